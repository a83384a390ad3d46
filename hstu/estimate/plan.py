"""Plans the workload of a run from its configuration and the lengths of its data, before it starts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice, pairwise
from typing import NamedTuple

import numpy as np

from hstu.base.errors import ConfigError, DataError
from hstu.config.args import BenchmarkDatasetArgs, DatasetArgs, EmbeddingArgs, NumericFeatureArgs, RankingTaskArgs
from hstu.config.rules.ranking_tasks import tasks_of
from hstu.config.run_config import RunConfig
from hstu.data.batches.jagged import run_offsets
from hstu.data.datasets import DATASETS, resolve_name
from hstu.data.datasets.spec import USER_FEATURE, DatasetSpec, Schema
from hstu.data.features.labels import label_columns
from hstu.data.features.roles import FeatureRoles
from hstu.data.sampling.sampler import SamplerPosition, TrainSampler
from hstu.data.store.layout import TIME_FEATURES
from hstu.estimate.workload import Batch, Workload
from hstu.model.embedding import table_specs
from hstu.train.batch_source import BatchSource, SampleLengths, choose_partition
from hstu.train.sources import open_source
from hstu.train.store_source import open_store

MOST_STEPS = 32
MOST_GROUPS = 16
"""Steps and tp_cp groups whose batches are planned. A mean over more of them hardly differs."""
DRAWN_RANKS = 64
"""Random data has samples for so many ranks, from which batches of any number of ranks are drawn."""


def plan_workload(config: RunConfig, world_size: int, ranks_per_host: int, device_type: str) -> Workload:
    """The workload of ``config`` on so many ranks. Reads lengths but no samples, and starts nothing.

    Raises ConfigError and DataError as a run would, except for data that is not preprocessed yet.
    """
    has_data = _has_data(config)
    data = _plan_steps(config, world_size) if has_data else _plan_without_data(config)
    return _workload(config, (world_size, ranks_per_host, device_type), data, has_data)


@dataclass(frozen=True)
class LengthDraws:
    """Global batches of ``world_size`` ranks with lengths of the data, as if it had as many samples as they need."""

    config: RunConfig
    roles: FeatureRoles
    max_items: int
    lengths: SampleLengths
    """Of the training samples."""
    world_size: int

    def global_batch(self, *seed: int) -> tuple[SampleLengths, np.ndarray]:
        """(samples that are drawn with replacement, the tp_cp group of each, int64), divided by the run's sampler."""
        size = self.config.trainer.sequences_per_iteration
        count = size * self.world_size
        chosen = np.random.default_rng(seed).integers(len(self.lengths.items), size=count)
        drawn = SampleLengths(*(values[chosen] for values in self.lengths))
        partition = choose_partition(self.config, self.roles, self.max_items, drawn)
        sampler = TrainSampler(count, size, 0, self.world_size, seed=0, shuffle=False, partition=partition)
        samples, ranks = next(sampler.global_batches())
        return SampleLengths(*(values[samples] for values in drawn)), ranks // self.config.ranks_per_group


def plan_cluster(
    config: RunConfig, world_size: int, ranks_per_host: int, device_type: str
) -> tuple[Workload, LengthDraws]:
    """The workload of a run that may need more samples than the data has, and its global batches.

    The batches of the workload are some of drawn global batches, from the cheapest to the most expensive.
    """
    has_data = _has_data(config)
    if has_data:
        source = open_source(config, world_size=DRAWN_RANKS)
        lengths = source.train_lengths
        data = _data_of(source, (), (f"lengths: drawn from those of {len(lengths.items):,} training samples",))
    else:
        data = _plan_without_data(config)
        batch = data.steps[0][0]
        lengths = SampleLengths(batch.item_lengths, batch.num_candidates, batch.num_labels)
    draws = LengthDraws(config, data.roles, data.max_items, lengths, world_size)
    workload = _workload(config, (world_size, ranks_per_host, device_type), data, has_data)
    return replace(workload, steps=(_spread_batches(workload, draws),)), draws


def _spread_batches(workload: Workload, draws: LengthDraws) -> tuple[Batch, ...]:
    """MOST_GROUPS batches of drawn global batches, evenly spaced in the order of their costs."""
    batches: list[Batch] = []
    while len(batches) < MOST_GROUPS:
        lengths, groups = draws.global_batch(len(batches))
        in_order = np.argsort(groups, kind="stable")
        bounds = run_offsets(np.bincount(groups, minlength=workload.dp_size))
        batches += (batch_of(lengths, in_order[begin:end]) for begin, end in pairwise(bounds.tolist()))
    batches.sort(key=workload.flops)
    return tuple(batches[index] for index in np.linspace(0, len(batches) - 1, MOST_GROUPS).astype(int))


def _has_data(config: RunConfig) -> bool:
    return isinstance(config.dataset, BenchmarkDatasetArgs) or _is_preprocessed(config.dataset)


def _workload(config: RunConfig, ranks: tuple[int, int, str], data: _Data, has_data: bool) -> Workload:
    """``ranks``: world size, ranks per host and type of their devices."""
    args = config.retrieval
    has_negatives = args is not None and args.negatives != "in_batch"
    specs = table_specs(data.tables, config.network, data.roles, has_negatives, ranks[0])
    world_size, ranks_per_host, device_type = ranks
    shape = data.max_items, data.corpus_size, data.values_per_item, data.steps, has_data, data.notes
    return Workload(config, world_size, ranks_per_host, device_type, data.roles, specs, *shape)


