"""Last stages: users and items are numbered, and the store's arrays are filled one bucket of users at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import count, pairwise
from typing import Any

import numpy as np

from hstu.base.errors import DataError
from hstu.data.datasets.raw import literal
from hstu.data.datasets.spec import SPLIT_NAMES, UNKNOWN, USER_FEATURE
from hstu.data.preprocess.engine import column, memory_bytes, one, write_parquet
from hstu.data.preprocess.features import ranges_of, warn_of_numbers, write_event_vocabularies
from hstu.data.preprocess.state import NUMBERING, WRITING, BuildState

ROWS_PER_CHUNK = 1 << 20
_SORT_BYTES_PER_ROW = 400
"""Upper bound of the memory per row of a bucket while it is joined and sorted."""
_FEATURE_BYTES_PER_ROW = 60
"""The same for each feature of the events."""


def number_users_and_items(state: BuildState) -> tuple[np.ndarray, int]:
    """Writes the files users and items (id, events), ascending in id; the row number is the code.

    Returns the number of events of each user, int64 [U], and the number of items.
    """
    journal, effort = state.writer.journal, NUMBERING * state.progress.unit
    for name in ("user", "item"):
        stage = f"{name}s"
        if stage in journal:
            state.progress.skip(effort / 2)
            continue
        query = f'SELECT "{name}" AS id, count(*) AS events FROM {state.events()} GROUP BY 1'
        further = [table for table in (state.all_items(), state.raw.requests and state.candidates()) if table]
        if name == "item" and further:
            every = " UNION ALL ".join([query, *(f"SELECT DISTINCT item, 0 FROM {table}" for table in further)])
            query = f"SELECT id, CAST(sum(events) AS BIGINT) AS events FROM ({every}) GROUP BY 1"
        with state.progress.stage(f"counting {stage}", effort / 2, state.engine):
            journal.commit(stage, write_parquet(state.engine, f"{query} ORDER BY 1", state.file(stage)))
    lengths = column(state.engine, f"SELECT events FROM {state.codes('users')} ORDER BY code")
    return lengths, journal["items"]


def items_with_events(state: BuildState) -> int:
    """How many of the items have events."""
    return int(one(state.engine, f"SELECT count(*) FROM {state.codes('items')} WHERE events > 0")[0])


def write_vocabularies(state: BuildState, num_users: int, num_items: int) -> None:
    """Writes the raw ids of users and items, the texts of actions, and the items' titles."""
    state.writer.write_vocabulary(USER_FEATURE, _ids(state, "users", num_users))
    state.writer.write_vocabulary(state.schema.item, _ids(state, "items", num_items))
    if state.schema.action and (labels := state.labels()):
        state.writer.write_vocabulary(state.schema.action, np.array(labels, dtype=object))
    if (titles := state.typed_titles()) is not None:
        state.writer.write_titles(column(state.engine, _title_values(state, titles)))
    elif state.raw.titles is not None:
        raw_items = _ids(state, "items", num_items).tolist()
        state.writer.write_titles([state.raw.titles.get(raw_id, "") for raw_id in raw_items])


def keep_raw_ids(state: BuildState) -> None:
    """Marks the features whose raw ids models get. Raises DataError for ids that are strings."""
    features = {"item": ("items", state.schema.item), "user": ("users", USER_FEATURE)}
    for role in state.options.raw_ids:
        table, feature = features[role]
        if str(state.engine.sql(f"SELECT id FROM {state.codes(table)}").types[0]) != "BIGINT":
            raise DataError(f"--raw_ids {role}: the ids of {feature!r} are text, and raw ids are int64; leave it out")
        state.writer.keep_raw_ids(feature)


def write_context(state: BuildState, num_users: int) -> None:
    """Writes codes and vocabularies of the contextual features: "unknown" where a user has no row or an empty value."""
    columns = (f"c{index}" for index in count())
    for feature in state.schema.context:
        if feature == USER_FEATURE:
            state.writer.write_context(feature, np.arange(num_users), cardinality=num_users)
            continue
        name = next(columns)
        first_values = _first_of_events(state, name) if name in state.raw.event_context else _first_rows(state, name)
        values = column(state.engine, _context_values(state, name, first_values))
        if feature in state.schema.bins:
            values = binned(feature, values, state.schema.bins[feature])
        vocabulary, codes = np.unique(values, return_inverse=True)
        warn_of_numbers(feature, vocabulary, of_users=True)
        state.writer.write_context(feature, codes, cardinality=len(vocabulary))
        state.writer.write_vocabulary(feature, vocabulary)


def binned(feature: str, values: np.ndarray, ranges: int) -> np.ndarray:
    """Numbers as text → the range of each as text, such as "18..24"; UNKNOWN stays.

    The ranges have about equally many values; there are fewer where many values are equal.
    """
    known = values != UNKNOWN
    try:
        numbers = values[known].astype(np.float64)
    except ValueError as error:
        raise DataError(f"--bins {feature}={ranges}: not all values are numbers ({error}); leave it out") from None
    if not np.isfinite(numbers).all():
        raise DataError(f"--bins {feature}={ranges}: not all values are finite numbers; leave it out")
    grouped = np.full(len(values), UNKNOWN, dtype=object)
    if len(numbers):
        starts = ranges_of(*np.unique(numbers, return_counts=True), ranges)
        place = np.searchsorted(list(starts.values()), numbers, side="right") - 1
        grouped[known] = np.array(list(starts), dtype=object)[place]
    return grouped


