"""Which samples form which batch: the order of an epoch, the position in it, and the division of a batch over ranks.

The order of an epoch is one permutation of all samples, a function of (seed, epoch) only, or with ShardWindows one of
the shards and one of the samples of each window of them. A *global batch* is the next run of the order:
``batch_size * world_size`` samples or, under a token budget, as many as fit on the ranks. Each rank takes a contiguous
slice of the run, or the samples that balancing assigns to it. The number of consumed samples is the whole state, and a
run can resume at any world size. Every rank plans the whole batch from known lengths, so nothing is communicated.
"""

from __future__ import annotations

import heapq
import math
from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from itertools import count, islice

import numpy as np
from torch.utils.data import IterableDataset

from hstu.base.errors import DataError
from hstu.base.hashing import random_below, random_bits, random_uniform
from hstu.data.batches.jagged import first_from, ranges, run_offsets, run_starts
from hstu.data.store.parts import Values


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
    shards: tuple[int, ...] = ()
    """Of a plan with windows: the shards of this window and of the next one, in the order of the epoch."""

    @classmethod
    def of(cls, samples: np.ndarray) -> BatchPlan:
        """A batch of these rows of the sample table, outside of any epoch."""
        return cls(samples, samples, epoch=0, global_start=0, position=START)


@dataclass(frozen=True)
class Loads:
    """Cost of training on each of n samples."""

    tokens: np.ndarray
    """int64 [n], at least 1."""
    costs: np.ndarray
    """float64 [n], above 0, in any unit. A rank's cost is the sum over its samples."""


@dataclass(frozen=True)
class BatchPartition:
    """How global batches are divided over the ranks."""

    loads: Callable[[np.ndarray], Loads]
    """Loads of rows of the sample table, int64 [n]. Nothing is kept per sample."""
    balance: bool = False
    """Equalise the costs of the ranks."""
    tokens_per_rank: int | None = None
    """Largest number of tokens per rank; a longer sample is the only one of its rank. None: samples are counted."""


