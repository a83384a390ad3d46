"""Random batches in memory, to measure speed. A sample depends only on its ordinal, the split and the seed."""

import dataclasses
import math
from typing import cast

import numpy as np
import torch

from hstu.base.errors import ConfigError
from hstu.base.hashing import hash_ids, random_bits
from hstu.config.args import BenchmarkDatasetArgs, DynamicEmbeddingArgs, RandomDistribution
from hstu.config.run_config import RunConfig
from hstu.data.batches.batch import HSTUBatch
from hstu.data.batches.collate import Assembler, Collator, Rows
from hstu.data.batches.jagged import run_indices, run_starts
from hstu.data.features.roles import benchmark_roles
from hstu.data.sampling.negatives import Negatives
from hstu.data.sampling.sampler import BatchPlan

_FIRST_TIME_S = 1_000_000_000
_MEAN_GAP_S = 3600.0
_ZIPF_HEAD = 1 << 20
"""Ranks of a Zipf distribution whose cumulative probabilities are stored."""
_NEAR_ONE = 1e-7
"""An alpha of a Zipf distribution that is nearer to 1 is moved to this distance, where powers are still precise."""
# Purpose of a random number: the first counter after the key.
_LENGTHS, _VALUES, _TIMES, _HELD_OUT = range(4)


class Distribution:
    """Maps uniform numbers to integers in [low, high) by a RandomDistribution. ``bound``: default of high. Values of
    normal and lognormal are rounded. All values are clipped to the range."""

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
        self._zipf = _Zipf(self.high - self.low, args.alpha) if self.kind == "zipf" else None

    def values(self, uniforms: np.ndarray) -> np.ndarray:
        """int64 in [low, high), by inversion of numbers that are uniform on (0, 1)."""
        if self._zipf is not None:
            drawn = self.low + self._zipf.ranks(uniforms)
        elif self.kind == "uniform":
            drawn = np.floor(self.low + uniforms * (self.high - self.low))
        else:
            normals = torch.special.ndtri(torch.from_numpy(uniforms)).numpy()
            if self.kind == "normal":
                drawn = np.rint(self.mean + self.std * normals)
            else:  # E[exp(m + s z)] = exp(m + s²/2), which must be the mean
                drawn = np.rint(np.exp(math.log(self.mean) - self.std**2 / 2 + self.std * normals))
        return np.clip(drawn, self.low, math.nextafter(self.high, 0)).astype(np.int64)


class _Zipf:
    """Ranks k in [0, n) with probabilities proportional to 1 / (k + 1)^alpha, for any n. The cumulative sum of the
    first ranks is stored. Beyond them, the sum of x^-alpha from x = a to b is approximated by the integral from a - 1/2
    to b + 1/2, with a relative error below alpha (alpha + 1) / (24 a^2): 1e-13."""

    def __init__(self, n: int, alpha: float) -> None:
        self._power = 1 - alpha if abs(1 - alpha) > _NEAR_ONE else _NEAR_ONE
        self._cumulative = np.cumsum(np.arange(1, min(n, _ZIPF_HEAD) + 1, dtype=np.float64) ** (self._power - 1))
        self._start = (len(self._cumulative) + 0.5) ** self._power
        self._end = (n + 0.5) ** self._power
        self._total = self._cumulative[-1] + (self._end - self._start) / self._power

    def ranks(self, uniforms: np.ndarray) -> np.ndarray:
        """float64 ranks of numbers that are uniform on (0, 1)."""
        masses = uniforms * self._total
        ranks = np.searchsorted(self._cumulative, masses, side="right").astype(np.float64)
        in_tail = ranks == len(self._cumulative)
        powers = self._start + self._power * (masses[in_tail] - self._cumulative[-1])
        ends = np.clip(powers, *sorted((self._start, self._end))) ** (1 / self._power)
        ranks[in_tail] = np.floor(ends - 0.5)  # rank k is x = k + 1, which has the integral from k + 1/2 to k + 3/2
        return ranks


