"""Reads the samples of a batch plan from a store and checks every value; a caller may give requests of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from hstu.base.errors import ConfigError, DataError
from hstu.config.args import DatasetArgs
from hstu.data.batches.batch import ItemFeatures
from hstu.data.batches.collate import Rows
from hstu.data.batches.jagged import ranges, run_offsets
from hstu.data.features.roles import FeatureRoles
from hstu.data.features.values import LabelColumn
from hstu.data.sampling.sampler import BatchPlan, shuffled_ties, window_starts
from hstu.data.sampling.samples import SampleTable, samples_of_requests
from hstu.data.store.lake import describe
from hstu.data.store.parts import Places
from hstu.data.store.sequence_store import Requests, SequenceStore, time_codes


@dataclass(eq=False)
class StoreReader:
    """Reads samples of a table from a store."""

    store: SequenceStore
    samples: SampleTable
    roles: FeatureRoles
    wants_timestamps: bool = field(default=False, kw_only=True)
    """Read event times, which relative attention biases need. Raises ConfigError where the store has none."""
    wants_request_times: bool = field(default=False, kw_only=True)
    """Read the times of the target events of evaluation samples."""
    wants_seen: bool = field(default=False, kw_only=True)
    """Read the items that users had before evaluation targets (filter_seen) or before training samples (mask_seen)."""
    recoding: Mapping[str, np.ndarray] | None = field(default=None, kw_only=True)
    """Feature → int64 [cardinality]: this store's codes → the training store's codes. None: the same store."""
    labels: Mapping[str, LabelColumn] = field(default_factory=dict, kw_only=True)
    """The columns that FeatureRoles.labels names."""
    window_seed: int | None = field(default=None, kw_only=True)
    """Seed that moves the windows of training samples, see window_starts. None: each sample is the newest window."""
    ties_seed: int | None = field(default=None, kw_only=True)
    """Seed that shuffles events of equal times in training samples, see shuffled_ties. None: the order of the file."""
    wants_label_events: bool = field(default=False, kw_only=True)
    """Give ``SampleTable.newest_labels`` as the target events of samples without a target."""

    def __post_init__(self) -> None:
        if self.wants_timestamps and self.store.timestamp_feature is None:
            raise ConfigError(
                f'NetworkArgs.position_encoding = "relative_bias" needs times, and {self.store} has none; '
                "use another position_encoding or preprocess with a time column"
            )

    def read(self, plan: BatchPlan) -> Rows:
        """Reads the rows of ``plan.indices``. A value out of range raises a DataError."""
        if plan.shards:
            self.store.expect(plan.shards)
        samples = self.samples.take(plan.indices)
        start, history_begin = samples.start, samples.history_begin
        lengths, num_labels = samples.lengths, samples.num_labels
        if self.window_seed is not None:
            start = window_starts(history_begin, start, samples.stop, self.window_seed, plan.epoch, plan.ordinals)
        ends = start + lengths
        items = self._shuffled(SampleItems.of(self.store, samples, start, lengths), samples, start, lengths, plan.epoch)
        labelled = SampleItems.of(self.store, samples, ends - num_labels, num_labels) if self.labels else items
        held_out = request_times = seen = None
        if samples.target is not None:
            target = SampleItems(self.store, samples.target)
            held_out = self._of_items(self.roles.item, target)
            request_times = target.times() if self.wants_timestamps and self.wants_request_times else None
        if self.wants_seen:
            before = start if samples.target is None else samples.target
            seen_lengths = before - history_begin
            earlier = SampleItems(self.store, ranges(history_begin, seen_lengths))
            earlier = self._shuffled(earlier, samples, history_begin, seen_lengths, plan.epoch)
            seen = self._of_items(self.roles.item, earlier), seen_lengths
        codes = items.values(self.roles.item)
        item_ids = self._for_model(self.roles.item, codes)  # also checks the codes, which then index item features
        return Rows(
            user_ids=samples.user,
            lengths=lengths,
            num_candidates=samples.num_candidates,
            num_labels=num_labels,
            items=item_ids,
            actions=None if self.roles.action is None else self._of_items(self.roles.action, items),
            timestamps=items.times() if self.wants_timestamps else None,
            context={
                name: self._for_model(name, self.store.context(name)[samples.user]) for name in self.roles.contextual
            },
            side=self._side(items, codes),
            label_values={name: column.read(labelled.values(name)) for name, column in self.labels.items()},
            numbers=self._numbers(items, codes),
            held_out=held_out,
            request_times=request_times,
            target_events=samples.newest_labels if self.wants_label_events else samples.target,
            seen=seen,
        )

    def _shuffled(
        self, items: SampleItems, samples: SampleTable, first: np.ndarray, counts: np.ndarray, epoch: int
    ) -> SampleItems:
        """The items, ``counts`` of each sample from event ``first`` on, with those of equal times shuffled."""
        if self.ties_seed is None:
            return items
        users = self.samples.user  # a user's first sample ends with the events to train on, other windows before
        stop = self.samples.stop[np.searchsorted(users, samples.user.astype(users.dtype))].astype(np.int64)
        times, bounds = self.store.sequence(str(self.store.timestamp_feature)), (samples.history_begin, stop)
        return replace(items, shuffled=shuffled_ties(times, bounds, first, counts, self.ties_seed, epoch))

    def _of_items(self, feature: str, items: SampleItems) -> np.ndarray:
        return self._for_model(feature, items.values(feature))

    def _side(self, items: SampleItems, codes: np.ndarray) -> ItemFeatures:
        """The side features with ids. ``codes``: of the items, already checked."""
        of_items = [name for name in self.roles.categories if name in self.store.item_side_features]
        found = self.features_of_items(of_items, codes)
        of_events = {
            name: items.time_codes(name) if name in self.store.time_features else self._of_items(name, items)
            for name in self.roles.categories
            if name not in of_items
        }
        return ItemFeatures({**found.values, **of_events}, found.list_lengths)

    def features_of_items(self, names: Sequence[str], codes: np.ndarray) -> ItemFeatures:
        """Features of the items with these codes, int64 or int32 [n], which must already be checked."""
        side: dict[str, np.ndarray] = {}
        list_lengths: dict[str, np.ndarray] = {}
        for name in names:
            values, offsets = self.store.item_values(name)
            places = codes
            if offsets is not None:
                starts = offsets.take(codes)
                list_lengths[name] = offsets.take(codes + 1) - starts
                places = ranges(starts, list_lengths[name])
            # take() is a third faster than [].
            side[name] = self._for_model(name, values.take(places))
        return ItemFeatures(side, list_lengths)

    def _numbers(self, items: SampleItems, codes: np.ndarray) -> np.ndarray | None:
        """See Rows.numbers. ``codes``: of the items, already checked."""
        if not self.roles.numbers:
            return None
        of_items = self.store.item_number_features
        columns = [
            self.store.item_numbers(name)[codes] if name in of_items else items.values(name)[:, None]
            for name in self.roles.numbers
        ]
        return np.concatenate(columns, axis=1)

    def _for_model(self, feature: str, stored: np.ndarray) -> np.ndarray:
        """Checks stored codes and returns their int64 model ids."""
        values = stored.astype(np.int64)
        cardinality = self.store.cardinality(feature)
        # Viewed as unsigned, negative codes are too large as well: one comparison instead of two.
        wrong = values.view(np.uint64) >= np.uint64(cardinality)
        if wrong.any():
            raise DataError(
                f"{self.store}: {feature} = {values[wrong][0]} is not in [0, {cardinality}): the data is damaged, "
                "preprocess it again"
            )
        if self.recoding and feature in self.recoding:
            return self.recoding[feature][values]
        return self.store.model_ids(feature, values)


@dataclass(frozen=True)
class SampleItems:
    """n items, sample after sample: the events of a sample, then the candidates of its request, if any."""

    store: SequenceStore
    events: np.ndarray
    """int64: indices into the store's events."""
    candidates: np.ndarray | None = None
    """int64: indices into the store's candidates. None: all items are events."""
    is_candidate: np.ndarray | None = None
    """bool [n]. None: all items are events."""
    before: np.ndarray | None = None
    """int64: the event that each event follows; for a candidate, the newest of its history. None: the one before."""
    shuffled: np.ndarray | None = None
    """int64: the event whose values stand in the place of each of ``events``, which has its time. None: itself."""

    @classmethod
    def of(cls, store: SequenceStore, samples: SampleTable, start: np.ndarray, lengths: np.ndarray) -> SampleItems:
        """The items of ``samples`` from events ``start`` on. ``lengths``: items per sample, [b]."""
        shown = samples.num_candidates
        if samples.first_candidate is None:
            events, before = ranges(start, lengths), None
            if shown.any():
                before = np.minimum(events, np.repeat(start + lengths - shown, lengths)) - 1
            return cls(store, events, before=before)
        runs = np.stack([lengths - shown, shown], axis=1).reshape(-1)
        is_candidate = np.repeat(np.tile([False, True], len(samples)), runs)
        candidates = ranges(samples.first_candidate, shown)
        return cls(store, ranges(start, lengths - shown), candidates, is_candidate)

    @cached_property
    def _taken(self) -> Places:
        """The events whose values the items have. Shuffled events have the times of those in whose place they are."""
        return self.store.places(self.events if self.shuffled is None else self.shuffled)

    def values(self, feature: str) -> np.ndarray:
        """[n] stored values of the item, the action or an event feature."""
        of_events = self._taken.of(self.store.sequence(feature))
        return self._joined(of_events, lambda shown: self.store.candidates(feature)[shown])

    def times(self) -> np.ndarray:
        """int64 [n] seconds: the times of the events, and for candidates the times of their requests."""
        of_events = self._taken.of(self.store.sequence(str(self.store.timestamp_feature)))
        return self._joined(of_events, lambda shown: self.store.candidate_times(shown)[0])

    def time_codes(self, feature: str) -> np.ndarray:
        """int64 [n] codes of a time feature. A candidate's previous event is the last event of its history."""
        of_events = self.store.time_codes(feature, self.events, self.before)
        return self._joined(of_events, lambda shown: time_codes(feature, *self.store.candidate_times(shown)))

    def _joined(self, of_events: np.ndarray, of_candidates: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        if self.candidates is None or self.is_candidate is None:
            return of_events
        joined = np.empty(len(self.is_candidate), dtype=of_events.dtype)
        joined[~self.is_candidate], joined[self.is_candidate] = of_events, of_candidates(self.candidates)
        return joined


class GivenRequests(SequenceStore):
    """A store with one request per user, after the user's whole history, instead of the requests of ``store``.
    ``users``: rows of the users, int64 [U]. ``counts``: candidates per user, int64 [U], at least 1. ``values``: feature
    → stored values of all candidates, user after user, [C]; other features are 0. ``at``: time of the requests in
    seconds since 1970; None means each user's newest event. Raises DataError if a user has an event after ``at``."""

    def __init__(
        self,
        store: SequenceStore,
        users: np.ndarray,
        counts: np.ndarray,
        values: Mapping[str, np.ndarray],
        at: int | None = None,
    ) -> None:
        super().__init__(store.path, describe(store.path))
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
        sizes, length = self._requests.sizes, args.max_sequence_length
        half = max(1, length // 2)
        if args.max_num_candidates:
            beside = np.full_like(sizes, args.max_num_candidates)
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
