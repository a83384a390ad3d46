"""What the stages of a build share: options, DuckDB within limits, working tables, finished stages, bad rows."""

from __future__ import annotations

import errno
import logging
import os
import re
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import duckdb
import numpy as np
import pyarrow

from hstu.base.errors import ConfigError, DataError
from hstu.base.files import sha256, written_aside
from hstu.data.datasets.own_columns import command_option
from hstu.data.datasets.raw import literal, one_file
from hstu.data.datasets.spec import RawTables, Schema
from hstu.data.store.sequence_store import SequenceStore
from hstu.data.store.writer import StoreWriter, mapped

_log = logging.getLogger(__name__)

T = TypeVar("T")
ROWS_PER_CHUNK = 1 << 20
_ENGINE_FRACTION, _DRIVER_FRACTION = 0.55, 0.1
"""DuckDB's share of the memory limit: alone, and in the driver of a Spark, where spark.py has further shares. Python,
vocabularies and memory that DuckDB does not count get the rest."""
_MIN_MEMORY = 256 << 20
_INTERRUPTED = "Query interrupted"
"""Text of the RuntimeError with which DuckDB replaces any exception of a signal handler during a query."""
_DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@dataclass(frozen=True, kw_only=True)
class BuildOptions:
    """Options of a build: those of scripts/preprocess_dataset.py for all data. ``command`` makes the store again."""

    name: str
    output: Path
    command: str
    force: bool = command_option("replace an existing store; else it is kept if it fits its raw files", False)
    memory_limit: str = command_option("of the process; beyond it, working files beside the store are used", "4GB")
    engine: str = command_option("what computes; the store is the same", "duckdb", choices=("duckdb", "spark"))
    spark_master: str | None = command_option("URL of Spark; without it the session of spark-submit, else local[*]")
    bad_row_policy: str = command_option(
        "raise: the first unusable row ends the run; skip: they are skipped and counted",
        "raise",
        choices=("raise", "skip"),
    )
    max_bad_rows: int = command_option("with skip, more bad rows than this end the run all the same", 1000)
    raw_ids: tuple[str, ...] = command_option("item, user or item,user: models get raw ids for dynamic tables", ())
    min_user_events: int = command_option("leave out users with fewer events", 1)
    min_item_events: int = command_option("leave out items with fewer events, until all left have enough", 1)
    shards: int = command_option("cut the store into so many parts, of which a rank opens those it needs", 1)
    all_items: bool = command_option("items of --items or --titles belong to the data even without events", False)
    running_statistics: bool = command_option("add statistics of what was known before each event", False)
    any_times: bool = command_option("take times of before 1990, of one day or like other kinds of dates", False)


@dataclass(frozen=True)
class Base:
    """The earlier store of a build that adds events to it or removes users from it."""

    store: SequenceStore
    files: tuple[Path, ...] = ()
    """All raw files of the result, in order."""
    digests: Mapping[Path, str] = field(default_factory=dict)
    """Earlier raw file → SHA-256."""
    forgotten: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    """Codes of the users who are removed."""
    events: dict[str, np.ndarray] = field(default_factory=dict)
    """"user", "item" → events of each of the base, of an item 1 or 0; -1 if it leaves; int32. A stage fills it."""
    codes: dict[str, np.ndarray] = field(default_factory=dict)
    """"user", "item" → the new code of each of the base, int32; -1 for those that do not stay. A stage fills it."""


class Engine:
    """Runs the SQL of the stages in DuckDB. spark.py has the same methods for a cluster.

    Queries are DuckDB's SELECT. Those that join, group, sort or number rows must also be SQL that sqlglot translates
    for Spark, so what is computed from the columns of one row belongs into a view before them."""

    rows_at_once: int | None = None
    """Most rows that may be sorted at once. None: as the memory limit allows."""

    def __init__(self, connection: duckdb.DuckDBPyConnection) -> None:
        self.connection = connection

    def sql(self, query: str) -> duckdb.DuckDBPyRelation:
        """The result of a query."""
        return self.connection.sql(query)

    def register(self, name: str, table: Any) -> None:
        """Name a table in memory."""
        self.connection.register(name, table)

    def write(self, query: str, target: Path) -> int:
        """Write the rows of a query to a working table atomically. Returns the number of rows."""
        return write_parquet(self.connection, query, target)

    def show(self, name: str, target: Path, number: str | None = None) -> None:
        """Name a working table. ``number``: its column of row numbers, from 0."""
        self.view(name, numbered_rows(target, number))

    def view(self, name: str, query: str) -> None:
        """Name a query, which runs again wherever it is used."""
        self.connection.execute(f"CREATE OR REPLACE VIEW {name} AS {query}")

    def each(self, function: Callable[..., T], arguments: Sequence[tuple[Any, ...]]) -> Iterator[T]:
        """The results of ``function(engine, *arguments)`` in order. An error of one is raised in its turn."""
        return (function(self, *given) for given in arguments)


