"""The Parquet files of a lake in a local directory or at a URL, of which only the bytes that are needed are read."""

from __future__ import annotations

import os
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

from fsspec.spec import AbstractBufferedFile

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


class _UrlFile(AbstractBufferedFile):
    """A file at a URL. Each read is one request for these bytes, which is repeated after failures."""

    def __init__(self, url: str, size: int) -> None:
        super().__init__(None, url, cache_type="none", size=size)

    def _fetch_range(self, begin: int, end: int) -> bytes:
        end = min(end, self.size)

        def once(files: Any, path: str) -> bytes:
            content: bytes = files.cat_file(path, start=begin, end=end)
            if len(content) != end - begin:
                raise OSError(f"{len(content)} bytes came instead of {end - begin}")
            return content

        return bytes(remote.retried(self.path, once))
