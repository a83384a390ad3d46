"""The data of a run: batches from a preprocessed store or of random numbers, its tables, and how ranks share it."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np

from hstu.config.args import (
    BenchmarkDatasetArgs,
    DatasetArgs,
    EmbeddingArgs,
    RetrievalArgs,
)
from hstu.config.errors import ConfigError, DataError
from hstu.config.problems import in_reading_order
from hstu.config.rules.ranking_tasks import tasks_of
from hstu.config.rules.training import token_limit_admits
from hstu.config.run_config import RunConfig
from hstu.data.batch import HSTUBatch, ItemFeatures
from hstu.data.collate import Assembler, Collator, SkippedSamples, StoreReader
from hstu.data.datasets import resolve_name
from hstu.data.labels import LabelColumn, LabelFacts, check_labels
from hstu.data.loader import build_loader
from hstu.data.negatives import ItemDistribution, Negatives, count_items, expected_log_counts
from hstu.data.random_windows import RandomWindows
from hstu.data.roles import FeatureRoles, benchmark_roles, check_numbers, resolve_roles
from hstu.data.sampler import BatchPartition, EvalSampler, SamplerPosition, TrainSampler
from hstu.data.samples import (
    SampleTable,
    Split,
    StochasticLength,
    build_samples,
    check_requests,
    check_split,
    require_requests,
)
from hstu.data.store import SequenceStore
from hstu.data.store_layout import NumberStatistics
from hstu.data.synthetic import SyntheticDataset
from hstu.data.training_statistics import training_statistics
from hstu.model.inputs import SequenceFeatures
from hstu.parallel.mesh import Mesh
from hstu.train.flops import FlopCounter
from hstu.train.tables import check_rows, choose_tables, predefined_tables

log = logging.getLogger(__name__)


class SampleLengths(NamedTuple):
    """The training samples by their lengths alone, in the order of the sample table; int64 [S] each."""

    items: np.ndarray
    """Items of the sequence, candidates included."""
    candidates: np.ndarray
    labels: np.ndarray
    """Labelled items."""


class BatchSource(ABC):
    """Training and evaluation batches of this rank, and what the model must know about the data.

    Args:
        config: the run.
        mesh: this rank. None: rank 0 of ``world_size`` ranks that are not started.
        world_size: ranks of the run, if ``mesh`` is None.
    """

    roles: FeatureRoles
    tables: tuple[EmbeddingArgs, ...]
    cardinalities: dict[str, int]
    """Feature → n: its ids are in [0, n), or n different int64 if the store keeps raw ids."""
    values_per_item: Mapping[str, float]
    """Side feature that is a list → its values per item, on average over the items."""
    raw_features: tuple[str, ...] = ()
    """Features of which the model gets raw ids, any int64."""
    label_facts: Mapping[str, LabelFacts]
    """Of each of ``roles.labels``, what occurs; empty without data."""
    max_items: int
    """Items of the longest sequence."""
    negatives: Negatives | None
    """Those of the retrieval loss."""
    train_lengths: SampleLengths
    batches_per_epoch: int
    """Steps of one pass over the training data. With tokens_per_rank: of the first pass; others differ a little."""
    eval_splits: tuple[Split, ...]
    """Splits evaluated during training. The first one selects the best model."""
    final_splits: tuple[Split, ...]
    """Splits evaluated after the last iteration."""

    def __init__(self, config: RunConfig, mesh: Mesh | None, world_size: int) -> None:
        self._config = config
        self.values_per_item = {}
        self.label_facts = {}
        self._rank, self._world_size = (0, world_size) if mesh is None else (mesh.rank, mesh.world_size)
        self._pin_memory = mesh is not None and mesh.device.type == "cuda"
        self.negatives = Negatives.of(config.retrieval) if config.retrieval else None
        retrieval = config.task_args if isinstance(config.task_args, RetrievalArgs) else None
        self._wants_timestamps = config.network.has_relative_bias
        self._wants_request_times = retrieval is not None and config.asks_for_next
        self._wants_seen = retrieval is not None and retrieval.filter_seen
        self._wants_earlier = config.retrieval is not None and config.retrieval.mask_seen

    def epoch_after(self, position: SamplerPosition) -> int:
        """The epoch (0-based) of the training batch that follows ``position``."""
        return position.epoch + (position.consumed == len(self.train_lengths.items))

    @property
    def description(self) -> dict[str, str]:
        """What must be equal on all ranks beside the configuration: name → value."""
        return {}

    @property
    @abstractmethod
    def least_action(self) -> int:
        """The smallest action in the data. The data must have an action feature."""

    @property
    def number_statistics(self) -> Mapping[str, NumberStatistics]:
        """Number or vector → its statistics in the training data. Empty where a checkpoint has them."""
        return {}

    @property
    def item_counts(self) -> np.ndarray:
        """How often each item occurs in the training samples; with random windows, float64, is expected in an epoch."""
        raise ConfigError("the items of training samples are counted in preprocessed data only")

    @cached_property
    def corpus(self) -> ItemDistribution:
        """How negatives are drawn from all items."""
        assert self.negatives is not None
        exponent = self.negatives.exponent
        weights = self.item_counts.astype(np.float64) ** exponent if exponent else None
        return ItemDistribution(self.cardinalities[self.roles.item], weights)

    def expected_log_counts(self) -> np.ndarray | None:
        """How often each item is expected among the negatives, see there; None without a logQ correction."""
        if self.negatives is None or not self.negatives.logq:
            return None
        counts = self.item_counts if self.negatives.has_batch_pool else np.zeros(self.corpus.size, dtype=np.int64)
        return expected_log_counts(self.negatives, self.corpus, counts, self.batches_per_epoch)

    def item_ids(self) -> np.ndarray | None:
        """What the model gets for each item code, int64; None: the codes."""
        return None

    def tower_features(self, ids: np.ndarray) -> ItemFeatures | None:
        """What an item tower reads of items, given by what the model gets for them. None: there is no tower."""
        return None

    @abstractmethod
    def train_sampler(self, position: SamplerPosition) -> TrainSampler:
        """The plan of training from ``position`` on: which samples make up which batch of this rank."""

    @abstractmethod
    def train_batches(self, position: SamplerPosition) -> Iterator[HSTUBatch]:
        """Endless training batches on the host, from ``position`` on."""

    @abstractmethod
    def eval_batches(self, split: Split) -> Iterator[HSTUBatch]:
        """One pass over a split; equally many batches on every rank."""


def open_source(config: RunConfig, mesh: Mesh | None = None, world_size: int = 1) -> BatchSource:
    """The source that ``config`` names; see :class:`BatchSource` for a run that is not started.

    Raises DataError for missing data and ConfigError for options that do not fit the data.
    """
    if isinstance(config.dataset, BenchmarkDatasetArgs):
        return RandomSource(config, config.dataset, mesh, world_size)
    return StoreSource(config, config.dataset, mesh, world_size)


def has_item_tower(config: RunConfig) -> bool:
    """Whether the vectors of items are made of their features, too."""
    return config.retrieval is not None and config.retrieval.item_tower


def open_store(args: DatasetArgs) -> SequenceStore:
    """The preprocessed data of ``args``: dataset_path, or tmp_data/<canonical name>."""
    return SequenceStore.open(store_path(args))


def store_path(args: DatasetArgs) -> Path:
    """Where the preprocessed data of ``args`` is."""
    name = resolve_name(args.dataset_name) or args.dataset_name
    return Path(args.dataset_path or Path("tmp_data") / name)


class StoreSource(BatchSource):
    """Real data: samples of a sequence store."""

    def __init__(self, config: RunConfig, args: DatasetArgs, mesh: Mesh | None, world_size: int = 1) -> None:
        super().__init__(config, mesh, world_size)
        self._args = args
        self.store = open_store(args)
        self._eval_store = SequenceStore.open(args.eval_dataset_path) if args.eval_dataset_path else self.store
        tasks, tower = tasks_of(config), has_item_tower(config)
        self.roles = resolve_roles(self.store, args, config.located, tasks, tower)
        check_numbers(self.roles, config.numbers, config.located)
        check_split(self.store, args, config.located)
        for store in (self.store, self._eval_store):
            check_requests(store, args, config.located)
        if config.retrieval is not None and config.retrieval.hard_negatives:
            require_requests(self.store, config.retrieval, "hard_negatives", config.located)
        self._labels = {name: LabelColumn(self.store, name) for name in self.roles.labels}
        self._eval_labels = {name: column.of(self._eval_store) for name, column in self._labels.items()}
        self.label_facts = {
            name: column.facts().joined(self._eval_labels[name].facts()) for name, column in self._labels.items()
        }
        check_labels(tasks_of(config), self.label_facts, config.located)
        predefined = predefined_tables(args, self.store, config.network)
        self.cardinalities = {name: self.store.cardinality(name) for name in self.roles.names}
        self.tables = self.fit(
            choose_tables(config.embeddings, predefined, self.roles.names, config.located, self.roles.numbers)
        )
        self._recoding = {} if self._eval_store is self.store else self._recode_eval_store()
        self.raw_features = tuple(name for name in self.roles.names if self.store.feature(name).raw)
        items = self.cardinalities[self.roles.item]
        self.values_per_item = {name: len(self.store.item_values(name)[0]) / items for name in self.roles.lists}
        check_rows(self.tables, self.cardinalities, config.located, self.raw_features)
        self.max_items = args.max_sequence_length
        self.eval_splits, self.final_splits = self._splits()
        self._train_samples = self._samples("train")
        self._eval_samples: dict[Split, SampleTable] = {}
        trainer, no_label = config.trainer, int(config.task == "retrieval")
        self._stochastic_length = StochasticLength.of(args, trainer.seed, no_label)
        self._random_windows = RandomWindows.of(args, trainer.seed)
        self._skipped = SkippedSamples(trainer.max_bad_rows) if trainer.bad_row_policy == "skip" else None
        samples = self._train_samples
        self.train_lengths = SampleLengths(samples.lengths, samples.num_candidates, samples.num_labels)
        self._partition = choose_partition(config, self.roles, self.max_items, self.train_lengths)
        self.batches_per_epoch = self.train_sampler(SamplerPosition()).batches_per_epoch

    def fit(self, tables: tuple[EmbeddingArgs, ...]) -> tuple[EmbeddingArgs, ...]:
        """The tables of the model, given the configured ones. For sources that change their sizes."""
        return tables

    @property
    def description(self) -> dict[str, str]:
        """See BatchSource. The checksum of each file."""
        facts = {f"{file} of the data": checksum for file, checksum in self.store.checksums.items()}
        if self._eval_store is not self.store:
            evaluated = self._eval_store.checksums.items()
            facts |= {f"{file} of eval_dataset_path": checksum for file, checksum in evaluated}
        return facts

    @cached_property
    def least_action(self) -> int:
        """See BatchSource. Reads the whole feature once."""
        assert self.roles.action is not None
        return min(store.least_value(self.roles.action) for store in (self.store, self._eval_store))

    @property
    def number_statistics(self) -> Mapping[str, NumberStatistics]:
        """See BatchSource. Reads the numbers of all training events."""
        return training_statistics(self.store, self.roles.numbers, self._train_samples)

    @cached_property
    def item_counts(self) -> np.ndarray:
        """See BatchSource. Reads the items of all training samples once."""
        return self._count_items(self._stochastic_length)

    def _count_items(self, shortened: StochasticLength | None) -> np.ndarray:
        is_random = self._args.random_windows
        return count_items(self.store, self.roles.item, self._train_samples, shortened, random_windows=is_random)

    def item_ids(self) -> np.ndarray | None:
        """See BatchSource."""
        if self.roles.item not in self.raw_features:
            return None
        return self.store.model_ids(self.roles.item, np.arange(self.cardinalities[self.roles.item]))

    def tower_features(self, ids: np.ndarray) -> ItemFeatures | None:
        """See BatchSource."""
        if not self.roles.tower:
            return None
        codes = np.searchsorted(self._raw_item_ids, ids) if self.roles.item in self.raw_features else ids
        return StoreReader(self.store, self._train_samples, self.roles).tower_features(codes)

    def trained_items(self) -> np.ndarray:
        """bool [items]: whether an item, given by its code, is in any training sample. Reads the items of all."""
        return self._count_items(None) > 0

    @cached_property
    def _raw_item_ids(self) -> np.ndarray:
        return self.store.raw_ids(self.roles.item)

    def train_batches(self, position: SamplerPosition) -> Iterator[HSTUBatch]:
        """See BatchSource."""
        trainer = self._config.trainer
        collator = self._collator(self.store, self._train_samples, trainer.sequences_per_iteration, training=True)
        return build_loader(
            collator,
            self.train_sampler(position),
            workers=trainer.data_workers,
            prefetch=trainer.data_prefetch,
            pin_memory=self._pin_memory,
        )

    def eval_batches(self, split: Split) -> Iterator[HSTUBatch]:
        """See BatchSource."""
        trainer = self._config.trainer
        if split not in self._eval_samples:  # they are the same at every evaluation
            self._eval_samples[split] = self._samples(split)
        samples = self._eval_samples[split]
        collator = self._collator(self._eval_store, samples, trainer.eval_batch_size, training=False)
        sampler = EvalSampler(len(samples), trainer.eval_batch_size, self._rank, self._world_size)
        return build_loader(collator, sampler, workers=trainer.data_workers, prefetch=trainer.data_prefetch)

    def history_batches(self, users: np.ndarray) -> Iterator[HSTUBatch]:
        """The whole histories of ``users`` (rows of the store) in the given order, without labels, on every rank."""
        offsets = np.asarray(self.store.offsets())
        begin, stop = offsets[users], offsets[users + 1]
        nothing = np.zeros_like(stop)
        start = np.maximum(begin, stop - self.max_items)
        # Nothing is held out. A target makes these evaluation batches, for which no negatives are drawn.
        samples = SampleTable(users, start, stop, nothing, nothing, target=stop - 1, history_begin=begin)
        batch_size = self._config.trainer.eval_batch_size
        collator = self._collator(self.store, samples, batch_size, training=False)
        return build_loader(collator, EvalSampler(len(users), batch_size, rank=0, world_size=1))

    def _splits(self) -> tuple[tuple[Split, ...], tuple[Split, ...]]:
        if events := self.store.events_by_split():
            held_out: tuple[Split, ...] = tuple(split for split in ("valid", "test") if events[split])
            shown = ", ".join(f"{number} {split}" for split, number in events.items())
            log.info("split by column %r of the data, in events: %s", self.store.split, shown)
            return held_out[:1], held_out
        if self._config.task == "ranking":
            return ("valid",), ("valid", "test") if self._args.valid_fraction else ("valid",)
        # Without held-out validation items the published protocol always evaluates on the last item.
        return (("valid",), ("valid", "test")) if self._args.valid_items else (("test",), ("test",))

    def _samples(self, split: Split) -> SampleTable:
        store = self.store if split == "train" else self._eval_store
        kind: Split = "all" if split != "train" and self._args.eval_dataset_path else split
        samples = build_samples(store, self._args, self._config.task, kind, self._config.trainer.seed)
        if split == "train" or store.split is not None:
            log.info("%s, %s: %s", store.path, split, ", ".join(f"{n} {name}" for name, n in samples.report.items()))
        return samples

    def train_sampler(self, position: SamplerPosition) -> TrainSampler:
        """See BatchSource."""
        trainer = self._config.trainer
        return TrainSampler(
            len(self._train_samples),
            trainer.sequences_per_iteration,
            self._rank,
            self._world_size,
            trainer.seed,
            self._args.shuffle,
            position,
            self._partition,
        )

    def _collator(self, store: SequenceStore, samples: SampleTable, batch_size: int, *, training: bool) -> Collator:
        # Roles and corpus are those of the training data, whichever store is read: a second store may have further
        # features and fewer ids, which fit the tables all the same.
        reader = StoreReader(
            store,
            samples,
            self.roles,
            wants_timestamps=self._wants_timestamps,
            wants_request_times=self._wants_request_times,
            wants_seen=self._wants_seen and not training,
            wants_earlier=self._wants_earlier and training,
            recoding=self._recoding if store is not self.store else None,
            labels=self._labels if store is self.store else self._eval_labels,
            random_windows=self._random_windows if training else None,
            stochastic_length=self._stochastic_length if training else None,
            hard_negatives=self.negatives.hard if training and self.negatives is not None else 0,
        )
        corpus_size, seed = self.cardinalities[self.roles.item], self._config.trainer.seed
        assembler = Assembler(
            batch_size,
            self._config.task,
            self.roles,
            corpus_size,
            seed,
            self.negatives,
            item_ids=reader.item_ids if self.roles.item in self.raw_features else None,
            corpus=self.corpus if training and self.negatives is not None else None,
            draws_negatives=training,
            tower_features=reader.tower_features if self.roles.tower else None,
        )
        return Collator(reader, assembler, self._skipped)

    def _recode_eval_store(self) -> dict[str, np.ndarray]:
        """Codes of the second store → codes of the first. Each store numbers the raw ids that occur in it."""
        theirs, ours = self._eval_store, self.store
        recoding, problems = {}, []
        for name in self.roles.names:
            if name in theirs.features and ours.feature(name).raw != theirs.feature(name).raw:
                having, lacking = (ours, theirs) if ours.feature(name).raw else (theirs, ours)
                problems.append(
                    f"DatasetArgs.eval_dataset_path: {having.path} keeps raw ids of {name!r}, {lacking.path} does not; "
                    "preprocess both with the same --raw_ids"
                )
            elif ours.feature(name).raw:
                continue
            elif ours.feature(name).has_vocab:
                try:
                    recoding[name] = ours.encode(name, theirs.raw_ids(name))
                except DataError as error:
                    raise DataError(
                        f"DatasetArgs.eval_dataset_path: {theirs.path} has ids that the training data lacks. "
                        f"{error}. Preprocess the training data so that it has them, or leave the feature out"
                    ) from error
            elif theirs.cardinality(name) > ours.cardinality(name):
                problems.append(
                    f"DatasetArgs.eval_dataset_path: {name!r} is up to {theirs.cardinality(name) - 1} in {theirs.path} "
                    f"and up to {ours.cardinality(name) - 1} in the training data, {ours.path}"
                )
        for name in self.roles.numbers:
            width, found = ours.features[name].width, theirs.features.get(name)
            if found is None or (found.role, found.width) != (ours.features[name].role, width):
                problems.append(
                    f"DatasetArgs.eval_dataset_path: {theirs.path} has no number or vector {name!r} like that of the "
                    "training data; preprocess both with the same --numbers and --vectors"
                )
        if problems:
            raise ConfigError(problems)
        return recoding


class RandomSource(BatchSource):
    """Random data in memory, to measure speed."""

    def __init__(self, config: RunConfig, args: BenchmarkDatasetArgs, mesh: Mesh | None, world_size: int = 1) -> None:
        super().__init__(config, mesh, world_size)
        self._args = args
        self._train = self._dataset("train", config.trainer.sequences_per_iteration)
        self._eval: dict[Split, SyntheticDataset] = {}
        self.roles = benchmark_roles(args)
        self.tables = tuple(args.embedding_args)
        self.cardinalities = dict(self._train.num_ids)
        self._check_negatives()
        self.max_items = next(
            group.max_sequence_length for group in args.feature_args if args.item_feature_name in group.feature_names
        )
        self.train_lengths = SampleLengths(*self._train.lengths())
        self._partition = choose_partition(config, self.roles, self.max_items, self.train_lengths)
        self.batches_per_epoch = self.train_sampler(SamplerPosition()).batches_per_epoch
        self.eval_splits = self.final_splits = ("valid",)

    def _check_negatives(self) -> None:
        """Negatives that are drawn from all items need a table with a row for each: others would be rows of zeros."""
        rows = {name: table.item_vocab_size_or_capacity for table in self.tables for name in table.feature_names}
        items, capacity = self.cardinalities[self.roles.item], rows[self.roles.item]
        if self.negatives is not None and self.negatives.kind != "in_batch" and items > capacity:
            raise ConfigError(
                f"RetrievalArgs.negatives = {self.negatives.kind!r} draws from all {items:,} items, but the dynamic "
                f"table of {self.roles.item!r} has {capacity:,} rows, and most negatives would have none; use "
                '"in_batch"'
            )

    @property
    def least_action(self) -> int:
        """See BatchSource. Any id of the table may be drawn."""
        return 0

    def train_batches(self, position: SamplerPosition) -> Iterator[HSTUBatch]:
        """See BatchSource."""
        return build_loader(self._train, self.train_sampler(position), pin_memory=self._pin_memory)

    def eval_batches(self, split: Split) -> Iterator[HSTUBatch]:
        """See BatchSource."""
        if split not in self._eval:  # a dataset keeps its batches
            self._eval[split] = self._dataset(split, self._config.trainer.eval_batch_size)
        dataset = self._eval[split]
        return build_loader(dataset, dataset.eval_sampler())

    def train_sampler(self, position: SamplerPosition) -> TrainSampler:
        """See BatchSource."""
        return self._train.train_sampler(position, self._partition)

    def _dataset(self, split: Split, batch_size: int) -> SyntheticDataset:
        return SyntheticDataset(
            self._args,
            self._config.task,
            batch_size=batch_size,
            rank=self._rank,
            world_size=self._world_size,
            seed=self._config.trainer.seed,
            split=split,
            negatives=self.negatives,
            wants_timestamps=self._wants_timestamps,
            wants_seen=self._wants_seen,
        )


def choose_partition(
    config: RunConfig, roles: FeatureRoles, max_items: int, lengths: SampleLengths
) -> BatchPartition | None:
    """How global batches are divided among data-parallel ranks; None for contiguous slices of equal counts.

    Raises ConfigError if the longest sequence that ``max_items`` allows has more tokens than a rank may have.
    """
    trainer, network = config.trainer, config.network
    if trainer.tokens_per_rank is None and not trainer.enable_balanced_shuffler:
        return None
    longest = SequenceFeatures.of(roles, max_items).max_tokens(network)
    length = f"max_sequence_length ({max_items} items and {len(roles.contextual)} contextual features)"
    if problems := list(token_limit_admits(config, longest, length)):
        raise ConfigError(in_reading_order(problems))
    loads = FlopCounter(network, roles).per_sequence(lengths.items, lengths.candidates)
    if trainer.tokens_per_rank is not None:
        log.info(
            "dynamic batching: at most %d tokens per rank, sequences of %.1f tokens on average",
            trainer.tokens_per_rank,
            float(loads.tokens.mean()) if len(loads.tokens) else 0.0,
        )
    return BatchPartition(loads, trainer.enable_balanced_shuffler, trainer.tokens_per_rank)
