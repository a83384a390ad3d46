"""BatchSource: the data of a run for training and evaluation, its partition over ranks and its labels."""

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch

from hstu.base.errors import ConfigError
from hstu.checkpoint.phase import Phase
from hstu.config.args import EmbeddingArgs, RankingArgs
from hstu.config.option import located
from hstu.config.problems import in_reading_order
from hstu.config.rules.training import token_limit_admits
from hstu.config.run_config import RunConfig
from hstu.data.batches.batch import HSTUBatch, ItemFeatures
from hstu.data.features.roles import FeatureRoles
from hstu.data.features.values import LabelCodes, LabelFacts
from hstu.data.sampling.negatives import Negatives, expected_log_counts
from hstu.data.sampling.sampler import BatchPartition, Loads, SamplerPosition, ShardWindows, TrainSampler
from hstu.data.sampling.splits import Split
from hstu.data.store.layout import NumberStatistics
from hstu.model.inputs import SequenceFeatures
from hstu.model.retrieval import LogCounts
from hstu.observe.throughput import FlopCounter
from hstu.parallel.mesh import Mesh

log = logging.getLogger(__name__)


class SampleLengths(NamedTuple):
    """Lengths of the training samples, in the order of the sample table; int32 or int64 [S] each."""

    items: np.ndarray
    """Items of the sequence, including candidates."""
    candidates: np.ndarray
    labels: np.ndarray


class BatchSource(ABC):
    """This rank's batches, and the facts about the data that the model needs.

    ``mesh``: None for rank 0 of a run of ``world_size`` ranks that is not started.
    """

    roles: FeatureRoles
    tables: tuple[EmbeddingArgs, ...]
    cardinalities: dict[str, int]
    """Feature → n: ids are in [0, n), or n different int64 if the store keeps raw ids."""
    raw_features: tuple[str, ...] = ()
    """Features whose raw ids, any int64, go to the model."""
    ranges: Mapping[str, Mapping[str, float]]
    """See SequenceStore; empty for random data."""
    label_facts: Mapping[str, LabelFacts]
    """Label of ``roles.labels`` → the values that occur; empty without data."""
    max_items: int
    negatives: Negatives | None
    train_lengths: SampleLengths
    batches_per_epoch: int
    """Steps per pass over the training data. With tokens_per_rank: of the first pass; others differ a little."""
    eval_splits: tuple[Split, ...]
    """Splits evaluated during training. The first one, if any, selects the best model."""
    final_splits: tuple[Split, ...]
    """Splits evaluated after the last iteration. Both may be empty."""
    phase: Phase = Phase()
    description: dict[str, str]
    """Facts that must be equal on all ranks, besides the configuration: name → value."""
    trained_on: dict[str, Any]
    """JSON that identifies the data, in whose samples a position is counted. Empty for random data."""

    def __init__(self, config: RunConfig, mesh: Mesh | None, world_size: int) -> None:
        self._config = config
        self.label_facts, self.ranges, self.description, self.trained_on = {}, {}, {}, {}
        self._windows: ShardWindows | None = None
        self.max_items = config.max_items
        self._mesh = mesh
        self._rank, self._world_size = (0, world_size) if mesh is None else (mesh.rank, mesh.world_size)
        self._pin_memory = mesh is not None and mesh.device.type == "cuda"
        self.negatives = Negatives.of(config.retrieval) if config.retrieval else None

    @property
    @abstractmethod
    def least_action(self) -> int:
        """The smallest action in the data, which must have an action feature."""

    @property
    def number_statistics(self) -> Mapping[str, NumberStatistics]:
        """Number or vector → its statistics in the training data. Empty if they come from a checkpoint."""
        return {}

    @property
    def newcomers(self) -> Mapping[str, np.ndarray]:
        """ "new_users" → rows of users, "new_items" → model ids: those in no history to train on, which has two events.
        Empty unless retrieval is split in time."""
        return {}

    @property
    def item_counts(self) -> np.ndarray:
        """Occurrences of each item in the training samples; with random windows the expectation per epoch, float64."""
        raise ConfigError("the items of training samples are counted in preprocessed data only")

    def log_counts(self) -> LogCounts | None:
        """log of the expected counts of items among the negatives; None without a logQ correction."""
        if self.negatives is None or not self.negatives.logq:
            return None
        has_pool = self.negatives.has_batch_pool
        counts = self.item_counts if has_pool else np.zeros(self.cardinalities[self.roles.item])
        log_counts = expected_log_counts(self.negatives, counts, self.batches_per_epoch)
        ids = self.item_ids()
        return LogCounts(torch.from_numpy(log_counts), None if ids is None else torch.from_numpy(ids))

    def item_ids(self) -> np.ndarray | None:
        """The model's id of each item code, int64; None if the codes are the ids."""
        return None

    def tower_features(self, ids: np.ndarray) -> ItemFeatures | None:
        """Inputs of the item tower for items, given by the model's ids; None without a tower."""
        return None

    def plan_training(self, lengths: SampleLengths) -> None:
        """Set what follows from the lengths of the training samples. Raises ConfigError as ``choose_partition``."""
        self.train_lengths, self._partition = lengths, choose_partition(self._config, self.roles, lengths)
        self.batches_per_epoch = self.train_sampler(SamplerPosition()).batches_per_epoch

    def train_sampler(self, position: SamplerPosition) -> TrainSampler:
        """The plan of training from ``position`` on: the samples of each batch of this rank."""
        trainer = self._config.trainer
        return TrainSampler(
            len(self.train_lengths.items),
            trainer.sequences_per_iteration,
            self._rank,
            self._world_size,
            trainer.seed,
            getattr(self._config.dataset, "shuffle", False),
            position,
            self._partition,
            self._windows,
        )

    @abstractmethod
    def batch_of(self, samples: np.ndarray) -> HSTUBatch:
        """The training batch of these rows of the sample table, int64 [S], as any rank may get it at any step."""

    @abstractmethod
    def train_batches(self, position: SamplerPosition) -> Iterator[HSTUBatch]:
        """Endless training batches on the host, starting at ``position``."""

    @abstractmethod
    def eval_batches(self, split: Split) -> Iterator[HSTUBatch]:
        """One pass over a split, with the same number of batches on every rank."""


