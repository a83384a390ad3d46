"""The directory of a run's checkpoints: names, manifests, links, commits and deletion.

Renaming creates and removes ``iteration_<n>``, so a directory of that name is always complete. ``latest`` and ``best``
are symbolic links that are replaced atomically. Each checkpoint has a manifest with the size and checksum of every
file, because torch.distributed.checkpoint loads flipped bytes without an error.
"""

import fnmatch
import hashlib
import json
import logging
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint.api import CheckpointException

from hstu.base.errors import DataError, UserError
from hstu.base.files import WRITING, aside_path, put_in_place, remove, sha256, sync_to_disk, unused
from hstu.parallel.collectives import on_all_ranks
from hstu.parallel.mesh import Mesh

log = logging.getLogger(__name__)

T = TypeVar("T")

MANIFEST = "manifest.json"
FORMAT_VERSION = 2
LATEST, BEST = "latest", "best"
_NAME = re.compile(r"iteration_(\d+)")
_DELETING, _SET_ASIDE = ".deleting_", "set_aside_"
_VISIBLE_S = 10.0
# Files that differ between two saves of one state: .metadata identifies the save, the others the run and its start.
_NOT_PART_OF_STATE = ("tensors/.metadata", "operative.gin", "run.json")

Files = dict[str, dict[str, Any]]
"""Path relative to the checkpoint → {"bytes", "sha256"}."""


class DamagedCheckpoint(DataError):
    """Files of a checkpoint are missing, truncated, changed or unreadable. The message lists them."""


class CheckpointFailure(UserError):
    """The file system refused an operation on some rank (disk full, no permission). Raised on every rank."""


def collective_io(
    function: Callable[[], T], mesh: Mesh, call: Callable[[Callable[[], T], ProcessGroup], T] = on_all_ranks
) -> T:
    """``call`` the function: ``on_all_ranks`` or ``on_rank_0``. Raises CheckpointFailure if the file system refuses."""
    mesh.heartbeat.mark()

    def checked() -> T:
        try:
            return function()
        except OSError as error:
            raise CheckpointFailure(f"checkpointing failed on rank {mesh.rank}: {error}") from error
        except CheckpointException as error:  # a BaseException that torch raises on all ranks with all failures
            for rank, (cause, _) in error.failures.items():
                if isinstance(cause, OSError):
                    raise CheckpointFailure(f"checkpointing failed on rank {rank}: {cause}") from cause
            raise RuntimeError(f"checkpointing failed on rank {next(iter(error.failures))}: {error}") from error

    return call(checked, mesh.world_group)


def torch_save(value: Any, path: Path) -> None:
    """Call torch.save. Raises OSError if the file system refuses."""
    with writing_errors(), path.open("wb") as file:
        torch.save(value, file)


def torch_load(path: Path, *, mmap: bool = False) -> Any:
    """Load only tensors, numbers and their containers with torch.load. Raises DamagedCheckpoint for anything else."""
    try:
        return torch.load(path, mmap=mmap, weights_only=True, map_location="cpu")
    except OSError:
        raise
    except Exception as error:  # of many types
        reason = str(error).strip().partition("\n")[0]
        raise DamagedCheckpoint(f"{path} is damaged ({reason}). Load another checkpoint.") from None


@contextmanager
def writing_errors() -> Iterator[None]:
    """Raise the OSError behind a RuntimeError of torch.save, whose own text is only "unexpected pos 704 vs 598"."""
    try:
        yield
    except RuntimeError as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, OSError):
            cause = cause.__context__
        raise cause or error from None


def describe_files(root: Path, files: Iterable[Path]) -> Files:
    """Flush the files to disk and return their sizes and checksums."""
    described = {}
    for path in files:
        sync_to_disk(path)
        described[path.relative_to(root).as_posix()] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
    return described


