"""Opens the batch source that a configuration names: a preprocessed store or random data."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from hstu.base.errors import ConfigError
from hstu.config.args import BenchmarkDatasetArgs
from hstu.config.run_config import RunConfig
from hstu.data.batches.batch import HSTUBatch
from hstu.data.batches.loader import build_loader
from hstu.data.batches.synthetic import SyntheticDataset
from hstu.data.features.roles import benchmark_roles
from hstu.data.sampling.sampler import SamplerPosition, TrainSampler
from hstu.data.sampling.samples import Split
from hstu.parallel.mesh import Mesh
from hstu.train.batch_source import BatchSource, SampleLengths, choose_partition
from hstu.train.store_source import StoreSource


def open_source(config: RunConfig, mesh: Mesh | None = None, world_size: int = 1) -> BatchSource:
    """Open the source that ``config`` names. Raises DataError for missing data, ConfigError for unsuitable options."""
    if isinstance(config.dataset, BenchmarkDatasetArgs):
        return RandomSource(config, config.dataset, mesh, world_size)
    return StoreSource(config, config.dataset, mesh, world_size)


class RandomSource(BatchSource):
    """Random data in memory, for speed measurements."""

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
        """Raise ConfigError if negatives drawn from all items would mostly have no row in the item table."""
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
        """See BatchSource. Any id of the table may occur."""
        return 0

    def batch_of(self, samples: np.ndarray) -> HSTUBatch:
        """See BatchSource."""
        return self._train.batch_of(samples)

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
