"""Atomic writes that survive power failures, directory locks, and the journal of a long job."""

import ctypes
import errno
import hashlib
import itertools
import json
import logging
import os
import secrets
import shutil
import socket
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from hstu.base.errors import ConfigError

_HERE, _EXCHANGE = -100, 2
"""AT_FDCWD and RENAME_EXCHANGE of Linux."""
WRITING = ".writing_"
"""Prefix of the names of incomplete files and directories."""


def aside_path(target: Path) -> Path:
    """The path under which ``target`` is written until it is complete."""
    return target.with_name(f"{WRITING}{target.name}")


@contextmanager
def written_aside(target: Path, shared: bool = False) -> Iterator[Path]:
    """Yield a temporary path for the block to write a file or a directory to, then rename it to ``target``.

    On an error, ``target`` stays unchanged and the temporary path is removed. A directory is replaced only if it is
    empty. ``shared``: several processes may write ``target`` at the same time; the last one wins.
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
    """Write a UTF-8 text file atomically, see ``written_aside``."""
    with written_aside(target, shared) as aside:
        aside.write_text(text, encoding="utf-8")


def put_in_place(written: Path, target: Path) -> None:
    """Rename ``written`` to ``target``, after a sync of the file and before a sync of the directory."""
    sync_to_disk(written)
    os.replace(written, target)
    sync_to_disk(target.parent)


def unused(directory: Path, pattern: str, first: int = 1) -> Path:
    """Insert ``first``, ``first`` + 1, … for ``{}``; return the first path that does not exist."""
    paths = (directory / pattern.format(number) for number in itertools.count(first))
    return next(path for path in paths if not path.exists())


def exchange(first: Path, second: Path) -> bool:
    """Swap two directories of one file system atomically. Returns False where the system cannot, such as on NFS."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    if rename is None or rename(_HERE, os.fsencode(first), _HERE, os.fsencode(second), _EXCHANGE):
        return False
    sync_to_disk(first.parent)
    return True


def sync_to_disk(path: Path) -> None:
    """Call fsync on a file or a directory. For a directory, this stores its file names."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_tree(directory: Path) -> None:
    """Call fsync on a directory and everything below it."""
    for path in (*directory.rglob("*"), directory):
        sync_to_disk(path)


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest_of(files: Iterable[Path], *more: str) -> str:
    """Hexadecimal SHA-256 of the names and contents of files, in the order of their names, and of further texts."""
    parts = [name for path in sorted(files) for name in (path.name.encode(), path.read_bytes())]
    return hashlib.sha256(b"\0".join([*parts, *(text.encode() for text in more)])).hexdigest()


def remove(path: Path) -> None:
    """Remove a file, a link or a whole directory, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def cache_directory() -> Path:
    """The user's cache directory for hstu, which is created. Raises OSError if there is none.

    Files in it are executed. Where others can write to ``hstu``, as in a shared XDG_CACHE_HOME, it is
    ``hstu-<user id>``.
    """
    try:
        root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except RuntimeError as error:
        raise OSError("the user has no home directory; set HOME or XDG_CACHE_HOME") from error
    for directory in (Path(root) / "hstu", Path(root) / f"hstu-{os.geteuid()}"):
        directory.mkdir(mode=0o755, parents=True, exist_ok=True)
        if only_own(directory):
            return directory
    raise OSError(f"other users can write to {directory}; set XDG_CACHE_HOME to a directory of your own")


def only_own(path: Path) -> bool:
    """Whether a file or directory exists and no other user but root can have written it."""
    status = path.stat() if path.exists() else None
    return status is not None and status.st_uid in (0, os.geteuid()) and not status.st_mode & 0o022


log = logging.getLogger(__name__)

LOCK_FILE = ".lock"
# Raised by file systems without locks, such as some network file systems.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


class DirectoryLock:
    """An exclusive lock on a directory, held until ``release`` or the end of this process, even by a kill.

    The lock file names the host and process that hold it; a file left by a killed process locks nothing. ``option``
    names the directory in errors. Raises ConfigError if another process has the lock, or OSError if the directory
    cannot be written.
    """

    def __init__(self, directory: Path, option: str) -> None:
        self._path = directory / LOCK_FILE
        self._process = os.getpid()
        self._lock = FileLock(self._path, thread_local=False, fallback_to_soft=False, on_acquired=_write_holder)
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            holder = self._path.read_bytes()[:200].decode(errors="replace").strip() or "another process"
            raise ConfigError(
                f"{option}: the directory '{directory}' is in use by a run that has not ended ({holder}). Nothing "
                "was changed. Wait for that run, end it, or give another directory."
            ) from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            log.warning("the file system of %s has no locks: make sure that only this run writes there", directory)

    def release(self) -> None:
        """Release the lock. Repeated calls and calls in a forked child do nothing."""
        if self._process == os.getpid() and self._lock.is_locked:
            with suppress(OSError):  # the disk may have become read-only: releasing is what counts
                self._path.unlink()
            self._lock.release()


def _write_holder(handle: int) -> None:
    begun = time.strftime("%Y-%m-%d %H:%M:%S")
    os.ftruncate(handle, 0)
    os.write(handle, f"host {socket.gethostname()}, process {os.getpid()}, since {begun}\n".encode())


class Journal(dict[str, Any]):
    """Finished stage of a long job → its result, in a JSON file that each commit replaces atomically.

    ``key`` identifies all inputs of the stages. A journal with another key is ignored.
    """

    def __init__(self, file: Path, key: str | None) -> None:
        super().__init__()
        self.file, self.key = file, key

    def resume(self) -> bool:
        """Load the stages of an interrupted job with the same key. Returns False if there is none."""
        try:
            stored = json.loads(self.file.read_text(encoding="utf-8"))
            if self.key is None or stored["key"] != self.key:
                return False
            self.update(stored["stages"])
        except (OSError, ValueError, TypeError, KeyError):
            return False
        return True

    def commit(self, stage: str, result: Any = None) -> None:
        """Record a stage as done. ``result`` must be JSON; the stage's files must already be on the disk."""
        self[stage] = result
        replace_text(self.file, json.dumps({"key": self.key, "stages": self}))
