"""Opens the batch source that a configuration names: a preprocessed store or random data."""

import logging
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path

import numpy as np

from hstu.base.errors import ConfigError
from hstu.base.ids import codes_of
from hstu.checkpoint.phase import NothingNew, choose_phase
from hstu.config.args import BenchmarkDatasetArgs, DatasetArgs
from hstu.config.rules.task import tasks_of
from hstu.config.run_config import RunConfig
from hstu.data.batches.batch import HSTUBatch, ItemFeatures
from hstu.data.batches.collate import Assembler, Collator, SkippedSamples
from hstu.data.batches.jagged import ranges
from hstu.data.batches.loader import build_loader
from hstu.data.batches.synthetic import SyntheticDataset
from hstu.data.datasets import store_path
from hstu.data.features.roles import benchmark_roles, check_numbers, recoding_of, resolve_roles
from hstu.data.features.values import LabelColumn, check_labels, training_statistics
from hstu.data.sampling.negatives import count_items
from hstu.data.sampling.sampler import MOST_LISTED, BatchPlan, EvalSampler, SamplerPosition, ShardWindows
from hstu.data.sampling.samples import SampleTable, build_samples
from hstu.data.sampling.splits import Period, Split, check_requests, check_split
from hstu.data.store.layout import OFFSETS_FILE, NumberStatistics
from hstu.data.store.reader import GivenRequests, NoLabels, StoreReader
from hstu.data.store.sequence_store import SequenceStore
from hstu.observe.logging import Progress
from hstu.parallel.collectives import on_all_ranks
from hstu.parallel.host_arrays import once_per_host
from hstu.parallel.mesh import Mesh
from hstu.train.batch_source import BatchSource, SampleLengths
from hstu.train.tables import check_new_items, check_rows, choose_tables, predefined_tables, with_room

log = logging.getLogger(__name__)


def open_source(
    config: RunConfig, mesh: Mesh | None = None, world_size: int = 1, earlier: Path | None = None
) -> BatchSource:
    """Open the source that ``config`` names. ``earlier``: the checkpoint from which training goes on.

    Raises DataError for missing data and as ``choose_phase``, ConfigError for unsuitable options, and NothingNew.
    """
    if isinstance(config.dataset, BenchmarkDatasetArgs):
        return RandomSource(config, config.dataset, mesh, world_size)
    return StoreSource(config, config.dataset, mesh, world_size, earlier)


