"""The earlier store of a build that adds events to it (--append) or removes users from it (--forget): the *base*.

Its users, items and values become DuckDB tables beside the new ones, so that the stages number the union of both:

    base_users, base_items   the rows that stay: ``id``, ``events`` (of an item: 1 or 0), ``first`` (the second of a
                             user's first event), the values c0, i0, … that no new table replaces, and ``title``; NULL
                             where unknown
    base_e0, …               ``id`` and ``code`` in the base of the values that the events of the base have
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow

from hstu.base.errors import DataError
from hstu.base.ids import codes_of
from hstu.data.datasets.raw import literal
from hstu.data.datasets.spec import UNKNOWN, USER_FEATURE
from hstu.data.preprocess.state import Build, columns_of
from hstu.data.store.sequence_store import SequenceStore

_BLOCK = 1 << 22


def show_no_events(build: Build) -> None:
    """Create an empty view of events, for a build without new files."""
    schema, store = build.schema, build.earlier.store
    kinds = {"item": store.item_feature, "user": USER_FEATURE}
    columns = {name: "VARCHAR" if is_text(store, feature) else "BIGINT" for name, feature in kinds.items()}
    columns |= dict.fromkeys(("action", "time", "timestamp", "split", "part", "source_row"), "BIGINT")
    columns |= {name: "FLOAT" if name in schema.quantities() else "VARCHAR" for name in schema.of_events()}
    selected = ", ".join(f'CAST(NULL AS {kind}) AS "{name}"' for name, kind in columns.items())
    build.engine.view("events", f"SELECT {selected} WHERE false")


def is_text(store: SequenceStore, feature: str) -> bool:
    """Whether the raw ids of a feature are text."""
    return len(store.raw_id_arrays(feature)) > 1


def show_base(build: Build) -> None:
    """Create base_users, base_items and base_e0, …"""
    store, schema = build.earlier.store, build.schema
    lengths = np.diff(store.offsets()).astype(np.int32)
    lengths[build.earlier.forgotten] = 0
    users = {"events": _arrow(lengths)}
    build.earlier.events["user"] = np.where(lengths > 0, lengths, -1)
    if store.timestamp_feature:
        users["first"] = _arrow(store.sequence(store.timestamp_feature)[store.offsets()[:-1]])
    used = used_values(build, store.item_feature, of_candidates=False).astype(np.int32)
    items = {"events": _arrow(used)}
    build.earlier.events["item"] = used if used.all() or _keeps_items_without_events(build) else used * 2 - 1
    if "titles" not in build.raw.tables and (titles := store.titles()) is not None:
        items["title"] = _arrow(titles)
    _show_owners(build, "user", USER_FEATURE, users, schema.of_users())
    _show_owners(build, "item", store.item_feature, items, schema.of_items())
    for name, feature in schema.of_events().items():
        if name not in schema.quantities():
            used = used_values(build, feature)
            columns = {"used": _arrow(used), "code": _arrow(np.arange(len(used)))}
            _register(build, f"base_{name}_values", feature, columns)
            build.engine.view(f"base_{name}", f"SELECT id, code FROM base_{name}_values WHERE used = 1")


def _show_owners(
    build: Build, owner: str, ids: str, columns: Mapping[str, pyarrow.Array], features: Mapping[str, str]
) -> None:
    stored = {name: feature for name, feature in features.items() if build.keeps(name)}
    values = {name: _values_of(build.earlier.store, feature) for name, feature in stored.items()}
    _register(build, f"base_{owner}_rows", ids, {**columns, **values})
    (kind,) = build.engine.sql(f'SELECT "{owner}" FROM events').types
    selected = [f"CAST(id AS {kind}) AS id", *columns]
    for name, feature in stored.items():
        meta = build.earlier.store.features[feature]
        first = f"{name}[1]" if meta.width > 1 else name
        unknown = f"[{literal(UNKNOWN)}]" if meta.is_list else literal(UNKNOWN)
        is_known = f"NOT isnan({first})" if meta.role == "item_number" else f"{name} <> {unknown}"
        selected.append(f"CASE WHEN {is_known} THEN {name} END AS {name}")
    stays = "true" if owner == "item" and _keeps_items_without_events(build) else "events > 0"
    build.engine.view(f"base_{owner}s", f"SELECT {', '.join(selected)} FROM base_{owner}_rows WHERE {stays}")


def number_with_base(build: Build, name: str, new: str) -> np.ndarray:
    """Show the table users or items of a build with a base, and its rows of the new files, new_users or new_items. Fill
    Base.codes. ``new``: SQL of ``id`` and ``events``, ascending. Returns the ids of all rows.
    DuckDB would sort and join all of them, of which most are of the base."""
    store, feature = build.earlier.store, USER_FEATURE if name == "user" else build.schema.item
    known, events = store.raw_ids(feature), build.earlier.events[name]
    places = np.flatnonzero(stays := events >= 0)
    if not stays.all():
        known, events = known[stays], events[stays]
    ids, counts = columns_of(build.engine, new)
    if known.dtype != ids.dtype:  # integers in the base, text in the new files
        known = known.astype(str).astype(object)
        order = np.argsort(known)
        known, events, places = known[order], events[order], places[order]
    place, is_new = np.searchsorted(known, ids), codes_of(ids, known) < 0
    events[place[~is_new]] += counts[~is_new]
    rows = place + np.cumsum(is_new) - is_new  # of the new files
    place, every = place[is_new], np.arange(len(known) + is_new.sum(), dtype=np.int32)
    known, events = np.insert(known, place, ids[is_new]), np.insert(events, place, counts[is_new])
    every_row = {"id": known, "code": every, "events": events}
    for table, columns in ((f"{name}s", every_row), (f"new_{name}s", {"id": ids, "code": rows})):
        build.engine.register(table, pyarrow.table({key: _arrow(values) for key, values in columns.items()}))
    build.earlier.codes[name] = np.full(len(stays), -1, dtype=np.int32)
    build.earlier.codes[name][places] = np.delete(every, rows[is_new])
    return known


def _keeps_items_without_events(build: Build) -> bool:
    """Whether no new file says which items without events there are."""
    from_tables = build.options.all_items and not build.raw.tables.keys() & {"titles", "item_table"}
    return from_tables or (build.earlier.store.num_requests > 0 and not build.raw.requests)


def _register(build: Build, table: str, ids: str, columns: Mapping[str, pyarrow.Array]) -> None:
    build.engine.register(table, pyarrow.table({"id": _texts(build.earlier.store, ids), **columns}))


def _arrow(values: np.ndarray) -> pyarrow.Array:
    """Numbers without a copy, or texts. Of numbers, pyarrow.array would import pandas, which takes 0.2 s."""
    if values.dtype == object:
        return pyarrow.array(values, type=pyarrow.large_string())
    values = np.ascontiguousarray(values, dtype=np.int8 if values.dtype == bool else None)
    kind = pyarrow.from_numpy_dtype(values.dtype)
    return pyarrow.Array.from_buffers(kind, len(values), [None, pyarrow.py_buffer(values)])


def _texts(store: SequenceStore, feature: str) -> pyarrow.Array:
    """Code → raw id, without a copy."""
    arrays = store.raw_id_arrays(feature)
    if len(arrays) == 1:
        return _arrow(arrays[0])
    buffers = [None, *(pyarrow.py_buffer(array) for array in arrays)]
    return pyarrow.Array.from_buffers(pyarrow.large_string(), len(arrays[0]) - 1, buffers)


def _values_of(store: SequenceStore, feature: str) -> pyarrow.Array:
    """The value of each user or item: text, a number, or a list of either."""
    meta = store.features[feature]
    if meta.role == "context":
        return _texts(store, feature).take(_arrow(store.context(feature)))
    if meta.role == "item_number":
        values, width = _arrow(store.item_numbers(feature).reshape(-1)), meta.width
        bounds = np.arange(0, len(values) + 1, width) if width > 1 else None
    else:
        codes, bounds = store.item_values(feature)
        values = _texts(store, feature).take(_arrow(codes))
    return values if bounds is None else pyarrow.LargeListArray.from_arrays(_arrow(bounds), values)


def used_values(build: Build, feature: str, of_candidates: bool = True) -> np.ndarray:
    """Which values of an item, action or event feature the base has in what stays of it; bool [cardinality]."""
    base, store = build.earlier, build.earlier.store
    size = store.cardinality(feature)
    has_others = store.num_requests > 0 and (not of_candidates or bool(build.raw.requests))
    is_item = feature == store.item_feature
    if not len(base.forgotten) and not has_others and not (is_item and store.statistics.get("items") != size):
        return np.ones(size, dtype=bool)
    used, stays = np.zeros(size, dtype=bool), np.ones(store.num_users, dtype=bool)
    stays[base.forgotten] = False
    parts = [(np.arange(store.num_users), store.offsets(), store.sequence(feature))]
    if of_candidates and store.num_requests and not build.raw.requests:
        parts.append((store.requests().users, store.requests().offsets, store.candidates(feature)))
    for owners, bounds, values in parts:
        for start in range(0, len(values), _BLOCK):
            rows = np.arange(start, min(start + _BLOCK, len(values)))
            owner = owners[np.searchsorted(bounds, rows, side="right") - 1]
            used[values[rows[stays[owner]]]] = True
    return used


def with_base(build: Build, owner: str, names: Sequence[str], rows: str) -> str:
    """SQL of the values of users or items: those that the base has, else those of ``rows``."""
    if build.base is None:
        return rows
    new = set(names) - set(build.raw.kept)
    values = (f"coalesce(b.{name}, f.{name}) AS {name}" if name in new else f"b.{name}" for name in names)
    joined = f'base_{owner}s b FULL JOIN ({rows}) f ON b.id = f."{owner}"'
    return f'SELECT coalesce(b.id, f."{owner}") AS "{owner}", {", ".join(values)} FROM {joined}'


def labels(build: Build) -> list[str]:
    """Texts of the actions 0, 1, …, those of the base included; empty where actions are numbers. Raises DataError if
    only one of the base and the new files has numbers."""
    new: list[str] = build.writer.journal["types"]["labels"] if build.raw.resolve_types else []
    action = build.schema.action
    if build.base is None or not action:
        return new
    store = build.base.store
    old = store.raw_ids(action)[used_values(build, action)].tolist() if store.features[action].has_vocab else []
    if build.raw.logs and bool(old) != bool(new):
        kinds = [f"texts, such as {values[0]!r}" if values else "numbers" for values in (old, new)]
        raise DataError(
            f"{build.raw.logs[0].path}: the actions in {action!r} are {kinds[1]}, and those of {store} are "
            f"{kinds[0]}. Write them alike"
        )
    return sorted({*old, *new})
