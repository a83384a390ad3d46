"""From a plan to a batch: gather the planned samples' events from the store and assemble an HSTUBatch.

Two steps: a *reader* (StoreReader here, random data in synthetic.py) produces plain arrays, and the Assembler turns
them into an HSTUBatch, with padding and negatives. Neither loops over samples or tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from hstu.config.args import DatasetArgs
from hstu.config.errors import ConfigError, DataError
from hstu.data.batch import NEGATIVES, HSTUBatch, keyed_jagged
from hstu.data.negatives import LabelKeys, Negatives, draw_31_bits, draw_shared, draw_uniform
from hstu.data.sampler import BatchPlan
from hstu.data.samples import SampleTable, StochasticLength
from hstu.data.sequences import Task
from hstu.data.skipping import SkippedSamples
from hstu.data.store import USER_FEATURE, SequenceStore


@dataclass(frozen=True)
class FeatureRoles:
    """Which features a model sees, and as what; contextual features in the order of their tokens."""

    item: str
    action: str | None
    contextual: tuple[str, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """All features in the order of a batch's keys."""
        return (*self.contextual, self.item, *([self.action] if self.action else []))


def resolve_roles(store: SequenceStore, args: DatasetArgs) -> FeatureRoles:
    """The store's features, or those named in ``args``; ConfigError names the ones that the store lacks."""
    chosen = FeatureRoles(
        item=args.item_feature_name or store.item_feature,
        action=store.action_feature if args.action_feature_name is None else args.action_feature_name or None,
        contextual=store.contextual_features
        if args.contextual_feature_names is None
        else tuple(args.contextual_feature_names),
    )
    wanted = [("item", chosen.item), *(("context", name) for name in chosen.contextual)]
    if chosen.action is not None:
        wanted.append(("action", chosen.action))
    problems = []
    for role, name in wanted:
        allowed = [meta.name for meta in store.features.values() if meta.role == role]
        if name not in allowed:
            problems.append(f"{name!r} is no {role} feature of {store.path}; allowed: {', '.join(allowed) or 'none'}")
    if problems:
        raise ConfigError(problems)
    return chosen


@dataclass(frozen=True)
class Rows:
    """The real sequences of a batch (b of them) as flat arrays, before padding; all int64."""

    user_ids: np.ndarray
    """[b]"""
    lengths: np.ndarray
    """Items of each sequence, [b]."""
    num_candidates: np.ndarray
    """[b]"""
    num_labels: np.ndarray
    """[b]"""
    items: np.ndarray
    """[sum of lengths]"""
    actions: np.ndarray | None
    """[sum of lengths]"""
    timestamps: np.ndarray | None
    """[sum of lengths], seconds."""
    context: Mapping[str, np.ndarray]
    """[b] a feature."""
    held_out: np.ndarray | None = None
    """Retrieval evaluation: the items to be found, [b]."""
    seen: np.ndarray | None = None
    """Retrieval evaluation: items of the whole histories, [sum of seen_lengths]."""
    seen_lengths: np.ndarray | None = None
    """[b]"""


class RowReader(Protocol):
    """Where rows come from."""

    def read(self, plan: BatchPlan) -> Rows:
        """The rows of ``plan.indices``, in that order."""
        ...


def ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """The integers of [starts[i], starts[i] + lengths[i]) for all i, one after another; int64 [sum of lengths]."""
    before = np.cumsum(lengths) - lengths
    return np.arange(lengths.sum(), dtype=np.int64) + np.repeat(starts - before, lengths)


