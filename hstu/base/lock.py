"""A lock on a directory: one process at a time may write there."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import socket
import time
from pathlib import Path

from filelock import FileLock, Timeout

from hstu.base.errors import ConfigError

log = logging.getLogger(__name__)

LOCK_FILE = ".lock"
# What file systems that have no locks raise, such as some network file systems.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


class DirectoryInUse(ConfigError):
    """Another process holds the lock of a directory."""


class DirectoryLock:
    """An exclusive lock on a directory, held until ``release`` or the end of this process, however it ends.

    The file ``.lock`` in the directory says which host and process hold it. A file that a killed process has left is no
    lock.
    """

    def __init__(self, directory: Path, option: str) -> None:
        """
        Args:
            directory: exists.
            option: the option that names the directory, for the error.

        Raises:
            DirectoryInUse: another process, or another lock of this process, holds the lock. Nothing has been changed.
            OSError: the directory cannot be written.
        """
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
