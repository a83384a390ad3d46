"""Features of items and of events: their vocabularies, their codes, ranges of numbers, and numbers."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping

import numpy as np

from hstu.config.errors import DataError
from hstu.data.datasets.raw import literal, parquet_rows
from hstu.data.datasets.spec import UNKNOWN
from hstu.data.preprocess.engine import column, one, write_parquet
from hstu.data.preprocess.state import BuildState

_log = logging.getLogger(__name__)

_MANY_NUMBERS = 100
"""A feature with more different numbers than this is probably a quantity."""
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
_LEAST_TEXTS, _LOOKED_AT = 10, 10_000
"""How many different values show whether a column holds lists."""
_PROBABLE_SEPARATORS = "|;,"
_NAN = "'nan'::FLOAT"
_NUMBERS_PER_CHUNK = 1 << 20


def write_item_features(state: BuildState) -> None:
    """Writes codes and vocabularies of the items' features: "unknown" where an item has no row or no value."""
    for name, feature in state.item_features().items():
        source = state.typed_items() if name not in state.raw.event_items else state.events()
        assert source is not None
        if name in state.numbers():
            _write_item_numbers(state, name, feature, source)
            continue
        is_list = str(state.engine.sql(f"SELECT {name} FROM {source}").types[0]).endswith("[]")
        values = _item_values(state, name, source, is_list)
        each = _flattened(values) if is_list else f"(SELECT *, 0 AS place FROM {values})"
        value = _value(state, feature, name, "value", each)
        number = _write_vocabulary(state, feature, name, f"SELECT {value} AS id FROM {each}")
        codes = column(
            state.engine,
            f"""SELECT CAST(v.code AS INTEGER) FROM (SELECT "row", place, {value} AS id FROM {each}) e
            JOIN {state.codes(f"vocabulary_{name}")} v ON e.id = v.id ORDER BY "row", place""",
        )
        lengths = column(state.engine, f'SELECT len(value) FROM {values} ORDER BY "row"') if is_list else None
        offsets = None if lengths is None else np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
        state.writer.write_item_feature(feature, codes, cardinality=number, offsets=offsets)


def write_event_vocabularies(state: BuildState) -> dict[str, tuple[int, str]]:
    """Writes the vocabularies of the events' features. Returns e0, e1, … → (cardinality, SQL of an event's value)."""
    found = {}
    for name, feature in state.event_features().items():
        if name in state.numbers():
            continue
        value = _value(state, feature, name, f"coalesce(nullif({name}, ''), {literal(UNKNOWN)})", state.events())
        found[name] = (_write_vocabulary(state, feature, name, f"SELECT {value} AS id FROM {state.events()}"), value)
    return found


def check_items(state: BuildState) -> dict[str, int]:
    """Warns of items without a row in the table of items and of rows that disagree; returns their numbers.

    Raises DataError where no item has a row.
    """
    rows = state.typed_items()
    if rows is None:
        return {}
    engine, items = state.engine, state.codes("items")
    file = state.raw.item_table[0].path if state.raw.item_table else state.raw.title_file
    known = f"SELECT item FROM {rows} WHERE item IS NOT NULL"
    without, total, example = one(
        engine, f"SELECT count(*) FILTER (WHERE id NOT IN ({known})), count(*), min(id) FROM {items}"
    )
    names = [name for name in state.item_features() if name not in state.raw.event_items]
    values = ", ".join(f"{name} := {name}" for name in names)
    repeated, other = one(
        engine,
        f"""SELECT count(*), min(item) FROM (SELECT item FROM {rows} WHERE item IS NOT NULL
        GROUP BY item HAVING count(DISTINCT struct_pack({values})) > 1)""",
    )
    if without == total and state.raw.item_table:
        (theirs,) = one(engine, f"SELECT min(item) FROM {rows}")
        raise DataError(
            f"{file} has no row for any of the {total:,} items of the events: it has items such as {theirs!r}, the "
            f"events have items such as {example!r}. Give the table of these items"
        )
    if without:
        missing = ", and their numbers missing" if state.numbers() else ""
        _log.warning('%s has no row for %d of %d items: their features are "%s"%s',
                     file, without, total, UNKNOWN, missing)  # fmt: skip
    if repeated:
        _log.warning("%s has several rows with different values for %d items, such as %r: the first counts",
                     file, repeated, other)  # fmt: skip
    return {"items_without_row": without, "items_with_different_rows": repeated}


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
        _log.warning(
            "column %r has %d different numbers, and each of them becomes a category of its own; --bins %s=10 groups "
            "them into 10 ranges%s",
            feature,
            len(vocabulary),
            feature,
            "" if of_users else f", and --numbers {feature} takes them as quantities",
        )