def becomes_visible(path: Path, size: int | None = None) -> bool:
    """Whether this host sees a path, of ``size`` bytes, within 10 s: network file systems show files with a delay."""
    deadline = time.monotonic() + _VISIBLE_S
    while not (os.path.exists(path) and size in (None, path.stat().st_size)) and time.monotonic() < deadline:
        time.sleep(0.2)
    return time.monotonic() < deadline


def write_manifest(root: Path, files: Files) -> None:
    """Write the manifest, which must be the last file of a checkpoint."""
    path = root / MANIFEST
    path.write_text(_manifest_text(files), encoding="utf-8")
    sync_to_disk(path)
    sync_to_disk(root)


def read_manifest(root: Path) -> Files:
    """Return the files that a checkpoint lists. Raises DamagedCheckpoint, or DataError if the version is too new."""
    path = root / MANIFEST
    try:
        text = path.read_text(encoding="utf-8")
        manifest = json.loads(text)
        version = manifest["version"]
        if type(version) is not int or version < FORMAT_VERSION:
            raise ValueError(f"its version is {version!r}")
        if version > FORMAT_VERSION:
            raise DataError(
                f"{root} was written by a newer version of this program: its format version is {version}, and this "
                f"program reads versions up to {FORMAT_VERSION}. Update the program."
            )
        files = manifest["files"]
        if text != _manifest_text(files):
            raise ValueError("its content has changed since it was written")
        for name, entry in files.items():
            if Path(name).is_absolute() or ".." in Path(name).parts:
                raise ValueError(f"it lists {name!r}, which is not in the checkpoint")
            if type(entry["bytes"]) is not int or type(entry["sha256"]) is not str:
                raise ValueError(f"its entry of {name!r} is no size and checksum")
    except FileNotFoundError:
        raise DamagedCheckpoint(
            f"{root} is not a complete checkpoint: it has no {MANIFEST}. Load another checkpoint."
        ) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DamagedCheckpoint(f"{path} is damaged ({error}). Load another checkpoint.") from None
    return dict(files)


def listed_files(root: Path, pattern: str) -> list[Path]:
    """Return the files in a checkpoint's manifest that match a pattern."""
    return [root / name for name in read_manifest(root) if fnmatch.fnmatchcase(name, pattern)]


def verified_file(root: Path, name: str) -> Path:
    """Compare a file with the manifest and return its path. Raises DamagedCheckpoint."""
    entry = read_manifest(root).get(name)
    problem = f"{root} has no {name} in its {MANIFEST}" if entry is None else _file_problem(root / name, entry)
    if problem:
        raise DamagedCheckpoint(f"{problem}. Load another checkpoint.")
    return root / name


def _manifest_text(files: Files) -> str:
    """Return a deterministic text with a checksum, which reveals any changed byte of a manifest."""
    files = dict(sorted(files.items()))
    checksum = hashlib.sha256(json.dumps(files).encode()).hexdigest()
    return json.dumps({"version": FORMAT_VERSION, "sha256": checksum, "files": files}, indent=1)


def file_problems(root: Path, files: Files) -> list[str]:
    """Return one line for each file that is missing or differs from the manifest."""
    return [problem for name, expected in files.items() if (problem := _file_problem(root / name, expected))]


def check_files(root: Path, action: str) -> Files:
    """Compare all files with the manifest and return them. Raises DamagedCheckpoint; ``action`` begins its message."""
    files = read_manifest(root)
    if problems := file_problems(root, files):
        raise DamagedCheckpoint("\n  ".join([f"{action}:", *problems]))
    return files


def _file_problem(path: Path, expected: dict[str, Any]) -> str | None:
    if not path.is_file():
        return f"{path} is missing"
    try:
        size, found = path.stat().st_size, sha256(path)
    except OSError as error:
        return f"{path} cannot be read: {error.strerror or error}"
    if size != expected["bytes"]:
        return f"{path} has {size} bytes instead of {expected['bytes']}"
    return None if found == expected["sha256"] else f"{path} is damaged: its sha256 is not the one in {MANIFEST}"