@dataclass(frozen=True)
class Build:
    """One run of the stages. Each stage leaves its result in the journal, a working table, or a part of the store.

    A working table is a Parquet file in the writer's scratch directory, or a directory of such files that Spark wrote,
    with a view of the same name for queries:

        log_0, …                            rows of the raw files as read; ``source_row`` numbers them from 0
        context, titles, item_table         the other files as in RawTables, with ``source_row``
        typed                               all events and impressions as in RawTables, ordered by (part, source_row)
        events, candidates                  the stored events and impressions
        users, items, vocabulary_<feature>  id and its ``code``
    """

    raw: RawTables
    schema: Schema
    options: BuildOptions
    writer: StoreWriter
    engine: Engine
    base: Base | None = None
    skipped: Counter[str] = field(default_factory=Counter)
    """Reason → skipped rows, over all stages."""
    event_values: dict[str, str] = field(default_factory=dict)
    """e0, e1, … with a vocabulary → SQL of an event's value in it. A stage fills it."""

    def once(self, stage: str, make: Callable[[], T]) -> T:
        """Run a stage, or return its JSON result from an earlier, interrupted run."""
        journal = self.writer.journal
        if stage not in journal:
            journal.commit(stage, make())
        result: T = journal[stage]
        return result

    @property
    def earlier(self) -> Base:
        """The base of a build that has one."""
        assert self.base is not None
        return self.base

    def keeps(self, name: str) -> bool:
        """Whether the base has values of c0, i0, e0, … that no new table replaces."""
        replaced = {*self.schema.of_users(), *self.schema.of_items()}
        replaced -= {*self.raw.event_context, *self.raw.event_items, *self.raw.kept}
        return self.base is not None and name not in replaced

    def feature(self, name: str) -> str:
        """The feature that item, action, timestamp or e0, … stands for."""
        schema = self.schema
        roles = {"item": schema.item, "action": schema.action, "timestamp": schema.timestamp} | schema.of_events()
        return str(roles[name])

    def aside(self, name: str, dtype: np.dtype, length: int) -> np.memmap:
        """A working array, which keeps its content when the build goes on."""
        return mapped(self.writer.scratch / f"{name}.npy", dtype, length)

    def table(self, name: str, query: str, number: str | None = None) -> int:
        """Create a working table from a query, once. ``number``: column of row numbers. Returns the number of rows."""
        rows = self.once(name, lambda: self.engine.write(query, self.file(name)))
        self.engine.show(name, self.file(name), number)
        return rows

    def file(self, name: str) -> Path:
        """The file of a working table."""
        return self.writer.scratch / f"{name}.parquet"

    def skip(self, bad: Counter[str], number: int, reason: str, location: str, detail: str) -> None:
        """Count ``number`` bad rows, the first of them at ``location``, in ``bad``, the counter of a stage (reason →
        rows). Raises DataError unless they may be skipped. Rows that earlier stages skipped count towards the limit."""
        more = f" ({number:,} such rows)" if number > 1 else ""
        if self.options.bad_row_policy == "raise":
            raise DataError(
                f"{location}: {detail}{more}. Correct or remove it, or skip such rows with --bad_row_policy skip"
            )
        bad[reason] += number
        total, limit = self.skipped.total() + bad.total(), self.options.max_bad_rows
        if total > limit:
            raise DataError(
                f"{location}: {detail}{more}. That makes {total:,} bad rows, more than --max_bad_rows {limit:,}"
            )
        _log.warning("skipped: %s: %s%s", location, detail, more)

    def order(self) -> str:
        """SQL columns that sort a user's events. A split separates events of one time."""
        time_column = '"time", ' if self.schema.timestamp else ""
        split = '"split", ' if self.schema.timestamp and self.schema.split else ""
        return f"{time_column}{split}part, source_row"

    def shown(self) -> str:
        """Relation of the events and the candidates, which lack columns of users."""
        return "shown" if self.raw.requests else "events"