class StoreSource(BatchSource):
    """Samples of a preprocessed sequence store."""

    has_spare_rows = False
    """Whether tables have a row for each id, and one for unknown ids, whatever their size in the configuration."""

    def __init__(
        self, config: RunConfig, args: DatasetArgs, mesh: Mesh | None, world_size: int = 1, earlier: Path | None = None
    ) -> None:
        super().__init__(config, mesh, world_size)
        self._args, self._earlier = args, earlier
        self._is_cut_in_time = config.task == "retrieval" and args.split == "time"
        # A rank that fails here would leave those of its host waiting for its samples.
        self._open() if mesh is None else on_all_ranks(self._open, mesh.world_group)
        self.eval_splits, self.final_splits = self._splits()
        self._train_samples = self._samples("train")
        self._draws_windows = args.has_random_windows and not self.phase.first_segment
        if self.phase.first_segment and not len(self._train_samples):
            count = f"{self._train_samples.report['new_events']:,} new events"
            raise NothingNew(f"nothing new to train on: {self.store} has {count}, and no label among them")
        self._eval_samples: dict[Split | Period, SampleTable] = {}
        self._skipped = SkippedSamples() if config.trainer.bad_row_policy == "skip" else None
        samples = self._train_samples
        if args.shuffle_window_shards:
            bounds = np.searchsorted(samples.user, self.store.shard_users.astype(samples.user.dtype))
            self._windows = ShardWindows(bounds, args.shuffle_window_shards)
        is_listed = len(samples) <= MOST_LISTED or self._windows is not None
        self.trained_on |= {"samples": len(samples)} | ({} if is_listed else {"order": "feistel"})
        self.plan_training(SampleLengths(samples.lengths, samples.num_candidates, samples.num_labels))

    def _open(self) -> None:
        config, args = self._config, self._args
        self.store = SequenceStore.open(store_path(args), most_open=2 * args.shuffle_window_shards or None)
        self.ranges = self.store.ranges
        second = args.eval_dataset_path
        self.eval_store = SequenceStore.open(store_path(replace(args, dataset_path=second))) if second else self.store
        """The data for evaluation."""
        opened = {"the data": self.store, "eval_dataset_path": self.eval_store}
        self.description = {
            f"{file} of {of}": sha for of, store in opened.items() for file, sha in store.checksums.items()
        }
        self.roles = resolve_roles(self.store, args, tasks_of(config), config.has_item_tower)
        check_numbers(self.roles, config.numbers)
        check_split(self.store, args)
        for store in (self.store, self.eval_store):
            check_requests(store, args)
        self._labels = {name: LabelColumn(self.store, name) for name in self.roles.labels}
        self._eval_labels = {name: column.of(self.eval_store) for name, column in self._labels.items()}
        self.label_facts = {
            name: column.facts().joined(self._eval_labels[name].facts()) for name, column in self._labels.items()
        }
        check_labels(tasks_of(config), self.label_facts)
        predefined = predefined_tables(args, self.store, config.network)
        self.cardinalities = {name: self.store.cardinality(name) for name in self.roles.names}
        self.tables = choose_tables(config.embeddings, predefined, self.roles.names, self.roles.numbers)
        if self.has_spare_rows:
            self.tables = with_room(self.tables, self.cardinalities)
        self._recoding = {} if self.eval_store is self.store else recoding_of(self.eval_store, self.store, self.roles)
        self.raw_features = tuple(name for name in self.roles.names if self.store.feature(name).raw)
        check_rows(self.tables, self.cardinalities, self.raw_features)
        if config.retrieval is not None and not config.has_item_tower:
            check_new_items(self.tables, self.roles.item)
        cut_by = self.store.timestamp_feature if self._is_cut_in_time else None
        features = [self.store.feature(name) for name in (self.roles.item, self.roles.action, cut_by) if name]
        self.trained_on = {
            "users": self.store.num_users,
            "events": self.store.num_events,
            "checksums": {file: self.store.checksums[file] for file in (OFFSETS_FILE, *(f.file for f in features))},
            "state": self.store.lineage[-1],
            "segments": self.store.num_segments,
        }
        if window := args.shuffle_window_shards:
            self.trained_on["windows"] = f"{window} of {self.store.num_shards}"
        if self._earlier is not None:
            self.phase = choose_phase(self._earlier, self.trained_on, self.store, config.trainer.continue_on)

    @cached_property
    def least_action(self) -> int:
        """See BatchSource. Reads the whole feature once."""
        assert self.roles.action is not None
        return min(store.least_value(self.roles.action) for store in (self.store, self.eval_store))

    @property
    def number_statistics(self) -> Mapping[str, NumberStatistics]:
        """See BatchSource. Reads the numbers of all training events."""
        return training_statistics(self.store, self.roles.numbers, self._train_samples)

    @cached_property
    def newcomers(self) -> Mapping[str, np.ndarray]:
        """See BatchSource. Reads the items of all training histories once."""
        if not self._is_cut_in_time:
            return {}
        samples, item = self._train_samples, self.roles.item
        if self.phase.first_segment:  # of histories that are older than the phase, too
            samples = build_samples(self.store, self._args, self._config.task, "train", self._config.trainer.seed)
        users, newest = np.unique(samples.user, return_index=True)  # of a user's windows, the newest is the first
        begin = samples.history_begin[newest]
        known = self.store.sequence(item)[ranges(begin, samples.stop[newest] - begin)]
        new_items = np.setdiff1d(np.arange(self.store.cardinality(item)), known)
        new_users = np.setdiff1d(np.arange(self.store.num_users), users)
        return {"new_users": new_users, "new_items": self.store.model_ids(item, new_items)}

    @cached_property
    def item_counts(self) -> np.ndarray:
        """See BatchSource. Reads the items of all training samples once."""
        return count_items(self.store, self.roles.item, self._train_samples, random_windows=self._draws_windows)

    def item_ids(self) -> np.ndarray | None:
        """See BatchSource."""
        if self.roles.item not in self.raw_features:
            return None
        return self.store.model_ids(self.roles.item, np.arange(self.cardinalities[self.roles.item]))

    def tower_features(self, ids: np.ndarray) -> ItemFeatures | None:
        """See BatchSource."""
        if not self.roles.tower:
            return None
        codes = codes_of(ids, self.store.raw_ids(self.roles.item)) if self.roles.item in self.raw_features else ids
        return StoreReader(self.store, self._train_samples, self.roles).features_of_items(self.roles.tower, codes)

    def batch_of(self, samples: np.ndarray) -> HSTUBatch:
        """See BatchSource."""
        return self._collator(self.store, self._train_samples)(BatchPlan.of(samples))

    def train_batches(self, position: SamplerPosition) -> Iterator[HSTUBatch]:
        """See BatchSource."""
        trainer = self._config.trainer
        return build_loader(
            self._collator(self.store, self._train_samples),
            self.train_sampler(position),
            workers=trainer.data_workers,
            prefetch=trainer.data_prefetch,
            pin_memory=self._pin_memory,
        )

    def eval_samples(self, split: Split | Period) -> SampleTable:
        """The samples of a part of ``eval_store``. Every evaluation uses the same. Collective."""
        if split not in self._eval_samples:
            self._eval_samples[split] = self._samples(split)
        return self._eval_samples[split]

    def eval_batches(self, split: Split | Period) -> Iterator[HSTUBatch]:
        """See BatchSource."""
        trainer, samples = self._config.trainer, self.eval_samples(split)
        collator = self._collator(self.eval_store, samples)
        sampler = EvalSampler(len(samples), trainer.eval_batch_size, self._rank, self._world_size)
        progress = Progress(f"eval {split}: batches", min(len(sampler), trainer.max_eval_iters or len(sampler)))
        workers, prefetch = trainer.data_workers, trainer.data_prefetch
        return progress.over(build_loader(collator, sampler, workers=workers, prefetch=prefetch))

    def history_batches(self, users: np.ndarray, *, divided: bool = False) -> Iterator[HSTUBatch]:
        """Whole histories of ``users``, rows of the store, without labels. divided: each rank gets some of them."""
        offsets = np.asarray(self.store.offsets())
        begin, stop = offsets[users], offsets[users + 1]
        nothing = np.zeros_like(stop)
        lengths = np.minimum(stop - begin, self.max_items)
        # Nothing is held out. Setting a target makes these evaluation batches, for which no negatives are drawn.
        samples = SampleTable(users, lengths, stop, nothing, nothing, target=stop - 1, history_begin=begin)
        ranks = (self._rank, self._world_size) if divided else (0, 1)
        sampler = EvalSampler(len(users), self._config.trainer.eval_batch_size, *ranks)
        return build_loader(self._collator(self.store, samples), sampler)

    def sample_batch(self, samples: SampleTable, rows: np.ndarray) -> HSTUBatch:
        """The evaluation batch of these rows of a table of samples of the store."""
        return self._collator(self.store, samples, batch_size=len(rows))(BatchPlan.of(rows))

    def candidate_batches(self, requests: GivenRequests) -> Iterator[tuple[np.ndarray, HSTUBatch]]:
        """Yield (indices of candidates among all candidates, int64 [M], batch) for this rank's requests."""
        samples = requests.samples(self._args)
        batch_size = self._config.trainer.eval_batch_size
        labels = {name: NoLabels(requests, name) for name in self.roles.labels}
        collator = self._collator(requests, samples, labels=labels)
        for plan in EvalSampler(len(samples), batch_size, self._rank, self._world_size):
            assert samples.first_candidate is not None
            chosen = plan.indices
            yield ranges(samples.first_candidate[chosen], samples.num_candidates[chosen]), collator(plan)

    def _splits(self) -> tuple[tuple[Split, ...], tuple[Split, ...]]:
        if events := self.store.events_by_split():
            held_out: tuple[Split, ...] = tuple(split for split in ("valid", "test") if events[split])
            shown = ", ".join(f"{number} {split}" for split, number in events.items())
            log.info("split by column %r of the data, in events: %s", self.store.split, shown)
            return held_out[:1], held_out
        if self._args.split == "none" and not self._args.eval_dataset_path:
            return (), ()
        if self._config.task == "ranking":
            return ("valid",), ("valid", "test") if self._args.valid_fraction else ("valid",)
        # Without held-out validation items the published protocol always evaluates on the last item.
        return (("valid",), ("valid", "test")) if self._args.valid_items else (("test",), ("test",))

    def _samples(self, split: Split | Period) -> SampleTable:
        store = self.store if split == "train" else self.eval_store
        is_second = split in ("valid", "test") and self._args.eval_dataset_path is not None
        kind: Split | Period = "all" if is_second else split
        first = self.phase.first_segment if split == "train" else 0
        build = partial(build_samples, store, self._args, self._config.task, kind, self._config.trainer.seed, first)
        samples = once_per_host(lambda: build().compact(), self._mesh, f"samples, {split}")
        report = dict(samples.report)
        if self._is_cut_in_time and split in ("valid", "test"):
            items = store.model_ids(self.roles.item, store.sequence(self.roles.item)[samples.target])
            of_targets = {"new_users": samples.user, "new_items": items}
            report |= {name: int(np.isin(of_targets[name], new).sum()) for name, new in self.newcomers.items()}
        if split not in ("valid", "test") or store.split is not None or self._is_cut_in_time:
            log.info("%s, %s: %s", store, split, ", ".join(f"{n} {name}" for name, n in report.items()))
        return samples

    def _collator(
        self,
        store: SequenceStore,
        samples: SampleTable,
        batch_size: int | None = None,
        labels: Mapping[str, LabelColumn] | None = None,
    ) -> Collator:
        """``batch_size``, ``labels``: None for those of the configuration and of the store."""
        trainer, retrieval, training = self._config.trainer, self._config.retrieval, samples is self._train_samples
        # Both stores use the roles and corpus of the training data: the evaluation store may have more features and
        # fewer ids, which still fit the tables.
        reader = StoreReader(
            store,
            samples,
            self.roles,
            wants_timestamps=self._config.network.needs_times,
            wants_request_times=self._config.reads_request_time,
            wants_seen=retrieval is not None and (retrieval.mask_seen if training else retrieval.filter_seen),
            recoding=self._recoding if store is self.eval_store else None,
            labels=labels or (self._labels if store is self.store else self._eval_labels),
            window_seed=trainer.seed if training and self._draws_windows else None,
            ties_seed=trainer.seed if training and self._args.shuffle_ties and not self.phase.first_segment else None,
            wants_label_events=not training,
        )
        assembler = Assembler(
            batch_size or (trainer.sequences_per_iteration if training else trainer.eval_batch_size),
            self._config.task,
            self.roles,
            self.cardinalities[self.roles.item],
            trainer.seed,
            self.negatives,
            item_ids=partial(store.model_ids, self.roles.item) if self.roles.item in self.raw_features else None,
            tower_features=partial(reader.features_of_items, self.roles.tower) if self.roles.tower else None,
            hides_request_times=training and self._config.reads_request_time and self._args.query_time == "either",
        )
        return Collator(reader.read, assembler, self._skipped)


