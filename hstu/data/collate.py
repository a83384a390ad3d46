"""From a plan to a batch: gather the planned samples' events from the store, and assemble an HSTUBatch.

A *reader* (StoreReader here, SyntheticReader for random data) produces flat arrays; the Assembler turns them into an
HSTUBatch with padding and negatives. Neither loops over samples or tokens.
"""

from __future__ import annotations

import logging
import multiprocessing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from hstu.config.args import Task
from hstu.config.errors import ConfigError, DataError
from hstu.data.batch import NEGATIVES, HSTUBatch, ItemFeatures, keyed_jagged, labels_with_history, of_negatives
from hstu.data.hard_negatives import shown_not_taken
from hstu.data.jagged import ranges, run_indices, run_offsets
from hstu.data.labels import LabelColumn
from hstu.data.negatives import ItemDistribution, LabelKeys, Negatives, draw_31_bits, draw_each, draw_shared
from hstu.data.random_windows import RandomWindows
from hstu.data.roles import FeatureRoles
from hstu.data.sample_items import SampleItems
from hstu.data.sampler import BatchPlan
from hstu.data.samples import SampleTable, StochasticLength
from hstu.data.store import USER_FEATURE, SequenceStore

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Rows:
    """The b real sequences of a batch as flat arrays, before padding; int64 unless stated otherwise."""

    user_ids: np.ndarray
    """[b]"""
    lengths: np.ndarray
    """Items of each sequence, [b]."""
    num_candidates: np.ndarray
    """[b]"""
    num_labels: np.ndarray
    """[b]"""
    items: np.ndarray
    """[Σ lengths]"""
    actions: np.ndarray | None
    """[Σ lengths]"""
    timestamps: np.ndarray | None
    """[Σ lengths], seconds."""
    context: Mapping[str, np.ndarray]
    """Feature → [b]."""
    side: Mapping[str, np.ndarray] = field(default_factory=dict)
    """Feature → [Σ lengths], or [Σ list_lengths[feature]] for a list: the values of one item after another."""
    list_lengths: Mapping[str, np.ndarray] = field(default_factory=dict)
    """List → values of each item, [Σ lengths]."""
    label_values: Mapping[str, np.ndarray] = field(default_factory=dict)
    """The features of FeatureRoles.labels in their order → float32 [Σ num_labels], NaN where missing."""
    numbers: np.ndarray | None = None
    """float32 [Σ lengths, W], see HSTUBatch.numbers."""
    hard_negatives: np.ndarray | None = None
    """Codes of items, [labels that follow another item, Negatives.hard], see draw_each."""
    held_out: np.ndarray | None = None
    """Retrieval evaluation: the target items, [b]."""
    request_times: np.ndarray | None = None
    """Retrieval evaluation: the times of the target events, [b], in seconds."""
    seen: np.ndarray | None = None
    """See HSTUBatch.seen_values, [Σ seen_lengths]."""
    seen_lengths: np.ndarray | None = None
    """[b]"""


class RowReader(Protocol):
    """A source of rows."""

    def read(self, plan: BatchPlan) -> Rows:
        """The rows of ``plan.indices``, in that order."""
        ...


