"""Features of the items: a pass over their table and one over the events find the values; arrays take their codes.

Values are written at the codes of their items, in any order, so that nothing has to be sorted by item.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator

import numpy as np

from hstu.base.errors import DataError
from hstu.data.datasets.raw import literal
from hstu.data.datasets.spec import UNKNOWN
from hstu.data.preprocess.engine import one, write_parquet
from hstu.data.preprocess.features import feature_value, write_vocabulary
from hstu.data.preprocess.state import BuildState

_log = logging.getLogger(__name__)
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