def write_events(state: BuildState, offsets: np.ndarray, num_items: int) -> dict[str, str]:
    """Writes items, actions, times and the features of events. Returns e0, e1, … → SQL of its value.

    Each bucket of users is joined with the codes, sorted, written and committed.
    """
    arrays = _create_arrays(state, num_items, int(offsets[-1]))
    features = {}
    for name, feature in state.event_features().items():
        if name in state.numbers():
            length = int(offsets[-1])
            arrays[name] = state.writer.create_sequence(feature, "event_number", cardinality=None, length=length)
    for name, (cardinality, value) in write_event_vocabularies(state).items():
        feature = state.event_features()[name]
        arrays[name] = state.writer.create_sequence(feature, "event", cardinality=cardinality, length=int(offsets[-1]))
        features[name] = value
    journal = state.writer.journal
    if "buckets" not in journal:
        journal.commit("buckets", bucket_bounds(offsets, rows_per_bucket(state, len(features))))
    bounds = journal["buckets"]
    for number, (begin, end) in enumerate(pairwise(bounds)):
        start, stop = int(offsets[begin]), int(offsets[end])
        effort = WRITING * state.progress.unit * (stop - start) / int(offsets[-1])
        if f"bucket {number}" in journal:
            state.progress.skip(effort)
            continue
        what = f"sorting and writing, part {number + 1} of {len(bounds) - 1}"
        with state.progress.stage(what, effort):
            _write_bucket(state, arrays, features, (begin, end), slice(start, stop))
        for array in arrays.values():
            array.flush()
        journal.commit(f"bucket {number}")
    return features


def rows_per_bucket(state: BuildState, num_features: int) -> int:
    """How many events may be sorted at once."""
    bytes_per_row = _SORT_BYTES_PER_ROW + _FEATURE_BYTES_PER_ROW * num_features
    return memory_bytes(state.options.memory_limit) // bytes_per_row


