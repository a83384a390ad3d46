"""Vocabularies of the features of items and of events, and ranges of numbers."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping

import numpy as np

from hstu.base.errors import DataError
from hstu.data.datasets.raw import literal
from hstu.data.datasets.spec import UNKNOWN
from hstu.data.preprocess.engine import column, one, utf8_column, write_parquet
from hstu.data.preprocess.state import BuildState

_log = logging.getLogger(__name__)

_MANY_NUMBERS = 100
"""A feature with more different numbers than this is probably a quantity."""
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
_LEAST_TEXTS, _LOOKED_AT = 10, 10_000
"""How many different values show whether a column holds lists."""
_PROBABLE_SEPARATORS = "|;,"


def write_event_vocabularies(state: BuildState) -> dict[str, tuple[int, str]]:
    """Writes the vocabularies of the events' features. Returns e0, e1, … → (cardinality, SQL of an event's value)."""
    found = {}
    for name, feature in state.event_features().items():
        if name in state.numbers():
            continue
        rows = state.shown_items()
        value = feature_value(state, feature, name, f"coalesce(nullif({name}, ''), {literal(UNKNOWN)})", rows)
        found[name] = (write_vocabulary(state, feature, name, f"SELECT {value} AS id FROM {rows}"), value)
    return found


def ranges_of(numbers: np.ndarray, counts: np.ndarray, ranges: int) -> dict[str, float]:
    """Name of a range, such as "18..24" → its first number, ascending; with about equally many values in each.

    Args:
        numbers: float64, different and ascending.
        counts: how often each occurs.
        ranges: at most so many; there are fewer where many values are equal.
    """
    ends = np.cumsum(counts)
    if not len(ends):
        return {}
    places = np.ceil((ends[-1] - 1) * (np.arange(ranges) / ranges))
    starts = np.unique(np.searchsorted(ends, places, side="right"))
    lasts = [*(starts[1:] - 1), len(numbers) - 1]
    found: dict[str, float] = {}
    for start, last in zip(starts, lasts, strict=True):
        found.setdefault(_range_name(numbers[start], numbers[last]), float(numbers[start]))
    return found


def warn_of_numbers(feature: str, vocabulary: np.ndarray, *, of_users: bool = False) -> None:
    """Logs a warning where a feature is probably a quantity."""
    if len(vocabulary) > _MANY_NUMBERS and all(_NUMBER.fullmatch(value) for value in vocabulary if value != UNKNOWN):
        _log_numbers(
            feature, len(vocabulary), "" if of_users else f", and --numbers {feature} takes them as quantities"
        )


def feature_value(state: BuildState, feature: str, name: str, value: str, relation: str) -> str:
    """SQL of a value as the vocabulary has it: the value itself, or the range that its number is in."""
    if feature not in state.schema.bins:
        return value
    journal = state.writer.journal
    stage = f"ranges {name}"
    if stage not in journal:
        journal.commit(stage, _find_ranges(state, feature, f"(SELECT {value} AS value FROM {relation})"))
    found: Mapping[str, float] = journal[stage]
    number = f"TRY_CAST({value} AS DOUBLE)"
    cases = [f"WHEN {number} >= CAST('{start!r}' AS DOUBLE) THEN {literal(key)}" for key, start in found.items()][::-1]
    return f"CASE WHEN {value} = {literal(UNKNOWN)} THEN {value} {' '.join(cases)} ELSE {value} END"


def _find_ranges(state: BuildState, feature: str, values: str) -> dict[str, float]:
    ranges = state.schema.bins[feature]
    known = f"FROM {values} WHERE value <> {literal(UNKNOWN)}"
    number = "TRY_CAST(value AS DOUBLE)"
    (bad,) = one(state.engine, f"SELECT min(value) {known} AND NOT coalesce(isfinite({number}), false)")
    if bad is not None:
        raise DataError(f"--bins {feature}={ranges}: not all values are finite numbers, such as {bad!r}; leave it out")
    query = f"SELECT {number} AS number, count(*) AS count {known} GROUP BY 1 ORDER BY 1"
    found = state.engine.execute(query).fetchnumpy()
    return ranges_of(np.asarray(found["number"]), np.asarray(found["count"]), ranges)


def _range_name(start: float, end: float) -> str:
    return f"{start:.15g}" if start == end else f"{start:.15g}..{end:.15g}"


def write_vocabulary(state: BuildState, feature: str, name: str, values: str) -> int:
    """Writes the different values of a query's ``id``, ascending; the row number is the code. Returns their number."""
    table, journal = f"vocabulary_{name}", state.writer.journal
    if table not in journal:
        journal.commit(
            table, write_parquet(state.engine, f"SELECT DISTINCT id FROM ({values}) ORDER BY 1", state.file(table))
        )
    vocabulary, number = state.codes(table), int(journal[table])
    state.writer.write_text_vocabulary(
        feature, *utf8_column(state.engine, f"SELECT id FROM {vocabulary} ORDER BY code")
    )
    if state.raw.resolve_types is not None:  # whoever describes a built-in dataset has decided
        _warn_of_values(state, feature, vocabulary, number)
        if name.startswith("i") and feature not in state.schema.lists:
            first = f"SELECT id FROM {vocabulary} ORDER BY code LIMIT {_LOOKED_AT}"
            _hint_at_lists(feature, column(state.engine, first).tolist())
    return number


def _warn_of_values(state: BuildState, feature: str, vocabulary: str, number: int) -> None:
    if number > _MANY_NUMBERS:
        are_numbers = f"bool_and(regexp_full_match(id, {literal(_NUMBER.pattern)}))"
        (only,) = one(state.engine, f"SELECT {are_numbers} FROM {vocabulary} WHERE id <> {literal(UNKNOWN)}")
        if only:
            _log_numbers(feature, number, f", and --numbers {feature} takes them as quantities")


def _log_numbers(feature: str, number: int, alternative: str) -> None:
    _log.warning(
        "column %r has %d different numbers, and each of them becomes a category of its own; --bins %s=10 groups them "
        "into 10 ranges%s",
        feature,
        number,
        feature,
        alternative,
    )


def _hint_at_lists(feature: str, values: list[str]) -> None:
    """Logs a hint where most values seem to consist of fewer others."""
    if len(values) < _LEAST_TEXTS:
        return
    for separator in _PROBABLE_SEPARATORS:
        parts = {part for value in values for part in value.split(separator)}
        if sum(separator in value for value in values) > len(values) / 2 and len(parts) < len(values):
            shown = "comma" if separator == "," else separator
            _log.warning("column %r may hold lists, such as %r; --lists '%s=%s' splits them",
                         feature, values[len(values) // 2], feature, shown)  # fmt: skip
            return
