"""Which type a column of users' own tables has, and the SQL of features of items and of events.

Types are never guessed from a sample. A text column counts as integers only if all its values are, so ``007`` stays a
string, distinct from ``7``; a time column counts as what most of its values are.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import NamedTuple

from duckdb import DuckDBPyConnection

from hstu.base.errors import ConfigError, DataError
from hstu.data.datasets.raw import identifier, literal
from hstu.data.datasets.spec import LATEST_SECOND, SPLIT_NAMES

_log = logging.getLogger(__name__)


class TimeUnit(NamedTuple):
    """A unit of times that are numbers."""

    name: str
    per_second: int


TIME_UNITS = {
    "s": TimeUnit("seconds", 1),
    "ms": TimeUnit("milliseconds", 10**3),
    "us": TimeUnit("microseconds", 10**6),
    "ns": TimeUnit("nanoseconds", 10**9),
}
_INTEGERS = frozenset(
    ("TINYINT", "SMALLINT", "INTEGER", "BIGINT", "UTINYINT", "USMALLINT", "UINTEGER", "UBIGINT", "HUGEINT", "UHUGEINT")
)
_DATES = ("DATE", "TIMESTAMP")
_MOST_LABELS = 256
_DECIMAL = r"[+-]?(\d+\.\d*|\.\d+|\d+)([eE][+-]?\d+)?"


def unit_hint(unit: str, value: str) -> str:
    """What to add to the message about a time that is too large for ``unit``."""
    try:
        number = abs(float(value))
    except ValueError:
        return ""
    fitting = (name for name, found in TIME_UNITS.items() if number < LATEST_SECOND * found.per_second)
    found = next(fitting, unit)
    if found in ("s", unit):
        return ""
    return f". In {TIME_UNITS[found].name} it would be before the year 5000: --time_unit {found}"


class ColumnTypes:
    """Ingested columns, as SQL expressions of the types that RawTables.events requires."""

    def __init__(self, engine: DuckDBPyConnection, files: tuple[Path, ...], relation: str) -> None:
        self._engine, self._relation = engine, relation
        self._name = f"{files[0]} and {len(files) - 1} more" if len(files) > 1 else str(files[0])
        described = engine.execute(f"DESCRIBE SELECT * FROM {relation}").fetchall()
        self._types: dict[str, str] = {row[0]: row[1] for row in described}

    def id(self, name: str, column: str) -> tuple[str, bool]:
        """(BIGINT or VARCHAR expression, whether it is BIGINT). BIGINT only if all values are canonical int64.

        Empty text is no id, whether it comes from CSV or Parquet.
        """
        kind = self._types[name]
        if kind not in _INTEGERS and kind != "VARCHAR":
            raise DataError(f"{self._name}: ids in {column!r} must be integers or strings, the column is {kind}")
        value = identifier(name)
        if kind == "VARCHAR":
            value = f"nullif({value}, '')"
        integer = as_integer(value)
        if self._unlike(value, integer) == 0:
            return f"TRY_CAST({value} AS BIGINT)", True  # the same for these values, and faster
        if kind == "VARCHAR":
            self._refuse_decimals(value, column)
        return f"CAST({value} AS VARCHAR)", False

    def _refuse_decimals(self, value: str, column: str) -> None:
        """DataError where all values are numbers and some have a fraction, as pandas writes integers with gaps."""
        number = f"regexp_full_match({value}, '{_DECIMAL}')"
        query = f"SELECT bool_and({number}), min({value}) FILTER (WHERE contains({value}, '.')) FROM {self._relation}"
        ((only_numbers, fraction),) = self._engine.execute(query).fetchall()
        if only_numbers and fraction is not None:
            raise DataError(
                f"{self._name}: ids in {column!r} are decimal numbers, such as {fraction}; ids must be integers or "
                "text. Write them without a fraction (pandas: astype('Int64')), or put a letter in front"
            )

    def action(self, column: str) -> tuple[str, tuple[str, ...]]:
        """(INTEGER expression, the text of each integer). Texts are numbered in their order if none is a number."""
        if self._types["action"] != "VARCHAR":
            return _ACTION, ()
        text = "nullif(action, '')"
        ((texts, numbers),) = self._engine.execute(
            f"SELECT count({text}), count({_NUMBER}) FROM {self._relation}"
        ).fetchall()
        if numbers or not texts:
            return _ACTION, ()
        query = f"SELECT DISTINCT {text} AS label FROM {self._relation} WHERE label IS NOT NULL ORDER BY label"
        labels = tuple(label for (label,) in self._engine.execute(f"{query} LIMIT {_MOST_LABELS + 1}").fetchall())
        if len(labels) > _MOST_LABELS:
            raise DataError(
                f"{self._name}: {column!r} has more than {_MOST_LABELS} different texts, such as {labels[0]!r}; "
                "actions are integers from 0 up, or few texts, such as 'buy' and 'view'. Is it the right column?"
            )
        _log.info("actions in %r: %s", column, ", ".join(f"{number} {label}" for number, label in enumerate(labels)))
        cases = " ".join(f"WHEN {literal(label)} THEN {number}" for number, label in enumerate(labels))
        return f"CASE action {cases} END", labels

    def time(self, column: str, unit: str) -> tuple[str, str]:
        """(expression to sort by, BIGINT seconds). Numbers are in ``unit``; dates without a zone are UTC.

        The kind that fits most values is chosen; the other values become NULL, hence bad rows.
        """
        integer, number = as_integer('"time"'), 'TRY_CAST("time" AS DOUBLE)'
        finite = f"CASE WHEN isfinite({number}) AND abs({number}) < 9e18 THEN {number} END"
        value = '"time"'
        if self._types["time"] == "VARCHAR":  # a cast refuses the blank in "2024-05-31 12:00:00 +0200"
            value = r"""regexp_replace("time", '\s+([+-]\d\d(:?\d\d)?)$', '\1')"""
        date = f"TRY_CAST({value} AS TIMESTAMPTZ)"
        moment = f"CASE WHEN isfinite({date}) THEN {date} END"
        kinds = (moment,) if self._types["time"].startswith(_DATES) else (integer, finite, moment)
        best = self._best_of(kinds)  # on a tie, integers, which are exact
        if best == moment:
            if unit != "s":
                _log.warning("--time_unit %s has no effect: %r holds dates", unit, column)
            return moment, f"CAST(floor(epoch({moment})) AS BIGINT)"
        per_second = TIME_UNITS[unit].per_second
        if best == finite:
            return finite, f"CAST(floor({finite} / {per_second}) AS BIGINT)"
        if per_second == 1:
            return integer, integer
        return (
            integer,
            f"CASE WHEN {integer} < 0 THEN -1 ELSE {integer} // {per_second} END",
        )  # -1: before 1970, refused

    def _best_of(self, kinds: tuple[str, ...]) -> str:
        """The kind of time that turns fewest values into NULL, the first of several."""
        best, fewest = kinds[0], None
        for kind in kinds if len(kinds) > 1 else ():
            unlike = self._unlike('"time"', kind)
            if fewest is None or unlike < fewest:
                best, fewest = kind, unlike
            if not fewest:
                break  # whether texts are dates takes long to find out
        return best

    def _unlike(self, value: str, converted: str) -> int:
        """How many values the conversion turns into NULL."""
        condition = f"{value} IS NOT NULL AND ({converted}) IS NULL"
        ((count,),) = self._engine.execute(f"SELECT count(*) FROM {self._relation} WHERE {condition}").fetchall()
        return int(count)


_NUMBER = "TRY_CAST(action AS DOUBLE)"
_ACTION = f"CASE WHEN {_NUMBER} = floor({_NUMBER}) AND abs({_NUMBER}) < 2147483647 THEN CAST({_NUMBER} AS INTEGER) END"
"""4.0 is an integer, 4.5 is not."""


def as_integer(name: str) -> str:
    """BIGINT of a value whose text is that of an int64 in plain decimal notation, else NULL."""
    integer = f"TRY_CAST({name} AS BIGINT)"
    return f"CASE WHEN CAST({integer} AS VARCHAR) = CAST({name} AS VARCHAR) THEN {integer} END"


def split_number() -> str:
    """The place of the column ``split`` in SPLIT_NAMES, NULL for any other value."""
    cases = " ".join(f"WHEN {literal(name)} THEN {number}" for number, name in enumerate(SPLIT_NAMES))
    return f'CASE lower(CAST("split" AS VARCHAR)) {cases} END'


_FRACTIONS = ("FLOAT", "DOUBLE", "DECIMAL")
_LARGEST = "3.4028234e38"
"""Largest float32."""
A_NUMBER = "a finite number, or nothing where it is missing"
A_VECTOR = "finite numbers, equally many in each row, or nothing where it is missing"


def feature_value(name: str, column: str, kind: str, separator: str | None, file: Path) -> str:
    """SQL of a feature's value: text, or a list of texts without empty ones. ``kind``: SQL type of the column."""
    value = identifier(name)
    if "[" in kind and kind.startswith(_FRACTIONS):
        raise DataError(f"{file}: {column!r} holds vectors ({kind}); add --vectors {column}, or leave it out")
    if kind.endswith("[]"):
        if separator is not None:
            raise ConfigError(f"--lists {column}: the column is a list in {file}; leave it out of --lists")
        return f"[x FOR x IN CAST({value} AS VARCHAR[]) IF x <> ''] AS {value}"
    if separator is not None:
        split = f"string_split(CAST({value} AS VARCHAR), {literal(separator)})"
        return f"[trim(x) FOR x IN {split} IF trim(x) <> ''] AS {value}"
    if kind in ("FLOAT", "DOUBLE"):
        return f"nullif(CAST({value} AS VARCHAR), 'nan') AS {value}"
    return f"CAST({value} AS VARCHAR) AS {value}"


