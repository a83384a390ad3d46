"""Which samples form which batch: the order of an epoch, the position in it, and the division of a batch over ranks.

The order of an epoch is one permutation of all samples, a function of (seed, epoch) only. A *global batch* is the next
run of it: ``batch_size * world_size`` samples or, under a token budget, as many as fit on the ranks. Each rank takes a
contiguous slice of the run, or the samples that balancing assigns to it. The number of consumed samples is therefore
the whole state, and a run can resume at any world size. Every rank plans the whole batch on the host from known
lengths, so nothing is communicated. The division decides which rank trains on a sample, never which samples share a
step.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import count, islice

import numpy as np

from hstu.base.errors import DataError
from hstu.base.hashing import random_uniform
from hstu.data.batches.jagged import run_offsets


@dataclass(frozen=True)
class SamplerPosition:
    """Progress of a run: ``consumed`` samples of ``epoch``, counted over all ranks."""

    epoch: int = 0
    consumed: int = 0


START = SamplerPosition()


@dataclass(frozen=True)
class BatchPlan:
    """The samples of one rank in a global batch."""

    indices: np.ndarray
    """int64 [<= batch_size]: rows of the sample table."""
    ordinals: np.ndarray
    """int64, same length: indices of the samples in the order of the epoch, ascending."""
    epoch: int
    global_start: int
    """First ordinal of the global batch, equal on all ranks."""
    position: SamplerPosition
    """Position of the run after training on the batch."""

    @classmethod
    def of(cls, samples: np.ndarray) -> BatchPlan:
        """A batch of these rows of the sample table, outside of any epoch."""
        return cls(samples, samples, epoch=0, global_start=0, position=START)


@dataclass(frozen=True)
class Loads:
    """Cost of training on each of S samples, in the order of the sample table."""

    tokens: np.ndarray
    """int64 [S], at least 1."""
    costs: np.ndarray
    """float64 [S], above 0, in any unit. A rank's cost is the sum over its samples."""


@dataclass(frozen=True)
class BatchPartition:
    """How global batches are divided over the ranks."""

    loads: Loads
    balance: bool = False
    """Equalise the costs of the ranks."""
    tokens_per_rank: int | None = None
    """Largest number of tokens per rank; a longer sample is the only one of its rank. None: samples are counted."""


def epoch_order(num_samples: int, seed: int, epoch: int, shuffle: bool) -> np.ndarray:
    """The order of an epoch, int64 [num_samples]: equal on all ranks and at all world sizes."""
    if not shuffle:
        return np.arange(num_samples, dtype=np.int64)
    return np.random.default_rng([seed, epoch]).permutation(num_samples).astype(np.int64, copy=False)


