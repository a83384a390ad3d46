"""Last stages: number users, items and requests (groups of impressions), and fill arrays one bucket at a time."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import pairwise

import numpy as np

from hstu.base.errors import DataError
from hstu.data.batches.jagged import first_from
from hstu.data.datasets.raw import literal
from hstu.data.datasets.spec import SPLIT_NAMES, USER_FEATURE
from hstu.data.preprocess.base import labels, number_with_base, used_values
from hstu.data.preprocess.features import write_event_vocabularies
from hstu.data.preprocess.merge import Growth
from hstu.data.preprocess.state import ROWS_PER_CHUNK, Build, columns_of, memory_bytes, one
from hstu.data.store.sequence_store import Requests

_log = logging.getLogger(__name__)

_SORT_BYTES_PER_ROW = 400
"""Upper bound of the memory per row while a bucket is joined and sorted."""
_FEATURE_BYTES_PER_ROW = 60
"""Additional memory per row for each event feature."""


def number_users_and_items(build: Build) -> tuple[np.ndarray, int]:
    """Create the tables users and items, ascending in id, and their vocabularies. Returns events per user, int64 [U],
    and the number of items."""
    listed = {"titles": "titles", "item_table": "usable_items"}
    further = [rows for name, rows in listed.items() if name in build.raw.tables and build.options.all_items]
    further += ["candidates"] if build.raw.requests else []
    build.writer.write_vocabulary(USER_FEATURE, _number(build, "user", ()))
    ids = _number(build, "item", further)
    build.writer.write_vocabulary(build.schema.item, ids)
    return columns_of(build.engine, "SELECT events FROM users")[0], len(ids)


def _number(build: Build, name: str, further: Sequence[str]) -> np.ndarray:
    """Create the table users or items, of events and of ``further`` tables. Returns its ids."""
    query = f'SELECT "{name}" AS id, count(*) AS events FROM events GROUP BY 1'
    if further:
        every = [query, *(f'SELECT DISTINCT "{name}", 0 FROM {rows} WHERE "{name}" IS NOT NULL' for rows in further)]
        query = f"SELECT id, CAST(sum(events) AS BIGINT) AS events FROM ({' UNION ALL '.join(every)}) GROUP BY 1"
    query = f"{query} ORDER BY 1"
    if build.base:
        return number_with_base(build, name, query)
    build.table(f"{name}s", query, "code")
    build.engine.view(f"new_{name}s", f"SELECT id, code FROM {name}s")
    return columns_of(build.engine, f"SELECT id FROM {name}s")[0]


def write_vocabularies(build: Build) -> None:
    """Write the texts of actions, and each item's first title."""
    texts = labels(build)
    if build.schema.action and texts:
        build.writer.write_vocabulary(build.schema.action, np.array(texts, dtype=object))
    has_table = "titles" in build.raw.tables
    if has_table or (build.base and build.base.store.titles() is not None):
        first_rows = """SELECT item, title FROM titles
            QUALIFY row_number() OVER (PARTITION BY item ORDER BY source_row) = 1"""
        first_rows = first_rows if has_table else "SELECT id AS item, title FROM base_items"
        query = f"SELECT coalesce(t.title, '') FROM items i LEFT JOIN ({first_rows}) t ON i.id = t.item ORDER BY i.code"
        build.writer.write_strings("titles", *columns_of(build.engine, query))


def keep_raw_ids(build: Build) -> None:
    """Mark the features that models get as raw ids. Raises DataError for string ids."""
    features = {"item": ("items", build.schema.item), "user": ("users", USER_FEATURE)}
    for role in build.options.raw_ids:
        table, feature = features[role]
        if str(build.engine.sql(f"SELECT id FROM {table}").types[0]) != "BIGINT":
            raise DataError(f"--raw_ids {role}: the ids of {feature!r} are text, and raw ids are int64; leave it out")
        build.writer.raw_features.add(feature)


def create_events(build: Build, length: int, num_items: int) -> dict[str, np.memmap]:
    """Create the arrays of items, actions, times and event features, by item, action, timestamp, e0, e1, …, and the
    vocabularies of these features."""
    schema, create = build.schema, build.writer.create_sequence
    arrays = {"item": create(schema.item, "item", cardinality=num_items, length=length)}
    if schema.action:
        query = f"SELECT max(action) FROM {build.shown()}"
        largest = build.once("largest action", lambda: int(one(build.engine, query)[0] or 0))
        if texts := labels(build):
            largest = len(texts) - 1
        elif build.base:
            largest = max(largest, int(np.flatnonzero(used_values(build, schema.action))[-1]))
        cardinality = schema.action_cardinality or largest + 1
        arrays["action"] = create(schema.action, "action", cardinality=cardinality, length=length)
    if schema.timestamp:
        arrays["timestamp"] = create(schema.timestamp, "timestamp", cardinality=None, length=length)
    names = schema.of_events()
    for name in (name for name in names if name in schema.quantities()):
        arrays[name] = create(names[name], "event_number", cardinality=None, length=length)
    for name, cardinality in write_event_vocabularies(build).items():
        arrays[name] = create(names[name], "event", cardinality=cardinality, length=length)
    return arrays


