"""The directory that a run's checkpoints share: their names, what points at them, what is deleted and when.

``iteration_<n>`` comes into being by a rename of something complete and ends by a rename, too, so whatever has that
name is whole. ``latest`` and ``best`` are symbolic links, replaced atomically.
"""

from __future__ import annotations

import logging
import re
import shutil
from pathlib import Path

from hstu.checkpoint.manifest import MANIFEST, DamagedCheckpoint, file_problems, read_manifest, sync_to_disk

log = logging.getLogger(__name__)

LATEST, BEST = "latest", "best"
_NAME = re.compile(r"iteration_(\d+)")
_WRITING, _DELETING, _SET_ASIDE = ".writing_", ".deleting_", "set_aside_"
# Files that differ between two saves of the same state: one names the save, the other where the run began.
_INCIDENTAL = ("tensors/.metadata", "operative.gin")


def place_of(directory: Path, iteration: int) -> Path:
    """Where the checkpoint of an iteration is."""
    return directory / f"iteration_{iteration:08d}"


def iteration_of(path: Path) -> int:
    """Iteration of a checkpoint, by its name."""
    return int(path.name.removeprefix("iteration_"))


def complete(directory: Path) -> list[Path]:
    """All checkpoints, those of the highest iterations first."""
    named = (path for path in directory.glob("iteration_*") if _NAME.fullmatch(path.name))
    return sorted((path for path in named if (path / MANIFEST).is_file()), key=iteration_of, reverse=True)


def by_preference(directory: Path) -> list[Path]:
    """All checkpoints, the one committed last first, then those before it, then any of later iterations.

    There are later ones where a run went back to an earlier checkpoint, or was killed on the point of committing.
    """
    paths, latest = complete(directory), pointed_at(directory, LATEST)
    if latest not in paths:
        return paths
    later = [path for path in paths if iteration_of(path) > iteration_of(latest)]
    return [path for path in paths if path not in later] + later


def pointed_at(directory: Path, pointer: str) -> Path | None:
    """The checkpoint that ``latest`` or ``best`` points at."""
    link = directory / pointer
    return directory / link.readlink() if link.is_symlink() else None


def point(directory: Path, pointer: str, path: Path) -> None:
    """Let ``latest`` or ``best`` point at a checkpoint; on the disk when this returns."""
    replacement = directory / f"{_WRITING}{pointer}"
    replacement.unlink(missing_ok=True)
    replacement.symlink_to(path.name)
    replacement.replace(directory / pointer)
    sync_to_disk(directory)


def begin(directory: Path, iteration: int) -> Path:
    """An empty directory to write a checkpoint in."""
    make(directory)
    remove_leftovers(directory)
    temporary = directory / f"{_WRITING}{place_of(directory, iteration).name}"
    temporary.mkdir()
    return temporary


def make(directory: Path) -> None:
    """Make the directory itself, on the disk when this returns."""
    if not directory.is_dir():
        directory.mkdir(parents=True)
        sync_to_disk(directory.parent)


def commit(temporary: Path, iteration: int) -> Path:
    """Give what ``begin`` made, now complete, its name. What has that name is kept: as it is, or under another one."""
    final = place_of(temporary.parent, iteration)
    if final.exists():
        difference = _difference(final, temporary)
        if difference is None:  # a resumed run has come to where it was before
            shutil.rmtree(temporary)
            return final
        log.warning("%s is there already, but %s; it is kept as %s", final, difference, _set_aside(final).name)
    temporary.rename(final)
    sync_to_disk(final.parent)
    return final


def _difference(old: Path, new: Path) -> str | None:
    """Why ``old`` cannot stand for ``new``; None where it holds the same and is whole."""
    try:
        old_files, new_files = read_manifest(old), read_manifest(new)
        problems = file_problems(old, old_files)
    except DamagedCheckpoint as error:
        return str(error)
    if problems:
        return problems[0]
    same = {name: entry for name, entry in old_files.items() if name not in _INCIDENTAL}
    return None if same == {n: e for n, e in new_files.items() if n not in _INCIDENTAL} else "it holds another state"


def _set_aside(path: Path) -> Path:
    count = 1
    while (aside := path.with_name(f"{_SET_ASIDE}{path.name}_{count}")).exists():
        count += 1
    return path.rename(aside)


def delete_older(directory: Path, iteration: int, keep: int) -> None:
    """Delete all checkpoints up to ``iteration``, which has been committed, but the last ``keep`` and the best.

    What the file system will not delete stays, with a warning: it is no reason to end a run.
    """
    old = [path for path in complete(directory) if iteration_of(path) <= iteration][keep:]
    kept = (pointed_at(directory, LATEST), pointed_at(directory, BEST))
    for path in old:
        if path not in kept:
            try:
                path.rename(directory / f"{_DELETING}{path.name}")  # at no moment half of it has its name
            except OSError as error:
                log.warning("cannot delete the older checkpoint %s: %s", path, error)
    remove_leftovers(directory)


def remove_leftovers(directory: Path) -> None:
    """Remove what a save or a deletion that was interrupted has left behind."""
    for prefix in (_WRITING, _DELETING):
        for path in directory.glob(f"{prefix}*"):
            if path.is_symlink():
                path.unlink()
            else:
                shutil.rmtree(path, ignore_errors=True)
