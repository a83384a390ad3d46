"""From a plan to a batch: a reader reads the samples as Rows, and the Assembler adds padding and negatives."""

import logging
import multiprocessing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from hstu.base.errors import ConfigError, DataError
from hstu.config.args import Task
from hstu.data.batches.batch import (
    NEGATIVES,
    BatchNegatives,
    HSTUBatch,
    ItemColumns,
    ItemFeatures,
    SeenIds,
    keyed_jagged,
    labels_with_history,
    of_negatives,
)
from hstu.data.batches.jagged import ranges, run_indices, run_offsets
from hstu.data.features.roles import FeatureRoles
from hstu.data.sampling.negatives import Negatives, draw_31_bits, draw_each, draw_shared
from hstu.data.sampling.sampler import BatchPlan, knows_request_time


@dataclass(frozen=True)
class Rows:
    """The b real sequences of a batch, with n = Σ lengths items, as flat arrays before padding; int64 unless stated."""

    user_ids: np.ndarray
    lengths: np.ndarray
    """Items per sequence, [b]; user_ids, num_candidates and num_labels are [b] as well."""
    num_candidates: np.ndarray
    num_labels: np.ndarray
    items: np.ndarray
    actions: np.ndarray | None
    timestamps: np.ndarray | None
    """[n] seconds; items and actions are [n] as well."""
    context: Mapping[str, np.ndarray]
    """Feature → [b]."""
    side: ItemFeatures = ItemFeatures({}, {})
    """The side features with ids of the n items."""
    label_values: Mapping[str, np.ndarray] = field(default_factory=dict)
    """Features of FeatureRoles.labels, in their order → float32 [Σ num_labels], NaN where missing."""
    numbers: np.ndarray | None = None
    """float32 [n, W], see ItemColumns.numbers."""
    held_out: np.ndarray | None = None
    """Retrieval evaluation: the target items, [b]."""
    request_times: np.ndarray | None = None
    """Retrieval evaluation: the times of the target events, [b], in seconds."""
    target_events: np.ndarray | None = None
    """Evaluation: ``SampleTable.newest_labels``, [b]."""
    seen: tuple[np.ndarray, np.ndarray] | None = None
    """SeenIds.values and lengths, [b]."""


_LookUps = tuple[dict[str, np.ndarray], np.ndarray | None]
"""For codes of negatives: key of the batch → values to look up; ``BatchNegatives.list_lengths``."""
_log = logging.getLogger(__name__)


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
    """For retrieval. Evaluation batches have none, but keep the key, because tables that serve NEGATIVES expect it."""
    item_ids: Callable[[np.ndarray], np.ndarray] | None = None
    """Item codes → model ids. None: the codes."""
    tower_features: Callable[[np.ndarray], ItemFeatures] | None = None
    """Item codes → the values of ``roles.tower``. Required for an item tower with NEGATIVES."""
    hides_request_times: bool = False
    """Training: draw ``HSTUBatch.asks_for_next``."""

    def __post_init__(self) -> None:
        if self.task == "ranking" and self.roles.action is None:
            raise ConfigError("ranking needs an action feature, and the data has none; name one or train retrieval")

    def assemble(self, rows: Rows, plan: BatchPlan) -> HSTUBatch:
        """The batch of ``rows``, padded with empty sequences."""
        labelled = ranges(np.cumsum(rows.lengths) - rows.num_labels, rows.num_labels)
        (looked_up, list_lengths), draws, pool_positions = self._negatives(rows, plan)
        num_candidates, num_labels = self._padded(rows.num_candidates), self._padded(rows.num_labels)
        lists, label_values = self.roles.lists, list(rows.label_values.values())
        asks = knows_request_time(self.seed, plan.epoch, plan.ordinals) if self.hides_request_times else None
        return HSTUBatch(
            features=self._features(rows, looked_up),
            num_candidates=torch.from_numpy(num_candidates),
            num_labels=torch.from_numpy(num_labels),
            labels=torch.from_numpy(self._labels(rows, labelled)),
            user_ids=torch.from_numpy(self._padded(rows.user_ids, -1)),
            label_values=_tensor(np.stack(label_values) if label_values else None),
            request_times=self._padded_tensor(rows.request_times),
            asks_for_next=None if asks is None else torch.from_numpy(self._padded(asks) > 0),
            target_events=self._padded_tensor(rows.target_events),
            items=ItemColumns(
                timestamps=_tensor(rows.timestamps),
                numbers=_tensor(rows.numbers),
                list_lengths=_tensor(np.stack([rows.side.list_lengths[name] for name in lists]) if lists else None),
            ),
            negatives=BatchNegatives(
                draws=_tensor(draws), pool_positions=_tensor(pool_positions), list_lengths=_tensor(list_lengths)
            ),
            seen=None
            if rows.seen is None
            else SeenIds(values=torch.from_numpy(rows.seen[0]), lengths=torch.from_numpy(self._padded(rows.seen[1]))),
            real_batch_size=len(rows.lengths),
            item_lengths=self._padded(rows.lengths),
            num_candidates_host=num_candidates,
            num_labels_host=num_labels,
            position=plan.position,
        )

    def _features(self, rows: Rows, negatives: Mapping[str, np.ndarray]) -> KeyedJaggedTensor:
        lengths = self._padded(rows.lengths)
        values = {name: rows.context[name] for name in self.roles.contextual}
        jagged_lengths = {name: (lengths > 0).astype(np.int64) for name in self.roles.contextual}
        values[self.roles.item] = rows.items
        if self.roles.action is not None and rows.actions is not None:
            values[self.roles.action] = rows.actions
        values |= {name: rows.side.values[name] for name in self.roles.categories}
        for name, of_items in rows.side.list_lengths.items():
            jagged_lengths[name] = self._padded(np.diff(run_offsets(of_items)[run_offsets(rows.lengths)]))
        jagged_lengths |= {key: self._padded(np.array([len(found)])) for key, found in negatives.items()}
        values |= negatives
        return keyed_jagged(values, {key: jagged_lengths.get(key, lengths) for key in values})

    @cached_property
    def _of_corpus(self) -> _LookUps:
        return self._look_ups(np.arange(self.corpus_size, dtype=np.int64))

    def _look_ups(self, negatives: np.ndarray) -> _LookUps:
        """``negatives``: item codes."""
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

    def _negatives(self, rows: Rows, plan: BatchPlan) -> tuple[_LookUps, np.ndarray | None, np.ndarray | None]:
        """(look-ups, draws, pool positions); each None or empty if this kind of negatives has none."""
        negatives = self.negatives
        nothing: _LookUps = ({}, None)
        if negatives is None:
            return nothing, None, None
        if rows.held_out is not None:
            return nothing if negatives.kind == "in_batch" else self._look_ups(np.empty(0, dtype=np.int64)), None, None
        if negatives.kind == "full":
            return self._of_corpus, None, None
        num_labels = labels_with_history(rows.num_labels, rows.lengths)
        pool = np.unique(rows.items, return_index=True)[1] if negatives.has_batch_pool else None
        key, (sample, place) = (self.seed, plan.epoch), run_indices(num_labels)
        labels = (*key, plan.ordinals[sample][:, None], place[:, None])
        if negatives.kind == "in_batch":
            return nothing, draw_31_bits(labels, negatives.num) if negatives.num else None, pool
        if negatives.shared:
            return self._look_ups(draw_shared((*key, plan.global_start), negatives.num, self.corpus_size)), None, pool
        codes, draws = draw_each(labels, negatives.num, self.corpus_size)
        return self._look_ups(codes), draws, pool

    def _padded_tensor(self, values: np.ndarray | None) -> Tensor | None:
        return None if values is None else torch.from_numpy(self._padded(values))

    def _padded(self, values: np.ndarray, filler: int = 0) -> np.ndarray:
        padding = np.full(self.batch_size - len(values), filler, dtype=np.int64)
        return np.concatenate([values, padding], dtype=np.int64)