def _write_item_numbers(state: BuildState, name: str, feature: str, source: str) -> None:
    """Writes the numbers or the vector of each item, NaN where an item has no row or no value."""
    width = state.width(name)
    items = int(one(state.engine, f"SELECT count(*) FROM {state.codes('items')}")[0])
    array = state.writer.create_item_numbers(feature, width=width, items=items)
    missing = _NAN if feature in state.schema.numbers else f"[{', '.join([_NAN] * width)}]"
    rows = _first_rows(state, name, source, f"{name} IS NOT NULL")
    query = f"""SELECT coalesce({name}, {missing}) AS value
        FROM {state.codes("items")} i LEFT JOIN ({rows}) f ON i.id = f.item ORDER BY i.code"""
    start = 0
    for batch in state.engine.sql(query).to_arrow_reader(max(_NUMBERS_PER_CHUNK // width, 1)):
        values = batch.column("value")
        numbers = (values if feature in state.schema.numbers else values.flatten()).to_numpy()
        array[start : start + len(numbers)] = numbers
        start += len(numbers)
    array.flush()
    if np.isnan(array.reshape(-1, width)[:, 0]).all():
        raise DataError(f"no item of the events has a value of {feature!r}; leave it out")


def _first_rows(state: BuildState, name: str, source: str, has_value: str) -> str:
    """SQL of item and value: that of the item's first row or, in the events, of its first event that has one."""
    if name in state.raw.event_items:
        first, order = f"{source} WHERE {has_value}", state.order()
    else:
        first, order = f"{source} WHERE item IS NOT NULL", '"row"'
    return f"SELECT item, {name} FROM {first} QUALIFY row_number() OVER (PARTITION BY item ORDER BY {order}) = 1"


def _item_values(state: BuildState, name: str, source: str, is_list: bool) -> str:
    """Writes a value per item, in the order of codes; returns SQL of "row", which is the code, and "value"."""
    has_value = f"len({name}) > 0" if is_list else f"{name} <> ''"
    rows = _first_rows(state, name, source, has_value)
    unknown = f"[{literal(UNKNOWN)}]" if is_list else literal(UNKNOWN)
    query = f"""SELECT CASE WHEN {has_value} THEN {name} ELSE {unknown} END AS value
        FROM {state.codes("items")} i LEFT JOIN ({rows}) f ON i.id = f.item ORDER BY i.code"""
    write_parquet(state.engine, query, state.file(f"values_{name}"))
    return state.numbered(f"values_{name}")


def _flattened(lists: str) -> str:
    return f'(SELECT "row", unnest(value) AS value, generate_subscripts(value, 1) AS place FROM {lists})'


def _value(state: BuildState, feature: str, name: str, value: str, relation: str) -> str:
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


def _write_vocabulary(state: BuildState, feature: str, name: str, values: str) -> int:
    """Writes the different values of a query's ``id``, ascending; the row number is the code. Returns their number."""
    table, journal = f"vocabulary_{name}", state.writer.journal
    if table not in journal:
        journal.commit(
            table, write_parquet(state.engine, f"SELECT DISTINCT id FROM ({values}) ORDER BY 1", state.file(table))
        )
    vocabulary = column(
        state.engine, f"SELECT id FROM {parquet_rows(state.file(table), numbered=True)} ORDER BY file_row_number"
    )
    state.writer.write_vocabulary(feature, vocabulary)
    if state.raw.resolve_types is not None:  # whoever describes a built-in dataset has decided
        warn_of_numbers(feature, vocabulary)
    if name.startswith("i") and feature not in state.schema.lists and state.raw.resolve_types is not None:
        _hint_at_lists(feature, vocabulary[:_LOOKED_AT].tolist())
    return int(journal[table])


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
