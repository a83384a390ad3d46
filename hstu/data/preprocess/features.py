"""Features of events and of items: vocabularies, ranges of numbers, and the arrays of items.

A pass over the table of items and one over the events find the values of items. They are written at the codes of their
items, in any order, so that nothing has to be sorted by item.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping

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


_ROWS_PER_CHUNK = 1 << 20
_OF_TABLE, _OF_EVENTS, _REPEATED = "values_of_items", "values_of_events", "repeated_items"
"""Working files: code and values of each item that has any, and the items that have several rows."""


def check_items(state: BuildState) -> dict[str, int]:
    """Reads the table of items. Warns of items without a row and of rows that disagree; returns their numbers.

    Raises DataError where no item has a row.
    """
    rows = state.typed_items()
    if rows is None:
        return {}
    engine, total = state.engine, state.writer.journal["items"]
    file = state.raw.item_table[0].path if state.raw.item_table else state.raw.title_file
    names = [name for name in state.item_features() if name not in state.raw.event_items]
    repeated, other = _write_values_of_table(state, rows, names)
    (known,) = one(engine, f"SELECT count(*) FROM {state.numbered(_OF_TABLE)}")
    without = total - known
    if known == 0 and state.raw.item_table:
        (theirs,) = one(engine, f"SELECT min(item) FROM {rows}")
        (example,) = one(engine, f"SELECT min(id) FROM {state.codes('items')}")
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


def write_item_features(state: BuildState) -> None:
    """Writes the features of the items, which check_items has read: "unknown" or NaN where an item has no value."""
    _write_values_of_events(state, [name for name in state.item_features() if name in state.raw.event_items])
    for name, feature in state.item_features().items():
        rows = state.numbered(_OF_EVENTS if name in state.raw.event_items else _OF_TABLE)
        if name in state.numbers():
            _write_numbers(state, name, feature, rows)
        else:
            _write_categories(state, name, feature, rows)


def _write_values_of_table(state: BuildState, rows: str, names: list[str]) -> tuple[int, object]:
    """Writes the first row of each item. Returns how many items have rows that differ, and one of them."""
    engine, columns = state.engine, ", ".join(["item", *names])
    several = f"SELECT item FROM {rows} WHERE item IS NOT NULL GROUP BY item HAVING count(*) > 1"
    first, differ = f"SELECT {columns} FROM {rows}", (0, None)
    if write_parquet(engine, several, state.file(_REPEATED)):
        repeated = state.numbered(_REPEATED)
        values = ", ".join(f"{name} := {name}" for name in names)
        differ = one(
            engine,
            f"""SELECT count(*), min(item) FROM (SELECT item FROM {rows} f SEMI JOIN {repeated} r ON f.item = r.item
            GROUP BY item HAVING count(DISTINCT struct_pack({values})) > 1)""",
        )
        first = f"""SELECT {columns} FROM {rows} f ANTI JOIN {repeated} r ON f.item = r.item
            UNION ALL SELECT {columns} FROM {rows} f SEMI JOIN {repeated} r ON f.item = r.item
            QUALIFY row_number() OVER (PARTITION BY item ORDER BY "row") = 1"""
    _write_by_code(state, first, names, _OF_TABLE)
    return differ[0], differ[1]


def _write_values_of_events(state: BuildState, names: list[str]) -> None:
    """Writes the values of those features that events hold: of each, the first that an item has."""
    if not names:
        return
    events, moment = state.shown_items(), f"row({state.order()})"
    present = {name: _has_value(state, name, events) for name in names}
    firsts = [f"arg_min({name}, {moment}) FILTER (WHERE {given}) AS {name}" for name, given in present.items()]
    _write_by_code(state, f"SELECT item, {', '.join(firsts)} FROM {events} GROUP BY item", names, _OF_EVENTS)


def _write_by_code(state: BuildState, rows: str, names: list[str], file: str) -> None:
    columns = ", ".join(["i.code", *(f"f.{name}" for name in names)])
    query = f"SELECT {columns} FROM ({rows}) f JOIN {state.codes('items')} i ON f.item = i.id"
    write_parquet(state.engine, query, state.file(file))


def _write_categories(state: BuildState, name: str, feature: str, rows: str) -> None:
    engine, items, given = state.engine, int(state.writer.journal["items"]), _has_value(state, name, rows)
    is_list = _is_list(state, name, rows)
    each = f"(SELECT code, {name} AS value, 0 AS place FROM {rows} WHERE {given})"
    if is_list:
        values = f"unnest({name}) AS value, generate_subscripts({name}, 1) - 1 AS place"
        each = f"(SELECT code, {values} FROM {rows} WHERE {given})"
    value = feature_value(state, feature, name, "value", each)
    (present,) = one(engine, f"SELECT count(*) FROM {rows} WHERE {given}")
    values = f"SELECT {value} AS id FROM {each}"
    if present < items:
        values += f" UNION ALL SELECT {literal(UNKNOWN)}"
    number = write_vocabulary(state, feature, name, values)
    vocabulary = state.codes(f"vocabulary_{name}")
    codes = f"""SELECT e.code, e.place, CAST(v.code AS INTEGER) AS value
        FROM (SELECT code, place, {value} AS id FROM {each}) e JOIN {vocabulary} v ON e.id = v.id"""
    offsets = None
    if is_list:
        lengths = f"SELECT code, len({name}) AS value FROM {rows} WHERE {given}"
        offsets = state.writer.create_list_offsets(feature, items=items)
        offsets[0], offsets[1:] = 0, 1
        for batch in _batches(state, lengths):
            offsets[1 + batch["code"]] = batch["value"]
        np.cumsum(offsets, out=offsets)
    length = items if offsets is None else int(offsets[-1])
    array = state.writer.create_sequence(feature, "item_feature", cardinality=number, length=length)
    if present < items:
        (array[:],) = one(engine, f"SELECT code FROM {vocabulary} WHERE id = {literal(UNKNOWN)}")
    for batch in _batches(state, codes):
        places = batch["code"] if offsets is None else offsets[batch["code"]] + batch["place"]
        array[places] = batch["value"]


def _write_numbers(state: BuildState, name: str, feature: str, rows: str) -> None:
    """Writes the number or the vector of each item, NaN where an item has no row or no value."""
    width, items = state.width(name), int(state.writer.journal["items"])
    array = state.writer.create_item_numbers(feature, width=width, items=items)
    array[:] = np.nan
    by_item, found = array.reshape(items, width), 0
    query = f"SELECT code, {name} AS value FROM {rows} WHERE {name} IS NOT NULL"
    for batch in _batches(state, query, rows_per_batch=max(_ROWS_PER_CHUNK // width, 1)):
        by_item[batch["code"]] = batch["value"].reshape(-1, width)
        found += len(batch["code"])
    array.flush()
    if not found:
        raise DataError(f"no item of the events has a value of {feature!r}; leave it out")


def _has_value(state: BuildState, name: str, rows: str) -> str:
    """SQL of whether a row has a value of a feature."""
    if name in state.numbers():
        return f"{name} IS NOT NULL"
    return f"len({name}) > 0" if _is_list(state, name, rows) else f"{name} <> ''"


def _is_list(state: BuildState, name: str, rows: str) -> bool:
    return str(state.engine.sql(f"SELECT {name} FROM {rows}").types[0]).endswith("[]")


def _batches(state: BuildState, query: str, rows_per_batch: int = _ROWS_PER_CHUNK) -> Iterator[dict[str, np.ndarray]]:
    """Column → values of some rows after others; the numbers of vectors one after another."""
    for batch in state.engine.sql(query).to_arrow_reader(rows_per_batch):
        columns = {name: batch.column(name) for name in batch.schema.names}
        yield {
            name: (values.flatten() if hasattr(values, "flatten") and values.type.num_fields else values).to_numpy(
                zero_copy_only=False
            )
            for name, values in columns.items()
        }
