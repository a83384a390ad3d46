"""Last stages: users and items are numbered, and the store's arrays filled, a bucket of users at a time."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np

from hstu.data.preprocess.engine import column, memory_bytes, one, write_parquet
from hstu.data.preprocess.progress import NUMBERING, WRITING
from hstu.data.preprocess.tables import literal
from hstu.data.preprocess.work import Work
from hstu.data.store import UNKNOWN, USER_FEATURE

_ROWS_PER_CHUNK = 1 << 20
_SORT_BYTES_PER_ROW = 400
"""Memory that a row of a bucket takes while it is joined and sorted, generously."""


def number_users_and_items(work: Work) -> tuple[np.ndarray, int]:
    """Leaves the files users and items (id, events), ascending in id: a row's place is its code.

    Returns the events of each user, int64 [U], and the number of items.
    """
    journal, effort = work.writer.journal, NUMBERING * work.progress.unit
    for name in ("user", "item"):
        stage = f"{name}s"
        if stage in journal:
            work.progress.skip(effort / 2)
            continue
        query = f'SELECT "{name}" AS id, count(*) AS events FROM {work.events()} GROUP BY 1 ORDER BY 1'
        with work.progress.stage(f"counting {stage}", effort / 2, work.engine):
            journal.commit(stage, write_parquet(work.engine, query, work.file(stage)))
    return column(work.engine, f"SELECT events FROM {_codes(work, 'users')} ORDER BY code"), journal["items"]


def write_vocabularies(work: Work, num_users: int, num_items: int) -> None:
    """Raw ids of users and items, and the items' titles."""
    work.writer.write_vocabulary(USER_FEATURE, _ids(work, "users", num_users))
    work.writer.write_vocabulary(work.schema.item, _ids(work, "items", num_items))
    if work.raw.titles is not None:
        raw_items = _ids(work, "items", num_items).tolist()
        work.writer.write_titles([work.raw.titles.get(raw_id, "") for raw_id in raw_items])


def write_context(work: Work, num_users: int) -> None:
    """Codes and vocabularies of the contextual features; ``unknown`` where a user has no row or an empty value."""
    places = iter(range(len(work.schema.context)))
    for feature in work.schema.context:
        if feature == USER_FEATURE:
            work.writer.write_context(feature, np.arange(num_users), cardinality=num_users)
            continue
        values = column(work.engine, _context_values(work, f"c{next(places)}"))
        vocabulary, codes = np.unique(values, return_inverse=True)
        work.writer.write_context(feature, codes, cardinality=len(vocabulary))
        work.writer.write_vocabulary(feature, vocabulary)


def write_events(work: Work, offsets: np.ndarray, num_items: int) -> None:
    """Items, actions and times: per bucket of users joined with the codes, sorted, written, synced and committed."""
    arrays = _create_arrays(work, num_items, int(offsets[-1]))
    journal = work.writer.journal
    if "buckets" not in journal:
        rows = memory_bytes(work.options.memory_limit) // _SORT_BYTES_PER_ROW
        journal.commit("buckets", bucket_bounds(offsets, rows))
    bounds = journal["buckets"]
    for number, (begin, end) in enumerate(pairwise(bounds)):
        start, stop = int(offsets[begin]), int(offsets[end])
        effort = WRITING * work.progress.unit * (stop - start) / int(offsets[-1])
        if f"bucket {number}" in journal:
            work.progress.skip(effort)
            continue
        what = f"sorting and writing, part {number + 1} of {len(bounds) - 1}"
        with work.progress.stage(what, effort):
            _write_bucket(work, arrays, (begin, end), slice(start, stop))
        for array in arrays.values():
            array.flush()
        journal.commit(f"bucket {number}")


def bucket_bounds(offsets: np.ndarray, rows: int) -> list[int]:
    """Users [bounds[i], bounds[i + 1]) make a bucket of about ``rows`` events at most; a user is never divided."""
    events = int(offsets[-1])
    wanted = np.linspace(0, events, -(-events // rows) + 1)
    return [int(bound) for bound in np.unique(np.searchsorted(offsets, wanted))]


def _create_arrays(work: Work, num_items: int, num_events: int) -> dict[str, np.memmap]:
    schema, create = work.schema, work.writer.create_sequence
    arrays = {"item": create(schema.item, "item", cardinality=num_items, length=num_events)}
    if schema.action:
        cardinality = schema.action_cardinality or _largest_action(work) + 1
        arrays["action"] = create(schema.action, "action", cardinality=cardinality, length=num_events)
    if schema.timestamp:
        arrays["timestamp"] = create(schema.timestamp, "timestamp", cardinality=None, length=num_events)
    return arrays


def _largest_action(work: Work) -> int:
    journal = work.writer.journal
    if "largest action" not in journal:
        journal.commit("largest action", int(column(work.engine, f"SELECT max(action) FROM {work.events()}")[0]))
    return int(journal["largest action"])


def _write_bucket(work: Work, arrays: dict[str, np.memmap], users: tuple[int, int], place: slice) -> None:
    first, last = _raw_user(work, users[0]), _raw_user(work, users[1] - 1)
    values = ", ".join("i.code AS item" if name == "item" else f'e."{name}"' for name in arrays)
    order = f'e."user", {"e.time, " if work.schema.timestamp else ""}e.part, e."row"'
    rows = work.engine.sql(
        f"""SELECT {values} FROM (SELECT * FROM {work.events()} WHERE "user" BETWEEN ? AND ?) e
        JOIN {_codes(work, "items")} i ON e.item = i.id ORDER BY {order}""",
        params=[first, last],
    )
    start = place.start
    for batch in rows.to_arrow_reader(_ROWS_PER_CHUNK):
        for name, array in arrays.items():
            array[start : start + batch.num_rows] = batch.column(name).to_numpy(zero_copy_only=False)
        start += batch.num_rows
    if start != place.stop:
        raise RuntimeError(f"{start - place.start} events of the users {users} instead of {place.stop - place.start}")


def _raw_user(work: Work, code: int) -> Any:
    return one(work.engine, f"SELECT id FROM {_codes(work, 'users')} WHERE code = {code}")[0]


def _ids(work: Work, table: str, length: int) -> np.ndarray:
    """The raw ids of a table by code: int64, without ever holding them twice, or str objects."""
    query = f"SELECT id FROM {_codes(work, table)} ORDER BY code"
    if str(work.engine.sql(query).types[0]) != "BIGINT":
        return column(work.engine, query)
    ids = np.empty(length, dtype=np.int64)
    start = 0
    for batch in work.engine.sql(query).to_arrow_reader(_ROWS_PER_CHUNK):
        ids[start : start + batch.num_rows] = batch.column(0).to_numpy()
        start += batch.num_rows
    return ids


def _codes(work: Work, table: str) -> str:
    """SQL of users or items: id, events, code."""
    path = literal(str(work.file(table)))
    return f"(SELECT id, events, file_row_number AS code FROM read_parquet({path}, file_row_number = true))"


def _context_values(work: Work, name: str) -> str:
    """One value a user, in the order of codes."""
    first_rows = f"""SELECT "user", {name} FROM {work.typed_context()}
        QUALIFY row_number() OVER (PARTITION BY "user" ORDER BY "row") = 1"""
    return f"""SELECT coalesce(nullif(c.{name}, ''), {literal(UNKNOWN)})
        FROM {_codes(work, "users")} u LEFT JOIN ({first_rows}) c ON u.id = c."user" ORDER BY u.code"""
