"""The items of the samples of a batch, and where the store has their values: in events or in candidates of requests."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hstu.data.batches.jagged import ranges
from hstu.data.features.time_features import age_codes, calendar_codes, gap_codes
from hstu.data.sampling.samples import SampleTable
from hstu.data.store.sequence_store import USER_FEATURE, SequenceStore


@dataclass(frozen=True)
class SampleItems:
    """n items, sample after sample: the events of a sample, and then the candidates of its request, if it has one."""

    store: SequenceStore
    events: np.ndarray
    """int64: places of the events among all of the store."""
    candidates: np.ndarray | None = None
    """int64: places of the candidates among those of all requests. None: all items are events."""
    is_candidate: np.ndarray | None = None
    """bool [n]. None: all items are events."""

    @classmethod
    def of(
        cls, store: SequenceStore, samples: SampleTable, chosen: np.ndarray, start: np.ndarray, lengths: np.ndarray
    ) -> SampleItems:
        """The items of the samples ``chosen``, [b], from the events ``start`` on. ``lengths``: items of each, [b]."""
        if samples.first_candidate is None:
            return cls(store, ranges(start, lengths))
        shown = samples.num_candidates[chosen]
        runs = np.stack([lengths - shown, shown], axis=1).reshape(-1)
        is_candidate = np.repeat(np.tile([False, True], len(chosen)), runs)
        candidates = ranges(samples.first_candidate[chosen], shown)
        return cls(store, ranges(start, lengths - shown), candidates, is_candidate)

    def values(self, feature: str) -> np.ndarray:
        """Stored values of the item, the action or an event feature, [n]."""
        of_events = self.store.sequence(feature)[self.events]
        if self.candidates is None:
            return of_events
        return self._joined(of_events, self.store.candidates(feature)[self.candidates])

    def times(self) -> np.ndarray:
        """int64 [n] seconds: times of the events, and of the requests of the candidates."""
        of_events = self.store.sequence(str(self.store.timestamp_feature))[self.events]
        if self.candidates is None:
            return of_events
        return self._joined(of_events, self.store.candidate_times(self.candidates)[0])

    def time_codes(self, feature: str) -> np.ndarray:
        """int64 [n] codes of a time feature. The time before a candidate's is that of the last event of the history."""
        of_events = self.store.time_codes(feature, self.events)
        if self.candidates is None:
            return of_events
        now, before = self.store.candidate_times(self.candidates)
        if feature == "item_age":
            codes = self.store.candidates(self.store.item_feature)[self.candidates]
            shown = age_codes(now - self.store.first_times()[codes])
        else:
            shown = gap_codes(now - before) if feature == "time_gap" else calendar_codes(feature, now)
        return self._joined(of_events, shown)

    def place(self, index: int) -> str:
        """Where the item at ``index`` is, for an error."""
        if self.candidates is not None and self.is_candidate is not None and self.is_candidate[index]:
            row = int(self.candidates[int(self.is_candidate[:index].sum())])
            requests = self.store.requests()
            user, kind = int(requests.users[requests.rows_of(np.array([row]))[0]]), "candidate"
        else:
            row = int(self.events[index if self.is_candidate is None else int((~self.is_candidate[:index]).sum())])
            user, kind = int(np.searchsorted(self.store.offsets(), row, side="right")) - 1, "event"
        return f"user {self.store.raw_ids(USER_FEATURE)[user]} ({kind} {row})"

    def _joined(self, of_events: np.ndarray, of_candidates: np.ndarray) -> np.ndarray:
        assert self.is_candidate is not None
        joined = np.empty(len(self.is_candidate), dtype=of_events.dtype)
        joined[~self.is_candidate], joined[self.is_candidate] = of_events, of_candidates
        return joined
