"""What the ranks of a run compute on: batches, and the shapes of the model that computes on them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch

from hstu.config.run_config import RunConfig
from hstu.data.batches.batch import NEGATIVES, of_negatives
from hstu.data.features.roles import FeatureRoles
from hstu.data.sampling.negatives import Negatives
from hstu.data.sampling.sampler import Loads
from hstu.model.embedding import TableSpec
from hstu.model.inputs import SequenceFeatures
from hstu.model.retrieval import LogCounts
from hstu.model.stack import FusedHSTULayer, SequenceEncoder, kernel_shapes
from hstu.ops.costs import FLOAT32
from hstu.ops.kernels import Kernels
from hstu.ops.pytorch.operators import REFERENCE_KERNELS
from hstu.ops.select import select_kernels
from hstu.parallel.tensor import SPLIT_DIMS
from hstu.train.builder import TaskModel, task_module
from hstu.train.flops import FlopCounter, truncated_items


@dataclass(frozen=True)
class Batch:
    """The samples that a tp_cp group computes on in one step. A rank looks up 1 / group_size of them."""

    item_lengths: np.ndarray
    """int64 [sequences]: items of each sequence, candidates included."""
    num_candidates: np.ndarray
    """int64 [sequences]."""
    labels: int
    """Labelled items."""

    @property
    def sequences(self) -> int:
        """Sequences that are not empty."""
        return len(self.item_lengths)

    @property
    def items(self) -> int:
        """Items of all sequences."""
        return int(self.item_lengths.sum())

    def first(self, sequences: int) -> Batch:
        """The first sequences, with their part of the labels."""
        labels = -(-self.labels * sequences // max(self.sequences, 1))
        return Batch(self.item_lengths[:sequences], self.num_candidates[:sequences], labels)


@dataclass(frozen=True)
class LayerPart:
    """Layers that compute on the same tokens."""

    spans: tuple[int | None, ...]
    """max_attention_span of each of the layers."""
    batch: Batch


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
        strides["replicas"] = self.tp_size * self.shard_group_size
        return min(ranks, max(1, self.ranks_per_host // strides.get(group, 1)))

    @property
    def element_size(self) -> int:
        """Bytes of a number in the compute type."""
        return 4 if self.config.network.dtype_str == "float32" else 2

    @cached_property
    def features(self) -> SequenceFeatures:
        """The features of a sequence."""
        return SequenceFeatures.of(self.roles, self.max_items)

    @cached_property
    def task(self) -> TaskModel:
        """The dense part of the model, replicated tables apart, on the meta device: shapes without memory."""
        has_log_counts = self.negatives is not None and self.negatives.logq
        with torch.device("meta"):
            log_counts = LogCounts(torch.empty(self.corpus_size)) if has_log_counts else None
            return task_module(self.config, self.features, REFERENCE_KERNELS, log_counts=log_counts)

    @cached_property
    def cpu_kernels(self) -> Kernels:
        """The kernels of the run on this CPU, for operators that are timed."""
        network = self.config.network
        shapes = kernel_shapes(network, self.tp_size)
        return select_kernels(network.kernel_backend, network.strict_kernel_backend, torch.device("cpu"), shapes)

    @cached_property
    def dense_parameters(self) -> dict[str, int]:
        """Elements of each parameter of ``task`` on one rank, by its name in the model."""
        split = tuple(f".{name}" for name in SPLIT_DIMS)
        return {
            f"task.{name}": parameter.numel() // (self.tp_size if name.endswith(split) else 1)
            for name, parameter in self.task.named_parameters()
        }

    @cached_property
    def dense_rows(self) -> dict[str, int]:
        """First dimension of each parameter of ``task`` on one rank, by its name in the model."""
        split = tuple(f".{name}" for name, dim in SPLIT_DIMS.items() if dim == 0)
        return {
            f"task.{name}": parameter.shape[0] // (self.tp_size if name.endswith(split) else 1)
            for name, parameter in self.task.named_parameters()
        }

    @property
    def dense_sharding(self) -> str:
        """DataParallelArgs.sharding as in force: "none" with one data-parallel rank."""
        return self.config.data_parallel.sharding if self.dp_cp_size > 1 else "none"

    @property
    def shard_group_size(self) -> int:
        """Ranks that share what ``dense_sharding`` shards; 1 if it is "none"."""
        if self.dense_sharding == "none":
            return 1
        return self.config.data_parallel.shard_group_size or self.dp_cp_size

    @property
    def encoder(self) -> SequenceEncoder:
        """The encoder of ``task``."""
        encoder = self.task.encoder
        assert isinstance(encoder, SequenceEncoder)
        return encoder

    @property
    def layer(self) -> FusedHSTULayer:
        """The first layer of ``task``; all layers are alike."""
        return next(module for module in self.task.modules() if isinstance(module, FusedHSTULayer))

    @cached_property
    def projected_widths(self) -> dict[str, int]:
        """Roles of features whose rows are projected to hidden_size → width of the rows."""
        return {role: mlp[0].in_features for role, mlp in self.encoder.inputs.projections.items()}  # type: ignore[index]

    @property
    def replicated_elements(self) -> int:
        """Elements of the data_parallel tables, which every rank holds in full."""
        return sum(spec.rows * spec.dim for spec in self.specs if spec.replicated)

    @property
    def residual_size(self) -> int:
        """Bytes of a number between the layers: float32 unless chosen, or all inputs come out of half precision."""
        if self.config.network.bfloat16_residual:
            return self.element_size
        used = {"item": True, "action": self.roles.action is not None, "contextual": bool(self.roles.contextual)}
        all_projected = all(role in self.projected_widths for role, is_used in used.items() if is_used)
        has_positions = self.encoder.inputs.position_table is not None
        return self.element_size if all_projected and not has_positions else FLOAT32

    def rows_by_role(self, batch: Batch) -> dict[str, int]:
        """Looked-up rows that become tokens, or parts of tokens, by role."""
        contextual = batch.sequences * len(self.roles.contextual)
        return dict.fromkeys(("item", "action", "side", "known_after"), batch.items) | {"contextual": contextual}

    def loads(self, item_lengths: np.ndarray, num_candidates: np.ndarray) -> Loads:
        """Tokens and reported operations of each sequence; both arrays int64 [sequences]."""
        return FlopCounter(self.config.network, self.roles).per_sequence(item_lengths, num_candidates)

    def tokens(self, batch: Batch) -> int:
        """Tokens of a batch."""
        return int(self.loads(batch.item_lengths, batch.num_candidates).tokens.sum())

    def layer_parts(self, batch: Batch) -> Iterator[LayerPart]:
        """Layers that compute on the same tokens; all layers in order."""
        spans, whole = self.config.network.attention_spans, self.config.network.whole_layers
        for of_part, stage in zip((spans[:whole], spans[whole:]), self.stages(batch), strict=False):
            yield LayerPart(of_part, stage)

    def stages(self, batch: Batch) -> list[Batch]:
        """What the layers compute on: the batch, then its truncated sequences (NetworkArgs.truncate_to_items)."""
        network = self.config.network
        if network.whole_layers == network.num_layers:
            return [batch]
        lengths = truncated_items(network, batch.item_lengths, batch.num_candidates)
        return [batch, replace(batch, item_lengths=lengths)]

    def share(self, count: int) -> int:
        """What a context-parallel rank has of so many tokens, or of so many things that belong to a token each."""
        return -(-count // self.cp_size)

    def tokens_of_layers(self, batch: Batch) -> int:
        """Tokens that a context-parallel rank has in all layers together."""
        return sum(len(part.spans) * self.share(self.tokens(part.batch)) for part in self.layer_parts(batch))

    def flops(self, batch: Batch) -> float:
        """Reported operations of training on a batch, all ranks of the group together."""
        return float(self.loads(batch.item_lengths, batch.num_candidates).costs.sum())

    def micro_batch(self, batch: Batch) -> Batch:
        """What the dense part computes in one pass: the whole batch, or a micro-batch of it."""
        return batch.first(-(-batch.sequences // self.config.trainer.gradient_accumulation_steps))

    @cached_property
    def negatives(self) -> Negatives | None:
        """Those of the retrieval loss."""
        return Negatives.of(self.config.retrieval) if self.config.retrieval is not None else None

    @property
    def shares_negatives(self) -> bool:
        """Whether all labels of a global batch have the same negatives from the corpus."""
        return self.negatives is not None and (self.negatives.shared or self.negatives.kind == "full")

    def batch_pool(self, items: int) -> int:
        """Rows of so many items of a batch that are negatives."""
        return self._distinct(items) if self.negatives is not None and self.negatives.has_batch_pool else 0

    def corpus_pool(self, labels: int) -> int:
        """Rows that a rank with so many labels looks up as negatives from the corpus."""
        if self.negatives is None or self.negatives.kind == "in_batch":
            return 0
        if self.negatives.kind == "full":
            return self.corpus_size
        return self.negatives.num if self.negatives.shared else self._distinct(labels * self.negatives.num)

    def _distinct(self, draws: int) -> int:
        """The expected number of distinct items of so many uniform draws. Draws by popularity have fewer."""
        return round(self.corpus_size * -np.expm1(draws * np.log1p(-1 / max(self.corpus_size, 2))))

    def pool(self, batch: Batch, ranks: int = 1) -> int:
        """Rows that the labels of a group are compared with, where ``ranks`` share the items of their batches.

        Draws are made distinct on each rank, not over the ranks of a group.
        """
        groups = 1 if self.shares_negatives else self.group_size
        return groups * self.corpus_pool(-(-batch.labels // groups)) + ranks * self.batch_pool(batch.items)

    @property
    def tower_widths(self) -> tuple[int, ...]:
        """Widths of what an item tower multiplies: joined features, hidden layer, vector. Empty without a tower."""
        network, features = self.config.network, len(self.roles.tower)
        return (features * network.side_embedding_dim, network.item_width, network.item_width) if features else ()

    def tower_rows(self, batch: Batch, pool: int) -> int:
        """Items of which a tower makes vectors in one pass: those of a batch, and of a pool that is not among them."""
        among = self.batch_pool(batch.items) if self.config.trainer.gradient_accumulation_steps == 1 else 0
        return batch.items + pool - among

    @property
    def draws_per_label(self) -> int:
        """Negatives drawn for each label alone; 0: all labels share one pool."""
        return 0 if self.negatives is None or self.shares_negatives else self.negatives.num

    def ids_per_rank(self, batch: Batch) -> dict[str, int]:
        """Ids of each feature that one rank looks up for the batch of its group."""
        ranks = self.group_size
        ids = dict.fromkeys(self.roles.contextual, -(-batch.sequences // ranks)) | {
            name: -(-batch.items // ranks) for name in (self.roles.item, self.roles.action) if name
        }
        values = self.values_per_item
        ids |= {name: math.ceil(values.get(name, 1) * ids[self.roles.item]) for name in self.roles.categories}
        if self.negatives is not None and self.negatives.kind != "in_batch":
            count = ids[NEGATIVES] = self.corpus_pool(-(-batch.labels // ranks))
            ids |= {of_negatives(name): math.ceil(values.get(name, 1) * count) for name in self.roles.tower}
        return ids

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
