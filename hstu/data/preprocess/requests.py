"""Requests: impressions are grouped into requests, those without a history are left out, and the rest is written."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from itertools import pairwise

import numpy as np

from hstu.base.errors import DataError
from hstu.data.datasets.raw import parquet_rows
from hstu.data.preprocess.engine import one, write_parquet
from hstu.data.preprocess.state import BuildState
from hstu.data.preprocess.write import ROWS_PER_CHUNK, bucket_bounds, rows_per_bucket, write_rows

_log = logging.getLogger(__name__)
_STAGE = "requests"


def find_requests(state: BuildState) -> dict[str, int]:
    """Writes the files requests (by user and time) and candidates (with ``number``, the row of their request).

    Requests of users without an event before them are left out with a warning. Returns how many there are of all.
    Raises DataError where none is left.
    """
    if not state.raw.requests:
        return {}
    journal = state.writer.journal
    if _STAGE not in journal:
        with state.progress.stage("finding requests", 0, state.engine):
            journal.commit(_STAGE, _find(state))
    found: dict[str, int] = journal[_STAGE]
    if found["requests_left_out"]:
        _log.warning(
            "%d of %d requests, with %d candidates, are left out: their users have no event in a second before them",
            found["requests_left_out"],
            found["requests_left_out"] + found["requests"],
            found["candidates_left_out"],
        )
    return found


def _find(state: BuildState) -> dict[str, int]:
    key = "request" if state.raw.has_request_ids else '"time"'
    firsts = f'SELECT "user", min("timestamp") AS first FROM {state.events()} GROUP BY 1'
    every = f"""SELECT "user", {key} AS key, min("time") AS "time", min("timestamp") AS "timestamp",
        count(*) AS candidates FROM {state.impressions()} GROUP BY 1, 2"""
    query = f"""SELECT r.*, coalesce(f.first < r."timestamp", false) AS has_history
        FROM ({every}) r LEFT JOIN ({firsts}) f ON r."user" = f."user" """
    write_parquet(state.engine, query, state.file("all_requests"))
    all_requests = parquet_rows(state.file("all_requests"))
    query = f'SELECT * FROM {all_requests} WHERE has_history ORDER BY "user", "time", key'
    requests = write_parquet(state.engine, query, state.file("requests"))
    left_out, candidates_left_out = one(
        state.engine,
        f"SELECT count(*), coalesce(sum(candidates), 0)::BIGINT FROM {all_requests} WHERE NOT has_history",
    )
    files = ", ".join(str(file.path) for file, _ in state.raw.requests)
    if not requests:
        what = f"none of the {left_out:,} requests has" if left_out else "there are no requests with"
        raise DataError(
            f"{files}: {what} an event of its user in a second before it, so there is no history to rank by; give the "
            "interactions of these users, in the same ids and times"
        )
    query = f"""SELECT r."row" AS number, i.* EXCLUDE ("user", "timestamp") FROM {state.impressions()} i
        JOIN {state.numbered("requests")} r ON i."user" = r."user" AND i.{key} = r.key"""
    candidates = write_parquet(state.engine, query, state.file("candidates"))
    return {
        "requests": requests,
        "candidates": candidates,
        "requests_left_out": int(left_out),
        "candidates_left_out": int(candidates_left_out),
    }


def write_requests(state: BuildState, offsets: np.ndarray, features: Mapping[str, str]) -> None:
    """Writes the requests and their candidates.

    offsets: int64 [U + 1], the events of each user, which are written already. features: e0, e1, … → SQL of its value.
    """
    if not state.raw.requests:
        return
    found = state.writer.journal[_STAGE]
    of_requests = state.writer.create_requests(found["requests"], found["candidates"])
    _write_requests(state, of_requests, offsets)
    named = {"item": state.schema.item, "action": state.schema.action} | state.event_features()
    arrays = {name: state.writer.create_candidates(feature) for name, feature in named.items() if feature}
    journal, bounds = state.writer.journal, of_requests["offsets"]
    if "request buckets" not in journal:
        journal.commit("request buckets", bucket_bounds(bounds, rows_per_bucket(state, len(features))))
    for number, (begin, end) in enumerate(pairwise(journal["request buckets"])):
        if f"request bucket {number}" in journal:
            continue
        rows = f"SELECT * FROM {state.candidates()} WHERE number BETWEEN {begin} AND {end - 1}"
        with state.progress.stage("writing requests", 0):
            place = slice(int(bounds[begin]), int(bounds[end]))
            write_rows(state, arrays, features, rows, 'number, part, "row"', place)
        for array in arrays.values():
            array.flush()
        journal.commit(f"request bucket {number}")


def _write_requests(state: BuildState, arrays: Mapping[str, np.memmap], offsets: np.ndarray) -> None:
    times = state.writer.written(str(state.schema.timestamp), "timestamp")
    rows = state.engine.sql(
        f"""SELECT u.code AS users, r."timestamp" AS times, r.candidates FROM {state.numbered("requests")} r
        JOIN {state.codes("users")} u ON r."user" = u.id ORDER BY r."row" """
    )
    start, candidates = 0, 0
    arrays["offsets"][0] = 0
    for batch in rows.to_arrow_reader(ROWS_PER_CHUNK):
        users, at, sizes = (batch.column(name).to_numpy() for name in ("users", "times", "candidates"))
        place = slice(start, start + len(users))
        arrays["users"][place], arrays["times"][place] = users, at
        arrays["history_ends"][place] = first_from(times, offsets[users], offsets[users + 1], at)
        arrays["offsets"][place.start + 1 : place.stop + 1] = candidates + np.cumsum(sizes)
        start, candidates = place.stop, candidates + int(sizes.sum())


def first_from(times: np.ndarray, begin: np.ndarray, end: np.ndarray, at: np.ndarray) -> np.ndarray:
    """The first place in [begin[i], end[i]) whose time is at[i] or later, else end[i]; int64 [n].

    ``times`` ascend within each of these ranges.
    """
    low, high = begin.astype(np.int64), end.astype(np.int64)
    while (open_ := low < high).any():
        middle = (low + high) // 2
        is_before = open_ & (times[np.minimum(middle, len(times) - 1)] < at)
        low, high = np.where(is_before, middle + 1, low), np.where(open_ & ~is_before, middle, high)
    return low