def bucket_bounds(offsets: np.ndarray, rows: int) -> list[int]:
    """Users [bounds[i], bounds[i + 1]) form a bucket of about ``rows`` events at most; a user is never divided."""
    events = int(offsets[-1])
    wanted = np.linspace(0, events, -(-events // rows) + 1)
    return [int(bound) for bound in np.unique(np.searchsorted(offsets, wanted))]


def _create_arrays(state: BuildState, num_items: int, num_events: int) -> dict[str, np.memmap]:
    schema, create = state.schema, state.writer.create_sequence
    arrays = {"item": create(schema.item, "item", cardinality=num_items, length=num_events)}
    if schema.action:
        cardinality = schema.action_cardinality or _largest_action(state) + 1
        arrays["action"] = create(schema.action, "action", cardinality=cardinality, length=num_events)
    if schema.timestamp:
        arrays["timestamp"] = create(schema.timestamp, "timestamp", cardinality=None, length=num_events)
    return arrays


def _largest_action(state: BuildState) -> int:
    journal = state.writer.journal
    if "largest action" not in journal:
        journal.commit("largest action", int(column(state.engine, f"SELECT max(action) FROM {state.shown_items()}")[0]))
    return int(journal["largest action"])


def _write_bucket(
    state: BuildState,
    arrays: Mapping[str, np.memmap],
    features: Mapping[str, str],
    users: tuple[int, int],
    place: slice,
) -> None:
    """``features``: e0, e1, … → SQL of its value."""
    first, last = _raw_user(state, users[0]), _raw_user(state, users[1] - 1)
    rows = f'SELECT * FROM {state.events()} WHERE "user" BETWEEN ? AND ?'
    write_rows(state, arrays, features, rows, f'"user", {state.order()}', place, [first, last])


def write_rows(
    state: BuildState,
    arrays: Mapping[str, np.memmap],
    features: Mapping[str, str],
    rows: str,
    order: str,
    place: slice,
    parameters: Sequence[Any] = (),
) -> None:
    """Fills a place of ``arrays`` with the rows of a query in ``order``; items and features become codes.

    ``features``: e0, e1, … → SQL of its value.
    """
    coded = {"item": "CAST(i.code AS INTEGER) AS item"}
    coded |= {name: f"CAST({name}_codes.code AS INTEGER) AS {name}" for name in features}
    coded |= {name: f"coalesce(e.{name}, 'nan'::FLOAT) AS {name}" for name in state.numbers()}
    values = ", ".join(coded.get(name, f'e."{name}"') for name in arrays)
    replaced = ", ".join(f"{value} AS {name}" for name, value in features.items())
    valued = f"SELECT * {f'REPLACE ({replaced})' if replaced else ''} FROM ({rows})"
    joins = " ".join(
        f"JOIN {state.codes(f'vocabulary_{name}')} {name}_codes ON e.{name} = {name}_codes.id" for name in features
    )
    found = state.engine.sql(
        f"""SELECT {values} FROM ({valued}) e
        JOIN {state.codes("items")} i ON e.item = i.id {joins} ORDER BY {order}""",
        params=list(parameters),
    )
    start = place.start
    for batch in found.to_arrow_reader(ROWS_PER_CHUNK):
        for name, array in arrays.items():
            array[start : start + batch.num_rows] = batch.column(name).to_numpy(zero_copy_only=False)
        start += batch.num_rows
    if start != place.stop:
        raise RuntimeError(f"{start - place.start} rows instead of {place.stop - place.start} in {place}")


def _raw_user(state: BuildState, code: int) -> Any:
    return one(state.engine, f"SELECT id FROM {state.codes('users')} WHERE code = {code}")[0]


def _ids(state: BuildState, table: str, length: int) -> np.ndarray:
    """The raw ids of a table by code: int64, without ever holding them twice, or str objects."""
    query = f"SELECT id FROM {state.codes(table)} ORDER BY code"
    if str(state.engine.sql(query).types[0]) != "BIGINT":
        return column(state.engine, query)
    ids = np.empty(length, dtype=np.int64)
    start = 0
    for batch in state.engine.sql(query).to_arrow_reader(ROWS_PER_CHUNK):
        ids[start : start + batch.num_rows] = batch.column(0).to_numpy()
        start += batch.num_rows
    return ids


def _context_values(state: BuildState, name: str, first_values: str) -> str:
    """SQL of one value per user, in the order of codes. ``first_values``: SQL of user and value."""
    return f"""SELECT coalesce(nullif(c.{name}, ''), {literal(UNKNOWN)})
        FROM {state.codes("users")} u LEFT JOIN ({first_values}) c ON u.id = c."user" ORDER BY u.code"""


def _first_rows(state: BuildState, name: str) -> str:
    return f"""SELECT "user", {name} FROM {state.typed_context()}
        QUALIFY row_number() OVER (PARTITION BY "user" ORDER BY "row") = 1"""


def _first_of_events(state: BuildState, name: str) -> str:
    """The value of a user's first event that has one, so that a sample never shows what comes after it."""
    return f"""SELECT "user", {name} FROM {state.events()} WHERE {name} <> ''
        QUALIFY row_number() OVER (PARTITION BY "user" ORDER BY {state.order()}) = 1"""


def _title_values(state: BuildState, titles: str) -> str:
    """SQL of one title per item, in the order of codes: that of the item's first row, empty where it has none."""
    first_rows = f"""SELECT item, title FROM {titles}
        QUALIFY row_number() OVER (PARTITION BY item ORDER BY "row") = 1"""
    return f"""SELECT coalesce(t.title, '')
        FROM {state.codes("items")} i LEFT JOIN ({first_rows}) t ON i.id = t.item ORDER BY i.code"""


def write_split(state: BuildState, offsets: np.ndarray) -> None:
    """Writes the bounds, if the data has a split. ``offsets``: int64 [U + 1], the events of each user.

    Raises DataError where a split begins before an earlier one of the same user has ended, and where nothing would be
    trained on or nothing evaluated.
    """
    if state.schema.split is None:
        return
    columns = state.engine.execute(_per_user(state)).fetchnumpy().values()
    users, train, valid, is_mixed = map(np.asarray, columns)
    _check_order(state, users[is_mixed])
    first_valid = offsets[:-1] + train
    first_test = first_valid + valid
    counts = dict(zip(SPLIT_NAMES, (train.sum(), valid.sum(), (offsets[1:] - first_test).sum()), strict=True))
    if not counts["train"] or counts["train"] == offsets[-1]:
        missing = "'valid' or 'test', so there is nothing to evaluate" if counts["train"] else "'train'"
        raise DataError(
            f"--split {state.schema.split}: no event is marked {missing}; correct the column or leave it out"
        )
    state.writer.write_split(state.schema.split, first_valid, first_test)


def _check_order(state: BuildState, mixed: np.ndarray) -> None:
    if not len(mixed):
        return
    order = "in time order" if state.schema.timestamp else "in the order of the rows"
    raise DataError(
        f"--split {state.schema.split}: {len(mixed):,} user(s), the first of them {mixed[0]!s}, have an event of an "
        f"earlier split after one of a later split. Each user's events must be, {order}, first train, then valid, then "
        "test; correct the column or leave it out"
    )


def _per_user(state: BuildState) -> str:
    """SQL of user, number of train events, number of valid events, whether splits overlap; in the order of codes."""
    place = '"time"' if state.schema.timestamp else 'row(part, "row")'
    overlaps = " OR ".join(
        f'coalesce(max({place}) FILTER ("split" < {later}) > min({place}) FILTER ("split" >= {later}), false)'
        for later in (1, 2)
    )
    counts = ", ".join(f'count(*) FILTER ("split" = {number})' for number in (0, 1))
    return f'SELECT "user", {counts}, {overlaps} FROM {state.events()} GROUP BY 1 ORDER BY 1'