class SyntheticDataset:
    """``num_generated_batches`` random batches per rank, which are drawn once, kept and repeated. It is the collator of
    samplers of these samples that do not shuffle: ``build_loader(dataset, sampler)``. ``config`` has a
    BenchmarkDatasetArgs and obeys hstu/config/rules/data.py.

    Sequences have at least one item more than candidates. Dynamic tables get the ids as drawn; for static tables, ids
    beyond the table are hashed into it. ``is_training`` selects the random stream and the batch size of training or
    evaluation. Retrieval evaluation draws one more item as the target. Raises ConfigError for distributions that do not
    fit their tables.
    """

    def __init__(self, config: RunConfig, rank: int, world_size: int, *, is_training: bool) -> None:
        args, trainer = cast(BenchmarkDatasetArgs, config.dataset), config.trainer
        roles, negatives = benchmark_roles(args), Negatives.of(config.retrieval) if config.retrieval else None
        groups = {name: group for group in args.feature_args for name in group.feature_names}
        tables = {name: table for table in args.embedding_args for name in table.feature_names}
        rows = {name: tables[name].item_vocab_size_or_capacity for name in roles.names}
        self._distributions = {
            name: Distribution(groups[name].distributions().get(name, RandomDistribution()), rows[name])
            for name in roles.names
        }
        """Feature → distribution of its ids, in the order of its index in the random stream."""
        self.num_ids = {
            name: max(ids.high, rows[name]) if isinstance(tables[name], DynamicEmbeddingArgs) else rows[name]
            for name, ids in self._distributions.items()
        }
        """Feature → n, where its ids lie in [0, n)."""
        if roles.action is not None and self._distributions[roles.action].high > rows[roles.action]:
            limit = f"actions must be below their table's rows, {rows[roles.action]}"
            raise ConfigError(f"value_dists of {roles.action!r}: {limit}")
        group = groups[roles.item]
        self._min_length, self._max_length = 1 + args.max_num_candidates, group.max_sequence_length
        lengths = group.seqlen_dist or RandomDistribution(low=1)
        self._lengths = Distribution(lengths, self._max_length + 1) if group.is_jagged else None
        self._max_num_candidates = args.max_num_candidates
        self._task, self._is_training, self._roles = config.task, is_training, roles
        self._key = (trainer.seed, int(is_training))
        self._wants_timestamps = config.network.needs_times
        self._wants_seen = config.retrieval is not None and config.retrieval.filter_seen
        batch_size = trainer.sequences_per_iteration if is_training else trainer.eval_batch_size
        self.num_samples = args.num_generated_batches * batch_size * world_size
        self.shares = (self.num_samples, batch_size, rank, world_size)
        """The first arguments of its samplers. Batches are kept, so their partition must not vary."""
        corpus, seed = self.num_ids[roles.item], trainer.seed
        assembler = Assembler(batch_size, config.task, roles, corpus, seed, negatives)
        self._collator = Collator(self.read, assembler)
        self._batches: dict[int, HSTUBatch] = {}

    def read(self, plan: BatchPlan) -> Rows:
        """The rows of ``plan.ordinals``."""
        ordinals = plan.ordinals
        lengths, candidates = self._lengths_of(ordinals)
        sample, place = run_indices(lengths)
        tokens = ordinals[sample], place
        items = self._ids(self._roles.item, _VALUES, *tokens)
        is_retrieval_eval = self._task == "retrieval" and not self._is_training
        return Rows(
            user_ids=ordinals,
            lengths=lengths,
            num_candidates=candidates,
            num_labels=self._num_labels(lengths, candidates),
            items=items,
            actions=None if self._roles.action is None else self._ids(self._roles.action, _VALUES, *tokens),
            timestamps=self._times(lengths, *tokens) if self._wants_timestamps else None,
            context={name: self._ids(name, _VALUES, ordinals, 0) for name in self._roles.contextual},
            held_out=self._ids(self._roles.item, _HELD_OUT, ordinals, 0) if is_retrieval_eval else None,
            seen=(items, lengths) if is_retrieval_eval and self._wants_seen else None,
        )

    def lengths(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Items, candidates and labelled items per sample; all int64 [num_samples]."""
        lengths, candidates = self._lengths_of(np.arange(self.num_samples, dtype=np.int64))
        return lengths, candidates, self._num_labels(lengths, candidates)

    def batch_of(self, samples: np.ndarray) -> HSTUBatch:
        """The batch of these samples, which may belong to any rank."""
        return self._collator(BatchPlan.of(samples))

    def __call__(self, plan: BatchPlan) -> HSTUBatch:
        """The batch of a plan: drawn once, then returned from memory."""
        if plan.global_start not in self._batches:
            self._batches[plan.global_start] = self._collator(plan)
        return dataclasses.replace(self._batches[plan.global_start], position=plan.position)

    def _lengths_of(self, ordinals: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(items, candidates) per sample, int64 [len(ordinals)] each. Draws nothing else."""
        candidates = np.full(len(ordinals), self._max_num_candidates if self._task == "ranking" else 0, dtype=np.int64)
        if self._lengths is None:
            return np.full(len(ordinals), self._max_length, dtype=np.int64), candidates
        drawn = self._lengths.values(self._uniforms(_LENGTHS, ordinals))
        return np.clip(drawn, self._min_length, self._max_length), candidates

    def _num_labels(self, lengths: np.ndarray, candidates: np.ndarray) -> np.ndarray:
        """int64: labelled items of samples with these lengths."""
        if self._task == "ranking":
            return candidates if self._max_num_candidates else lengths
        return lengths - 1 if self._is_training else np.zeros_like(lengths)

    def _times(self, lengths: np.ndarray, ordinals: np.ndarray, places: np.ndarray) -> np.ndarray:
        """int64 event times in seconds, strictly ascending within a sequence, with exponential gaps."""
        gaps = 1 + np.floor(-np.log(self._uniforms(_TIMES, ordinals, places)) * _MEAN_GAP_S).astype(np.int64)
        elapsed = np.cumsum(gaps)
        return _FIRST_TIME_S + elapsed - np.repeat(elapsed[run_starts(lengths)], lengths)

    def _ids(self, name: str, purpose: int, ordinals: np.ndarray, places: np.ndarray | int) -> np.ndarray:
        index, drawn, num_ids = [*self._distributions].index(name), self._distributions[name], self.num_ids[name]
        ids = drawn.values(self._uniforms(purpose, index, ordinals, places))
        return ids if drawn.high <= num_ids else hash_ids(ids, num_ids)

    def _uniforms(self, *counters: int | np.ndarray) -> np.ndarray:
        """float64 in (0, 1)."""
        bits = random_bits(*self._key, *counters) >> np.uint64(11)
        return (bits.astype(np.float64) + 0.5) * 2.0**-53
