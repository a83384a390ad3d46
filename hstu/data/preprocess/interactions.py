"""One's own interactions, a CSV, TSV or Parquet table with a row an event, as raw tables.

Nothing is guessed from a sample: a column of text is taken as integers, numbers or dates only if every one of its
values is. So ``007`` stays a string, distinct from ``7``.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import duckdb

from hstu.config.errors import ConfigError, DataError
from hstu.data.datasets import Schema
from hstu.data.preprocess.build import RawTables
from hstu.data.preprocess.tables import identifier, literal, read_table_with_header, require_columns
from hstu.data.store import USER_FEATURE

_DELIMITERS = {".csv": ",", ".tsv": "\t"}
_INTEGERS = frozenset(
    ("TINYINT", "SMALLINT", "INTEGER", "BIGINT", "UTINYINT", "USMALLINT", "UINTEGER", "UBIGINT", "HUGEINT", "UHUGEINT")
)
_FLOATS = frozenset(("FLOAT", "DOUBLE"))
_DATES = ("DATE", "TIMESTAMP")


@dataclass(frozen=True, kw_only=True)
class InteractionColumns:
    """Columns of the interactions table, and of ``context``, a table with one row a user.

    user and item: integers (any int64) or strings. action: integers >= 0. time: seconds since 1970 or dates; without
    it the rows are taken to be in time order. context_columns may name the user column: the user is then a contextual
    feature, called user_id.
    """

    interactions: Path
    user: str
    item: str
    action: str | None = None
    time: str | None = None
    context: Path | None = None
    context_columns: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        problems = []
        if self.context and not self.context_columns:
            problems.append("--context needs --context_columns, the columns to take from it")
        if not self.context and set(self.context_columns) - {self.user}:
            problems.append("--context_columns needs --context, the table with one row a user")
        named = [self.item, self.action, self.time, *self.schema().context]
        repeated = sorted({name for name in named if name and named.count(name) > 1})
        if repeated:
            problems.append(f"column(s) {', '.join(repeated)} would be two features; each feature needs its own column")
        if USER_FEATURE in (self.item, self.action, self.time):
            problems.append(f"{USER_FEATURE!r} is the name of the users, it cannot be the item, action or time")
        if problems:
            raise ConfigError(problems)

    def schema(self) -> Schema:
        """Features are named after their columns, the user's is user_id."""
        context = tuple(USER_FEATURE if column == self.user else column for column in self.context_columns)
        return Schema(item=self.item, action=self.action, timestamp=self.time, context=context)


def interactions(columns: InteractionColumns) -> RawTables:
    """The tables as SQL, with the type of each column settled. Raises DataError that names what cannot be used."""
    files = (columns.interactions,) + ((columns.context,) if columns.context else ())
    for file in files:
        if not file.is_file():
            raise DataError(f"there is no file {file}")
    try:
        with duckdb.connect() as engine:
            table = _Table(engine, columns.interactions)
            user, user_is_integer = table.id(columns.user)
            item, _ = table.id(columns.item)
            selected = [f'{user} AS "user"', f"{item} AS item"]
            if columns.action:
                selected.append(f"{table.action(columns.action)} AS action")
            if columns.time:
                time, timestamp = table.time(columns.time)
                selected += [f'{time} AS "time"', f'{timestamp} AS "timestamp"']
            context = _context(engine, columns, user_is_integer) if columns.context else None
    except duckdb.Error as error:
        raise DataError(f"cannot read {' and '.join(map(str, files))}: {str(error).strip()}") from error
    return RawTables(files=files, events=f"SELECT {', '.join(selected)} FROM {table.relation}", context=context)


def _context(engine: duckdb.DuckDBPyConnection, columns: InteractionColumns, user_is_integer: bool) -> str:
    assert columns.context is not None
    table = _Table(engine, columns.context)
    wanted = [column for column in columns.context_columns if column != columns.user]
    require_columns(columns.context, list(table.types), [columns.user, *wanted])
    user = identifier(columns.user)
    known = f"{_as_integer(user)} IS NOT NULL" if user_is_integer else "true"
    features = ", ".join(f"CAST({identifier(column)} AS VARCHAR) AS {identifier(column)}" for column in wanted)
    user = _as_integer(user) if user_is_integer else f"CAST({user} AS VARCHAR)"
    return f'SELECT {user} AS "user"{", " if features else ""}{features} FROM {table.relation} WHERE {known}'