def _tensor(array: np.ndarray | None) -> Tensor | None:
    return None if array is None else torch.from_numpy(np.ascontiguousarray(array))


class SkippedSamples:
    """Counts damaged samples that are left out (TrainerArgs.bad_row_policy = "skip"), in each epoch again. The data
    workers of a rank share the count, which is passed to them at their start. Above ``limit``, raises DataError."""

    def __init__(self, limit: int = 100) -> None:
        self.limit = limit
        self._count = multiprocessing.Value("q", 0)

    @property
    def count(self) -> int:
        """Samples left out so far."""
        return int(self._count.value)

    def add(self, error: DataError) -> None:
        """Counts a damaged sample, which ``error`` describes."""
        with self._count.get_lock():
            self._count.value += 1
            count = self.count
        if count > self.limit:
            text = f"It is damaged sample {count}, and a rank may skip {self.limit}; preprocess the data again"
            raise DataError(f"{error}. {text}") from error
        _log.warning("skipped damaged sample %d of at most %d: %s", count, self.limit, error)


@dataclass(frozen=True)
class Collator:
    """Builds the batch of a plan. Picklable: each worker process gets a copy, which reopens the memory maps."""

    read: Callable[[BatchPlan], Rows]
    """Returns the rows of ``plan.indices``, in that order."""
    assembler: Assembler
    skipped: SkippedSamples | None = None
    """Counts damaged samples, which are then left out. None: a damaged sample raises DataError."""

    def __call__(self, plan: BatchPlan) -> HSTUBatch:
        """Reads and assembles the batch. Leaving out damaged samples does not change the ordinals of the others."""
        try:
            rows = self.read(plan)
        except DataError:
            if self.skipped is None:
                raise
            is_good = np.array([self._can_read(_select(plan, [index])) for index in range(len(plan.indices))])
            plan = _select(plan, np.flatnonzero(is_good))
            rows = self.read(plan)
        return self.assembler.assemble(rows, plan)

    def _can_read(self, plan: BatchPlan) -> bool:
        assert self.skipped is not None
        try:
            self.read(plan)
        except DataError as error:
            self.skipped.add(error)
            return False
        return True


def _select(plan: BatchPlan, chosen: Sequence[int] | np.ndarray) -> BatchPlan:
    return replace(plan, indices=plan.indices[chosen], ordinals=plan.ordinals[chosen])