def source_digest(file: Path) -> str:
    """SHA-256 of a raw file. One that has not changed since is read once only."""
    now = file.stat()
    return _digest(file, now.st_size, now.st_mtime_ns)


@lru_cache
def _digest(file: Path, *_version: int) -> str:
    return sha256(file)


def source_names(files: Sequence[Path]) -> dict[str, Path]:
    """Name in meta.json → raw file. The name is the file name, or the path if two files share the name."""
    namesakes = Counter(file.name for file in dict.fromkeys(files))
    return {file.name if namesakes[file.name] == 1 else str(file): file for file in files}


def memory_bytes(text: str) -> int:
    """Convert 4GB, 512MiB, … to bytes. Raises ConfigError for other text and for less than 256MiB."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(I?)B?\s*", text, flags=re.IGNORECASE)
    if match is None:
        raise ConfigError(f"--memory_limit {text!r}: expected an amount like 4GB or 512MiB")
    amount = int(float(match[1]) * (1024 if match[3] else 1000) ** " KMGT".index(match[2].upper() or " "))
    if amount < _MIN_MEMORY:
        raise ConfigError(f"--memory_limit {text!r}: at least 256MiB are needed")
    return amount


def connect(memory: float, spill: Path, threads: int) -> duckdb.DuckDBPyConnection:
    """An in-memory DuckDB of ``memory`` bytes, which spills to a directory."""
    engine = duckdb.connect()
    engine.execute(f"SET memory_limit = '{int(memory) >> 10} KiB'")
    engine.execute(f"SET temp_directory = {literal(str(spill))}")
    engine.execute(f"SET threads = {threads}")
    engine.execute("SET TimeZone = 'UTC'")  # else times without a zone are local times
    return engine


@contextmanager
def open_engine(scratch: Path, memory_limit: str, is_driver: bool = False) -> Iterator[Engine]:
    """An in-memory DuckDB that spills to ``scratch``. Its errors become DataError, interruptions KeyboardInterrupt."""
    spill, fraction = scratch / "spill", _DRIVER_FRACTION if is_driver else _ENGINE_FRACTION
    try:
        with connect(memory_bytes(memory_limit) * fraction, spill, len(os.sched_getaffinity(0))) as connection:
            connection.execute(f"SET enable_progress_bar = {str(sys.stdout.isatty()).lower()}")
            yield Engine(connection)
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


def one(engine: Engine, query: str) -> tuple[Any, ...]:
    """The only row of a query."""
    (row,) = engine.sql(query).fetchall()
    return tuple(row)


def columns_of(engine: Engine, query: str) -> list[np.ndarray]:
    """The columns of a query, without NULLs; texts as str objects."""
    return [np.asarray(values) for values in engine.sql(query).fetchnumpy().values()]


def utf8_column(engine: Engine, query: str) -> tuple[np.ndarray, np.ndarray]:
    """The only column of a query, strings without NULLs, as (int64 offsets [n + 1], UTF-8 bytes as uint8)."""
    texts = pyarrow.large_string()
    batches = [batch.column(0).cast(texts) for batch in engine.sql(query).to_arrow_reader(ROWS_PER_CHUNK)]
    values = pyarrow.concat_arrays([pyarrow.array([""], texts), *batches])  # a column without rows has no buffers
    _, bounds, text = values.buffers()
    offsets = np.frombuffer(bounds, dtype=np.int64)[1 : len(values) + 1]
    return offsets, np.frombuffer(text, dtype=np.uint8)[: offsets[-1]]


def numbered_rows(file: Path, number: str | None, first: int = 0) -> str:
    """SQL of the rows of a Parquet file. ``number``: column of row numbers, from ``first``."""
    numbered = f"* EXCLUDE file_row_number, file_row_number + {first} AS {number}" if number else "*"
    rows = f"read_parquet({one_file(file)}, hive_partitioning = false, file_row_number = {bool(number)})"
    return f"SELECT {numbered} FROM {rows}"


def write_parquet(connection: duckdb.DuckDBPyConnection, select: str, target: Path, options: str = "") -> int:
    """Write the rows of a query atomically: to a file, or as ``options`` of COPY say. Returns their number."""
    with written_aside(target) as aside:
        copy = f"COPY ({select}) TO {literal(str(aside))} (FORMAT parquet, COMPRESSION lz4_raw{options})"
        ((rows,),) = connection.execute(copy).fetchall()
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
