"""A lock on a directory: one process at a time may write there."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import socket
import time
from pathlib import Path

from hstu.base.errors import ConfigError

log = logging.getLogger(__name__)

LOCK_FILE = ".lock"
# What flock raises on file systems that have no locks, such as some network file systems.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


class DirectoryInUse(ConfigError):
    """Another process holds the lock of a directory."""


class DirectoryLock:
    """An exclusive lock (flock) on a directory, held until ``release`` or the end of this process, however it ends.

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
        self._handle: int | None = None
        self._process = os.getpid()
        while self._handle is None:
            handle = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                holder = os.read(handle, 200).decode(errors="replace").strip() or "another process"
                os.close(handle)
                if error.errno in _NO_LOCKS:
                    log.warning(
                        "the file system of %s has no locks: make sure that only this run writes there", directory
                    )
                    return
                if not isinstance(error, BlockingIOError):
                    raise
                raise DirectoryInUse(
                    f"{option}: the directory '{directory}' is in use by a run that has not ended ({holder}). Nothing "
                    "was changed. Wait for that run, end it, or give another directory."
                ) from None
            if _is_file(handle, self._path):
                self._handle = handle
            else:  # the previous holder has removed the file in the meantime
                os.close(handle)
        os.ftruncate(self._handle, 0)
        begun = time.strftime("%Y-%m-%d %H:%M:%S")
        os.write(self._handle, f"host {socket.gethostname()}, process {self._process}, since {begun}\n".encode())

    def release(self) -> None:
        """Remove the lock. May be called twice."""
        if self._handle is not None:
            if self._process == os.getpid():  # not in a forked child
                with contextlib.suppress(OSError):  # the disk may have become read-only: closing is what counts
                    self._path.unlink()
            os.close(self._handle)
            self._handle = None

    def __del__(self) -> None:
        self.release()


def _is_file(handle: int, path: Path) -> bool:
    """Return whether an open file is still the one at ``path``."""
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False