@dataclass(eq=False)
class StoreReader:
    """Reads the samples of a table from a store, and checks every value that it reads."""

    store: SequenceStore
    samples: SampleTable
    roles: FeatureRoles
    wants_timestamps: bool = field(default=False, kw_only=True)
    """Read event times, which relative attention biases need. ConfigError where the store has none."""
    wants_request_times: bool = field(default=False, kw_only=True)
    """Read the times of the held-out events of evaluation samples."""
    wants_seen: bool = field(default=False, kw_only=True)
    """Read whole histories of evaluation samples, which filter_seen needs."""
    wants_earlier: bool = field(default=False, kw_only=True)
    """Read what users had before their training samples begin, which mask_seen needs."""
    recoding: Mapping[str, np.ndarray] | None = field(default=None, kw_only=True)
    """Feature → int64 [cardinality]: from this store's codes to those of the training store. None: the same store."""
    labels: Mapping[str, LabelColumn] = field(default_factory=dict, kw_only=True)
    """The columns of FeatureRoles.labels."""
    random_windows: RandomWindows | None = field(default=None, kw_only=True)
    """Moves the windows of training samples at random."""
    stochastic_length: StochasticLength | None = field(default=None, kw_only=True)
    """Shortens training samples at random."""
    hard_negatives: int = field(default=0, kw_only=True)
    """Items to read for each label of what its user was shown and did not take."""

    def __post_init__(self) -> None:
        if self.wants_timestamps and self.store.timestamp_feature is None:
            raise ConfigError(
                f'NetworkArgs.position_encoding = "relative_bias" needs times, and {self.store.path} has none; '
                "use another position_encoding or preprocess with a time column"
            )

    def read(self, plan: BatchPlan) -> Rows:
        """The rows of ``plan.indices``. A value out of range is a DataError that names its user."""
        samples, chosen = self.samples, plan.indices
        start, users = samples.start[chosen], samples.user[chosen]
        lengths, num_labels = samples.lengths[chosen], samples.num_labels[chosen]
        if self.random_windows is not None:
            begin, stop = samples.history_begin[chosen], samples.stop[chosen]
            start = self.random_windows.starts(begin, start, stop, plan.epoch, plan.ordinals)
        if self.stochastic_length is not None:
            whole = lengths
            lengths, num_labels = self.stochastic_length.shorten(
                whole, num_labels, plan.epoch, plan.ordinals, samples.num_candidates[chosen]
            )
            start = start + whole - lengths
        items = SampleItems.of(self.store, samples, chosen, start, lengths)
        times = self.store.timestamp_feature if self.wants_timestamps else None
        held_out = request_times = seen = seen_lengths = None
        if samples.target is not None:
            target, begin = samples.target[chosen], samples.history_begin[chosen]
            held_out = self._of_items(self.roles.item, SampleItems(self.store, target))
            if times is not None and self.wants_request_times:
                request_times = self.store.sequence(times)[target].astype(np.int64)
            if self.wants_seen:
                seen, seen_lengths = self._items_between(begin, target)
        elif self.wants_earlier:
            seen, seen_lengths = self._items_between(samples.history_begin[chosen], start)
        codes = self._of_items(self.roles.item, items)
        side, list_lengths = self._side(items)
        ends = start + lengths
        labelled = SampleItems.of(self.store, samples, chosen, ends - num_labels, num_labels) if self.labels else items
        return Rows(
            user_ids=users,
            lengths=lengths,
            num_candidates=samples.num_candidates[chosen],
            num_labels=num_labels,
            items=codes,
            actions=None if self.roles.action is None else self._of_items(self.roles.action, items),
            timestamps=items.times() if self.wants_timestamps else None,
            context={name: self._of_users(name, users) for name in self.roles.contextual},
            side=side,
            list_lengths=list_lengths,
            label_values={name: column.read(labelled.values(name)) for name, column in self.labels.items()},
            numbers=self._numbers(items),
            hard_negatives=self._hard_negatives(ends, labels_with_history(num_labels, lengths)),
            held_out=held_out,
            request_times=request_times,
            seen=seen,
            seen_lengths=seen_lengths,
        )

    def _items_between(self, begins: np.ndarray, ends: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """What the model gets of the items of the events [begins[i], ends[i]) for each i; the counts of these."""
        lengths = ends - begins
        return self._of_items(self.roles.item, SampleItems(self.store, ranges(begins, lengths))), lengths

    def _hard_negatives(self, ends: np.ndarray, num_labels: np.ndarray) -> np.ndarray | None:
        if not self.hard_negatives:
            return None
        events = ranges(ends - num_labels, num_labels)
        return shown_not_taken(self.store, events, np.repeat(ends, num_labels), self.hard_negatives)

    def _of_items(self, feature: str, items: SampleItems) -> np.ndarray:
        """What the model gets of the items, the actions or an event feature; int64."""
        return self._for_model(feature, items.values(feature), items.place)

    def _of_users(self, feature: str, users: np.ndarray) -> np.ndarray:
        """What the model gets of a contextual feature; int64."""

        def place(index: int) -> str:
            return f"user {self.store.raw_ids(USER_FEATURE)[users[index]]} (row {users[index]})"

        return self._for_model(feature, self.store.context(feature)[users], place)

    def _side(self, items: SampleItems) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """Rows.side and Rows.list_lengths. The codes of the items must be known to be right."""
        side: dict[str, np.ndarray] = {}
        of_items = []
        for name in self.roles.categories:
            if name in self.store.time_features:
                side[name] = items.time_codes(name)
            elif name in self.store.event_features:
                side[name] = self._of_items(name, items)
            else:
                of_items.append(name)
        if not of_items:
            return side, {}
        found = self._features_of_items(of_items, items.values(self.roles.item))
        return {**side, **found.values}, {**found.list_lengths}

    def _features_of_items(self, names: Sequence[str], codes: np.ndarray) -> ItemFeatures:
        """Features of the items with these codes, which must be known to be right."""
        side: dict[str, np.ndarray] = {}
        list_lengths: dict[str, np.ndarray] = {}
        for name in names:
            values, offsets = self.store.item_values(name)
            places = codes
            if offsets is not None:
                starts = offsets.take(codes)
                list_lengths[name] = offsets.take(codes + 1) - starts
                places = ranges(starts, list_lengths[name])
            side[name] = self._for_model(name, values.take(places), lambda _: "an item")  # a third faster than []
        return ItemFeatures(side, list_lengths)

    def _numbers(self, items: SampleItems) -> np.ndarray | None:
        """Rows.numbers. The codes of the items must be known to be right."""
        if not self.roles.numbers:
            return None
        codes = items.values(self.roles.item)
        columns = []
        for name in self.roles.numbers:
            of_items = self.store.features[name].role == "item_number"
            values = self.store.item_numbers(name)[codes] if of_items else items.values(name)[:, None]
            if np.isinf(values).any():
                raise DataError(
                    f"{self.store.path}: {name} has infinite numbers: the data is damaged, preprocess it again"
                )
            columns.append(values)
        return np.concatenate(columns, axis=1)

    def _for_model(self, feature: str, stored: np.ndarray, place: Callable[[int], str]) -> np.ndarray:
        """What the model gets for stored codes, int64. ``place``: where the one at an index is, for an error."""
        values = stored.astype(np.int64)
        cardinality = self.store.cardinality(feature)
        # Viewed as unsigned, a negative code is too large as well: one comparison instead of two.
        wrong = values.view(np.uint64) >= np.uint64(cardinality)
        if wrong.any():
            first = int(wrong.argmax())
            raise DataError(
                f"{self.store.path}: {feature} = {values[first]} of {place(first)} is not in [0, {cardinality}): "
                "the data is damaged, preprocess it again"
            )
        if self.recoding and feature in self.recoding:
            return self.recoding[feature][values]
        return self.store.model_ids(feature, values)

    def item_ids(self, codes: np.ndarray) -> np.ndarray:
        """What the model gets for item codes, int64 [n]."""
        return self.store.model_ids(self.roles.item, codes)

    def tower_features(self, codes: np.ndarray) -> ItemFeatures:
        """What an item tower reads of items, given by their codes, int64 [n]."""
        return self._features_of_items(self.roles.tower, codes)


@dataclass(frozen=True)
class Assembler:
    """Turns rows into batches of ``batch_size`` sequences."""

    batch_size: int
    task: Task
    roles: FeatureRoles
    corpus_size: int
    """Item codes lie in [0, corpus_size)."""
    seed: int
    negatives: Negatives | None = None
    """For retrieval. Evaluation batches hold none, but keep the key: the tables that serve NEGATIVES expect it in every
    batch."""
    item_ids: Callable[[np.ndarray], np.ndarray] | None = None
    """Item codes → what the model gets for them. None: the codes."""
    corpus: ItemDistribution | None = None
    """How negatives are drawn from the corpus. None: uniformly."""
    draws_negatives: bool = True
    """False for evaluation, where nothing is learnt."""
    tower_features: Callable[[np.ndarray], ItemFeatures] | None = None
    """Item codes → the values of ``roles.tower``. Needed with an item tower and NEGATIVES."""

    def __post_init__(self) -> None:
        if self.task == "ranking" and self.roles.action is None:
            raise ConfigError("ranking needs an action feature, and the data has none; name one or train retrieval")

    def assemble(self, rows: Rows, plan: BatchPlan) -> HSTUBatch:
        """The batch of ``rows``, padded with empty sequences."""
        labelled = ranges(np.cumsum(rows.lengths) - rows.num_labels, rows.num_labels)
        negatives, draws, pool_positions = self._negatives(rows, plan)
        looked_up, negative_list_lengths = self._look_ups(negatives)
        num_candidates, num_labels = self._padded(rows.num_candidates), self._padded(rows.num_labels)
        lists, label_values = self.roles.lists, list(rows.label_values.values())
        seen_offsets = None if rows.seen_lengths is None else run_offsets(self._padded(rows.seen_lengths))
        return HSTUBatch(
            features=self._features(rows, looked_up),
            num_candidates=torch.from_numpy(num_candidates),
            num_labels=torch.from_numpy(num_labels),
            labels=torch.from_numpy(self._labels(rows, labelled)),
            user_ids=torch.from_numpy(self._padded(rows.user_ids, -1)),
            label_values=_tensor(np.stack(label_values) if label_values else None),
            list_lengths=_tensor(np.stack([rows.list_lengths[name] for name in lists]) if lists else None),
            numbers=_tensor(rows.numbers),
            timestamps=_tensor(rows.timestamps),
            request_times=None if rows.request_times is None else torch.from_numpy(self._padded(rows.request_times)),
            draws=_tensor(draws),
            pool_positions=_tensor(pool_positions),
            negative_list_lengths=_tensor(negative_list_lengths),
            seen_values=_tensor(rows.seen),
            seen_offsets=_tensor(seen_offsets),
            real_batch_size=len(rows.lengths),
            item_lengths=self._padded(rows.lengths),
            num_candidates_host=num_candidates,
            num_labels_total=len(labelled),
            num_labels_host=num_labels,
            position=plan.position,
        )

    def _features(self, rows: Rows, negatives: Mapping[str, np.ndarray]) -> KeyedJaggedTensor:
        lengths = self._padded(rows.lengths)
        values = {name: rows.context[name] for name in self.roles.contextual}
        jagged_lengths = {name: (lengths > 0).astype(np.int64) for name in self.roles.contextual}
        values[self.roles.item], jagged_lengths[self.roles.item] = rows.items, lengths
        if self.roles.action is not None and rows.actions is not None:
            values[self.roles.action] = rows.actions
            jagged_lengths[self.roles.action] = lengths
        for name in self.roles.categories:
            values[name], jagged_lengths[name] = rows.side[name], lengths
            if name in rows.list_lengths:
                ends = run_offsets(rows.list_lengths[name])[run_offsets(rows.lengths)]
                jagged_lengths[name] = self._padded(np.diff(ends))
        for key, looked_up in negatives.items():
            values[key], jagged_lengths[key] = looked_up, self._padded(np.array([len(looked_up)]))
        return keyed_jagged(values, jagged_lengths)

    def _look_ups(self, negatives: np.ndarray | None) -> tuple[dict[str, np.ndarray], np.ndarray | None]:
        """For the codes of negatives: what is looked up, by key of the batch, and ``negative_list_lengths``."""
        if negatives is None:
            return {}, None
        values = {NEGATIVES: negatives if self.item_ids is None else self.item_ids(negatives)}
        if not self.roles.tower:
            return values, None
        lists = self.roles.tower_lists
        if len(negatives):
            assert self.tower_features is not None
            features = self.tower_features(negatives)
        else:  # an evaluation batch
            features = ItemFeatures(dict.fromkeys(self.roles.tower, negatives), dict.fromkeys(lists, negatives))
        values |= {of_negatives(name): features.values[name] for name in self.roles.tower}
        return values, np.stack([features.list_lengths[name] for name in lists]) if lists else None

    def _labels(self, rows: Rows, labelled: np.ndarray) -> np.ndarray:
        if rows.held_out is not None:
            return self._padded(rows.held_out, -1)
        values = rows.actions if self.task == "ranking" else rows.items
        assert values is not None, "__post_init__ requires an action feature for ranking"
        return values[labelled]

    def _negatives(self, rows: Rows, plan: BatchPlan) -> tuple[np.ndarray | None, np.ndarray | None, np.ndarray | None]:
        """(item codes to look up, draws, pool positions); each None where the kind of negatives has none."""
        negatives = self.negatives
        if negatives is None:
            return None, None, None
        if rows.held_out is not None or not self.draws_negatives:
            return None if negatives.kind == "in_batch" else np.empty(0, dtype=np.int64), None, None
        num_labels = labels_with_history(rows.num_labels, rows.lengths)
        pool = np.unique(rows.items, return_index=True)[1] if negatives.has_batch_pool else None
        keys = LabelKeys(
            seed=self.seed,
            epoch=plan.epoch,
            ordinals=np.repeat(plan.ordinals, num_labels),
            places=run_indices(num_labels)[1],
            global_start=plan.global_start,
        )
        if negatives.kind == "in_batch":
            return None, draw_31_bits(keys, negatives.num) if negatives.num else None, pool
        draws, corpus = None, self.corpus or ItemDistribution(self.corpus_size)
        if negatives.kind == "full":
            codes = np.arange(self.corpus_size, dtype=np.int64)
        elif negatives.shared:
            codes = draw_shared(keys, negatives.num, corpus)
        else:
            codes, draws = draw_each(keys, negatives.num, corpus, rows.hard_negatives)
        return codes, draws, pool

    def _padded(self, values: np.ndarray, filler: int = 0) -> np.ndarray:
        padding = np.full(self.batch_size - len(values), filler, dtype=np.int64)
        return np.concatenate([values, padding], dtype=np.int64)


def _tensor(array: np.ndarray | None) -> Tensor | None:
    return None if array is None else torch.from_numpy(np.ascontiguousarray(array))


@dataclass(frozen=True)
class Collator:
    """Builds the batch of a plan. Picklable: each worker process gets a copy, which reopens the memory maps."""

    reader: RowReader
    assembler: Assembler
    skipped: SkippedSamples | None = None
    """Leaves out and counts samples with damaged data. None: such a sample is an error."""

    def __call__(self, plan: BatchPlan) -> HSTUBatch:
        """Reads and assembles the batch."""
        if self.skipped is None:
            return self.assembler.assemble(self.reader.read(plan), plan)
        plan, rows = self.skipped.read(self.reader, plan)
        return self.assembler.assemble(rows, plan)


class SkippedSamples:
    """TrainerArgs.bad_row_policy = "skip": leaves damaged samples out of batches, and counts them.

    The count covers all data workers of a rank and must be passed to them when they start. More than ``limit`` skipped
    samples are a DataError.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._count = multiprocessing.Value("q", 0)

    @property
    def count(self) -> int:
        """Samples left out so far; a sample that recurs in another epoch counts again."""
        return int(self._count.value)

    def read(self, reader: RowReader, plan: BatchPlan) -> tuple[BatchPlan, Rows]:
        """The plan without its damaged samples, and its rows. The other samples keep their ordinals."""
        try:
            return plan, reader.read(plan)
        except DataError:
            good = np.array([self._is_good(reader, plan, index) for index in range(len(plan.indices))])
        plan = _select(plan, good)
        return plan, reader.read(plan)

    def _is_good(self, reader: RowReader, plan: BatchPlan, index: int) -> bool:
        try:
            reader.read(_select(plan, np.array([index])))
        except DataError as error:
            with self._count.get_lock():
                self._count.value += 1
                count = int(self._count.value)
            if count > self.limit:
                raise DataError(
                    f"{error}. It is damaged sample {count}, TrainerArgs.max_bad_rows = {self.limit}"
                ) from error
            _log.warning("skipped damaged sample %d of at most %d: %s", count, self.limit, error)
            return False
        return True


def _select(plan: BatchPlan, chosen: np.ndarray) -> BatchPlan:
    """The samples of a plan that ``chosen``, a mask or indices, picks."""
    return replace(plan, indices=plan.indices[chosen], ordinals=plan.ordinals[chosen])
