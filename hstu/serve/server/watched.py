"""Files that are read again when they change."""

import logging
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Generic, TypeVar

from hstu.base.errors import DataError, printable

Content = TypeVar("Content")
_log = logging.getLogger(__name__)


class WatchedFile(ABC, Generic[Content]):
    """A file with its ``content``. Raises DataError if it cannot be read at first."""

    def __init__(self, path: Path) -> None:
        self.path, self._state = path, _state(path)
        self.content = self.read()
        self.refused: dict[str, str] = {}
        """The path → what is wrong with the newest content, if something is."""

    @abstractmethod
    def read(self) -> Content:
        """Read the file. Raises DataError."""

    def refresh(self) -> bool:
        """Read the file if it has changed. Returns whether there is new content: a mistake changes nothing."""
        if (state := _state(self.path)) == self._state:
            return False
        self._state = state
        try:
            self.content, self.refused = self.read(), {}
        except DataError as error:
            self.refused = {str(self.path): printable(str(error))}
            _log.warning("refused file=%s reason=%s", self.path, error)
            return False
        _log.info("reloaded file=%s", self.path)
        return True


def _state(path: Path) -> tuple[int, ...]:
    return (found.st_size, found.st_mtime_ns) if path.exists() and (found := path.stat()) else ()
