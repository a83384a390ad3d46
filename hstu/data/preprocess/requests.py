"""Requests: impressions are grouped into requests, those without a history are left out, and the rest is written."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import partial
from itertools import pairwise

import numpy as np

from hstu.base.errors import DataError
from hstu.data.preprocess.engine import ROWS_PER_CHUNK, one
from hstu.data.preprocess.state import Build
from hstu.data.preprocess.write import bucket_bounds, rows_per_bucket, write_rows

_log = logging.getLogger(__name__)


def find_requests(build: Build) -> dict[str, int]:
    """Makes the tables requests (by user and time) and candidates (with ``number``, the row of their request).

    Requests of users without an event before them are left out with a warning. Returns how many there are of all.
    Raises DataError where none is left.
    """
    if not build.raw.requests:
        return {}
    key = "request" if build.raw.has_request_ids else '"time"'
    firsts = 'SELECT "user", min("timestamp") AS first FROM events GROUP BY 1'
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
    if left_out:
        _log.warning(
            "%d of %d requests, with %d candidates, are left out: their users have no event in a second before them",
            left_out,
            left_out + requests,
            candidates_left_out,
        )
    counts = {"requests": requests, "candidates": candidates}
    return counts | {"requests_left_out": left_out, "candidates_left_out": candidates_left_out}


def write_requests(
    build: Build, offsets: np.ndarray, requests: int, candidates: int, features: Mapping[str, str]
) -> None:
    """Writes the requests and their candidates.

    offsets: int64 [U + 1], the events of each user, which are written already. features: e0, e1, … → SQL of its value.
    """
    of_requests = build.writer.create_requests(requests, candidates)
    _write_requests(build, of_requests, offsets)
    named = {"item": build.schema.item, "action": build.schema.action} | build.schema.of_events()
    arrays = {name: build.writer.create_candidates(feature) for name, feature in named.items() if feature}
    bounds, size = of_requests["offsets"], rows_per_bucket(build, len(features))
    buckets = build.once("request buckets", lambda: bucket_bounds(bounds, size))
    for number, (begin, end) in enumerate(pairwise(buckets)):
        rows = f"SELECT * FROM candidates WHERE number BETWEEN {begin} AND {end - 1}"
        place = slice(int(bounds[begin]), int(bounds[end]))
        write = partial(write_rows, build, arrays, features, rows, "number, part, source_row", place)
        build.once(f"request bucket {number}", write)


def _write_requests(build: Build, arrays: Mapping[str, np.memmap], offsets: np.ndarray) -> None:
    times = build.writer.written(str(build.schema.timestamp), "timestamp")
    rows = build.engine.sql(
        """SELECT u.code AS users, r."timestamp" AS times, r.candidates FROM requests r
        JOIN users u ON r."user" = u.id ORDER BY r.number"""
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
