"""Merges the events of an earlier store, the base, with new ones: each user's in the order of time, in blocks.

Events of one second keep the order of the files: those of the base come first.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Self

import numpy as np

from hstu.base.errors import DataError
from hstu.data.batches.jagged import first_from, ranges, run_offsets
from hstu.data.preprocess.base import labels
from hstu.data.preprocess.state import Build, columns_of
from hstu.data.store.parts import Values
from hstu.data.store.sequence_store import Requests

_log = logging.getLogger(__name__)

_BLOCK = 1 << 18
"""Events at once: what is done to them, one array after another, stays in the caches."""
_MOST_SEGMENTS = 1 << 16

Codes = tuple[np.ndarray | None, np.ndarray | None]
"""New codes of the values of the base, and of the values as the new events have them; None where they do not change."""


@dataclass(frozen=True)
class Growth:
    """Where the events of the base and the new ones lie among all events, user after user."""

    build: Build
    offsets: np.ndarray
    """int64 [U + 1] of all events."""
    added: np.ndarray
    """int64 [U + 1] of the new events alone."""
    stays: np.ndarray
    """int64 [U + 1] of the events of the base that stay."""
    begins: np.ndarray
    """int64 [U]: the first event of each user in the base."""
    users: np.ndarray
    """int64 [users of the base]: their new codes, -1 if forgotten."""
    codes: Mapping[str, Codes]
    """item, action, e0, … whose codes may change → their new ones."""

    @classmethod
    def of(cls, build: Build, offsets: np.ndarray) -> Self:
        """``offsets``: int64 [U + 1] of all events, by the table of users. The vocabularies must be there."""
        store, schema = build.earlier.store, build.schema
        users = build.earlier.codes["user"]
        begins, lengths = np.zeros((2, len(offsets) - 1), dtype=np.int64)
        begins[users[users >= 0]] = store.offsets()[:-1][users >= 0]
        lengths[users[users >= 0]] = np.diff(store.offsets())[users >= 0]
        stays = run_offsets(lengths)
        codes: dict[str, Codes] = {"item": (build.earlier.codes["item"], None)}
        for name, feature in schema.of_events().items():
            if name not in schema.quantities():
                query = (
                    f"SELECT b.code AS old, n.code AS new FROM base_{name} b JOIN vocabulary_{name} n ON b.id = n.id"
                )
                old, changed = columns_of(build.engine, query)
                of_base = np.full(store.cardinality(feature), -1)
                of_base[old] = changed
                codes[name] = (of_base, None)
        if schema.action and (texts := labels(build)):
            new = build.writer.journal["types"]["labels"] if build.raw.logs else []
            both = (store.raw_ids(schema.action), np.array(new, dtype=object))
            old, of_new = (np.searchsorted(np.array(texts, dtype=object), known) for known in both)
            codes["action"] = (old, of_new)
        codes = {name: (_narrow(old), _narrow(of_new)) for name, (old, of_new) in codes.items()}
        return cls(build, offsets, offsets - stays, stays, begins, users, codes)

    def asides(self, arrays: Mapping[str, np.ndarray]) -> dict[str, np.memmap]:
        """Working arrays of the new events, by name as ``arrays``, and of their splits."""
        kinds = {name: array.dtype for name, array in arrays.items()}
        kinds |= {"split": np.dtype(np.int8)} if self.build.schema.split else {}
        return {name: self.build.aside(f"new_{name}", kind, int(self.added[-1])) for name, kind in kinds.items()}

    @cached_property
    def places(self) -> np.memmap:
        """int64 [new events], ascending: their places among all events."""
        return self.build.aside("places", np.dtype(np.int64), int(self.added[-1]))

    def merge(self, arrays: Mapping[str, np.memmap], new: Mapping[str, np.ndarray]) -> None:
        """Fill the arrays of all events, by item, action, timestamp, e0, …, and the segments. ``new``: the arrays of
        the new events."""
        build, store = self.build, self.build.earlier.store
        late = build.once("places", lambda: self._find_places(new))
        if build.raw.logs:
            _log.info("%d new events, of which %d are older than the newest one before", len(self.places), late)
        old: Values
        for name, array in arrays.items():
            old, codes = store.sequence(build.feature(name)), self.codes.get(name, (None, None))
            build.once(f"merged {name}", lambda: self._fill(array, old, new[name], codes))  # noqa: B023
        segments = store.num_segments + bool(build.raw.logs)
        if segments > _MOST_SEGMENTS:
            raise DataError(f"{store} has {store.num_segments} segments, and cannot have more: make it again")
        if segments > 1:
            array = build.writer.create_segments(segments, int(self.offsets[-1]))
            first = np.broadcast_to(np.uint16(0), store.num_events)
            old = first if (known := store.segments()) is None else known
            latest = np.broadcast_to(np.uint16(store.num_segments), len(self.places))
            build.once("merged segments", lambda: self._fill(array, old, latest, (None, None)))

    def _find_places(self, new: Mapping[str, np.ndarray]) -> int:
        """Write ``places``. Returns the number of late events."""
        store, places, late = self.build.earlier.store, self.places, 0
        lengths = np.diff(self.stays)
        bounds = None if store.split is None else (store.held_out("valid")[0], store.held_out("test")[0])
        by_code = np.zeros((2, len(lengths)), dtype=np.int64)  # of splits, by new code
        if bounds:
            stay = self.users >= 0
            by_code[:, self.users[stay]] = [bound[stay] for bound in bounds]
        times = store.sequence(store.timestamp_feature) if store.timestamp_feature else None
        newest = 0 if times is None else times[store.offsets()[1:] - 1].max()
        for start in range(0, len(places), _BLOCK):
            rows = np.arange(start, min(start + _BLOCK, len(places)))
            user = np.searchsorted(self.added, rows, side="right") - 1
            begin, end = self.begins[user], self.begins[user] + lengths[user]
            before = end.copy()
            if times is not None:
                now = new["timestamp"][rows]
                late += int((now < newest).sum())
                inner = np.flatnonzero((begin < end) & (times[np.maximum(end - 1, 0)] >= now))
                first, last, at = begin[inner], end[inner], now[inner]
                after = first_from(times, first, last, at + 1)
                if bounds:  # of one time, those of earlier splits come first
                    split = new["split"][rows[inner]]
                    ends = np.choose(split, [*by_code[:, user[inner]], last])
                    after = np.clip(ends, first_from(times, first, last, at), after)
                before[inner] = after
            places[rows] = self.offsets[user] + (rows - self.added[user]) + (before - begin)
        places.flush()
        return late

    @cached_property
    def is_whole(self) -> bool:
        """Whether all events of the base stay, in the order in which they are."""
        return bool((np.diff(self.users, prepend=-1) > 0).all())

    def _fill(self, target: np.memmap, old: Values, new: np.ndarray, codes: Codes) -> None:
        places, (old_codes, new_codes) = self.places, codes
        with open(str(target.filename), "r+b") as file:  # the kernel writes zeros to a map first
            file.seek(target.offset)
            for begin in range(0, len(target), _BLOCK):
                part = np.empty(min(_BLOCK, len(target) - begin), dtype=target.dtype)
                first, last = np.searchsorted(places, (begin, begin + len(part)))
                values = self._old(old, begin - first, begin + len(part) - last)
                here, at, is_old = new[first:last], places[first:last] - begin, np.ones(len(part), dtype=bool)
                is_old[at] = False
                part[is_old] = values if old_codes is None else old_codes.take(values)
                part[at] = here if new_codes is None else new_codes[here]
                file.write(part.data)
        target.flush()

    def _old(self, values: Values, begin: int, end: int) -> np.ndarray:
        """Values [begin, end) of those of the base that stay, in the new order of the users."""
        if self.is_whole:
            return values[begin:end]
        first, last = np.searchsorted(self.stays, begin, side="right") - 1, np.searchsorted(self.stays, end)
        bounds = np.clip(self.stays[first : last + 1], begin, end)
        starts = self.begins[first:last] + np.maximum(begin - self.stays[first:last], 0)
        found: np.ndarray = values[ranges(starts, np.diff(bounds))]
        return found

    def split_counts(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(training events, validation events, whether an event is in an earlier split than one before it) of all
        users, [U] each."""
        store, split = self.build.earlier.store, self.asides({})["split"]
        user = np.repeat(np.arange(len(self.begins)), np.diff(self.added))
        train, valid = (np.bincount(user[split == number], minlength=len(self.begins)) for number in (0, 1))
        stay = self.users >= 0
        first, second = store.held_out("valid")
        train[self.users[stay]] += (first - store.offsets()[:-1])[stay]
        valid[self.users[stay]] += (second - first)[stay]
        ends = self.offsets[:-1] + np.cumsum([train, valid], axis=0)
        expected = (self.places >= ends[0][user]).astype(np.int8) + (self.places >= ends[1][user])
        is_mixed = np.bincount(user[expected != split], minlength=len(self.begins)) > 0
        return train, valid, is_mixed

    def keep_requests(self) -> tuple[Requests, dict[str, int]]:
        """Write the requests of the base, with the histories that they have now. Returns them and their counts."""
        build, store = self.build, self.build.earlier.store
        of_base = store.requests()
        codes = self.users[of_base.users]
        order = np.argsort(codes, kind="stable")
        order = order[np.searchsorted(codes[order], 0) :]  # without those of forgotten users
        offsets, times = run_offsets(of_base.sizes[order]), build.writer.written(str(build.schema.timestamp))
        arrays = build.writer.create_requests(len(order), int(offsets[-1]))
        users, at = codes[order], of_base.times[order]
        ends = first_from(times, self.offsets[users], self.offsets[users + 1], at)
        for name, values in (("users", users), ("times", at), ("history_ends", ends), ("offsets", offsets)):
            arrays[name][:] = values
        shown = ranges(of_base.offsets[order], of_base.sizes[order])
        for name in ("item", "action", *build.schema.of_events()):
            values, (old_codes, _) = store.candidates(build.feature(name))[shown], self.codes.get(name, (None, None))
            build.writer.create_candidates(build.feature(name))[:] = values if old_codes is None else old_codes[values]
        counts = {"requests": len(order), "candidates": len(shown)}
        left_out = ("requests_left_out", "candidates_left_out")
        return Requests(**arrays), counts | {name: store.statistics.get(name, 0) for name in left_out}


def _narrow(codes: np.ndarray | None) -> np.ndarray | None:
    """int32 codes; None if each value keeps its code."""
    return None if codes is None or (codes == np.arange(len(codes))).all() else codes.astype(np.int32)
