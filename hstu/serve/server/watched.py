"""Files that are read again when they change."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Generic, TypeVar

from hstu.base.errors import DataError, printable

Content = TypeVar("Content")
_log = logging.getLogger(__name__)


class WatchedFile(Generic[Content]):
    """What ``read`` makes of a file. Raises DataError if it cannot be read at first."""

    def __init__(self, path: Path, read: Callable[[Path], Content]) -> None:
        self._path, self._read, self._state = path, read, _state(path)
        self.content = read(path)
        self.refused: dict[str, str] = {}
        """The path → what is wrong with the newest content, if something is."""

    def refresh(self) -> bool:
        """Read the file if it has changed. Returns whether there is new content: a mistake changes nothing."""
        if (state := _state(self._path)) == self._state:
            return False
        self._state = state
        try:
            self.content, self.refused = self._read(self._path), {}
        except DataError as error:
            self.refused = {str(self._path): printable(str(error))}
            _log.warning("refused file=%s reason=%s", self._path, error)
            return False
        _log.info("reloaded file=%s", self._path)
        return True


def _state(path: Path) -> tuple[int, ...]:
    return (found.st_size, found.st_mtime_ns) if path.exists() and (found := path.stat()) else ()