class _Data(NamedTuple):
    roles: FeatureRoles
    tables: Sequence[EmbeddingArgs]
    max_items: int
    corpus_size: int
    values_per_item: Mapping[str, float]
    steps: tuple[tuple[Batch, ...], ...]
    notes: tuple[str, ...]


def _plan_steps(config: RunConfig, world_size: int) -> _Data:
    """The batches of the first steps, by the sampler of the run."""
    source, size = open_source(config, world_size=world_size), config.ranks_per_group
    num_steps = min(source.batches_per_epoch, MOST_STEPS)
    groups = np.unique(np.linspace(0, world_size // size - 1, MOST_GROUPS).astype(int))
    steps = []
    for samples, ranks in islice(source.train_sampler(SamplerPosition()).global_batches(), num_steps):
        in_order = samples[np.argsort(ranks, kind="stable")]
        bounds = run_offsets(np.bincount(ranks // size, minlength=world_size // size))
        steps.append(
            tuple(batch_of(source.train_lengths, in_order[bounds[g] : bounds[g + 1]]) for g in groups.tolist())
        )
    kind = "random data" if isinstance(config.dataset, BenchmarkDatasetArgs) else "the preprocessed data"
    notes = (f"lengths: the first {num_steps} steps of this run, planned on {kind}",)
    return _data_of(source, tuple(steps), notes)


def _data_of(source: BatchSource, steps: tuple[tuple[Batch, ...], ...], notes: tuple[str, ...]) -> _Data:
    shape = source.max_items, source.cardinalities[source.roles.item], source.values_per_item
    return _Data(source.roles, source.tables, *shape, steps, notes)


def batch_of(lengths: SampleLengths, samples: np.ndarray) -> Batch:
    """The batch of these rows of the sample table."""
    return Batch(lengths.items[samples], lengths.candidates[samples], lengths.labels[samples])


def _is_preprocessed(args: DatasetArgs) -> bool:
    try:
        open_store(args)
    except DataError:
        return False
    return True


def _plan_without_data(config: RunConfig) -> _Data:
    """From the configuration alone: its tables, published sizes, and sequences as long as allowed."""
    args = config.dataset
    assert isinstance(args, DatasetArgs)
    name = resolve_name(args.dataset_name)
    spec = DATASETS[name] if name else None
    tower = config.has_item_tower
    roles = roles_without_data(args, spec, tasks_of(config), config.numbers, tower)
    tables = [*config.embeddings, *(_published_tables(config, roles, spec) if spec else ())]
    rows = {feature: table.item_vocab_size_or_capacity for table in tables for feature in table.feature_names}
    longest = args.max_sequence_length
    sequences = config.trainer.sequences_per_iteration * config.ranks_per_group
    candidates = args.max_num_candidates or (longest - 1) * args.has_candidates  # those of requests may fill it
    labels = longest - 1 if config.task == "retrieval" else candidates or longest
    lengths = np.full(sequences, longest, dtype=np.int64)
    batch = Batch(lengths, np.full_like(lengths, candidates), np.full_like(lengths, labels))
    notes = [f"{args.dataset_name} is not preprocessed: every sequence is taken to be as long as allowed"]
    if unknown := [feature for feature in roles.names if feature not in rows]:
        notes.append(f"tables of unknown size, not counted: {', '.join(unknown)}")
    if args.side_feature_names:
        notes.append("side features that are lists are counted with one value per item")
    return _Data(roles, tables, longest, rows.get(roles.item, 1), {}, ((batch,),), tuple(notes))


def roles_without_data(
    args: DatasetArgs,
    spec: DatasetSpec | None,
    tasks: Sequence[RankingTaskArgs] = (),
    given: Sequence[NumericFeatureArgs] = (),
    item_tower: bool = False,
) -> FeatureRoles:
    """The features of data that is not preprocessed yet. Raises ConfigError if they are not known.

    ``given``: says which of them are numbers; vectors are taken to have one.
    ``item_tower``: side features, other than those of times, are taken to belong to items.
    """
    schema = spec.schema if spec else Schema(item="")
    item = args.item_feature_name or schema.item
    if not item:
        raise ConfigError(
            f"{args.dataset_name} is not preprocessed, so its features are not known: make it with "
            "scripts/preprocess_dataset.py, or name them (DatasetArgs.item_feature_name, action_feature_name, "
            "contextual_feature_names)"
        )
    action = schema.action if args.action_feature_name is None else args.action_feature_name
    context = schema.context if args.contextual_feature_names is None else args.contextual_feature_names
    side, after = tuple(args.side_feature_names), tuple(args.known_after)
    named = {name for each in given for name in each.feature_names}
    numbers = tuple(name for name in side if name in named)
    return FeatureRoles(
        item,
        action or None,
        tuple(context),
        side,
        known_after=after,
        numbers=numbers,
        number_widths=(1,) * len(numbers),
        tower=tuple(name for name in side if item_tower and name not in (*after, *numbers, *TIME_FEATURES)),
        labels=label_columns(tasks),
    )


def _published_tables(config: RunConfig, roles: FeatureRoles, spec: DatasetSpec) -> list[EmbeddingArgs]:
    """Predefined tables with published numbers of rows: items, users and actions."""
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
