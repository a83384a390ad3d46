"""What a run trains on, as far as it can be known before it starts: features, tables, lengths of the first steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from hstu.config.args import BenchmarkDatasetArgs, DatasetArgs, EmbeddingArgs, RetrievalArgs
from hstu.config.errors import ConfigError, DataError
from hstu.config.run_config import RunConfig
from hstu.data.balance import Loads
from hstu.data.batch import NEGATIVES
from hstu.data.collate import FeatureRoles
from hstu.data.datasets import DATASETS, DatasetSpec, Schema, resolve_name
from hstu.data.store import USER_FEATURE
from hstu.model.embedding import TableSpec, table_specs
from hstu.model.inputs import SequenceFeatures
from hstu.parallel.mesh import planned
from hstu.train.sources import BatchSource, Share, open_source, open_store
from hstu.train.work import StepWork

MOST_STEPS = 32
MOST_GROUPS = 16
"""Steps and tensor-parallel groups whose samples are planned; a mean over more of them hardly moves."""


@dataclass(frozen=True)
class Batch:
    """The samples that a tensor-parallel group computes on in one step; a rank looks up 1 / tp_size of them."""

    item_lengths: np.ndarray
    """int64 [sequences]: items of each, candidates included."""
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


@dataclass(frozen=True)
class Situation:
    """A run seen from outside. Ranks of a host are neighbours, as torchrun numbers them."""

    config: RunConfig
    world_size: int
    ranks_per_host: int
    device_type: str
    """"cpu" or "cuda"."""
    roles: FeatureRoles
    specs: tuple[TableSpec, ...]
    max_items: int
    corpus_size: int
    """Item codes are below this."""
    steps: tuple[tuple[Batch, ...], ...]
    """The batches of the first steps, one a data-parallel rank (of some of them, where there are many)."""
    source: BatchSource | None
    """Where the lengths are from; None: the data is not there, and each sequence is taken to be as long as allowed."""
    notes: tuple[str, ...]
    """What was assumed."""

    @property
    def tp_size(self) -> int:
        """Ranks of a tensor-parallel group."""
        return self.config.tensor_parallel.tensor_model_parallel_size

    @property
    def dp_size(self) -> int:
        """Data-parallel ranks."""
        return self.world_size // self.tp_size

    @property
    def features(self) -> SequenceFeatures:
        """What makes a sequence."""
        return SequenceFeatures(self.roles.item, self.roles.action, self.roles.contextual, self.max_items)

    @property
    def compute_bytes(self) -> int:
        """Bytes of a number in the compute type."""
        return 4 if self.config.network.dtype_str == "float32" else 2

    def loads(self, batch: Batch) -> Loads:
        """Tokens and floating-point operations of each sequence."""
        return StepWork(self.config.network, self.roles).loads(batch.item_lengths, batch.num_candidates)

    def micro(self, batch: Batch) -> Batch:
        """What the dense part computes of it at a time: all, or a micro-batch."""
        count = -(-batch.sequences // self.config.trainer.gradient_accumulation_steps)
        labels = -(-batch.labels * count // max(batch.sequences, 1))
        return Batch(batch.item_lengths[:count], batch.num_candidates[:count], labels)

    def tokens(self, batch: Batch) -> int:
        """Tokens of a batch."""
        return int(self.loads(batch).tokens.sum())

    def flops(self, batch: Batch) -> float:
        """Floating-point operations of training on a batch, all ranks of the group together, as the log counts them."""
        return float(self.loads(batch).costs.sum())

    def negatives(self, labels: int, items: int) -> int:
        """Rows of the pool of negatives of so many labels and items; 0 where the task has none.

        Distinct ids are what as many uniform draws are expected to give.
        """
        args = self.config.task_args
        if not isinstance(args, RetrievalArgs):
            return 0
        if args.negatives == "full":
            return self.corpus_size
        if args.shared_negatives:
            return args.num_negatives
        draws = items if args.negatives == "in_batch" else labels * args.num_negatives
        return round(self.corpus_size * -np.expm1(draws * np.log1p(-1 / max(self.corpus_size, 2))))

    def pool(self, batch: Batch) -> int:
        """Rows that a group's labels are compared with; draws of each rank's own are not made distinct over ranks."""
        args = self.config.task_args
        if isinstance(args, RetrievalArgs) and args.negatives == "uniform" and not args.shared_negatives:
            return self.tp_size * self.negatives(-(-batch.labels // self.tp_size), 0)
        return self.negatives(batch.labels, batch.items)

    def own_ids(self, batch: Batch) -> dict[str, int]:
        """Ids of each feature that one rank looks up of a group's batch."""
        tp = self.tp_size
        ids = dict.fromkeys(self.roles.contextual, -(-batch.sequences // tp)) | {
            name: -(-batch.items // tp) for name in (self.roles.item, self.roles.action) if name
        }
        args = self.config.task_args
        if isinstance(args, RetrievalArgs) and args.negatives != "in_batch":
            ids[NEGATIVES] = self.negatives(-(-batch.labels // tp), ids[self.roles.item])
        return ids

    @cached_property
    def typical(self) -> Batch:
        """The planned batch whose cost is nearest to the mean."""
        batches = [batch for step in self.steps for batch in step]
        costs = np.array([self.flops(batch) for batch in batches])
        return batches[int(np.abs(costs - costs.mean()).argmin())]

    @cached_property
    def largest(self) -> Batch:
        """The planned batch with the most tokens."""
        return max((batch for step in self.steps for batch in step), key=self.tokens)

    @cached_property
    def straggling(self) -> float:
        """Mean over the steps of the costliest data-parallel rank over the mean one: all wait for it."""
        costs = [[self.flops(batch) for batch in step] for step in self.steps]
        return float(np.mean([max(step) for step in costs]) / np.mean([np.mean(step) for step in costs]))


def look_at(config: RunConfig, world_size: int, ranks_per_host: int, device_type: str) -> Situation:
    """What ``config`` means for so many ranks. Reads lengths and no samples; starts nothing.

    Raises ConfigError and DataError as a run would, but for data that is not there yet.
    """
    tp = config.tensor_parallel.tensor_model_parallel_size
    mesh = planned(world_size, ranks_per_host, tp, device_type, config.trainer.seed)
    if isinstance(config.dataset, DatasetArgs) and not _is_preprocessed(config.dataset):
        return _unseen(config, config.dataset, world_size, ranks_per_host, device_type)
    source = open_source(config, mesh)
    specs = _specs(config, source.roles, source.tables, world_size)
    steps = min(source.batches_per_epoch, MOST_STEPS)
    groups = np.unique(np.linspace(0, world_size // tp - 1, MOST_GROUPS).astype(int))
    shares = {rank: source.train_shares(rank, steps) for group in groups for rank in _ranks(group, tp)}
    batches = tuple(
        tuple(_merged([shares[rank][step] for rank in _ranks(group, tp)]) for group in groups) for step in range(steps)
    )
    what = f"the first {steps} steps of this run"
    kind = "random data" if isinstance(config.dataset, BenchmarkDatasetArgs) else "the preprocessed data"
    return Situation(
        config,
        world_size,
        ranks_per_host,
        device_type,
        source.roles,
        specs,
        source.max_items,
        source.cardinalities[source.roles.item],
        batches,
        source,
        (f"lengths: {what}, planned on {kind}",),
    )


def _ranks(group: int, tp_size: int) -> range:
    return range(group * tp_size, (group + 1) * tp_size)


def _merged(shares: list[Share]) -> Batch:
    lengths = np.concatenate([share.item_lengths for share in shares])
    candidates = np.concatenate([share.num_candidates for share in shares])
    return Batch(lengths, candidates, int(sum(share.num_labels.sum() for share in shares)))


def _specs(
    config: RunConfig, roles: FeatureRoles, tables: Sequence[EmbeddingArgs], world_size: int
) -> tuple[TableSpec, ...]:
    args = config.task_args
    has_negatives = isinstance(args, RetrievalArgs) and args.negatives != "in_batch"
    return table_specs(tables, config.network, roles.contextual, roles.item, has_negatives, world_size)


def _is_preprocessed(args: DatasetArgs) -> bool:
    try:
        open_store(args)
    except DataError:
        return False
    return True


def _unseen(config: RunConfig, args: DatasetArgs, world_size: int, ranks_per_host: int, device_type: str) -> Situation:
    """From the configuration alone: tables given by hand, published sizes, and sequences as long as allowed."""
    name = resolve_name(args.dataset_name)
    roles = _roles_without_data(args, DATASETS[name].schema if name else None)
    tables = [*config.embeddings, *(_published_tables(config, roles, DATASETS[name]) if name else ())]
    rows = {feature: table.item_vocab_size_or_capacity for table in tables for feature in table.feature_names}
    unknown = [feature for feature in roles.names if feature not in rows]
    tp, batch_size = config.tensor_parallel.tensor_model_parallel_size, config.trainer.sequences_per_iteration
    lengths = np.full(batch_size * tp, args.max_sequence_length, dtype=np.int64)
    ranking_labels = args.max_num_candidates or args.max_sequence_length
    labels = args.max_sequence_length - 1 if config.task == "retrieval" else ranking_labels
    batch = Batch(lengths, np.full_like(lengths, args.max_num_candidates), labels * len(lengths))
    notes = [f"{args.dataset_name} is not preprocessed: every sequence is taken to be as long as allowed"]
    if unknown:
        notes.append(f"tables of unknown size, not counted: {', '.join(unknown)}")
    return Situation(
        config,
        world_size,
        ranks_per_host,
        device_type,
        roles,
        _specs(config, roles, tables, world_size),
        args.max_sequence_length,
        rows.get(roles.item, 1),
        ((batch,),),
        None,
        tuple(notes),
    )


def _roles_without_data(args: DatasetArgs, schema: Schema | None) -> FeatureRoles:
    item = args.item_feature_name or (schema.item if schema else None)
    if item is None:
        raise ConfigError(
            f"{args.dataset_name} is not preprocessed, so its features are not known: make it with "
            "scripts/preprocess_dataset.py, or name them (DatasetArgs.item_feature_name, action_feature_name, "
            "contextual_feature_names)"
        )
    action, context = args.action_feature_name, args.contextual_feature_names
    if action is None:
        action = schema.action if schema else None
    if context is None:
        context = list(schema.context) if schema else []
    return FeatureRoles(item, action or None, tuple(context))


def _published_tables(config: RunConfig, roles: FeatureRoles, spec: DatasetSpec) -> list[EmbeddingArgs]:
    """Predefined tables whose rows the dataset's publisher states: users, items and actions."""
    rows = {
        roles.item: (spec.published.get("items"), "model_parallel"),
        USER_FEATURE: (spec.published.get("users"), "model_parallel"),
        spec.schema.action: (spec.schema.action_cardinality, "data_parallel"),
    }
    given = {name for table in config.embeddings for name in table.feature_names}
    return [
        EmbeddingArgs(
            feature_names=[name],
            table_name=name,
            item_vocab_size_or_capacity=int(rows[name][0] or 1),
            sharding_type=rows[name][1],
        )
        for name in roles.names
        if name not in given and rows.get(name, (None,))[0]
    ]
