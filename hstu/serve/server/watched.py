"""Files that are read again when they change."""

import logging
from abc import ABC, abstractmethod
from pathlib import Path

from hstu.base.errors import DataError, printable

_log = logging.getLogger(__name__)


class WatchedFile(ABC):
    """A file that is read when it is created, and again when it changes. Raises DataError if it cannot be read."""

    def __init__(self, path: Path) -> None:
        self.path, self._problem = path, ""
        self._state: tuple[int, ...] | None = None
        self._reload()

    @property
    def refused(self) -> dict[str, str]:
        """The path → what is wrong with its newest content, if something is."""
        return {str(self.path): self._problem} if self._problem else {}

    def refresh(self) -> bool:
        """Read the file if it has changed. Returns whether it has. One with a mistake changes nothing."""
        try:
            if not self._reload():
                return False
        except DataError as error:  # once per change
            self._problem = printable(str(error))
            _log.warning("refused file=%s reason=%s", self.path, self._problem)
            return False
        self._problem = ""
        _log.info("reloaded file=%s", self.path)
        return True

    @abstractmethod
    def read(self) -> None:
        """Read the file. Raises DataError, and then changes nothing."""

    def _reload(self) -> bool:
        state = (found.st_size, found.st_mtime_ns) if self.path.exists() and (found := self.path.stat()) else ()
        if state == self._state:
            return False
        self._state = state
        self.read()
        return True
