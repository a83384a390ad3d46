"""Users' own interactions, a CSV, TSV or Parquet table with one row per event, as raw tables.

Types are never guessed from a sample. A text column counts as integers only if all its values are, so ``007`` stays a
string, distinct from ``7``; a time column counts as what most of its values are.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import duckdb
from duckdb import DuckDBPyConnection

from hstu.config.errors import ConfigError, DataError
from hstu.data.datasets.raw import RawFile, check_readable, identifier, require_columns, table_with_header
from hstu.data.datasets.spec import USER_FEATURE, ColumnDescription, RawTables, Schema, TypedColumns

_DELIMITERS = {".csv": ",", ".tsv": "\t"}
_INTEGERS = frozenset(
    ("TINYINT", "SMALLINT", "INTEGER", "BIGINT", "UTINYINT", "USMALLINT", "UINTEGER", "UBIGINT", "HUGEINT", "UHUGEINT")
)
_DATES = ("DATE", "TIMESTAMP")
_ALLOWED = {
    "user": "an id, int64 or text",
    "item": "an id, int64 or text",
    "action": "an integer from 0 up (for half stars, double them)",
    "time": "seconds since 1970, or a date and time like 2024-05-31 12:00:00",
}


@dataclass(frozen=True, kw_only=True)
class InteractionColumns:
    """The interactions table and its columns; the table of contextual features and its columns."""

    interactions: Path
    user: str
    """int64 or strings."""
    item: str
    """int64 or strings."""
    action: str | None = None
    """Integers >= 0."""
    time: str | None = None
    """Seconds since 1970, or dates. None: the rows are in time order."""
    context: Path | None = None
    """A table with one row per user, and the same user column."""
    context_columns: tuple[str, ...] = ()
    """Contextual features in token order. The user column among them makes the user a feature, user_id."""

    def __post_init__(self) -> None:
        problems = []
        if self.context and not self.context_columns:
            problems.append("--context needs --context_columns, the columns to take from it")
        if not self.context and set(self.context_columns) - {self.user}:
            problems.append("--context_columns needs --context, the table with one row per user")
        named = [self.item, self.action, self.time, *self.schema().context]
        repeated = sorted({name for name in named if name and named.count(name) > 1})
        if repeated:
            problems.append(f"column(s) {', '.join(repeated)} would be two features; each feature needs its own column")
        if USER_FEATURE in (self.item, self.action, self.time):
            problems.append(f"{USER_FEATURE!r} is the name of the users, it cannot be the item, action or time")
        if problems:
            raise ConfigError(problems)

    def schema(self) -> Schema:
        """Features are named after their columns; the user's is user_id."""
        context = tuple(USER_FEATURE if column == self.user else column for column in self.context_columns)
        return Schema(item=self.item, action=self.action, timestamp=self.time, context=context)


def interactions(columns: InteractionColumns) -> RawTables:
    """The tables as SQL; their types are resolved once they are read. Raises DataError for unusable files."""
    log = _table(columns.interactions)
    wanted = {"user": columns.user, "item": columns.item, "action": columns.action, "time": columns.time}
    given = {name: column for name, column in wanted.items() if column}
    _require(log, given.values())
    context = None
    if columns.context:
        table = _table(columns.context)
        features = [column for column in columns.context_columns if column != columns.user]
        _require(table, [columns.user, *features])
        named = {"user": columns.user} | {f"c{place}": column for place, column in enumerate(features)}
        context = (table, _renamed(named))
    return RawTables(
        logs=(log,),
        events=_renamed(given),
        context=context,
        resolve_types=partial(_resolve_types, columns),
        descriptions={name: ColumnDescription(column, _ALLOWED[name]) for name, column in given.items()},
    )


def _table(file: Path) -> RawFile:
    name = file.name.removesuffix(".gz")
    suffix = Path(name).suffix
    if suffix == ".parquet" and name == file.name:
        table = RawFile(path=file)
    elif suffix in _DELIMITERS:
        table = RawFile(path=file, columns={}, delimiter=_DELIMITERS[suffix])
    else:
        raise ConfigError(f"{file}: the name of a table ends in .csv, .tsv (perhaps with .gz) or .parquet")
    check_readable(table)
    return table_with_header(file, {}, delimiter=table.delimiter) if table.is_text else table


def _require(table: RawFile, wanted: Iterable[str]) -> None:
    if table.columns is None:
        try:
            with duckdb.connect() as engine:
                described = engine.execute(f"DESCRIBE SELECT * FROM {table.relation()}").fetchall()
        except duckdb.Error as error:
            raise DataError(f"{table.path} is a damaged Parquet file: {str(error).splitlines()[0]}") from error
        present = [row[0] for row in described]
    else:
        present = list(table.columns)
    require_columns(table.path, present, wanted)