class _Table:
    """A file as a relation, and SQL expressions that give its columns the types of RawTables.events."""

    def __init__(self, engine: duckdb.DuckDBPyConnection, file: Path) -> None:
        self.file = file
        self._engine = engine
        if file.suffix == ".parquet":
            self.relation = f"read_parquet({literal(str(file))})"
        elif file.suffix in _DELIMITERS:
            self.relation = read_table_with_header([file], {}, delimiter=_DELIMITERS[file.suffix])
        else:
            raise ConfigError(f"{file}: the name of a table ends in .csv, .tsv or .parquet")
        described = engine.execute(f"DESCRIBE SELECT * FROM {self.relation}").fetchall()
        self.types: dict[str, str] = {row[0]: row[1] for row in described}

    def id(self, column: str) -> tuple[str, bool]:
        """(BIGINT or VARCHAR expression, whether it is BIGINT): integers only if all values are canonical int64."""
        kind = self._type(column)
        if kind in _FLOATS or kind.startswith(_DATES):
            raise DataError(f"{self.file}: ids in {column!r} must be integers or strings, the column is {kind}")
        name = identifier(column)
        if self._all(name, _as_integer(name)):
            return _as_integer(name), True
        return f"CAST({name} AS VARCHAR)", False

    def action(self, column: str) -> str:
        """INTEGER expression; 4.0 is an integer, 4.5 is not."""
        self._type(column)
        name = identifier(column)
        number = f"TRY_CAST({name} AS DOUBLE)"
        integer = (
            f"CASE WHEN {number} = floor({number}) AND abs({number}) < 2147483647 THEN CAST({number} AS INTEGER) END"
        )
        self._demand(column, integer, "an integer from 0 up (for half stars, double them)")
        return integer

    def time(self, column: str) -> tuple[str, str]:
        """(what to order by, BIGINT seconds): integers and numbers are seconds, dates and timestamps are UTC."""
        kind, name = self._type(column), identifier(column)
        if not kind.startswith(_DATES):
            if self._all(name, integer := _as_integer(name)):
                return integer, integer
            number = f"TRY_CAST({name} AS DOUBLE)"
            finite = f"CASE WHEN isfinite({number}) AND abs({number}) < 9e18 THEN {number} END"
            if self._all(name, finite):
                return finite, f"CAST(floor({finite}) AS BIGINT)"
        moment = f"TRY_CAST({name} AS TIMESTAMP)"
        self._demand(column, moment, "seconds since 1970, or a date and time like 2024-05-31 12:00:00")
        return moment, f"CAST(floor(epoch({moment})) AS BIGINT)"

    def _type(self, column: str) -> str:
        require_columns(self.file, list(self.types), [column])
        return self.types[column]

    def _all(self, name: str, converted: str) -> bool:
        query = f"SELECT 1 FROM {self.relation} WHERE {name} IS NOT NULL AND ({converted}) IS NULL LIMIT 1"
        return not self._engine.execute(query).fetchall()

    def _demand(self, column: str, converted: str, allowed: str) -> None:
        name = identifier(column)
        bad = self._engine.execute(
            f"SELECT {name} FROM {self.relation} WHERE {name} IS NOT NULL AND ({converted}) IS NULL LIMIT 3"
        ).fetchall()
        if bad:
            shown = ", ".join(repr(row[0]) for row in bad)
            raise DataError(f"{self.file}: {column!r} holds {shown}; allowed is {allowed}")


def _as_integer(name: str) -> str:
    """BIGINT of a value whose text is that of an int64 in plain decimal notation, else NULL."""
    integer = f"TRY_CAST({name} AS BIGINT)"
    return f"CASE WHEN CAST({integer} AS VARCHAR) = CAST({name} AS VARCHAR) THEN {integer} END"