def checkpoint_path(directory: Path, iteration: int) -> Path:
    """Return the path of the checkpoint of an iteration."""
    return directory / f"iteration_{iteration:08d}"


def iteration_of(path: Path) -> int:
    """Return the iteration in the name of a checkpoint."""
    return int(path.name.removeprefix("iteration_"))


def complete_checkpoints(directory: Path) -> list[Path]:
    """Return all checkpoints, highest iteration first."""
    named = (path for path in directory.glob("iteration_*") if _NAME.fullmatch(path.name))
    return sorted((path for path in named if (path / MANIFEST).is_file()), key=iteration_of, reverse=True)


def restore_candidates(directory: Path) -> list[Path]:
    """Return all checkpoints: the last committed one, earlier ones, then later ones, left by a run that went back."""
    paths, latest = complete_checkpoints(directory), link_target(directory, LATEST)
    if latest not in paths:
        return paths
    return sorted(paths, key=lambda path: iteration_of(path) > iteration_of(latest))


def link_target(directory: Path, name: str) -> Path | None:
    """Return the checkpoint that the link ``latest`` or ``best`` points to, or None."""
    link = directory / name
    return directory / link.readlink() if link.is_symlink() else None


def set_link(directory: Path, name: str, target: Path) -> None:
    """Point ``latest`` or ``best`` to a checkpoint, and flush the link to disk."""
    replacement = directory / f"{WRITING}{name}"
    replacement.unlink(missing_ok=True)
    replacement.symlink_to(target.name)
    replacement.replace(directory / name)
    sync_to_disk(directory)


def make(directory: Path) -> bool:
    """Create the directory of a run's checkpoints and flush it to disk. Returns False if it exists."""
    if directory.is_dir():
        return False
    directory.mkdir(parents=True)
    sync_to_disk(directory.parent)
    return True


def begin(final: Path) -> Path:
    """Create and return the empty temporary directory for writing the checkpoint ``final``."""
    make(final.parent)
    remove_leftovers(final.parent)
    temporary = aside_path(final)
    temporary.mkdir()
    return temporary


def commit(final: Path) -> None:
    """Rename the temporary directory to ``final``. An existing ``final`` with another state is renamed and kept."""
    temporary = aside_path(final)
    if final.exists():
        if _holds_state_of(temporary, final):  # a resumed run saves an iteration again
            remove(temporary)
            return
        aside = unused(final.parent, f"{_SET_ASIDE}{final.name}_{{}}")
        log.warning("%s is damaged or holds another state; it is kept as %s", final, final.rename(aside).name)
    put_in_place(temporary, final)


def _holds_state_of(new: Path, old: Path) -> bool:
    """Return whether ``old`` is intact and has the same files as ``new``, except for files that identify a run."""
    try:
        old_files = check_files(old, "it is damaged")
    except DataError:
        return False
    new_files = read_manifest(new)
    names = {*old_files, *new_files}.difference(_NOT_PART_OF_STATE)
    return all(old_files.get(name) == new_files.get(name) for name in names)


def delete_older(directory: Path, iteration: int, keep: int) -> None:
    """Delete checkpoints up to ``iteration`` except the last ``keep``, the latest and the best. Failures only warn."""
    old = [path for path in complete_checkpoints(directory) if iteration_of(path) <= iteration][keep:]
    linked = (link_target(directory, LATEST), link_target(directory, BEST))
    for path in old:
        if path not in linked:
            try:
                path.rename(directory / f"{_DELETING}{path.name}")  # a partly deleted directory never has its name
            except OSError as error:
                log.warning("cannot delete the older checkpoint %s: %s", path, error)
    remove_leftovers(directory)


def remove_leftovers(directory: Path) -> None:
    """Remove leftovers of interrupted saves and deletions."""
    for path in (*directory.glob(f"{WRITING}*"), *directory.glob(f"{_DELETING}*")):
        with suppress(OSError):
            remove(path)