class StoreReader:
    """Reads the samples of a table from a store, and checks every value that it reads.

    ``wants_timestamps``: read times, for relative biases; ``wants_seen``: read whole histories, for filter_seen.
    ``recoding``: int64 [cardinality] a feature, from this store's codes to those of the store that is trained on.
    ``stochastic_length``: shortens training samples by chance.
    """

    def __init__(
        self,
        store: SequenceStore,
        samples: SampleTable,
        roles: FeatureRoles,
        *,
        wants_timestamps: bool = False,
        wants_seen: bool = False,
        recoding: Mapping[str, np.ndarray] | None = None,
        stochastic_length: StochasticLength | None = None,
    ) -> None:
        if wants_timestamps and store.timestamp_feature is None:
            raise ConfigError(
                f'NetworkArgs.position_encoding = "relative_bias" needs times, and {store.path} has none; '
                "use another position_encoding or preprocess with a time column"
            )
        self.store = store
        self.samples = samples
        self.roles = roles
        self.timestamp_feature = store.timestamp_feature if wants_timestamps else None
        self.wants_seen = wants_seen and samples.target is not None
        self.recoding = dict(recoding or {})
        self.stochastic_length = stochastic_length

    def read(self, plan: BatchPlan) -> Rows:
        """The rows of ``plan.indices``. Raises DataError that names the user of a value out of range."""
        samples, chosen = self.samples, plan.indices
        start, users = samples.start[chosen], samples.user[chosen]
        lengths, num_labels = samples.stop[chosen] - start, samples.num_labels[chosen]
        if self.stochastic_length is not None:
            whole = lengths
            lengths, num_labels = self.stochastic_length.shorten(whole, num_labels, plan.epoch, plan.ordinals)
            start = start + whole - lengths
        events = ranges(start, lengths)
        held_out = seen = seen_lengths = None
        if samples.target is not None:
            target, begin = samples.target[chosen], samples.history_begin[chosen]
            held_out = self._events(self.roles.item, target)
            if self.wants_seen:
                seen_lengths = target - begin
                seen = self._events(self.roles.item, ranges(begin, seen_lengths))
        return Rows(
            user_ids=users,
            lengths=lengths,
            num_candidates=samples.num_candidates[chosen],
            num_labels=num_labels,
            items=self._events(self.roles.item, events),
            actions=None if self.roles.action is None else self._events(self.roles.action, events),
            timestamps=None if self.timestamp_feature is None else self._events(self.timestamp_feature, events),
            context={name: self._context(name, users) for name in self.roles.contextual},
            held_out=held_out,
            seen=seen,
            seen_lengths=seen_lengths,
        )

    def _events(self, feature: str, events: np.ndarray) -> np.ndarray:
        values = self.store.sequence(feature)[events].astype(np.int64)
        if feature != self.timestamp_feature and (wrong := self._out_of_range(feature, values)) is not None:
            user = int(np.searchsorted(self.store.offsets(), events[wrong], side="right")) - 1
            raise self._damaged(feature, int(values[wrong]), user, f"event {events[wrong]}")
        return self._recoded(feature, values)

    def _context(self, feature: str, users: np.ndarray) -> np.ndarray:
        values = self.store.context(feature)[users].astype(np.int64)
        if (wrong := self._out_of_range(feature, values)) is not None:
            raise self._damaged(feature, int(values[wrong]), int(users[wrong]), f"row {users[wrong]}")
        return self._recoded(feature, values)

    def _recoded(self, feature: str, values: np.ndarray) -> np.ndarray:
        return self.recoding[feature][values] if feature in self.recoding else values

    def _out_of_range(self, feature: str, values: np.ndarray) -> int | None:
        # A timestamp has no range. Seen as unsigned, a negative code is too large: one comparison, not two.
        wrong = values.view(np.uint64) >= np.uint64(self.store.cardinality(feature))
        return int(wrong.argmax()) if wrong.any() else None

    def _damaged(self, feature: str, value: int, user: int, where: str) -> DataError:
        return DataError(
            f"{self.store.path}: {feature} = {value} of user {self.store.raw_ids(USER_FEATURE)[user]} ({where}) "
            f"is not in [0, {self.store.cardinality(feature)}): the data is damaged, preprocess it again"
        )


