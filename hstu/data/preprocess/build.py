"""From raw tables, as SQL, to a sequence store: the part that all datasets share.

DuckDB holds the events in a file beside the store and sorts them out of core; vocabularies are ascending in the raw
id; the sorted events stream into the store's arrays in chunks. Memory is bounded by ``memory_limit`` plus the
vocabularies, whatever the number of events.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import duckdb
import numpy as np
from tqdm import tqdm

from hstu.config.errors import DataError
from hstu.data.datasets import Schema
from hstu.data.preprocess.report import statistics_of
from hstu.data.preprocess.tables import identifier, literal
from hstu.data.store import UNKNOWN, USER_FEATURE
from hstu.data.store_writer import StoreWriter

_log = logging.getLogger(__name__)
_ROWS_PER_CHUNK = 1 << 20


@dataclass(frozen=True, kw_only=True)
class RawTables:
    """A raw dataset as SQL.

    events: SELECT giving user and item (both BIGINT or VARCHAR), action (if the schema has one; integer), and time
      (any type, what events are ordered by) with timestamp (BIGINT, seconds), if the schema has one; rows in the
      order of the raw files.
    context: SELECT giving user and each contextual feature but user_id, as VARCHAR; one row a user.
    """

    files: tuple[Path, ...]
    events: str
    context: str | None = None
    titles: Mapping[int, str] | None = None


@dataclass(frozen=True, kw_only=True)
class BuildOptions:
    """Where the store goes and how it is made; ``command`` is recorded as the way to make it again."""

    name: str
    output: Path
    command: str
    memory_limit: str = "4GB"


def build_store(raw: RawTables, schema: Schema, options: BuildOptions, published: Mapping[str, float]) -> Path:
    """Writes the store and returns its path. Raises DataError where the raw data is not what it should be."""
    writer = StoreWriter(options.output, name=options.name, command=options.command, overwrite=True)
    with writer, _engine(writer.scratch, options.memory_limit) as engine:
        _log.info("reading %s", ", ".join(str(file) for file in raw.files))
        _load_events(engine, raw, schema)
        lengths = _number_users_and_items(engine)
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        writer.write_offsets(offsets)
        user_ids, item_ids = (_column(engine, f"SELECT id FROM {table} ORDER BY code") for table in ("users", "items"))
        writer.write_vocabulary(USER_FEATURE, user_ids)
        writer.write_vocabulary(schema.item, item_ids)
        _write_context(engine, writer, raw, schema, len(user_ids))
        _write_events(engine, writer, schema, len(item_ids), int(offsets[-1]))
        if raw.titles is not None:
            writer.write_titles([raw.titles.get(raw_id, "") for raw_id in item_ids.tolist()])
        writer.statistics = statistics_of(lengths, len(item_ids), published)
        writer.sources = {file.name: _sha256(file) for file in raw.files}
    return options.output


@contextmanager
def _engine(scratch: Path, memory_limit: str) -> Iterator[duckdb.DuckDBPyConnection]:
    """A DuckDB whose data and spill files lie in ``scratch``; its errors become DataError."""
    try:
        with duckdb.connect(str(scratch / "events.duckdb")) as engine:
            engine.execute(f"SET memory_limit = {literal(memory_limit)}")
            engine.execute(f"SET temp_directory = {literal(str(scratch))}")
            yield engine
    except duckdb.Error as error:
        raise DataError(f"cannot preprocess: {str(error).strip()}") from error


def _load_events(engine: duckdb.DuckDBPyConnection, raw: RawTables, schema: Schema) -> None:
    """Table ``events``, whose rowid is the raw row order (DuckDB preserves insertion order)."""
    engine.execute(f"CREATE TABLE events AS {raw.events}")
    columns = ["user", "item"] + ["action"] * bool(schema.action) + ["time", "timestamp"] * bool(schema.timestamp)
    files = ", ".join(file.name for file in raw.files)
    for column in columns:
        missing, first = _one(engine, f'SELECT count(*), min(rowid) + 1 FROM events WHERE "{column}" IS NULL')
        if missing:
            raise DataError(
                f"{files}: {missing} row(s) without a usable {column}, the first is row {first}; correct or remove them"
            )
    (total,) = _one(engine, "SELECT count(*) FROM events")
    if total == 0:
        raise DataError(f"{files}: no events")
    if schema.action:
        lowest, highest = _one(engine, "SELECT min(action), max(action) FROM events")
        bound = schema.action_cardinality or np.iinfo(np.int32).max
        if lowest < 0 or highest >= bound:
            raise DataError(f"{files}: actions run from {lowest} to {highest}, allowed are 0 to {bound - 1}")


def _number_users_and_items(engine: duckdb.DuckDBPyConnection) -> np.ndarray:
    """Tables ``users`` and ``items`` (id, code, events), codes ascending in id; returns the events of each user."""
    for table, column in (("users", "user"), ("items", "item")):
        engine.execute(
            f"CREATE TABLE {table} AS SELECT id, row_number() OVER (ORDER BY id) - 1 AS code, events "
            f'FROM (SELECT "{column}" AS id, count(*) AS events FROM events GROUP BY 1)'
        )
    return _column(engine, "SELECT events FROM users ORDER BY code")


def _write_context(
    engine: duckdb.DuckDBPyConnection, writer: StoreWriter, raw: RawTables, schema: Schema, num_users: int
) -> None:
    if raw.context is not None:
        engine.execute(f"CREATE TABLE context AS {raw.context}")
        repeated = engine.execute('SELECT "user" FROM context GROUP BY 1 HAVING count(*) > 1 LIMIT 3').fetchall()
        if repeated:
            raise DataError(
                f"{raw.files[-1].name}: several rows for user {', '.join(repr(row[0]) for row in repeated)}"
            )
    for feature in schema.context:
        if feature == USER_FEATURE:
            writer.write_context(feature, np.arange(num_users), cardinality=num_users)
            continue
        values = _column(
            engine,
            f"SELECT coalesce(nullif(c.{identifier(feature)}, ''), {literal(UNKNOWN)}) "
            'FROM users u LEFT JOIN context c ON u.id = c."user" ORDER BY u.code',
        )
        vocabulary, codes = np.unique(values, return_inverse=True)
        writer.write_context(feature, codes, cardinality=len(vocabulary))
        writer.write_vocabulary(feature, vocabulary)


def _write_events(
    engine: duckdb.DuckDBPyConnection, writer: StoreWriter, schema: Schema, num_items: int, num_events: int
) -> None:
    arrays = {"item": writer.create_sequence(schema.item, "item", cardinality=num_items, length=num_events)}
    if schema.action:
        cardinality = schema.action_cardinality or _one(engine, "SELECT max(action) + 1 FROM events")[0]
        arrays["action"] = writer.create_sequence(
            schema.action, "action", cardinality=int(cardinality), length=num_events
        )
    if schema.timestamp:
        arrays["timestamp"] = writer.create_sequence(schema.timestamp, "timestamp", cardinality=None, length=num_events)
    selected = ", ".join("i.code AS item" if name == "item" else f'e."{name}"' for name in arrays)
    order = f'e."user", {"e.time, " if schema.timestamp else ""}e.rowid'
    rows = engine.sql(f"SELECT {selected} FROM events e JOIN items i ON e.item = i.id ORDER BY {order}")
    start = 0
    with tqdm(total=num_events, desc="writing events", unit=" events", unit_scale=True, disable=None) as progress:
        for batch in rows.to_arrow_reader(_ROWS_PER_CHUNK):
            for name, array in arrays.items():
                array[start : start + batch.num_rows] = batch.column(name).to_numpy(zero_copy_only=False)
            start += batch.num_rows
            progress.update(batch.num_rows)


def _one(engine: duckdb.DuckDBPyConnection, query: str) -> tuple[int, ...]:
    (row,) = engine.execute(query).fetchall()
    return row


def _column(engine: duckdb.DuckDBPyConnection, query: str) -> np.ndarray:
    """A query's only column, without NULLs: int64 or str objects."""
    (values,) = engine.execute(query).fetchnumpy().values()
    return np.asarray(values)


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
