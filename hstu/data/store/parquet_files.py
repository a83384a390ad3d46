"""The Parquet files of a lake in a local directory or at a URL, of which only the bytes that are needed are read."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

from hstu.base import remote


def files_below(place: str) -> dict[str, tuple[int, int]]:
    """Path or URL of each file → (bytes, time of its last change), of a directory or of one file as it is now.

    Raises DataError where nothing is at a URL.
    """
    if remote.url_of(place) is not None:
        found = remote.retried(place, remote.sizes_and_times).items()
        return {f"{place}/{name}".rstrip("/"): (entry["bytes"], entry["modified"]) for name, entry in found}
    walked = os.walk(place, followlinks=True)
    paths = (
        [place] if os.path.isfile(place) else [os.path.join(each, name) for each, _, names in walked for name in names]
    )
    return {path: (status.st_size, status.st_mtime_ns) for path in paths for status in [os.stat(path)]}


def open_dataset(sizes: Mapping[str, int]) -> Any:
    """pyarrow.dataset.Dataset of these files (path or URL → bytes) in order. Directories ``day=1`` are columns."""
    from pyarrow import dataset, fs

    files = fs.LocalFileSystem()
    if remote.url_of(next(iter(sizes))) is not None:  # It keeps no connection, which a forked process would share.
        opened = SimpleNamespace(
            protocol="url", isfile=sizes.__contains__, open=lambda url, mode: _UrlFile(url, sizes[url])
        )
        files = fs.PyFileSystem(fs.FSSpecHandler(opened))
    return dataset.dataset([*sizes], format="parquet", filesystem=files, partitioning="hive")


class _UrlFile(io.RawIOBase):
    """A file at a URL. Each read is one request for these bytes, which is repeated after failures."""

    def __init__(self, url: str, size: int) -> None:
        super().__init__()
        self._url, self._size, self._at = url, size, 0

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        return self._at

    def read(self, size: int | None = -1) -> bytes:
        begin, length = self._at, self._size - self._at
        length = length if size is None or size < 0 else min(size, length)
        if length <= 0:
            return b""

        def once(files: Any, path: str) -> bytes:
            content: bytes = files.cat_file(path, start=begin, end=begin + length)
            if len(content) != length:
                raise OSError(f"{len(content)} bytes came instead of {length}")
            return content

        content: bytes = remote.retried(self._url, once)
        self._at = begin + length
        return content
