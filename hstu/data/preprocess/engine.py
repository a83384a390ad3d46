"""DuckDB as preprocessing uses it: bounded memory, working files beside the store, errors that a user understands."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import duckdb
import numpy as np

from hstu.config.errors import ConfigError, DataError
from hstu.data.preprocess.tables import literal

_ENGINE_SHARE = 0.55
"""Of the memory limit for DuckDB's own accounting; the rest is Python, the vocabularies and what DuckDB overlooks."""
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}
_LEAST_MEMORY = 256 << 20
_DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}

Connection = duckdb.DuckDBPyConnection


def memory_bytes(text: str) -> int:
    """4GB, 512MiB, … in bytes. Raises ConfigError for what is no amount of memory, or too little to work with."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]I?|)B?\s*", text, flags=re.IGNORECASE)
    if match is None:
        raise ConfigError(f"--memory_limit {text!r}: expected an amount like 4GB or 512MiB")
    amount = int(float(match[1]) * _UNITS[match[2].upper()])
    if amount < _LEAST_MEMORY:
        raise ConfigError(f"--memory_limit {text!r}: at least 256MiB are needed")
    return amount


@contextmanager
def open_engine(scratch: Path, memory_limit: str) -> Iterator[Connection]:
    """A DuckDB in memory that spills to ``scratch``. Its errors become DataError."""
    spill = scratch / "spill"
    try:
        with duckdb.connect() as engine:
            engine.execute(f"SET memory_limit = '{int(memory_bytes(memory_limit) * _ENGINE_SHARE) >> 10} KiB'")
            engine.execute(f"SET temp_directory = {literal(str(spill))}")
            engine.execute(f"SET threads = {len(os.sched_getaffinity(0))}")
            # Asked for with query_progress(), printed by nobody but us.
            engine.execute("SET enable_progress_bar = true")
            engine.execute("SET enable_progress_bar_print = false")
            yield engine
    except duckdb.Error as error:
        raise _understood(error, scratch, memory_limit) from error
    finally:
        shutil.rmtree(spill, ignore_errors=True)


@contextmanager
def disk_errors(directory: Path) -> Iterator[None]:
    """A write that fails becomes a DataError that tells why."""
    try:
        yield
    except OSError as error:
        if error.errno in _DISK_FULL:
            raise _disk_full(directory, error.strerror) from error
        raise DataError(f"cannot write {error.filename or directory}: {error.strerror or error}") from error


def one(engine: Connection, query: str, parameters: Any = None) -> tuple[Any, ...]:
    """A query's only row."""
    (row,) = engine.execute(query, parameters).fetchall()
    return tuple(row)


def column(engine: Connection, query: str) -> np.ndarray:
    """A query's only column, without NULLs: int64 or str objects."""
    (values,) = engine.execute(query).fetchnumpy().values()
    return np.asarray(values)


def write_parquet(engine: Connection, select: str, target: Path) -> int:
    """A query's rows as a file, which appears whole; returns how many they are."""
    part = target.with_suffix(".part")
    (rows,) = one(engine, f"COPY ({select}) TO {literal(str(part))} (FORMAT parquet, COMPRESSION lz4_raw)")
    os.replace(part, target)
    return int(rows)


def _understood(error: duckdb.Error, scratch: Path, memory_limit: str) -> DataError:
    text = str(error).strip()
    if re.search(r"no space left|file too large|disk quota|max_temp_directory_size", text, flags=re.IGNORECASE):
        return _disk_full(scratch.parent, "no space left for working files")
    if isinstance(error, duckdb.OutOfMemoryException):
        return DataError(f"preprocessing needs more memory than --memory_limit {memory_limit}; give it more")
    return DataError(f"cannot preprocess: {text.splitlines()[0]}")


def _disk_full(directory: Path, what: str | None) -> DataError:
    place = directory if directory.exists() else directory.parent
    return DataError(f"cannot write to {place}: {what}; free some space, or choose another --output")
