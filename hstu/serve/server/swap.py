"""Find exports, serve the newest, and replace it when a newer export appears."""

import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from hstu.base.errors import DataError, printable
from hstu.base.remote import local_export
from hstu.serve import runtime
from hstu.serve.runtime.files import DELTA, FACTS, MANIFEST, SERVING, digest_of

from .batching import ModelMetrics
from .model import ServedModel
from .rules import ItemFile

LATEST = "latest"
_log = logging.getLogger(__name__)


@dataclass(frozen=True, order=True)
class Found:
    """An export folder in its current state. A newer one is greater."""

    written_ns: int
    """Modification time of the manifest."""
    folder: Path
    state: tuple[tuple[str, int, int], ...]
    """(name, size, modification time in ns) of each file. It changes while the folder is being copied."""


def find_exports(root: Path) -> list[Found]:
    """The exports, newest first, of ``root``: an export, its folder "serving", a folder with a link "latest" to an
    export, or one with several exports. Hidden folders and those without a manifest are skipped as incomplete. Links
    are resolved to folders."""
    link = root / LATEST
    named = link if os.path.lexists(link) else root
    folders = [each for each in (named, named / SERVING) if (each / FACTS).is_file()][:1]
    if not folders and named is root and root.is_dir():
        folders = [path.parent for path in (*root.glob(f"[!.]*/{FACTS}"), *root.glob(f"[!.]*/{SERVING}/{FACTS}"))]
    return sorted(filter(None, (_look(folder.resolve()) for folder in folders)), reverse=True)


def _look(folder: Path) -> Found | None:
    try:
        files = {path.name: path.stat() for path in sorted(folder.iterdir())}
    except OSError:  # removed meanwhile
        return None
    state = tuple((name, stat.st_size, stat.st_mtime_ns) for name, stat in files.items())
    return Found(files[MANIFEST].st_mtime_ns, folder, state) if MANIFEST in files else None


Load = Callable[[Path, str, ServedModel | None], ServedModel]
"""(folder, version, current model) → model. Raises if the export cannot be served."""


def load(folder: Path, version: str, current: ServedModel | None, mapped: bool = False) -> ServedModel:
    """Load or map an export, and verify it. Shares what is equal with the current model, maybe the base of a delta."""
    model = runtime.load(folder, like=None if current is None else current.model, mapped=mapped)
    if model.whole_because is not None:
        _log.info("no keys and values are kept model=%s reason=%s", version, model.whole_because)
    if model.traced_because is not None:
        _log.info("the compiled program does not run model=%s reason=%s", version, model.traced_because)
    return ServedModel(model, version)


class LiveModel:
    """The current model of ``root`` (see ``find_exports``). Raises DataError if there is none, or no ``items``."""

    current: ServedModel

    def __init__(self, root: Path, metrics: ModelMetrics, load: Load = load, items: Path | None = None) -> None:
        self._root, self._load, self.metrics = root, load, metrics
        self._items = None if items is None else ItemFile(items)
        self._loaded: Found | None = None
        self._found: list[Found] = []
        self._bad: dict[Found, str] = {}  # never mutated, only replaced: other threads read it
        self.since = 0.0
        """Start time of the current model, in seconds since 1970."""
        if not self.refresh():
            reasons = "\n".join(f"{folder}: {reason}" for folder, reason in self.refused.items())
            remedy = "give the folder that hstu-export --program has written, or one with several of them"
            raise DataError(f"{root} has no export that can be served\n{reasons or remedy}")

    @property
    def refused(self) -> dict[str, str]:
        """Folder or item file → reason, for existing ones that cannot be loaded."""
        found = {str(found.folder): reason for found, reason in self._bad.items()}
        return found | (self._items.refused if self._items else {})

    def refresh(self) -> bool:
        """Load the newest export that works, if it is new. Returns whether it is. One thread at a time may call it."""
        found = find_exports(local_export(self._root))
        is_same, self._found = found == self._found, found  # the base of a delta may have come after it
        kept = [each for each in found if is_same or not (each.folder / DELTA).is_file()]
        self._bad = {each: reason for each, reason in self._bad.items() if each in kept}
        before = self._loaded
        for each in found:  # older than the current model only if that one's folder is gone
            if each not in (before, *self._bad):
                self._try(each)
            if self._loaded is not None and each.folder == self._loaded.folder:
                break
        if self._items is not None and self._loaded is not None and self._items.refresh():
            self.current.catalog = self._items.catalog(self.current.model)
        self.metrics.refused.set(len(self._bad))
        return self._loaded != before

    def _try(self, found: Found) -> None:
        """Serve this export. Its version in answers: folder name, "@", and the first 12 digits of its digest."""
        begun, current = time.monotonic(), None if self._loaded is None else self.current
        folder = found.folder.parent if found.folder.name == SERVING else found.folder
        try:
            version = f"{printable(folder.name, '')}@{digest_of(found.folder)[:12]}"
            model = self._load(found.folder, version, current)
            if current is not None and model.task != current.task:
                raise runtime.ServingError(f"it is a {model.task} model, and a {current.task} model is in use")
            if self._items is not None:
                model.catalog = self._items.catalog(model.model)
        except Exception as error:  # whatever fails, the current model keeps serving
            reason = printable(f"{type(error).__name__}: {error}".split("\n")[0])
            self._bad = {**self._bad, found: reason}
            _log.warning("refused export=%s reason=%s", found.folder, reason)
            return
        if current is not None:
            model.set_recent(current.recent)
            self.metrics.swaps.inc()
        self.current, self._loaded, self.since = model, found, time.time()
        _log.info("serving model=%s task=%s load=%.1fs", version, model.task, time.monotonic() - begun)
        self.metrics.model.clear()
        self.metrics.model.labels(version, model.task).set(1)
