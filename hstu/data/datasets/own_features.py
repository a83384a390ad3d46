"""Features of items and of events in users' own tables: which columns they are, and their values as SQL."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from hstu.base.errors import ConfigError, DataError
from hstu.data.datasets.raw import identifier, literal

SEPARATORS = {"comma": ",", "tab": "\t", "space": " "}
"""Words for separators that a command line cannot show."""
_FRACTIONS = ("FLOAT", "DOUBLE", "DECIMAL")
_LARGEST = "3.4028234e38"
"""Largest float32."""
A_NUMBER = "a finite number, or nothing where it is missing"
A_VECTOR = "finite numbers, equally many in each row, or nothing where it is missing"


def lists_of(text: str) -> dict[str, str]:
    """``genres=|,tags=comma`` → column → what separates its values. Raises ValueError for anything else."""
    pairs = [pair.rpartition("=") for pair in text.split(",") if pair.strip()]
    if not all(column.strip() and separator for column, _, separator in pairs) or text.endswith(","):
        words = ", ".join(SEPARATORS)
        raise ValueError(f"expected columns and separators, as genres=|,tags=;, or the words {words}, not {text!r}")
    return {column.strip(): SEPARATORS.get(separator, separator) for column, _, separator in pairs}


def text_of_lists(lists: Mapping[str, str]) -> str:
    """What lists_of reads."""
    words = {separator: word for word, separator in SEPARATORS.items()}
    return ",".join(f"{column}={words.get(separator, separator)}" for column, separator in lists.items())


def problems_of_lists(lists: Mapping[str, str], item_columns: Sequence[str], bins: Iterable[str]) -> list[str]:
    """What is wrong with the columns that are named as lists."""
    problems = []
    for column, separator in lists.items():
        named = f"--lists {text_of_lists({column: separator})}"
        if column not in item_columns:
            problems.append(f"{named}: {column!r} is not among --item_columns; only items have lists of values")
        if not separator:
            problems.append(f"{named}: say what separates the values, as {column}=|")
        if column in bins:
            problems.append(
                f"{named}: {column!r} is among --bins, too, and ranges are of single numbers; leave one out"
            )
    return problems


def problems_of_numbers(
    numbers: Sequence[str],
    vectors: Sequence[str],
    item_columns: Sequence[str],
    event_columns: Sequence[str],
    bins: Iterable[str],
    lists: Iterable[str],
) -> list[str]:
    """What is wrong with the columns that are named as numbers or vectors."""
    problems = []
    for column in numbers:
        if column not in (*item_columns, *event_columns):
            problems.append(f"--numbers {column}: {column!r} is not among --item_columns or --event_columns")
        if others := [
            f"--{name}" for name, named in (("bins", bins), ("lists", lists), ("vectors", vectors)) if column in named
        ]:
            problems.append(f"--numbers {column}: {column!r} is among {' and '.join(others)}, too; leave one out")
    for column in vectors:
        if column not in item_columns:
            problems.append(f"--vectors {column}: {column!r} is not among --item_columns; only items have vectors")
        if column in bins:
            problems.append(f"--vectors {column}: {column!r} is among --bins, too; leave one out")
    return problems


def numbered(prefix: str, columns: Iterable[str]) -> dict[str, str]:
    """Prefix and place → column: c0, c1, … of users, i0, i1, … of items, e0, e1, … of events."""
    return {f"{prefix}{place}": column for place, column in enumerate(columns)}


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