@dataclass(eq=False)
class TrainSampler:
    """Endless batch plans of one rank from ``position`` on. ``partition`` None means contiguous slices of equal counts.
    The last global batch of an epoch may be smaller. Every rank then gets a sample where there are enough; otherwise
    some ranks get empty plans. Raises DataError without samples, or for a position beyond the epoch."""

    num_samples: int
    batch_size: int
    rank: int
    world_size: int
    seed: int
    shuffle: bool
    position: SamplerPosition = START
    partition: BatchPartition | None = None

    def __post_init__(self) -> None:
        self._token_budget = None if self.partition is None else self.partition.tokens_per_rank
        if self.num_samples < 1:
            raise DataError(
                "the training split has no samples: every user has too few events. Retrieval needs two events per "
                "user besides the held-out ones, ranking needs one event more than candidates"
            )
        if not 0 <= self.position.consumed <= self.num_samples:
            raise DataError(
                f"cannot resume at sample {self.position.consumed} of an epoch of {self.num_samples} samples: "
                "the checkpoint was written for other data. TrainerArgs.ckpt_load_optimizer = False starts from its "
                "weights at iteration 0"
            )

    @cached_property
    def batches_per_epoch(self) -> int:
        """Global batches per epoch: under a token budget, of the first epoch, from which others differ by a few."""
        if self._token_budget is None:
            return -(-self.num_samples // (self.batch_size * self.world_size))
        order = epoch_order(self.num_samples, self.seed, 0, self.shuffle)
        return sum(1 for _ in self._global_batches(order, begin=0))

    @cached_property
    def batches_done(self) -> int:
        """Global batches of this size from the start of the run to ``position``; a part of one counts as whole."""
        epoch, consumed = self.position.epoch, self.position.consumed
        if self._token_budget is None:
            left = -(-(self.num_samples - consumed) // (self.batch_size * self.world_size))
            return (epoch + 1) * self.batches_per_epoch - left
        batches = 0
        for each in range(epoch + 1):
            order = epoch_order(self.num_samples, self.seed, each, self.shuffle)
            batches += sum(1 for _ in self._global_batches(order, begin=0))
        return batches - sum(1 for _ in self._global_batches(order, consumed))

    def __iter__(self) -> Iterator[BatchPlan]:
        for epoch, order, bounds in self._epochs():
            start, stop = int(bounds[0]), int(bounds[-1])
            ordinals = start + np.flatnonzero(self._ranks(order, bounds) == self.rank)
            yield BatchPlan(order[ordinals], ordinals, epoch, start, SamplerPosition(epoch, stop))

    def global_batches(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yields (rows of the sample table, rank of each row) of all global batches without end; int64 [n] both."""
        for _, order, bounds in self._epochs():
            yield order[bounds[0] : bounds[-1]], self._ranks(order, bounds)

    def _epochs(self) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """Yields (epoch, its order, bounds of the ranks' slices) of the global batches without end."""
        begin = self.position.consumed
        for epoch in count(self.position.epoch):
            order = epoch_order(self.num_samples, self.seed, epoch, self.shuffle)
            for bounds in self._global_batches(order, begin):
                yield epoch, order, bounds
            begin = 0

    def _global_batches(self, order: np.ndarray, begin: int) -> Iterator[np.ndarray]:
        """Yields the bounds of the ranks' slices, int64 [ranks + 1], of each global batch from ordinal ``begin`` on."""
        tokens_until = np.empty(0)
        if self.partition is not None and self._token_budget is not None:
            tokens_until = run_offsets(self.partition.loads.tokens[order])
        while begin < self.num_samples:
            if self._token_budget is None:
                size = min(self.batch_size * self.world_size, self.num_samples - begin)
                bounds = even_bounds(begin, size, self.world_size)
            else:
                bounds = budget_bounds(tokens_until, begin, self.world_size, self._token_budget, self.batch_size)
            yield bounds
            begin = int(bounds[-1])

    def _ranks(self, order: np.ndarray, bounds: np.ndarray) -> np.ndarray:
        """int64 [n]: the rank of each sample of a global batch, in the order of the epoch."""
        if self.partition is None or not self.partition.balance or self.world_size == 1:
            return np.repeat(np.arange(self.world_size), np.diff(bounds))
        chosen, loads = order[bounds[0] : bounds[-1]], self.partition.loads
        chosen_loads = Loads(loads.tokens[chosen], loads.costs[chosen])
        return rebalance(np.diff(bounds), chosen_loads, self.batch_size, self._token_budget)


@dataclass(eq=False)
class EvalSampler:
    """One pass over all samples in table order. All ranks yield equally many plans, of which the last may be empty."""

    num_samples: int
    batch_size: int
    rank: int
    world_size: int

    def __len__(self) -> int:
        """Plans per rank."""
        return -(-self.num_samples // (self.batch_size * self.world_size))

    def __iter__(self) -> Iterator[BatchPlan]:
        if self.num_samples:
            endless = TrainSampler(self.num_samples, self.batch_size, self.rank, self.world_size, seed=0, shuffle=False)
            yield from islice(endless, len(self))


def even_bounds(begin: int, count: int, num_ranks: int) -> np.ndarray:
    """Bounds of the ranks' slices of [begin, begin + count), int64 [ranks + 1]. Sizes differ by at most one."""
    return begin + count * np.arange(num_ranks + 1, dtype=np.int64) // num_ranks


def budget_bounds(
    tokens_until: np.ndarray, begin: int, num_ranks: int, tokens_per_rank: int, max_samples: int
) -> np.ndarray:
    """Bounds of the ranks' slices of the global batch that begins at ordinal ``begin``; int64 [ranks + 1].
    ``tokens_until``: int64 [S + 1], tokens of the first 0, 1, … samples of the epoch. Each rank takes the next samples
    up to ``tokens_per_rank`` tokens and ``max_samples`` samples, at least one, and leaves one for each later rank."""
    num_samples = len(tokens_until) - 1
    bounds = [begin]
    for ranks_after in reversed(range(num_ranks)):
        start = bounds[-1]
        fitting = int(np.searchsorted(tokens_until, tokens_until[start] + tokens_per_rank, side="right")) - 1
        stop = min(fitting, start + max_samples, num_samples - ranks_after)
        bounds.append(min(max(stop, start + 1), num_samples))
    return np.array(bounds, dtype=np.int64)


def rebalance(counts: np.ndarray, loads: Loads, max_samples: int, tokens_per_rank: int | None) -> np.ndarray:
    """int64 [n]: the rank of each sample of a global batch, chosen so that the ranks' costs are similar. ``counts``:
    int64 [ranks], sizes of the contiguous slices. Without ``tokens_per_rank`` every rank keeps its count. With it, a
    rank takes up to ``max_samples`` samples within its tokens. Falls back to the contiguous slices."""
    contiguous = np.repeat(np.arange(len(counts)), counts)
    if tokens_per_rank is None:
        found = balanced_ranks(loads.costs, counts)
    else:
        # A sample that alone exceeds the budget fills a rank.
        tokens = np.minimum(loads.tokens, tokens_per_rank)
        found = balanced_ranks(loads.costs, np.full_like(counts, max_samples), tokens, tokens_per_rank)
    before, after = (np.bincount(contiguous if ranks is None else ranks, loads.costs).max() for ranks in (None, found))
    return contiguous if found is None or after >= before else found


def balanced_ranks(
    costs: np.ndarray, counts: np.ndarray, tokens: np.ndarray | None = None, tokens_per_rank: int = 0
) -> np.ndarray | None:
    """int64 [n]: the rank of each sample, chosen so that the largest cost of a rank is small. None: no room is left.

    Longest processing time first: samples in descending cost, each to the rank with the lowest cost so far that has
    room (R. L. Graham, "Bounds on multiprocessing timing anomalies", SIAM J. Appl. Math. 17, 1969; here with limits).
    ``costs``: float64 [n]. ``counts``: int64 [ranks], largest number of samples per rank. With ``tokens``, int64 [n], a
    rank also holds at most ``tokens_per_rank`` tokens."""
    order = np.argsort(-costs, kind="stable")
    sizes = [0] * len(costs) if tokens is None else tokens[order].tolist()
    # (cost so far, rank, room for samples, room for tokens). Ties go to the lower rank, so all ranks agree.
    ranks = [(0.0, rank, count, tokens_per_rank) for rank, count in enumerate(counts.tolist()) if count]
    chosen = []
    for cost, size in zip(costs[order].tolist(), sizes, strict=True):
        full = []
        while ranks and ranks[0][3] < size:
            full.append(heapq.heappop(ranks))
        if not ranks:
            return None
        load, rank, room, token_room = ranks[0]
        chosen.append(rank)
        if room > 1:
            heapq.heapreplace(ranks, (load + cost, rank, room - 1, token_room - size))
        else:
            heapq.heappop(ranks)
        for entry in full:
            heapq.heappush(ranks, entry)
    result = np.empty(len(costs), dtype=np.int64)
    result[order] = chosen
    return result


_STREAM = 0x5749_4E44
"""Separates these draws from the draws of negatives, which use the same seed."""


def window_starts(
    begin: np.ndarray, newest: np.ndarray, stop: np.ndarray, seed: int, epoch: int, ordinals: np.ndarray
) -> np.ndarray:
    """int64 [b]: first events of the windows of long histories in an epoch, for DatasetArgs.window_stride = "random".

    A window of L events begins at event floor(uniform * T) of T events, or is the newest window if fewer than L events
    follow. So L / T of the epochs see the newest event, as often as events in the middle. A uniform end would show this
    event, the nearest to what is recommended, once in T - L + 1 epochs. The draw depends only on seed, epoch and
    ordinal: it is the same at any world size, with any number of workers and after a resume.

    begin, stop: bounds of the histories. newest: first events of their newest windows. ordinals: indices in the order
    of the epoch. All int64 [b].
    """
    uniform = random_uniform(seed, _STREAM, epoch, ordinals)
    return np.minimum(begin + (uniform * (stop - begin)).astype(np.int64), newest)
