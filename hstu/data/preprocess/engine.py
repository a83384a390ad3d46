"""DuckDB for preprocessing: memory and disk limits, working files, and errors for users."""

from __future__ import annotations

import errno
import os
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow

from hstu.base.errors import ConfigError, DataError
from hstu.base.files import written_aside
from hstu.data.datasets.raw import literal

ROWS_PER_CHUNK = 1 << 20
_ENGINE_FRACTION = 0.55
"""DuckDB's share of the memory limit. Python, vocabularies and memory that DuckDB does not count get the rest."""
_MIN_MEMORY = 256 << 20
_INTERRUPTED = "Query interrupted"
"""Text of the RuntimeError with which DuckDB replaces any exception of a signal handler during a query."""
_DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}

Connection = duckdb.DuckDBPyConnection


def memory_bytes(text: str) -> int:
    """Convert 4GB, 512MiB, … to bytes. Raises ConfigError for other text and for less than 256MiB."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(I?)B?\s*", text, flags=re.IGNORECASE)
    if match is None:
        raise ConfigError(f"--memory_limit {text!r}: expected an amount like 4GB or 512MiB")
    amount = int(float(match[1]) * (1024 if match[3] else 1000) ** " KMGT".index(match[2].upper() or " "))
    if amount < _MIN_MEMORY:
        raise ConfigError(f"--memory_limit {text!r}: at least 256MiB are needed")
    return amount


@contextmanager
def open_engine(scratch: Path, memory_limit: str) -> Iterator[Connection]:
    """An in-memory DuckDB that spills to ``scratch``. Its errors become DataError, interruptions KeyboardInterrupt."""
    spill = scratch / "spill"
    try:
        with duckdb.connect() as engine:
            engine.execute(f"SET memory_limit = '{int(memory_bytes(memory_limit) * _ENGINE_FRACTION) >> 10} KiB'")
            engine.execute(f"SET temp_directory = {literal(str(spill))}")
            engine.execute(f"SET threads = {len(os.sched_getaffinity(0))}")
            engine.execute("SET TimeZone = 'UTC'")  # else times without a zone are local times
            engine.execute(f"SET enable_progress_bar = {str(sys.stdout.isatty()).lower()}")
            yield engine
    except duckdb.InterruptException:
        raise KeyboardInterrupt from None
    except RuntimeError as error:
        if str(error) != _INTERRUPTED:
            raise
        raise KeyboardInterrupt from None
    except duckdb.Error as error:
        raise _data_error(error, scratch, memory_limit) from error
    finally:
        shutil.rmtree(spill, ignore_errors=True)


@contextmanager
def disk_errors(directory: Path) -> Iterator[None]:
    """Turn a failed write into a DataError with its reason."""
    try:
        yield
    except OSError as error:
        if error.errno in _DISK_FULL:
            raise _disk_full(directory, error.strerror) from error
        raise DataError(f"cannot write {error.filename or directory}: {error.strerror or error}") from error


def one(engine: Connection, query: str) -> tuple[Any, ...]:
    """The only row of a query."""
    (row,) = engine.execute(query).fetchall()
    return tuple(row)


def column(engine: Connection, query: str) -> np.ndarray:
    """The only column of a query, without NULLs: int64 or str objects."""
    (values,) = engine.execute(query).fetchnumpy().values()
    return np.asarray(values)


def utf8_column(engine: Connection, query: str) -> tuple[np.ndarray, np.ndarray]:
    """The only column of a query, strings without NULLs, as (int64 offsets [n + 1], UTF-8 bytes as uint8)."""
    lengths, texts = [np.zeros(1, dtype=np.int64)], [np.zeros(0, dtype=np.uint8)]
    for batch in engine.sql(query).to_arrow_reader(ROWS_PER_CHUNK):
        values = batch.column(0).cast(pyarrow.large_string())
        _, bounds, text = values.buffers()
        ends = np.frombuffer(bounds, dtype=np.int64)[values.offset : values.offset + len(values) + 1]
        lengths.append(np.diff(ends))
        if text is not None:
            texts.append(np.frombuffer(text, dtype=np.uint8)[ends[0] : ends[-1]])
    return np.cumsum(np.concatenate(lengths)), np.concatenate(texts)


def write_parquet(engine: Connection, select: str, target: Path) -> int:
    """Write the rows of a query to a file atomically. Returns their number."""
    with written_aside(target) as aside:
        (rows,) = one(engine, f"COPY ({select}) TO {literal(str(aside))} (FORMAT parquet, COMPRESSION lz4_raw)")
    return int(rows)


def _data_error(error: duckdb.Error, scratch: Path, memory_limit: str) -> DataError:
    text = str(error).strip()
    if re.search(r"no space left|file too large|disk quota|max_temp_directory_size", text, flags=re.IGNORECASE):
        return _disk_full(scratch.parent, "no space left for working files")
    if isinstance(error, duckdb.OutOfMemoryException):
        return DataError(f"preprocessing needs more memory than --memory_limit {memory_limit}; give it more")
    return DataError(f"cannot preprocess: {text.splitlines()[0]}")


def _disk_full(directory: Path, what: str | None) -> DataError:
    place = directory if directory.exists() else directory.parent
    return DataError(f"cannot write to {place}: {what}; free some space, or choose another --output")
