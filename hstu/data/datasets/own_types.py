"""Types of the columns of users' own tables, as SQL expressions.

All values decide, not a sample. A text column holds integers only if all its values are canonical integers: ``007``
stays text, distinct from ``7``. A time column has the type of most of its values.
"""

from __future__ import annotations

import logging
from pathlib import Path

from duckdb import DuckDBPyConnection

from hstu.base.errors import DataError
from hstu.data.datasets.raw import identifier, literal
from hstu.data.datasets.spec import LATEST_SECOND

_log = logging.getLogger(__name__)


TIME_UNITS = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}
"""Unit of numeric times → units per second."""
UNIT_NAMES = {"s": "seconds", "ms": "milliseconds", "us": "microseconds", "ns": "nanoseconds"}
_INTEGERS = frozenset(
    ("TINYINT", "SMALLINT", "INTEGER", "BIGINT", "UTINYINT", "USMALLINT", "UINTEGER", "UBIGINT", "HUGEINT", "UHUGEINT")
)
_DATES = ("DATE", "TIMESTAMP")
_LARGEST = "3.4028234e38"
"""Largest float32."""
_MOST_LABELS = 256
_DECIMAL = r"[+-]?(\d+\.\d*|\.\d+|\d+)([eE][+-]?\d+)?"


def unit_hint(unit: str, value: str) -> str:
    """Hint for the error about a time that is too large for ``unit``; empty if no other unit fits."""
    try:
        number = abs(float(value))
    except ValueError:
        return ""
    fitting = (name for name, per_second in TIME_UNITS.items() if number < LATEST_SECOND * per_second)
    found = next(fitting, unit)
    if found in ("s", unit):
        return ""
    return f". In {UNIT_NAMES[found]} it would be before the year 5000: --time_unit {found}"


class ColumnTypes:
    """SQL expressions that convert ingested columns to the types of RawTables.events."""

    def __init__(self, engine: DuckDBPyConnection, files: tuple[Path, ...], relation: str) -> None:
        self._engine, self._relation = engine, relation
        self._name = f"{files[0]} and {len(files) - 1} more" if len(files) > 1 else str(files[0])
        described = engine.execute(f"DESCRIBE SELECT * FROM {relation}").fetchall()
        self._types: dict[str, str] = {row[0]: row[1] for row in described}

    def id(self, name: str, column: str) -> tuple[str, bool]:
        """Return (SQL, whether it is BIGINT, not VARCHAR): if all values are canonical int64. Empty text is NULL."""
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
        """Raise DataError if all values are numbers and some have a fraction, as in pandas columns with gaps."""
        number = f"regexp_full_match({value}, '{_DECIMAL}')"
        query = f"SELECT bool_and({number}), min({value}) FILTER (WHERE contains({value}, '.')) FROM {self._relation}"
        ((only_numbers, fraction),) = self._engine.execute(query).fetchall()
        if only_numbers and fraction is not None:
            raise DataError(
                f"{self._name}: ids in {column!r} are decimal numbers, such as {fraction}; ids must be integers or "
                "text. Write them without a fraction (pandas: astype('Int64')), or put a letter in front"
            )

    def action(self, column: str) -> tuple[str, tuple[str, ...]]:
        """Return (INTEGER SQL, text of each integer). Texts are numbered alphabetically if none is a number."""
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
        """Return (SQL to sort by, SQL of BIGINT seconds). Numbers are in ``unit``; dates without a zone are UTC.

        The type that fits most values is chosen; the other values become NULL, hence bad rows.
        """
        integer, number = as_integer('"time"'), 'TRY_CAST("time" AS DOUBLE)'
        finite = f"CASE WHEN isfinite({number}) AND abs({number}) < 9e18 THEN {number} END"
        value = '"time"'
        if self._types["time"] == "VARCHAR":  # a cast refuses the blank in "2024-05-31 12:00:00 +0200"
            value = r"""regexp_replace("time", '\s+([+-]\d\d(:?\d\d)?)$', '\1')"""
        date = f"TRY_CAST({value} AS TIMESTAMPTZ)"
        moment = f"CASE WHEN isfinite({date}) THEN {date} END"
        kinds = (moment,) if self._types["time"].startswith(_DATES) else (integer, finite, moment)
        best = self._best_of(kinds)  # a tie selects integers, which are exact
        if best == moment:
            if unit != "s":
                _log.warning("--time_unit %s has no effect: %r holds dates", unit, column)
            return moment, f"CAST(floor(epoch({moment})) AS BIGINT)"
        per_second = TIME_UNITS[unit]
        if best == finite:
            return finite, f"CAST(floor({finite} / {per_second}) AS BIGINT)"
        if per_second == 1:
            return integer, integer
        return (
            integer,
            f"CASE WHEN {integer} < 0 THEN -1 ELSE {integer} // {per_second} END",
        )  # -1: before 1970, refused

    def _best_of(self, kinds: tuple[str, ...]) -> str:
        """The SQL that turns the fewest values into NULL; the first of several."""
        best, fewest = kinds[0], None
        for kind in kinds if len(kinds) > 1 else ():
            unlike = self._unlike('"time"', kind)
            if fewest is None or unlike < fewest:
                best, fewest = kind, unlike
            if not fewest:
                break  # parsing texts as dates is slow
        return best

    def _unlike(self, value: str, converted: str) -> int:
        """Number of values that the conversion turns into NULL."""
        condition = f"{value} IS NOT NULL AND ({converted}) IS NULL"
        ((count,),) = self._engine.execute(f"SELECT count(*) FROM {self._relation} WHERE {condition}").fetchall()
        return int(count)


_NUMBER = "TRY_CAST(action AS DOUBLE)"
_ACTION = f"CASE WHEN {_NUMBER} = floor({_NUMBER}) AND abs({_NUMBER}) < 2147483647 THEN CAST({_NUMBER} AS INTEGER) END"
"""4.0 is an integer, 4.5 is not."""


def as_integer(name: str) -> str:
    """SQL: BIGINT of an int64 in canonical decimal notation, else NULL."""
    integer = f"TRY_CAST({name} AS BIGINT)"
    return f"CASE WHEN CAST({integer} AS VARCHAR) = CAST({name} AS VARCHAR) THEN {integer} END"


def number_value(value: str) -> str:
    """SQL: FLOAT; NULL for an empty value and NaN (also as text), NaN for other text and beyond float32."""
    number = f"TRY_CAST({value} AS DOUBLE)"
    missing = f"{value} IS NULL OR trim(CAST({value} AS VARCHAR)) = '' OR coalesce(isnan({number}), false)"
    fits = f"coalesce(abs({number}) <= {_LARGEST}, false)"
    return f"CASE WHEN {missing} THEN NULL WHEN {fits} THEN CAST({number} AS FLOAT) ELSE 'nan'::FLOAT END"


def vector_value(value: str, elements: str) -> str:
    """SQL: FLOAT[] of a list of numbers or texts; NULL if ``value`` is empty, [NaN] if it is unusable."""
    numbers = f"[{number_value('x')} FOR x IN {elements}]"
    is_missing = f"{value} IS NULL OR trim(CAST({value} AS VARCHAR)) IN ('', '[]')"
    has_gaps = f"len([y FOR y IN {numbers} IF y IS NULL OR isnan(y)]) > 0"
    return f"CASE WHEN {is_missing} THEN NULL WHEN {has_gaps} THEN ['nan'::FLOAT] ELSE {numbers} END"
