"""Requests of a caller instead of the data: which candidates a model scores for which users."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from hstu.base.errors import DataError
from hstu.config.args import DatasetArgs
from hstu.data.batches.jagged import run_offsets
from hstu.data.features.labels import LabelColumn
from hstu.data.sampling.samples import SampleTable, samples_of_requests
from hstu.data.store.meta import read_meta
from hstu.data.store.requests import Requests
from hstu.data.store.sequence_store import SequenceStore


class GivenRequests(SequenceStore):
    """A store with one request per user, after the user's whole history, instead of the requests of ``store``.

    Args:
        users: rows of the users, int64 [U].
        counts: candidates per user, int64 [U], at least 1.
        values: feature → stored values of all candidates, user after user, [C]. Other features are 0.
        at: time of the requests, in seconds since 1970. None: the time of each user's newest event.

    Raises DataError if one of the users has an event after ``at``.
    """

    def __init__(
        self,
        store: SequenceStore,
        users: np.ndarray,
        counts: np.ndarray,
        values: Mapping[str, np.ndarray],
        at: int | None = None,
    ) -> None:
        super().__init__(store.path, read_meta(store.path))
        ends = np.asarray(store.offsets())[users + 1]
        times = np.zeros_like(ends)
        if store.timestamp_feature is not None:
            times = store.sequence(store.timestamp_feature)[ends - 1].astype(np.int64)
            if at is not None and (times > at).any():
                raise DataError(
                    f"scores are asked for at second {at} since 1970, and a history has an event at second "
                    f"{times.max()}, which is later; give a later time"
                )
        times = times if at is None else np.full_like(times, at)
        self._requests = Requests(users, times, ends, run_offsets(counts))
        self._values = values
        self.num_requests, self.num_candidates = len(users), int(counts.sum())

    def requests(self) -> Requests:
        """See SequenceStore."""
        return self._requests

    def candidates(self, feature: str) -> np.ndarray:
        """See SequenceStore."""
        if feature in self._values:
            return self._values[feature]
        return np.zeros(self.num_candidates, dtype=self.sequence(feature).dtype)

    def samples(self, args: DatasetArgs) -> SampleTable:
        """The requests, each cut into samples of at most half of ``max_sequence_length`` candidates. The history is as
        long as in training with candidates or, if training has no candidates, one event shorter than the longest
        sequence. Where candidates do not see each other, the cut leaves their scores unchanged."""
        sizes, length, most = self._requests.sizes, args.max_sequence_length, args.max_num_candidates
        half = max(1, length // 2)
        if most:
            beside = -(-sizes // -(-sizes // most))
        elif args.candidates == "requests":
            beside = np.where(sizes < length, sizes, half)
        else:
            beside = np.ones_like(sizes)
        parts = -(-sizes // np.maximum(beside, half))
        offsets = np.asarray(self.offsets())
        return samples_of_requests(self._requests, offsets, np.arange(len(sizes)), parts, length - beside)


@dataclass(frozen=True)
class NoLabels(LabelColumn):
    """A label that no candidate has."""

    def read(self, codes: np.ndarray) -> np.ndarray:
        """NaN, float32 [n]."""
        return np.full(len(codes), np.nan, dtype=np.float32)