@dataclass(frozen=True)
class Assembler:
    """Turns rows into batches of ``batch_size`` sequences.

    ``negatives``: of retrieval, else None. Batches of an evaluation have none, but the same keys: the tables that
    serve NEGATIVES expect the key in every batch. ``corpus_size``: item codes lie in [0, corpus_size).
    """

    batch_size: int
    task: Task
    roles: FeatureRoles
    corpus_size: int
    seed: int
    negatives: Negatives | None = None

    def __post_init__(self) -> None:
        if self.task == "ranking" and self.roles.action is None:
            raise ConfigError("ranking needs an action feature, and the data has none; name one or train retrieval")

    def assemble(self, rows: Rows, plan: BatchPlan) -> HSTUBatch:
        """The batch of ``rows``, padded with empty sequences."""
        items = rows.items
        labelled = ranges(np.cumsum(rows.lengths) - rows.num_labels, rows.num_labels)
        negatives, draws, pool_positions = self._negatives(rows, items, plan)
        num_candidates = self._padded(rows.num_candidates)
        return HSTUBatch(
            features=self._features(rows, items, negatives),
            num_candidates=torch.from_numpy(num_candidates),
            num_labels=torch.from_numpy(self._padded(rows.num_labels)),
            labels=torch.from_numpy(self._labels(rows, items, labelled)),
            user_ids=torch.from_numpy(self._padded(rows.user_ids, -1)),
            timestamps=_tensor(rows.timestamps),
            draws=_tensor(draws),
            pool_positions=_tensor(pool_positions),
            seen_values=_tensor(rows.seen),
            seen_offsets=None if rows.seen_lengths is None else _tensor(self._offsets(rows.seen_lengths)),
            real_batch_size=len(rows.lengths),
            item_lengths=self._padded(rows.lengths),
            num_candidates_host=num_candidates,
            num_labels_total=len(labelled),
            position=plan.position,
        )

    def _features(self, rows: Rows, items: np.ndarray, negatives: np.ndarray | None) -> KeyedJaggedTensor:
        lengths = self._padded(rows.lengths)
        values = {name: rows.context[name] for name in self.roles.contextual}
        jagged_lengths = {name: (lengths > 0).astype(np.int64) for name in self.roles.contextual}
        values[self.roles.item], jagged_lengths[self.roles.item] = items, lengths
        if self.roles.action is not None and rows.actions is not None:
            values[self.roles.action] = rows.actions
            jagged_lengths[self.roles.action] = lengths
        if negatives is not None:
            values[NEGATIVES] = negatives
            jagged_lengths[NEGATIVES] = self._padded(np.array([len(negatives)]))
        return keyed_jagged(values, jagged_lengths)

    def _labels(self, rows: Rows, items: np.ndarray, labelled: np.ndarray) -> np.ndarray:
        if rows.held_out is not None:
            return self._padded(rows.held_out, -1)
        values = rows.actions if self.task == "ranking" else items
        assert values is not None, "ranking has an action feature, __post_init__ sees to it"
        return values[labelled]

    def _negatives(
        self, rows: Rows, items: np.ndarray, plan: BatchPlan
    ) -> tuple[np.ndarray | None, np.ndarray | None, np.ndarray | None]:
        """(item codes to look up, draws, pool positions), each None where the kind of negatives has none."""
        negatives = self.negatives
        if negatives is None:
            return None, None, None
        in_batch = negatives.kind == "in_batch"
        if rows.held_out is not None:
            return None if in_batch else np.empty(0, dtype=np.int64), None, None
        keys = LabelKeys(
            seed=self.seed,
            epoch=plan.epoch,
            ordinals=np.repeat(plan.ordinals, rows.num_labels),
            places=ranges(np.zeros_like(rows.num_labels), rows.num_labels),
            global_start=plan.global_start,
        )
        if in_batch:
            draws = draw_31_bits(keys, negatives.num) if negatives.num else None
            return None, draws, np.unique(items, return_index=True)[1]
        if negatives.kind == "full":
            return np.arange(self.corpus_size, dtype=np.int64), None, None
        if negatives.shared:
            return draw_shared(keys, negatives.num, self.corpus_size), None, None
        return *draw_uniform(keys, negatives.num, self.corpus_size), None

    def _padded(self, values: np.ndarray, filler: int = 0) -> np.ndarray:
        padding = np.full(self.batch_size - len(values), filler, dtype=np.int64)
        return np.concatenate([values, padding], dtype=np.int64)

    def _offsets(self, lengths: np.ndarray) -> np.ndarray:
        return np.concatenate([[0], np.cumsum(self._padded(lengths))])


def _tensor(array: np.ndarray | None) -> Tensor | None:
    return None if array is None else torch.from_numpy(np.ascontiguousarray(array))


@dataclass(frozen=True)
class Collator:
    """Makes the batch of a plan. Picklable: a worker process gets its own, which reopens the memory maps.

    ``skipped``: leaves samples with damaged data out, and counts them; None: they are an error.
    """

    reader: RowReader
    assembler: Assembler
    skipped: SkippedSamples | None = None

    def __call__(self, plan: BatchPlan) -> HSTUBatch:
        """Read and assemble."""
        if self.skipped is None:
            return self.assembler.assemble(self.reader.read(plan), plan)
        plan, rows = self.skipped.read(self.reader, plan)
        return self.assembler.assemble(rows, plan)