def write_events(build: Build, offsets: np.ndarray, arrays: Mapping[str, np.memmap]) -> None:
    """Fill ``arrays`` with the new events by bucket of users. ``offsets``: int64 [U + 1], of these events."""

    def of_users(begin: int, end: int) -> str:
        ids = [one(build.engine, f"SELECT id FROM users WHERE code = {code}")[0] for code in (begin, end - 1)]
        first, last = (literal(name) if isinstance(name, str) else name for name in ids)
        return f'"user" BETWEEN {first} AND {last}'

    _write_rows(build, "events", offsets, arrays, f'e."user", {build.order()}', of_users)


def _write_rows(
    build: Build,
    table: str,
    offsets: np.ndarray,
    arrays: Mapping[str, np.memmap],
    order: str,
    of_owners: Callable[[int, int], str],
) -> None:
    """Fill ``arrays`` with the rows of a table, as codes in ``order``, by bucket of their owners. ``offsets``: int64
    [owners + 1], of these rows. ``of_owners``: SQL condition of the rows of owners [begin, end)."""
    coded = {"item": "CAST(i.code AS INTEGER) AS item"}
    coded |= {name: f"CAST({name}_codes.code AS INTEGER) AS {name}" for name in build.event_values}
    coded |= {name: f"coalesce(e.{name}, 'nan'::FLOAT) AS {name}" for name in build.schema.quantities()}
    values = ", ".join(coded.get(name, f'e."{name}"') for name in arrays)
    replaced = ", ".join(f"{value} AS {name}" for name, value in build.event_values.items())
    replace = f" REPLACE ({replaced})" if replaced else ""
    joins = " ".join(
        f"JOIN vocabulary_{name} {name}_codes ON e.{name} = {name}_codes.id" for name in build.event_values
    )
    query = f"SELECT {values} FROM bucket e JOIN new_items i ON e.item = i.id {joins} ORDER BY {order}"
    bytes_per_row = _SORT_BYTES_PER_ROW + _FEATURE_BYTES_PER_ROW * len(build.event_values)
    most = build.engine.rows_at_once or memory_bytes(build.options.memory_limit) // bytes_per_row
    buckets = build.once(f"buckets of {table}", lambda: bucket_bounds(offsets, most))

    def write(begin: int, end: int) -> None:
        condition = f" WHERE {of_owners(begin, end)}" if len(buckets) > 2 else ""
        build.engine.view("bucket", f"SELECT *{replace} FROM {table}{condition}")
        start, stop = offsets[begin], offsets[end]
        for batch in build.engine.sql(query).to_arrow_reader(ROWS_PER_CHUNK):
            for name, array in arrays.items():  # to_numpy would import pandas
                array[start : start + batch.num_rows] = np.from_dlpack(batch.column(name))
            start += batch.num_rows
        if start != stop:
            raise RuntimeError(f"{table}: {stop - start} rows are missing before row {stop}")
        for array in arrays.values():
            array.flush()

    for begin, end in pairwise(buckets):
        build.once(f"{table} from {begin}", partial(write, begin, end))


