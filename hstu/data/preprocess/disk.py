"""How much room preprocessing takes beside the store, asked before it begins."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import duckdb

from hstu.config.errors import DataError
from hstu.data.preprocess.tables import RawFile, literal, open_bytes

_SAMPLE_BYTES = 1 << 18
_STORE_BYTES = 16
"""An event in the store: item and action int32, timestamp int64."""
_WORKING_BYTES = 32
"""An event in working files: columnar and compressed, a bucket's spill, and its part of the vocabulary."""
_GZIP_RATIO = 5
_GIB = 1 << 30


def check(logs: Sequence[RawFile], output: Path, already: int = 0) -> None:
    """Raises DataError where less is free than is needed; ``already``: bytes an interrupted run has left."""
    needed = sum(estimated_rows(log) for log in logs) * (_STORE_BYTES + _WORKING_BYTES) - already
    place = output.absolute().parent
    free = shutil.disk_usage(place).free
    if needed > free:
        raise DataError(
            f"{place} has {free / _GIB:.1f} GiB free, and preprocessing needs about {needed / _GIB:.1f} GiB there; "
            "free some space, or choose another --output"
        )


def used_below(directory: Path) -> int:
    """Bytes of all files below a directory."""
    return sum(file.stat().st_size for file in directory.rglob("*") if file.is_file())


def estimated_rows(raw: RawFile) -> int:
    """Rows of a file: of text from its size and the length of its first lines."""
    if not raw.is_text:
        with duckdb.connect() as engine:
            row = engine.execute(
                f"SELECT sum(num_rows) FROM parquet_file_metadata({literal(str(raw.path))})"
            ).fetchone()
        return int(row[0]) if row and row[0] else 0
    with open_bytes(raw.path) as stream:
        sample = stream.read(_SAMPLE_BYTES)
    size = raw.path.stat().st_size * (_GZIP_RATIO if raw.path.suffix == ".gz" else 1)
    return int(size * max(sample.count(b"\n"), 1) / max(len(sample), 1))