def _renamed(columns: Mapping[str, str]) -> str:
    return ", ".join(f"{identifier(column)} AS {identifier(name)}" for name, column in columns.items())


def _resolve_types(
    columns: InteractionColumns, engine: DuckDBPyConnection, log: str, context: str | None
) -> TypedColumns:
    table = _Columns(engine, columns.interactions, log)
    user, user_is_integer = table.id("user", columns.user)
    item, _ = table.id("item", columns.item)
    selected = [f'{user} AS "user"', f"{item} AS item"]
    if columns.action:
        selected.append(f"{_ACTION} AS action")
    if columns.time:
        time, timestamp = table.time()
        selected += [f'{time} AS "time"', f'{timestamp} AS "timestamp"']
    return TypedColumns(", ".join(selected), context and _context(columns, user_is_integer))


def _context(columns: InteractionColumns, user_is_integer: bool) -> str:
    # If users of events are integers, a user that is no integer has no events: it becomes NULL and matches nobody.
    user = _as_integer('"user"') if user_is_integer else 'CAST("user" AS VARCHAR)'
    features = len([column for column in columns.context_columns if column != columns.user])
    return ", ".join([f'{user} AS "user"', *(f"CAST(c{place} AS VARCHAR) AS c{place}" for place in range(features))])


class _Columns:
    """Ingested columns, as SQL expressions of the types that RawTables.events requires."""

    def __init__(self, engine: DuckDBPyConnection, file: Path, relation: str) -> None:
        self._engine, self._file, self._relation = engine, file, relation
        described = engine.execute(f"DESCRIBE SELECT * FROM {relation}").fetchall()
        self._types: dict[str, str] = {row[0]: row[1] for row in described}

    def id(self, name: str, column: str) -> tuple[str, bool]:
        """(BIGINT or VARCHAR expression, whether it is BIGINT). BIGINT only if all values are canonical int64."""
        kind = self._types[name]
        if kind not in _INTEGERS and kind != "VARCHAR":
            raise DataError(f"{self._file}: ids in {column!r} must be integers or strings, the column is {kind}")
        integer = _as_integer(identifier(name))
        if self._unlike(name, integer) == 0:
            return integer, True
        return f"CAST({identifier(name)} AS VARCHAR)", False

    def time(self) -> tuple[str, str]:
        """(expression to sort by, BIGINT seconds). Numbers are seconds; dates without a zone are UTC.

        The kind that fits most values is chosen; the other values become NULL, hence bad rows.
        """
        integer, number = _as_integer('"time"'), 'TRY_CAST("time" AS DOUBLE)'
        finite = f"CASE WHEN isfinite({number}) AND abs({number}) < 9e18 THEN {number} END"
        value = '"time"'
        if self._types["time"] == "VARCHAR":  # a cast refuses the blank in "2024-05-31 12:00:00 +0200"
            value = r"""regexp_replace("time", '\s+([+-]\d\d(:?\d\d)?)$', '\1')"""
        date = f"TRY_CAST({value} AS TIMESTAMPTZ)"
        moment = f"CASE WHEN isfinite({date}) THEN {date} END"
        kinds = [(moment, f"CAST(floor(epoch({moment})) AS BIGINT)")]
        if not self._types["time"].startswith(_DATES):
            kinds = [(integer, integer), (finite, f"CAST(floor({finite}) AS BIGINT)"), *kinds]
        return min(kinds, key=lambda kind: self._unlike("time", kind[0]))

    def _unlike(self, name: str, converted: str) -> int:
        """How many values the conversion turns into NULL."""
        condition = f"{identifier(name)} IS NOT NULL AND ({converted}) IS NULL"
        ((count,),) = self._engine.execute(f"SELECT count(*) FROM {self._relation} WHERE {condition}").fetchall()
        return int(count)


_NUMBER = "TRY_CAST(action AS DOUBLE)"
_ACTION = f"CASE WHEN {_NUMBER} = floor({_NUMBER}) AND abs({_NUMBER}) < 2147483647 THEN CAST({_NUMBER} AS INTEGER) END"
"""4.0 is an integer, 4.5 is not."""


def _as_integer(name: str) -> str:
    """BIGINT of a value whose text is that of an int64 in plain decimal notation, else NULL."""
    integer = f"TRY_CAST({name} AS BIGINT)"
    return f"CASE WHEN CAST({integer} AS VARCHAR) = CAST({name} AS VARCHAR) THEN {integer} END"
