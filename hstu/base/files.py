"""Files and directories that are written aside and put in place, so that a reader or a kill finds no half of one.

What has its name is whole and on the disk, also after a power failure.
"""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

WRITING = ".writing_"
"""Prefix of the names of what is not complete yet."""


def aside_path(target: Path) -> Path:
    """The path under which ``target`` is written until it is complete."""
    return target.with_name(f"{WRITING}{target.name}")


@contextmanager
def written_aside(target: Path, shared: bool = False) -> Iterator[Path]:
    """Give the path at which the block writes a file or a directory, then put that in place of ``target``.

    If the block or the disk fails, ``target`` is as before and what was written is removed.

    Args:
        target: its directory exists. A file is replaced; a directory is replaced only if it is empty.
        shared: other processes may write the same target at the same time. The last one wins.
    """
    aside = aside_path(target.with_name(f"{target.name}.{secrets.token_hex(8)}") if shared else target)
    remove(aside)
    try:
        yield aside
        if aside.is_dir():
            sync_tree(aside)
        put_in_place(aside, target)
    except BaseException:
        with suppress(OSError):  # the first error is the one to report
            remove(aside)
        raise


def replace_text(target: Path, text: str, shared: bool = False) -> None:
    """Write a file of text in UTF-8, see ``written_aside``."""
    with written_aside(target, shared) as aside:
        aside.write_text(text, encoding="utf-8")


def put_in_place(written: Path, target: Path) -> None:
    """Rename what was written under another path. The file, and the names in both directories, are then on the disk."""
    sync_to_disk(written)
    os.replace(written, target)
    sync_to_disk(target.parent)


def sync_to_disk(path: Path) -> None:
    """Call fsync on a file, or on the list of names in a directory."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_tree(directory: Path) -> None:
    """Call fsync on a directory and on all that is below it."""
    for path in (*directory.rglob("*"), directory):
        sync_to_disk(path)


def remove(path: Path) -> None:
    """Remove a file, a link or a directory with all that is in it. Nothing needs to be there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
