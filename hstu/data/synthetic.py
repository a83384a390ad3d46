"""Random data in memory, to measure speed: BenchmarkDatasetArgs → the same HSTUBatch that real data gives.

A sample is a function of its ordinal, the split and the seed alone, so that ranks see different samples, and the
same number of samples is the same data at any world size.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from hstu.config.args import BenchmarkDatasetArgs, FeatureArgs, RandomDistribution
from hstu.config.errors import ConfigError
from hstu.data.balance import Sharing
from hstu.data.batch import HSTUBatch
from hstu.data.collate import Assembler, Collator, FeatureRoles, Rows, ranges
from hstu.data.hashing import hash_ids, random_bits
from hstu.data.negatives import Negatives
from hstu.data.sampler import BatchPlan, EvalSampler, SamplerPosition, TrainSampler
from hstu.data.sequences import Task

_FIRST_TIME_S = 1_000_000_000
_MEAN_GAP_S = 3600.0
# What a random number is for; the first counter after the seed.
_LENGTHS, _VALUES, _TIMES, _HELD_OUT = range(4)


class Distribution:
    """A RandomDistribution on [low, high), with its defaults filled in, as a map from uniform numbers.

    Values of normal and lognormal are rounded; all are clipped to the range.
    """

    def __init__(self, args: RandomDistribution, bound: int) -> None:
        self.kind = args.dist_type
        self.low = args.low
        self.high = bound if args.high is None else args.high
        if self.low >= self.high:
            raise ConfigError(f"RandomDistribution: low = {self.low} must be below high = {self.high}")
        self.mean = (self.low + self.high) / 2 if args.mean is None else args.mean
        default_std = 1.0 if self.kind == "lognormal" else (self.high - self.low) / 4
        self.std = default_std if args.std is None else args.std
        if self.kind == "lognormal" and self.mean <= 0:
            raise ConfigError(f"RandomDistribution: the mean of a lognormal must be above 0, not {self.mean}")
        self._cumulative = _zipf_cumulative(self.high - self.low, args.alpha) if self.kind == "zipf" else None

    def values(self, uniforms: np.ndarray) -> np.ndarray:
        """int64 in [low, high), by inversion of numbers that are uniform on (0, 1)."""
        if self._cumulative is not None:
            drawn = self.low + np.searchsorted(self._cumulative, uniforms, side="right")
        elif self.kind == "uniform":
            drawn = np.floor(self.low + uniforms * (self.high - self.low))
        else:
            normals = torch.special.ndtri(torch.from_numpy(uniforms)).numpy()
            drawn = np.rint(self._gaussian(normals))
        return np.clip(drawn, self.low, self.high - 1).astype(np.int64)

    def _gaussian(self, normals: np.ndarray) -> np.ndarray:
        if self.kind == "normal":
            return self.mean + self.std * normals
        # E[exp(m + s z)] = exp(m + s²/2) is to be the mean.
        return np.exp(math.log(self.mean) - self.std**2 / 2 + self.std * normals)


def _zipf_cumulative(size: int, alpha: float) -> np.ndarray:
    weights = np.arange(1, size + 1, dtype=np.float64) ** -alpha
    return np.cumsum(weights) / weights.sum()


@dataclass(frozen=True)
class _Feature:
    """A feature's place in the random stream, and the distribution of its ids."""

    index: int
    rows: int
    ids: Distribution