class RandomSource(BatchSource):
    """Random data in memory, for speed measurements."""

    least_action = 0
    """Any id of the table may occur."""

    def __init__(self, config: RunConfig, args: BenchmarkDatasetArgs, mesh: Mesh | None, world_size: int = 1) -> None:
        super().__init__(config, mesh, world_size)
        self._train = SyntheticDataset(config, self._rank, self._world_size, is_training=True)
        self.roles = benchmark_roles(args)
        self.tables = tuple(args.embedding_args)
        self.cardinalities = dict(self._train.num_ids)
        rows = {name: table.item_vocab_size_or_capacity for table in self.tables for name in table.feature_names}
        items, capacity = self.cardinalities[self.roles.item], rows[self.roles.item]
        if self.negatives is not None and self.negatives.kind != "in_batch" and items > capacity:
            raise ConfigError(
                f"RetrievalArgs.negatives = {self.negatives.kind!r} draws from all {items:,} items, but the dynamic "
                f"table of {self.roles.item!r} has {capacity:,} rows, and most negatives would have none; use "
                '"in_batch"'
            )
        self.plan_training(SampleLengths(*self._train.lengths()))
        self.eval_splits = self.final_splits = ("valid",)

    def batch_of(self, samples: np.ndarray) -> HSTUBatch:
        """See BatchSource."""
        return self._train.batch_of(samples)

    def train_batches(self, position: SamplerPosition) -> Iterator[HSTUBatch]:
        """See BatchSource."""
        return build_loader(self._train, self.train_sampler(position), pin_memory=self._pin_memory)

    def eval_batches(self, split: Split) -> Iterator[HSTUBatch]:
        """See BatchSource."""
        return build_loader(self._eval, EvalSampler(*self._eval.shares))

    @cached_property
    def _eval(self) -> SyntheticDataset:
        return SyntheticDataset(self._config, self._rank, self._world_size, is_training=False)