def event_value(name: str, column: str, kind: str, file: Path) -> str:
    """SQL of an event feature's value, text."""
    if kind.endswith("]"):
        raise DataError(f"{file}: {column!r} holds lists ({kind}), and an event has one value; leave it out")
    return feature_value(name, column, kind, None, file)


def number_value(name: str, column: str, kind: str, file: Path) -> str:
    """SQL of a number: FLOAT, NULL where it is missing, NaN where it is unusable. ``kind``: SQL type of the column."""
    if kind.endswith("]") or kind.startswith(("DATE", "TIME", "STRUCT", "MAP")):
        what = "a vector; name it in --vectors" if kind.endswith("]") else "no number"
        raise DataError(f"{file}: {column!r} is {kind}, which is {what}, or leave it out of --numbers")
    value = f"CAST({identifier(name)} AS INTEGER)" if kind == "BOOLEAN" else identifier(name)
    return f"{_float(value)} AS {identifier(name)}"


def vector_value(name: str, column: str, kind: str, separator: str | None, file: Path) -> str:
    """SQL of a vector: FLOAT[], NULL where it is missing, and [NaN] where it is unusable. ``kind`` as above."""
    value = identifier(name)
    is_missing = f"{value} IS NULL OR len({value}) = 0"
    if kind.endswith("]"):
        if separator is not None:
            raise ConfigError(f"--lists {column}: the column is a list in {file}; leave it out of --lists")
        numbers = f"[{_float('x')} FOR x IN {value}]"
    elif kind == "VARCHAR":
        if separator is None:
            raise ConfigError(
                f"--vectors {column}: the column is text in {file}; say in --lists what separates its numbers, as "
                f"--lists '{column}=;'"
            )
        numbers = f"[{_float('x')} FOR x IN string_split({value}, {literal(separator)})]"
        is_missing = f"{value} IS NULL OR trim({value}) = ''"
    else:
        raise DataError(f"{file}: {column!r} is {kind}, which is no vector; name it in --numbers")
    unusable = "['nan'::FLOAT]"
    has_gaps = f"len([y FOR y IN {numbers} IF y IS NULL OR isnan(y)]) > 0"
    return f"CASE WHEN {is_missing} THEN NULL WHEN {has_gaps} THEN {unusable} ELSE {numbers} END AS {value}"


def _float(value: str) -> str:
    """SQL: FLOAT, NULL for nothing, for NaN and for the text "nan", and NaN for any other text and beyond float32."""
    number = f"TRY_CAST({value} AS DOUBLE)"
    missing = f"{value} IS NULL OR trim(CAST({value} AS VARCHAR)) = '' OR coalesce(isnan({number}), false)"
    fits = f"coalesce(abs({number}) <= {_LARGEST}, false)"
    return f"CASE WHEN {missing} THEN NULL WHEN {fits} THEN CAST({number} AS FLOAT) ELSE 'nan'::FLOAT END"
