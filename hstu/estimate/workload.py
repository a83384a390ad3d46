"""What the ranks of a run compute on: the lengths of their batches, and the sizes of their groups."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from hstu.config.run_config import RunConfig
from hstu.data.batches.batch import labels_with_history
from hstu.data.features.roles import FeatureRoles
from hstu.data.sampling.negatives import Negatives
from hstu.data.sampling.sampler import Loads
from hstu.model.embedding import TableSpec
from hstu.train.flops import FlopCounter


@dataclass(frozen=True)
class Batch:
    """The samples that a tp_cp group computes on in one step. A rank looks up 1 / group_size of them."""

    item_lengths: np.ndarray
    """int64 [sequences]: items of each sequence, candidates included."""
    num_candidates: np.ndarray
    """int64 [sequences]."""
    num_labels: np.ndarray
    """int64 [sequences]: labelled items of each."""

    @property
    def sequences(self) -> int:
        """Sequences that are not empty."""
        return len(self.item_lengths)

    @property
    def items(self) -> int:
        """Items of all sequences."""
        return int(self.item_lengths.sum())

    @property
    def labels_with_history(self) -> int:
        """Labelled items that follow another item."""
        return int(labels_with_history(self.num_labels, self.item_lengths).sum())

    def part(self, index: int, parts: int) -> Batch:
        """One of ``parts`` runs of equally many sequences; the last one may have fewer."""
        size = -(-self.sequences // parts)
        chosen = slice(index * size, (index + 1) * size)
        return Batch(self.item_lengths[chosen], self.num_candidates[chosen], self.num_labels[chosen])


@dataclass(frozen=True)
class Workload:
    """A run of ``world_size`` ranks. Ranks of a host are neighbours, as torchrun numbers them."""

    config: RunConfig
    world_size: int
    ranks_per_host: int
    device_type: str
    """"cpu" or "cuda"."""
    roles: FeatureRoles
    specs: tuple[TableSpec, ...]
    max_items: int
    """Items of the longest sequence."""
    corpus_size: int
    """Item codes are below this."""
    values_per_item: Mapping[str, float]
    """Side feature that is a list → its values per item, on average over the items."""
    steps: tuple[tuple[Batch, ...], ...]
    """For each of the first steps one batch per data-parallel rank (of some of them, if there are many)."""
    has_data: bool
    """Whether the lengths are those of the data. If not, each sequence is taken to be as long as allowed."""
    notes: tuple[str, ...]
    """Assumptions, one sentence each."""

    @property
    def tp_size(self) -> int:
        """Ranks of a tensor-parallel group."""
        return self.config.tensor_parallel.tensor_model_parallel_size

    @property
    def cp_size(self) -> int:
        """Ranks of a context-parallel group."""
        return self.config.context_parallel.context_parallel_size

    @property
    def group_size(self) -> int:
        """Ranks that compute on the same samples."""
        return self.config.ranks_per_group

    @property
    def dp_size(self) -> int:
        """Data-parallel ranks."""
        return self.world_size // self.group_size

    @property
    def dp_cp_size(self) -> int:
        """Ranks with equal dense weights, over which DDP averages gradients."""
        return self.world_size // self.tp_size

    def ranks_on_host(self, group: str, ranks: int) -> int:
        """How many of the ``ranks`` of a group of a Transfer a host has."""
        strides = {"context": self.tp_size, "data": self.world_size // ranks, "shards": self.tp_size}
        return min(ranks, max(1, self.ranks_per_host // strides.get(group, 1)))

    @property
    def element_size(self) -> int:
        """Bytes of a number in the compute type."""
        return 4 if self.config.network.dtype_str == "float32" else 2

    @property
    def dense_sharding(self) -> str:
        """DataParallelArgs.sharding as in force: "none" with one data-parallel rank."""
        return self.config.data_parallel.sharding if self.dp_cp_size > 1 else "none"

    @property
    def shard_group_size(self) -> int:
        """Ranks that share what ``dense_sharding`` shards; 1 if it is "none"."""
        return 1 if self.dense_sharding == "none" else self.dp_cp_size

    @property
    def replicated_elements(self) -> int:
        """Elements of the data_parallel tables, which every rank holds in full."""
        return sum(spec.rows * spec.dim for spec in self.specs if spec.replicated)

    def loads(self, item_lengths: np.ndarray, num_candidates: np.ndarray) -> Loads:
        """Tokens and reported operations of each sequence; both arrays int64 [sequences]."""
        return FlopCounter(self.config.network, self.roles).per_sequence(item_lengths, num_candidates)

    def tokens(self, batch: Batch) -> int:
        """Tokens of a batch."""
        return int(self.loads(batch.item_lengths, batch.num_candidates).tokens.sum())

    def flops(self, batch: Batch) -> float:
        """Reported operations of training on a batch, all ranks of the group together."""
        return float(self.loads(batch.item_lengths, batch.num_candidates).costs.sum())

    @cached_property
    def negatives(self) -> Negatives | None:
        """Those of the retrieval loss."""
        return Negatives.of(self.config.retrieval) if self.config.retrieval is not None else None

    def list_lengths(self, feature: str, items: int) -> np.ndarray:
        """Values that each of so many items has of a list, on average those of the data; int64 [items]."""
        ends = np.ceil(np.arange(items + 1) * self.values_per_item.get(feature, 1.0)).astype(np.int64)
        return np.diff(ends)

    @property
    def batches(self) -> list[Batch]:
        """All planned batches."""
        return [batch for step in self.steps for batch in step]

    @cached_property
    def typical(self) -> Batch:
        """The planned batch whose cost is nearest to the mean."""
        costs = np.array([self.flops(batch) for batch in self.batches])
        return self.batches[int(np.abs(costs - costs.mean()).argmin())]

    @cached_property
    def largest(self) -> Batch:
        """The planned batch with the most tokens."""
        return max(self.batches, key=self.tokens)

    @cached_property
    def straggling(self) -> float:
        """Cost of the slowest data-parallel rank, for which all wait, over the mean rank; mean over the steps."""
        costs = [[self.flops(batch) for batch in step] for step in self.steps]
        return float(np.mean([max(step) for step in costs]) / np.mean([np.mean(step) for step in costs]))