def choose_partition(config: RunConfig, roles: FeatureRoles, lengths: SampleLengths) -> BatchPartition | None:
    """How ranks divide global batches; None: equal slices. Raises ConfigError if the longest sequence fits no rank."""
    trainer, network = config.trainer, config.network
    if trainer.tokens_per_rank is None and not trainer.enable_balanced_shuffler:
        return None
    longest = SequenceFeatures.of(config, roles).max_tokens(network)
    length = f"max_sequence_length ({config.max_items} items and {len(roles.contextual)} contextual features)"
    ConfigError.raise_if(in_reading_order(token_limit_admits(config, longest, length)))
    counter = FlopCounter(network, roles)

    def loads(rows: np.ndarray) -> Loads:
        return counter.per_sequence(lengths.items[rows], lengths.candidates[rows])

    if trainer.tokens_per_rank is not None:
        some = np.arange(0, len(lengths.items), 1 + len(lengths.items) // 2**20)
        log.info(
            "dynamic batching: at most %d tokens per rank, sequences of %.1f tokens on average",
            trainer.tokens_per_rank,
            float(loads(some).tokens.mean()) if len(some) else 0.0,
        )
    return BatchPartition(loads, trainer.enable_balanced_shuffler, trainer.tokens_per_rank)


def label_codes(config: RunConfig, source: BatchSource) -> tuple[LabelCodes, ...]:
    """The meaning of each ranking task's label values."""
    if not isinstance(config.task_args, RankingArgs):
        return ()
    if config.task_args.tasks is None:
        return (LabelCodes(label_offset(config.task_args, source)),)
    unknown = LabelFacts()  # without data there is no training
    return tuple(LabelCodes.of(task, source.label_facts.get(task.label, unknown)) for task in config.task_args.tasks)


def label_offset(args: RankingArgs, data: BatchSource) -> int:
    """The action of class 0: 0 if the head has a class for every action from 0 on, 1 if it lacks one (ratings).

    Raises ConfigError if an action of the data has no class in the head.
    """
    last, action = args.prediction_head_arch[-1], data.roles.action
    if action is None:
        raise ConfigError("ranking needs an action feature, and the data has none; name one or train retrieval")
    if not args.num_classes:
        return 0
    actions = data.cardinalities[action]
    if last < actions - 1:
        text = (
            f"ends in {last} classes, but {action!r} goes up to {actions - 1}: end it in {actions - 1} (values from 1 "
            f"on) or {actions} (from 0 on), or in num_tasks for bit tasks"
        )
        raise ConfigError(located(args, "prediction_head_arch", text))
    if last >= actions:
        return 0
    if data.least_action == 0:
        text = (
            f"ends in {last} classes, which serve the actions 1 to {last}, but {action!r} also takes the value 0: end "
            f"it in {actions}"
        )
        raise ConfigError(located(args, "prediction_head_arch", text))
    return 1
