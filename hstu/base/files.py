"""Files and directories: written aside and put in place, locked, and the journal of a long job.

What has its name is whole and on the disk, also after a power failure.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import secrets
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from hstu.base.errors import ConfigError

WRITING = ".writing_"
"""Prefix of the names of what is not complete yet."""


def aside_path(target: Path) -> Path:
    """The path under which ``target`` is written until it is complete."""
    return target.with_name(f"{WRITING}{target.name}")


@contextmanager
def written_aside(target: Path, shared: bool = False) -> Iterator[Path]:
    """Give the path at which the block writes a file or a directory, then put that in place of ``target``.

    If the block or the disk fails, ``target`` is as before and what was written is removed. A directory is replaced
    only if it is empty. ``shared``: other processes may write the same target at the same time; the last one wins.
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


log = logging.getLogger(__name__)

LOCK_FILE = ".lock"
# What file systems that have no locks raise, such as some network file systems.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


class DirectoryInUse(ConfigError):
    """Another process holds the lock of a directory."""


class DirectoryLock:
    """An exclusive lock on a directory, held until ``release`` or the end of this process, however it ends.

    Its file says which host and process hold it. A file that a killed process has left is no lock. ``option`` names the
    directory in the error. Raises DirectoryInUse, or OSError if the directory cannot be written.
    """

    def __init__(self, directory: Path, option: str) -> None:
        self._path = directory / LOCK_FILE
        self._process = os.getpid()
        self._lock = FileLock(self._path, thread_local=False, fallback_to_soft=False, on_acquired=_write_holder)
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            holder = self._path.read_bytes()[:200].decode(errors="replace").strip() or "another process"
            raise DirectoryInUse(
                f"{option}: the directory '{directory}' is in use by a run that has not ended ({holder}). Nothing "
                "was changed. Wait for that run, end it, or give another directory."
            ) from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            log.warning("the file system of %s has no locks: make sure that only this run writes there", directory)

    def release(self) -> None:
        """Remove the lock. May be called twice. A forked child does not hold the lock of its parent."""
        if self._process == os.getpid() and self._lock.is_locked:
            with contextlib.suppress(OSError):  # the disk may have become read-only: releasing is what counts
                self._path.unlink()
            self._lock.release()


def _write_holder(handle: int) -> None:
    begun = time.strftime("%Y-%m-%d %H:%M:%S")
    os.ftruncate(handle, 0)
    os.write(handle, f"host {socket.gethostname()}, process {os.getpid()}, since {begun}\n".encode())


class Journal:
    """The finished stages of a long job and the result of each, in a file that is replaced atomically at every commit.

    ``key`` identifies everything that the stages depend on. A journal with another key is ignored.
    """

    def __init__(self, file: Path, key: str | None) -> None:
        self.file = file
        self.key = key
        self.stages: dict[str, Any] = {}

    def resume(self) -> bool:
        """Takes over the stages of an interrupted job with the same key. False where there is none."""
        try:
            stored = json.loads(self.file.read_text(encoding="utf-8"))
            if self.key is None or stored["key"] != self.key:
                return False
            self.stages = dict(stored["stages"])
        except (OSError, ValueError, TypeError, KeyError):
            return False
        return True

    def __contains__(self, stage: str) -> bool:
        return stage in self.stages

    def __getitem__(self, stage: str) -> Any:
        return self.stages[stage]

    def commit(self, stage: str, result: Any = None) -> None:
        """Records a stage as done. ``result`` must be JSON; files of the stage must already be on the disk."""
        self.stages[stage] = result
        replace_text(self.file, json.dumps({"key": self.key, "stages": self.stages}))
