"""Where the parts of a stream come from."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import fsspec
from fsspec.implementations.local import LocalFileSystem

from hstu.base.errors import DataError
from hstu.base.files import written_aside

_HIDDEN = (".", "_")
"""Names that begin so are no parts: files that are being written, and marks of other programs."""


class Source(ABC):
    """Parts with names, in an order. What ``taken`` has, the names of the parts so far, decides what comes next."""

    @abstractmethod
    def waiting(self, taken: Sequence[str]) -> list[str]:
        """Names of the complete parts that are not in ``taken``, the next one first."""

    @abstractmethod
    def fetch(self, name: str, taken: Sequence[str], folder: Path) -> list[Path]:
        """The local files of a part, which must not change any more. What is fetched or made lies in ``folder``, where
        it is there already if an earlier call was not killed. Raises DataError if the part is empty or gone."""


class Directory(Source):
    """A directory in which each entry is a part: a file, or a directory of files. Parts come in the order of names.

    A part must appear at once, by a rename. One with an earlier name than others that are taken is taken, too: its
    events are late. ``url``: a local path, or any URL of fsspec, whose files are copied.
    """

    def __init__(self, url: str) -> None:
        self._files, root = fsspec.core.url_to_fs(url)
        self._root, self._url, self._is_local = PurePosixPath(root), url, isinstance(self._files, LocalFileSystem)
        if not self._files.isdir(root):
            raise DataError(f"--source {url}: there is no such directory; each entry of it is to be a part of the data")

    def waiting(self, taken: Sequence[str]) -> list[str]:
        """See Source."""
        self._files.invalidate_cache()
        names = {PurePosixPath(path).name for path in self._files.ls(str(self._root), detail=False)}
        return sorted(name for name in names - set(taken) if not name.startswith(_HIDDEN))

    def fetch(self, name: str, taken: Sequence[str], folder: Path) -> list[Path]:
        """See Source. Local files are used where they are."""
        part = self._root / name
        found = sorted(PurePosixPath(path) for path in self._files.find(str(part)))
        files = [path for path in found if not any(each.startswith(_HIDDEN) for each in path.relative_to(part).parts)]
        if not files:
            raise DataError(f"--source {self._url}: {name} has no files")
        return [Path(path) if self._is_local else self._copied(path, part, folder) for path in files]

    def _copied(self, path: PurePosixPath, part: PurePosixPath, folder: Path) -> Path:
        target = folder / (path.name if path == part else str(path.relative_to(part)))
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            with written_aside(target) as aside:
                self._files.get_file(str(path), str(aside))
        return target
