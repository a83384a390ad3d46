"""Where a run's batches come from: a preprocessed store, or random data. One interface for the trainer."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path

import numpy as np

from hstu.config.args import BenchmarkDatasetArgs, DatasetArgs, EmbeddingArgs, RetrievalArgs, TrainerArgs
from hstu.config.errors import ConfigError, DataError
from hstu.config.run_config import RunConfig
from hstu.data.batch import HSTUBatch
from hstu.data.collate import Assembler, Collator, FeatureRoles, StoreReader, resolve_roles
from hstu.data.datasets import predefined_embeddings, resolve_name
from hstu.data.loader import build_loader
from hstu.data.micro import with_micro_batches
from hstu.data.negatives import Negatives
from hstu.data.sampler import BatchPlan, EvalSampler, SamplerPosition, TrainSampler
from hstu.data.samples import SampleTable, StochasticLength
from hstu.data.sequences import Split, build_samples
from hstu.data.skipping import SkippedSamples
from hstu.data.store import SequenceStore
from hstu.data.synthetic import SyntheticDataset
from hstu.parallel.group import with_groups
from hstu.parallel.mesh import Mesh
from hstu.train.sharing import choose_sharing
from hstu.train.tables import check_rows, choose_tables

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Share:
    """What a rank trains on in one step, by its lengths. item_lengths, num_candidates, num_labels: int64 [b]."""

    item_lengths: np.ndarray
    num_candidates: np.ndarray
    num_labels: np.ndarray


class BatchSource(ABC):
    """Training and evaluation batches of this rank, and what the model must know of the data."""

    roles: FeatureRoles
    tables: tuple[EmbeddingArgs, ...]
    cardinalities: dict[str, int]
    """Ids of a feature lie in [0, cardinality)."""
    max_items: int
    """Items of the longest sequence."""
    batches_per_epoch: int
    """Steps of one pass over the training data; with tokens_per_rank those of the first, others differ a little."""
    eval_splits: tuple[Split, ...]
    """What is evaluated while training; the first one selects the best model."""
    final_splits: tuple[Split, ...]
    """What is evaluated after the last iteration."""

    @property
    @abstractmethod
    def least_action(self) -> int:
        """The smallest action of the data, which must have an action feature."""

    def train_shares(self, rank: int, steps: int) -> list[Share]:
        """The shares of ``rank`` in the first ``steps`` steps of training, planned and not read."""
        sampler = self._train_sampler(SamplerPosition())
        sampler.rank = rank
        return [self._share(plan) for plan in islice(sampler, steps)]

    def _computed_in_parts(self, batches: Iterator[HSTUBatch], args: TrainerArgs, mesh: Mesh) -> Iterator[HSTUBatch]:
        """Training batches with those of their group, and with their micro-batches."""
        with_own_group = with_groups(batches, self.roles.item, mesh)
        return with_micro_batches(with_own_group, args.gradient_accumulation_steps, self.roles.item)

    @abstractmethod
    def _train_sampler(self, position: SamplerPosition) -> TrainSampler: ...

    @abstractmethod
    def _share(self, plan: BatchPlan) -> Share: ...

    @abstractmethod
    def train_batches(self, position: SamplerPosition) -> Iterator[HSTUBatch]:
        """Endless training batches on the host, from ``position`` on."""

    @abstractmethod
    def eval_batches(self, split: Split) -> Iterator[HSTUBatch]:
        """One pass over a split; equally many batches on every rank."""


class _Wanted:
    """What the configuration asks of every batch, whatever its source."""

    def __init__(self, config: RunConfig) -> None:
        retrieval = config.task_args if isinstance(config.task_args, RetrievalArgs) else None
        self.negatives = Negatives.of(retrieval) if retrieval else None
        self.timestamps = config.network.position_encoding == "relative_bias"
        self.seen = retrieval is not None and retrieval.filter_seen


def open_source(config: RunConfig, mesh: Mesh) -> BatchSource:
    """The source that the configuration names. Raises DataError where the data is missing, ConfigError on a misfit."""
    if isinstance(config.dataset, BenchmarkDatasetArgs):
        return RandomSource(config, config.dataset, mesh)
    return StoreSource(config, config.dataset, mesh)


def open_store(args: DatasetArgs) -> SequenceStore:
    """The preprocessed data that ``args`` names: dataset_path, or tmp_data/<canonical name>."""
    name = resolve_name(args.dataset_name) or args.dataset_name
    return SequenceStore.open(args.dataset_path or Path("tmp_data") / name)


class StoreSource(BatchSource):
    """Real data: samples of a sequence store."""

    def __init__(self, config: RunConfig, args: DatasetArgs, mesh: Mesh) -> None:
        self._config, self._args, self._mesh = config, args, mesh
        self._wanted = _Wanted(config)
        self.store = open_store(args)
        self._eval_store = SequenceStore.open(args.eval_dataset_path) if args.eval_dataset_path else self.store
        self.roles = resolve_roles(self.store, args)
        predefined: tuple[EmbeddingArgs, ...] = ()
        if resolve_name(args.dataset_name):
            predefined = predefined_embeddings(self.store, config.network, dynamic=args.dynamic_tables)
        self.tables = choose_tables(config.embeddings, predefined, self.roles.names)
        self.cardinalities = {name: self.store.cardinality(name) for name in self.roles.names}
        self._recoding = {} if self._eval_store is self.store else self._recode_eval_store()
        check_rows(self.tables, self.cardinalities)
        self.max_items = args.max_sequence_length
        self.eval_splits, self.final_splits = self._splits()
        self._train_samples = self._samples("train")
        self._eval_samples: dict[Split, SampleTable] = {}
        trainer, no_label = config.trainer, int(config.task == "retrieval")
        self._stochastic_length = StochasticLength.of(args, trainer.seed, no_label)
        self._skipped = SkippedSamples(trainer.max_bad_rows) if trainer.bad_row_policy == "skip" else None
        items = self._train_samples.stop - self._train_samples.start
        self._sharing = choose_sharing(config, self.roles, self.max_items, items, self._train_samples.num_candidates)
        self.batches_per_epoch = self._train_sampler(SamplerPosition()).batches_per_epoch

    @cached_property
    def least_action(self) -> int:
        """See BatchSource. Reads the whole feature, once."""
        assert self.roles.action is not None
        return min(int(store.sequence(self.roles.action).min()) for store in (self.store, self._eval_store))

    def train_batches(self, position: SamplerPosition) -> Iterator[HSTUBatch]:
        """See BatchSource."""
        trainer = self._config.trainer
        collator = self._collator(self.store, self._train_samples, trainer.sequences_per_iteration, training=True)
        batches = build_loader(
            collator,
            self._train_sampler(position),
            workers=trainer.data_workers,
            prefetch=trainer.data_prefetch,
            pin_memory=self._mesh.device.type == "cuda",
        )
        return self._computed_in_parts(batches, trainer, self._mesh)

    def eval_batches(self, split: Split) -> Iterator[HSTUBatch]:
        """See BatchSource."""
        trainer = self._config.trainer
        if split not in self._eval_samples:  # the same at every evaluation
            self._eval_samples[split] = self._samples(split)
        samples = self._eval_samples[split]
        collator = self._collator(self._eval_store, samples, trainer.eval_batch_size, training=False)
        sampler = EvalSampler(len(samples), trainer.eval_batch_size, self._mesh.rank, self._mesh.world_size)
        batches = build_loader(collator, sampler, workers=trainer.data_workers, prefetch=trainer.data_prefetch)
        return with_groups(batches, self.roles.item, self._mesh)

    def history_batches(self, users: np.ndarray) -> Iterator[HSTUBatch]:
        """The whole histories of ``users`` (rows of the store), in that order and without labels, on every rank."""
        offsets = np.asarray(self.store.offsets())
        begin, stop = offsets[users], offsets[users + 1]
        nothing = np.zeros_like(stop)
        start = np.maximum(begin, stop - self.max_items)
        # Nothing is held out, but a target makes these evaluation batches, for which no negatives are drawn.
        samples = SampleTable(users, start, stop, nothing, nothing, target=stop - 1, history_begin=begin)
        batch_size = self._config.trainer.eval_batch_size
        collator = self._collator(self.store, samples, batch_size, training=False)
        batches = build_loader(collator, EvalSampler(len(users), batch_size, rank=0, world_size=1))
        return with_groups(batches, self.roles.item, self._mesh)

    def _splits(self) -> tuple[tuple[Split, ...], tuple[Split, ...]]:
        if self._config.task == "ranking":
            return ("valid",), ("valid",)
        # Without held-out validation items the published protocol evaluates on the last item throughout.
        return (("valid",), ("valid", "test")) if self._args.valid_items else (("test",), ("test",))

    def _samples(self, split: Split) -> SampleTable:
        store = self.store if split == "train" else self._eval_store
        kind: Split = "all" if split != "train" and self._args.eval_dataset_path else split
        samples = build_samples(store, self._args, self._config.task, kind, self._config.trainer.seed)
        if split == "train":
            log.info("%s, %s: %s", store.path, split, ", ".join(f"{n} {name}" for name, n in samples.report.items()))
        return samples

    def _train_sampler(self, position: SamplerPosition) -> TrainSampler:
        trainer, mesh = self._config.trainer, self._mesh
        return TrainSampler(
            len(self._train_samples),
            trainer.sequences_per_iteration,
            mesh.rank,
            mesh.world_size,
            trainer.seed,
            self._args.shuffle,
            position,
            self._sharing,
        )

    def _share(self, plan: BatchPlan) -> Share:
        samples, chosen = self._train_samples, plan.indices
        lengths = samples.stop[chosen] - samples.start[chosen]
        return Share(lengths, samples.num_candidates[chosen], samples.num_labels[chosen])

    def _collator(self, store: SequenceStore, samples: SampleTable, batch_size: int, *, training: bool) -> Collator:
        # Roles and corpus are those of the data that is trained on, whichever store is read: a second one may
        # have other features besides and fewer ids, which then fit the tables.
        reader = StoreReader(
            store,
            samples,
            self.roles,
            wants_timestamps=self._wanted.timestamps,
            wants_seen=self._wanted.seen and not training,
            recoding=self._recoding if store is not self.store else None,
            stochastic_length=self._stochastic_length if training else None,
        )
        corpus_size, seed = self.cardinalities[self.roles.item], self._config.trainer.seed
        negatives, task = self._wanted.negatives, self._config.task
        assembler = Assembler(batch_size, task, self.roles, corpus_size, seed, negatives)
        return Collator(reader, assembler, self._skipped)

    def _recode_eval_store(self) -> dict[str, np.ndarray]:
        """Codes of the second store → codes of the first; a store numbers the raw ids that it has seen."""
        theirs, ours = self._eval_store, self.store
        recoding, problems = {}, []
        for name in self.roles.names:
            if ours.features[name].has_vocab:
                try:
                    recoding[name] = ours.encode(name, theirs.raw_ids(name))
                except DataError as error:
                    raise DataError(
                        f"DatasetArgs.eval_dataset_path: {theirs.path} has ids that the data trained on has not. "
                        f"{error}. Preprocess what is trained on so that it has them, or do without the feature"
                    ) from error
            elif theirs.cardinality(name) > ours.cardinality(name):
                problems.append(
                    f"DatasetArgs.eval_dataset_path: {name!r} is up to {theirs.cardinality(name) - 1} in {theirs.path} "
                    f"and up to {ours.cardinality(name) - 1} in {ours.path}, which is trained on"
                )
        if problems:
            raise ConfigError(problems)
        return recoding


class RandomSource(BatchSource):
    """Random data in memory, to measure speed."""

    def __init__(self, config: RunConfig, args: BenchmarkDatasetArgs, mesh: Mesh) -> None:
        self._config, self._args, self._mesh = config, args, mesh
        self._train = self._dataset("train", config.trainer.sequences_per_iteration)
        self._eval: dict[Split, SyntheticDataset] = {}
        self.roles = FeatureRoles(
            args.item_feature_name, args.action_feature_name, tuple(args.contextual_feature_names)
        )
        self.tables = tuple(args.embedding_args)
        self.cardinalities = {
            name: table.item_vocab_size_or_capacity for table in self.tables for name in table.feature_names
        }
        check_rows(self.tables, self.cardinalities)
        self.max_items = next(
            group.max_sequence_length for group in args.feature_args if args.item_feature_name in group.feature_names
        )
        self._sharing = choose_sharing(config, self.roles, self.max_items, *self._train.lengths())
        self.batches_per_epoch = self._train_sampler(SamplerPosition()).batches_per_epoch
        self.eval_splits = self.final_splits = ("valid",)

    @property
    def least_action(self) -> int:
        """See BatchSource. What is drawn may be any id of the table."""
        return 0

    def train_batches(self, position: SamplerPosition) -> Iterator[HSTUBatch]:
        """See BatchSource."""
        batches = build_loader(self._train, self._train_sampler(position), pin_memory=self._mesh.device.type == "cuda")
        return self._computed_in_parts(batches, self._config.trainer, self._mesh)

    def eval_batches(self, split: Split) -> Iterator[HSTUBatch]:
        """See BatchSource."""
        if split not in self._eval:  # a dataset keeps the batches that it has made
            self._eval[split] = self._dataset(split, self._config.trainer.eval_batch_size)
        dataset = self._eval[split]
        return with_groups(build_loader(dataset, dataset.eval_sampler()), self.roles.item, self._mesh)

    def _train_sampler(self, position: SamplerPosition) -> TrainSampler:
        return self._train.train_sampler(position, self._sharing)

    def _share(self, plan: BatchPlan) -> Share:
        return Share(*self._train.lengths_of(plan.ordinals))

    def _dataset(self, split: Split, batch_size: int) -> SyntheticDataset:
        wanted = _Wanted(self._config)
        return SyntheticDataset(
            self._args,
            self._config.task,
            batch_size=batch_size,
            rank=self._mesh.rank,
            world_size=self._mesh.world_size,
            seed=self._config.trainer.seed,
            split=split,
            negatives=wanted.negatives,
            wants_timestamps=wanted.timestamps,
            wants_seen=wanted.seen,
        )