class SyntheticReader:
    """Draws the rows of a plan; ``plan.ordinals`` are what samples are drawn from.

    Sequences have at least one item more than candidates. Ids beyond their table are hashed into it. ``split`` tells
    the training stream from the evaluation's; in an evaluation of retrieval a further item is drawn to be found.
    """

    def __init__(
        self, args: BenchmarkDatasetArgs, task: Task, split: str, seed: int, *, wants_timestamps: bool, wants_seen: bool
    ) -> None:
        self.roles = FeatureRoles(
            args.item_feature_name, args.action_feature_name, tuple(args.contextual_feature_names)
        )
        self.features = _features(args, self.roles)
        group = _group_of(args, self.roles.item)
        self.min_length = 1 + args.max_num_candidates
        self.max_length = group.max_sequence_length
        self.lengths = _length_distribution(group) if group.is_jagged else None
        self.max_num_candidates = args.max_num_candidates
        self.task = task
        self.is_training = split == "train"
        self.key = (seed, int(self.is_training))
        self.wants_timestamps = wants_timestamps
        self.wants_seen = wants_seen

    def read(self, plan: BatchPlan) -> Rows:
        """The rows of ``plan.ordinals``."""
        ordinals = plan.ordinals
        lengths, candidates = self.lengths_of(ordinals)
        tokens = np.repeat(ordinals, lengths), ranges(np.zeros_like(lengths), lengths)
        items = self._ids(self.roles.item, _VALUES, *tokens)
        is_retrieval_eval = self.task == "retrieval" and not self.is_training
        wants_seen = is_retrieval_eval and self.wants_seen
        return Rows(
            user_ids=ordinals,
            lengths=lengths,
            num_candidates=candidates,
            num_labels=self.num_labels(lengths, candidates),
            items=items,
            actions=None if self.roles.action is None else self._ids(self.roles.action, _VALUES, *tokens),
            timestamps=self._times(lengths, *tokens) if self.wants_timestamps else None,
            context={name: self._ids(name, _VALUES, ordinals, 0) for name in self.roles.contextual},
            held_out=self._ids(self.roles.item, _HELD_OUT, ordinals, 0) if is_retrieval_eval else None,
            seen=items if wants_seen else None,
            seen_lengths=lengths if wants_seen else None,
        )

    def lengths_of(self, ordinals: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Items of samples, and how many of them are candidates, drawing nothing else; int64 [len(ordinals)]."""
        candidates = np.full(len(ordinals), self.max_num_candidates if self.task == "ranking" else 0, dtype=np.int64)
        if self.lengths is None:
            return np.full(len(ordinals), self.max_length, dtype=np.int64), candidates
        drawn = self.lengths.values(self._uniforms(_LENGTHS, ordinals))
        return np.clip(drawn, self.min_length, self.max_length), candidates

    def num_labels(self, lengths: np.ndarray, candidates: np.ndarray) -> np.ndarray:
        """Labelled items of samples of these lengths; int64."""
        if self.task == "ranking":
            return candidates if self.max_num_candidates else lengths
        return lengths - 1 if self.is_training else np.zeros_like(lengths)

    def _times(self, lengths: np.ndarray, ordinals: np.ndarray, places: np.ndarray) -> np.ndarray:
        """Event times in seconds, strictly ascending in a sequence, with exponential gaps."""
        gaps = 1 + np.floor(-np.log(self._uniforms(_TIMES, ordinals, places)) * _MEAN_GAP_S).astype(np.int64)
        elapsed = np.cumsum(gaps)
        starts = np.cumsum(lengths) - lengths
        return _FIRST_TIME_S + elapsed - np.repeat(elapsed[starts], lengths)

    def _ids(self, name: str, purpose: int, ordinals: np.ndarray, places: np.ndarray | int) -> np.ndarray:
        feature = self.features[name]
        ids = feature.ids.values(self._uniforms(purpose, feature.index, ordinals, places))
        return ids if feature.ids.high <= feature.rows else hash_ids(ids, feature.rows)

    def _uniforms(self, *counters: int | np.ndarray) -> np.ndarray:
        """float64 in (0, 1)."""
        bits = random_bits(*self.key, *counters) >> np.uint64(11)
        return (bits.astype(np.float64) + 0.5) * 2.0**-53


class SyntheticDataset:
    """``num_generated_batches`` random batches a rank, made once and kept, then repeated.

    It is the collator of its own samplers: ``build_loader(dataset, dataset.train_sampler(...))``.
    Raises ConfigError listing what in ``args`` does not fit together.
    """

    def __init__(
        self,
        args: BenchmarkDatasetArgs,
        task: Task,
        *,
        batch_size: int,
        rank: int,
        world_size: int,
        seed: int,
        split: str = "train",
        negatives: Negatives | None = None,
        wants_timestamps: bool = False,
        wants_seen: bool = False,
    ) -> None:
        _check(args)
        reader = SyntheticReader(args, task, split, seed, wants_timestamps=wants_timestamps, wants_seen=wants_seen)
        action = reader.features.get(args.action_feature_name or "")
        if action is not None and action.ids.high > action.rows:
            raise ConfigError(
                f"value_dists of {args.action_feature_name!r}: actions must be below their table's rows, {action.rows}"
            )
        corpus_size = reader.features[args.item_feature_name].rows
        assembler = Assembler(batch_size, task, reader.roles, corpus_size, seed, negatives)
        self.batch_size, self.rank, self.world_size = batch_size, rank, world_size
        self.num_samples = args.num_generated_batches * batch_size * world_size
        self._reader = reader
        self._collator = Collator(reader, assembler)
        self._made: dict[int, HSTUBatch] = {}

    def lengths(self) -> tuple[np.ndarray, np.ndarray]:
        """Items of each sample, and how many of them are candidates; both int64 [num_samples]."""
        return self._reader.lengths_of(np.arange(self.num_samples, dtype=np.int64))

    def lengths_of(self, ordinals: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Items, candidates and labels of these samples; all int64 [len(ordinals)]."""
        lengths, candidates = self._reader.lengths_of(ordinals)
        return lengths, candidates, self._reader.num_labels(lengths, candidates)

    def train_sampler(self, position: SamplerPosition | None = None, sharing: Sharing | None = None) -> TrainSampler:
        """Endless plans; an epoch is the generated samples once. Batches are kept: use one ``sharing`` a dataset."""
        return TrainSampler(
            self.num_samples,
            self.batch_size,
            self.rank,
            self.world_size,
            seed=0,
            shuffle=False,
            position=position,
            sharing=sharing,
        )

    def eval_sampler(self) -> EvalSampler:
        """The generated batches once."""
        return EvalSampler(self.num_samples, self.batch_size, self.rank, self.world_size)

    def __call__(self, plan: BatchPlan) -> HSTUBatch:
        """The batch of a plan, from memory where it has been made before."""
        if plan.global_start not in self._made:
            self._made[plan.global_start] = self._collator(plan)
        batch = self._made[plan.global_start]
        return dataclasses.replace(batch, position=plan.position)


def _check(args: BenchmarkDatasetArgs) -> None:
    roles = FeatureRoles(args.item_feature_name, args.action_feature_name, tuple(args.contextual_feature_names))
    groups = [(name, group) for group in args.feature_args for name in group.feature_names]
    tables = [name for table in args.embedding_args for name in table.feature_names]
    group_of = dict(groups)
    problems = [
        f"feature {name!r} stands in {found} {where}; it needs exactly one"
        for where, names in (("FeatureArgs", [name for name, _ in groups]), ("EmbeddingArgs", tables))
        for name in dict.fromkeys([*roles.names, *names])
        if (found := names.count(name)) != 1
    ]
    problems += [
        f"feature {name!r} is neither item_feature_name, action_feature_name nor in contextual_feature_names"
        for name in dict.fromkeys(group_of)
        if name not in roles.names
    ]
    for group in args.feature_args:
        if group.value_dists is not None and len(group.value_dists) != len(group.feature_names):
            problems.append(f"FeatureArgs of {group.feature_names}: value_dists must have one entry a feature")
        if group.seqlen_dist is not None and not group.is_jagged:
            problems.append(f"FeatureArgs of {group.feature_names}: seqlen_dist needs is_jagged = True")
    for name in roles.contextual:
        if name in group_of and (group_of[name].is_jagged or group_of[name].max_sequence_length != 1):
            problems.append(f"contextual feature {name!r} is one token: max_sequence_length = 1 and is_jagged = False")
    item, action = group_of.get(args.item_feature_name), group_of.get(args.action_feature_name or "")
    if item is not None and action is not None and not _share_lengths(item, action):
        problems.append(
            f"{args.item_feature_name!r} and {args.action_feature_name!r} must have equal lengths: put them into the "
            "feature_names of one FeatureArgs"
        )
    if item is not None and args.max_num_candidates >= item.max_sequence_length:
        problems.append(
            f"BenchmarkDatasetArgs.max_num_candidates = {args.max_num_candidates} leaves no room for history in "
            f"max_sequence_length = {item.max_sequence_length}; it must be smaller"
        )
    if problems:
        raise ConfigError(problems)


def _share_lengths(first: FeatureArgs, second: FeatureArgs) -> bool:
    fixed = not first.is_jagged and not second.is_jagged
    return first is second or (fixed and first.max_sequence_length == second.max_sequence_length)


def _group_of(args: BenchmarkDatasetArgs, name: str) -> FeatureArgs:
    return next(group for group in args.feature_args if name in group.feature_names)


def _length_distribution(group: FeatureArgs) -> Distribution:
    uniform = RandomDistribution(low=1, high=group.max_sequence_length + 1)
    return Distribution(group.seqlen_dist or uniform, group.max_sequence_length + 1)


def _features(args: BenchmarkDatasetArgs, roles: FeatureRoles) -> Mapping[str, _Feature]:
    rows = {name: table.item_vocab_size_or_capacity for table in args.embedding_args for name in table.feature_names}
    features = {}
    for index, name in enumerate(roles.names):
        group = _group_of(args, name)
        dists = group.value_dists or [RandomDistribution()] * len(group.feature_names)
        ids = Distribution(dists[group.feature_names.index(name)], rows[name])
        features[name] = _Feature(index, rows[name], ids)
    return features