def bucket_bounds(offsets: np.ndarray, rows: int) -> list[int]:
    """Users [bounds[i], bounds[i + 1]) form a bucket of at most about ``rows`` events. Users stay whole."""
    events = int(offsets[-1])
    wanted = np.linspace(0, events, -(-events // rows) + 1)
    return [int(bound) for bound in np.unique(np.searchsorted(offsets, wanted))]


def write_split(build: Build, offsets: np.ndarray, growth: Growth | None) -> None:
    """Write the bounds of the splits, if the data has any. ``offsets``: int64 [U + 1], event offsets of users. Raises
    DataError if splits of a user overlap, and if no event is for training or none for evaluation."""
    schema = build.schema
    if schema.split is None:
        return
    place = '"time"' if schema.timestamp else "row(part, source_row)"
    overlaps = " OR ".join(
        f'coalesce(max({place}) FILTER ("split" < {later}) > min({place}) FILTER ("split" >= {later}), false)'
        for later in (1, 2)
    )
    counted = ", ".join(f'count(*) FILTER ("split" = {number})' for number in (0, 1))
    per_user = f'SELECT "user", {counted}, {overlaps} FROM events GROUP BY 1 ORDER BY 1'
    users, train, valid, is_mixed = columns_of(build.engine, per_user)
    if growth and not is_mixed.any():
        (users,) = columns_of(build.engine, "SELECT id FROM users ORDER BY code")
        train, valid, is_mixed = growth.split_counts()
    if is_mixed.any():
        order = "in time order" if schema.timestamp else "in the order of the rows"
        raise DataError(
            f"--split {schema.split}: {is_mixed.sum():,} user(s), the first of them {users[is_mixed][0]!s}, have an "
            f"event of an earlier split after one of a later split. Each user's events must be, {order}, first train, "
            "then valid, then test; correct the column or leave it out"
        )
    first_valid = offsets[:-1] + train
    first_test = first_valid + valid
    counts = dict(zip(SPLIT_NAMES, (train.sum(), valid.sum(), (offsets[1:] - first_test).sum()), strict=True))
    if not counts["train"] or counts["train"] == offsets[-1]:
        missing = "'valid' or 'test', so there is nothing to evaluate" if counts["train"] else "'train'"
        raise DataError(f"--split {schema.split}: no event is marked {missing}; correct the column or leave it out")
    build.writer.write_split(schema.split, first_valid, first_test)


def find_requests(build: Build) -> dict[str, int]:
    """Create the tables requests, sorted by user and time, and candidates (``number``: row of their request). Leaves
    out requests without an earlier event of their user. Returns counts. Raises DataError if no request remains."""
    if not build.raw.requests:
        return {}
    key = "request" if build.raw.has_request_ids else '"time"'
    of_base = 'UNION ALL SELECT id, "first" FROM base_users' if build.base else ""
    every = f'SELECT "user", "timestamp" FROM events {of_base}'
    firsts = f'SELECT "user", min("timestamp") AS first FROM ({every}) GROUP BY 1'
    every = f"""SELECT "user", {key} AS key, min("time") AS "time", min("timestamp") AS "timestamp",
        count(*) AS candidates FROM impressions GROUP BY 1, 2"""
    query = f"""SELECT r.*, coalesce(f.first < r."timestamp", false) AS has_history
        FROM ({every}) r LEFT JOIN ({firsts}) f ON r."user" = f."user" """
    build.table("all_requests", query)
    kept = 'SELECT * FROM all_requests WHERE has_history ORDER BY "user", "time", key'
    requests = build.table("requests", kept, "number")
    query = "SELECT count(*), coalesce(sum(candidates), 0)::BIGINT FROM all_requests WHERE NOT has_history"
    left_out, candidates_left_out = one(build.engine, query)
    if not requests:
        files = ", ".join(str(file.path) for file, _ in build.raw.requests)
        what = f"none of the {left_out:,} requests has" if left_out else "there are no requests with"
        raise DataError(
            f"{files}: {what} an event of its user in a second before it, so there is no history to rank by; give the "
            "interactions of these users, in the same ids and times"
        )
    query = f"""SELECT r.number, i.* EXCLUDE ("user", "timestamp") FROM impressions i
        JOIN requests r ON i."user" = r."user" AND i.{key} = r.key"""
    candidates = build.table("candidates", query)
    build.engine.view("shown", "SELECT * FROM events UNION ALL BY NAME SELECT * EXCLUDE number FROM candidates")
    if left_out:
        _log.warning(
            "%d of %d requests, with %d candidates, are left out: their users have no event in a second before them",
            left_out,
            left_out + requests,
            candidates_left_out,
        )
    counts = {"requests": requests, "candidates": candidates}
    return counts | {"requests_left_out": left_out, "candidates_left_out": candidates_left_out}


def write_requests(build: Build, offsets: np.ndarray, requests: int, candidates: int) -> Requests:
    """Write requests and candidates, after events with ``offsets`` [U + 1]."""
    of_requests = build.writer.create_requests(requests, candidates)
    times = build.writer.written(str(build.schema.timestamp))
    ordered = build.engine.sql(
        """SELECT u.code AS users, r."timestamp" AS times, r.candidates FROM requests r
        JOIN users u ON r."user" = u.id ORDER BY r.number"""
    )
    start = of_requests["offsets"][0] = 0
    for batch in ordered.to_arrow_reader(ROWS_PER_CHUNK):
        users, at, sizes = (batch.column(name).to_numpy() for name in ("users", "times", "candidates"))
        place = slice(start, start + len(users))
        of_requests["users"][place], of_requests["times"][place] = users, at
        of_requests["history_ends"][place] = first_from(times, offsets[users], offsets[users + 1], at)
        of_requests["offsets"][start + 1 : place.stop + 1] = of_requests["offsets"][start] + np.cumsum(sizes)
        start = place.stop
    named = {"item": build.schema.item, "action": build.schema.action} | build.schema.of_events()
    arrays = {name: build.writer.create_candidates(feature) for name, feature in named.items() if feature}
    of_some = "number BETWEEN {} AND {} - 1".format
    _write_rows(build, "candidates", of_requests["offsets"], arrays, "number, part, source_row", of_some)
    return Requests(**of_requests)