@dataclass(frozen=True)
class ShardWindows:
    """Shuffle the shards of a store, then the samples within each window of shards that follow one another."""

    bounds: np.ndarray
    """int64 [shards + 1]: shard k has the samples [bounds[k], bounds[k + 1])."""
    shards: int
    """Shards of a window."""

    def order(self, seed: int, epoch: int) -> Order:
        """The order of an epoch. It keeps nothing per sample."""
        drawn, begins = self._drawn(seed, epoch)
        edges = begins[[*range(0, len(drawn), self.shards), -1]]

        def rows(ordinals: np.ndarray) -> np.ndarray:
            windows = np.searchsorted(edges, ordinals, side="right") - 1
            places = np.empty(len(ordinals), dtype=np.int64)
            for window in np.unique(windows).tolist():
                begin, stop = edges[window : window + 2].tolist()
                inner = windows == window
                places[inner] = begin + feistel_rows(stop - begin, seed, epoch, ordinals[inner] - begin, window)
            shards = np.searchsorted(begins, places, side="right") - 1
            return self.bounds[drawn[shards]] + places - begins[shards]

        return rows

    def next_shards(self, seed: int, epoch: int, ordinal: int) -> tuple[int, ...]:
        """The shards of the window of a sample and of the next one, which may be in the next epoch, in this order."""
        drawn, begins = self._drawn(seed, epoch)
        place = int(np.searchsorted(begins, ordinal, side="right")) - 1
        first = place - place % self.shards
        window, rest = np.split(drawn[first:], [self.shards])
        return (*window.tolist(), *[*rest.tolist(), *self._drawn(seed, epoch + 1)[0].tolist()][: self.shards])

    def _drawn(self, seed: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The shards in the order of an epoch, int64 [shards], and the first sample of each, int64 [shards + 1]."""
        drawn = _shard_order(len(self.bounds) - 1, seed, epoch)
        return drawn, run_offsets(np.diff(self.bounds)[drawn])


@lru_cache(maxsize=2)
def _shard_order(shards: int, seed: int, epoch: int) -> np.ndarray:
    """int64 [shards]. Each batch asks for that of its epoch and of the next one."""
    return np.random.default_rng([seed, epoch]).permutation(shards)


Order = Callable[[np.ndarray], np.ndarray]
"""Rows of the sample table, int64 [n], at these indices in the order of an epoch, int64 [n]."""

_BLOCK = 1 << 16  # samples whose tokens are read at once
_COSTLY_SAMPLES = 1 << 12  # of a global batch, whose plan takes about 2 ms
MOST_LISTED = 1 << 24
"""Samples up to which the order of an epoch is a list in memory. It decides the order: changing it would make a resumed
run train on some samples of its epoch twice and never on others."""
_FEISTEL_ROUNDS = 6


def epoch_order(num_samples: int, seed: int, epoch: int, shuffle: bool, windows: ShardWindows | None = None) -> Order:
    """The order of an epoch, equal on all ranks and at all world sizes: above MOST_LISTED samples ``feistel_rows``."""
    if not shuffle:
        return np.asarray
    if windows is not None:
        return windows.order(seed, epoch)
    if num_samples > MOST_LISTED:
        return partial(feistel_rows, num_samples, seed, epoch)
    listed = np.arange(num_samples, dtype=np.int32)
    np.random.default_rng([seed, epoch]).shuffle(listed)
    return lambda ordinals: listed[ordinals].astype(np.int64)


def feistel_rows(num_samples: int, seed: int, epoch: int, ordinals: np.ndarray, *window: int) -> np.ndarray:
    """int64 [n]: where a random permutation of ``num_samples`` rows takes ``ordinals``; each row is computed alone.
    ``window``: number of a permutation among those of the epoch.

    A Feistel network on pairs (left, right) in [0, width) x [0, height), whose product is at least ``num_samples``. A
    row beyond the samples is permuted again until it is one of them.
    Source: J. Black, P. Rogaway, "Ciphers with arbitrary finite domains", CT-RSA 2002 (generalised Feistel cipher).
    """
    width = math.isqrt(num_samples - 1) + 1
    height = -(-num_samples // width)
    sizes, halves = (width, height), [*np.divmod(ordinals, height)]
    for step in range(_FEISTEL_ROUNDS):
        own = step % 2
        bits = random_bits(seed, _ORDER_STREAM, epoch, *window, step, halves[1 - own]) >> np.uint64(32)
        halves[own] = (halves[own] + random_below(sizes[own], bits)) % sizes[own]
    rows = halves[0] * height + halves[1]
    beyond = np.flatnonzero(rows >= num_samples)
    if len(beyond):
        rows[beyond] = feistel_rows(num_samples, seed, epoch, rows[beyond], *window)
    return rows


@dataclass(eq=False)
class TrainSampler(IterableDataset[BatchPlan]):
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
    windows: ShardWindows | None = None
    """With ``shuffle``: the shards to shuffle. None: one permutation of all samples."""

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
                "the checkpoint was written with other options of DatasetArgs. Set them back; "
                "TrainerArgs.ckpt_load_optimizer = False starts from its weights at iteration 0"
            )

    @cached_property
    def batches_per_epoch(self) -> int:
        """Global batches per epoch: under a token budget, of the first epoch, from which others differ by a few."""
        return self._batches_after(SamplerPosition())

    def batches_since(self, epoch: int) -> int:
        """Global batches of this size from the start of ``epoch`` to ``position``; a part of one counts as whole."""
        begun = sum(self._batches_after(SamplerPosition(each)) for each in range(epoch, self.position.epoch + 1))
        return begun - self._batches_after(self.position)

    def _batches_after(self, position: SamplerPosition) -> int:
        """Global batches of the rest of the epoch."""
        if self._token_budget is None:
            return -(-(self.num_samples - position.consumed) // (self.batch_size * self.world_size))
        return sum(1 for _ in self._global_batches(self._order(position.epoch), position.consumed))

    def _order(self, epoch: int) -> Order:
        return epoch_order(self.num_samples, self.seed, epoch, self.shuffle, self.windows)

    @property
    def is_costly(self) -> bool:
        """Whether a plan takes long enough that another process should make it ahead of time."""
        return self.partition is not None and self.batch_size * self.world_size >= _COSTLY_SAMPLES

    def __iter__(self) -> Iterator[BatchPlan]:
        for epoch, order, bounds in self._epochs():
            start, stop = int(bounds[0]), int(bounds[-1])
            ordinals = start + np.flatnonzero(self._ranks(order, bounds) == self.rank)
            shards = () if self.windows is None else self.windows.next_shards(self.seed, epoch, start)
            yield BatchPlan(order(ordinals), ordinals, epoch, start, SamplerPosition(epoch, stop), shards)

    def global_batches(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yields (rows of the sample table, rank of each row) of all global batches without end; int64 [n] both."""
        for _, order, bounds in self._epochs():
            yield order(np.arange(bounds[0], bounds[-1])), self._ranks(order, bounds)

    def _epochs(self) -> Iterator[tuple[int, Order, np.ndarray]]:
        """Yields (epoch, its order, bounds of the ranks' slices) of the global batches without end."""
        begin = self.position.consumed
        for epoch in count(self.position.epoch):
            order = self._order(epoch)
            for bounds in self._global_batches(order, begin):
                yield epoch, order, bounds
            begin = 0

    def _global_batches(self, order: Order, begin: int) -> Iterator[np.ndarray]:
        """Yields the bounds of the ranks' slices, int64 [ranks + 1], of each global batch from ordinal ``begin`` on.
        Under a token budget each rank takes the next samples up to it and to ``batch_size`` samples, at least one, and
        leaves one for each later rank."""
        first, until = begin, [0]  # until[i]: tokens of the samples [first, first + i)
        while begin < self.num_samples:
            if self.partition is None or self._token_budget is None:
                size = min(self.batch_size * self.world_size, self.num_samples - begin)
                yield even_bounds(begin, size, self.world_size)
                begin += size
                continue
            bounds = [begin]
            for ranks_after in reversed(range(self.world_size)):
                start = bounds[-1]
                last = min(start + self.batch_size, self.num_samples)
                if last - first >= len(until):
                    first, read = start, np.arange(start, min(last + _BLOCK, self.num_samples))
                    until = run_offsets(self.partition.loads(order(read)).tokens).tolist()
                limit = until[start - first] + self._token_budget
                fitting = first + bisect_right(until, limit, start - first, last - first + 1) - 1
                bounds.append(min(max(min(fitting, self.num_samples - ranks_after), start + 1), self.num_samples))
            yield np.array(bounds, dtype=np.int64)
            begin = bounds[-1]

    def _ranks(self, order: Order, bounds: np.ndarray) -> np.ndarray:
        """int64 [n]: the rank of each sample of a global batch, in the order of the epoch.

        These are the contiguous slices, unless balancing finds more similar costs. It keeps each rank's count or, under
        a token budget, gives it up to ``batch_size`` samples within its tokens.
        """
        counts = np.diff(bounds)
        contiguous = np.repeat(np.arange(self.world_size), counts)
        if self.partition is None or not self.partition.balance or self.world_size == 1:
            return contiguous
        loads, budget = self.partition.loads(order(np.arange(bounds[0], bounds[-1]))), self._token_budget
        if budget is None:
            found = balanced_ranks(loads.costs, counts)
        else:  # a sample that alone exceeds the budget fills a rank
            tokens = np.minimum(loads.tokens, budget)
            found = balanced_ranks(loads.costs, np.full_like(counts, self.batch_size), tokens, budget)
        if found is None or np.bincount(found, loads.costs).max() >= np.bincount(contiguous, loads.costs).max():
            return contiguous
        return found


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


def balanced_ranks(
    costs: np.ndarray, counts: np.ndarray, tokens: np.ndarray | None = None, tokens_per_rank: int = 0
) -> np.ndarray | None:
    """int64 [n]: the rank of each sample, chosen so that the largest cost of a rank is small. None: no room is left.

    Longest processing time first: samples in descending cost, each to the rank with the lowest cost so far that has
    room (R. L. Graham, "Bounds on multiprocessing timing anomalies", SIAM J. Appl. Math. 17, 1969; here with limits).
    ``costs``: float64 [n]. ``counts``: int64 [ranks], largest number of samples per rank. With ``tokens``, int64 [n], a
    rank also holds at most ``tokens_per_rank`` tokens."""
    order = np.argsort(-costs, kind="stable")
    sizes = np.zeros(len(costs), dtype=np.int64) if tokens is None else tokens
    # (cost so far, rank, room for samples, room for tokens). Ties go to the lower rank, so all ranks agree.
    ranks = [(0.0, rank, room, tokens_per_rank) for rank, room in enumerate(counts.tolist()) if room]
    full: list[tuple[int, tuple[float, int, int, int]]] = []  # without room for the last sample, the most room first
    chosen = np.empty_like(order)
    for sample, cost, size in zip(order, costs[order].tolist(), sizes[order].tolist(), strict=True):
        while full and -full[0][0] >= size:
            heapq.heappush(ranks, heapq.heappop(full)[1])
        while ranks and ranks[0][3] < size:
            entry = heapq.heappop(ranks)
            heapq.heappush(full, (-entry[3], entry))
        if not ranks:
            return None
        load, rank, room, token_room = ranks[0]
        chosen[sample] = rank
        if room > 1:
            heapq.heapreplace(ranks, (load + cost, rank, room - 1, token_room - size))
        else:
            heapq.heappop(ranks)
    return chosen


_STREAM, _ORDER_STREAM, _TIME_STREAM, _TIES_STREAM = 0x5749_4E44, 0x4F52_4445, 0x5449_4D45, 0x5449_4553
"""Separate the draws of windows, orders, request times and ties from those of negatives, which use the same seed."""


def window_starts(
    begin: np.ndarray, newest: np.ndarray, stop: np.ndarray, seed: int, epoch: int, ordinals: np.ndarray
) -> np.ndarray:
    """int64 [b]: first events of the windows of long histories in an epoch, for DatasetArgs.window_stride = "random".

    A window of L events begins at event floor(uniform * T) of T events, or is the newest window if fewer than L events
    follow. So L / T of the epochs see the newest event, as often as events in the middle. A uniform end would show this
    event, the nearest to what is recommended, once in T - L + 1 epochs.

    begin, stop: bounds of the histories. newest: first events of their newest windows. ordinals: indices in the order
    of the epoch, on which alone the draw depends beside seed and epoch. All int64 [b]."""
    uniform = random_uniform(seed, _STREAM, epoch, ordinals)
    return np.minimum(begin + (uniform * (stop - begin)).astype(np.int64), newest)


def knows_request_time(seed: int, epoch: int, ordinals: np.ndarray) -> np.ndarray:
    """bool [b]: which half of the samples knows the time of the request, for DatasetArgs.query_time = "either"."""
    return np.asarray(random_uniform(seed, _TIME_STREAM, epoch, ordinals) < 0.5)


def shuffled_ties(
    times: Values, bounds: tuple[np.ndarray, np.ndarray], first: np.ndarray, lengths: np.ndarray, *key: int
) -> np.ndarray:
    """int64 [Σ lengths]: the events at places [first, first + length) of histories whose equal times are shuffled.

    The draw depends only on the event and on ``key``: seed and epoch. All windows of a history see one order: where
    a window cuts a run of equal times, each event of the run is on one side of the cut, on any ranks and workers.

    times: int64 [E], ascending within a history. bounds: (begin, stop) of the histories; events outside of them, such
    as held-out ones, are not moved. first, lengths: at least one event of the history is at ``first`` or later. All
    int64 [b].
    """
    begin, stop = bounds
    ends = first + lengths
    # Runs of equal times that the places cut are sorted as a whole.
    whole = first_from(times, begin, first, times[first])
    sizes = first_from(times, ends, stop, times[np.maximum(ends - 1, first)] + 1) - whole
    events, starts = ranges(whole, sizes), run_starts(sizes)
    begins_run = np.diff(times[events], prepend=0) != 0
    begins_run[starts] = True
    runs, drawn, half = np.cumsum(begins_run, dtype=np.uint64), random_bits(_TIES_STREAM, *key, events), np.uint64(32)
    order = np.argsort(runs << half | drawn >> half, kind="stable")  # 20 times as fast as a lexsort
    return events[order[ranges(starts + first - whole, lengths)]]
