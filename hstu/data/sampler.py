"""Which samples make up which batch: an order of the epoch that no world size changes, and a cursor into it.

The order of an epoch is one permutation of all samples, a function of (seed, epoch) only. A *global batch* is
the next run of it: ``batch_size * world_size`` samples or, by tokens, as many as the ranks have room for. Every rank
takes its own contiguous slice of the run, or what balance.py gives it. How far the epoch has been consumed is
therefore the whole state: it can be resumed at any world size.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import islice

import numpy as np

from hstu.config.errors import DataError
from hstu.data.balance import Loads, Sharing, budget_bounds, even_bounds, rebalanced


@dataclass(frozen=True)
class SamplerPosition:
    """How far a run has come: ``consumed`` samples of epoch ``epoch``, counted over all ranks."""

    epoch: int = 0
    consumed: int = 0


@dataclass(frozen=True)
class BatchPlan:
    """One rank's share of a global batch.

    ``indices``: int64 [<= batch_size], rows of the sample table. ``ordinals``: int64, their places in the order of
    the epoch. ``global_start``: the first ordinal of the global batch, equal on all ranks. ``position``: where the
    run stands once the batch has been trained on.
    """

    indices: np.ndarray
    ordinals: np.ndarray
    epoch: int
    global_start: int
    position: SamplerPosition


def epoch_order(num_samples: int, seed: int, epoch: int, shuffle: bool) -> np.ndarray:
    """The order of an epoch, int64 [num_samples]: equal on all ranks and at all world sizes."""
    if not shuffle:
        return np.arange(num_samples, dtype=np.int64)
    return np.random.default_rng([seed, epoch]).permutation(num_samples).astype(np.int64, copy=False)


class TrainSampler:
    """Endless batches, epoch after epoch, starting at ``position``.

    ``sharing``: how a global batch is shared out; None: contiguous slices of equal counts. The last global batch of an
    epoch may be smaller; it is split over the ranks so that none goes without as long as there are enough samples,
    and every rank yields a plan for it (an empty one where there are fewer samples than ranks).
    """

    def __init__(
        self,
        num_samples: int,
        batch_size: int,
        rank: int,
        world_size: int,
        seed: int,
        shuffle: bool,
        position: SamplerPosition | None = None,
        sharing: Sharing | None = None,
    ) -> None:
        if num_samples < 1:
            raise DataError(
                "the training split has no samples: every user has too few events for it. Retrieval needs two events a "
                "user besides those that are held out, ranking one event more than candidates"
            )
        position = position or SamplerPosition()
        if not 0 <= position.consumed <= num_samples:
            raise DataError(
                f"cannot resume at sample {position.consumed} of an epoch of {num_samples} samples: "
                "the checkpoint was written for other data"
            )
        self.num_samples = num_samples
        self.batch_size = batch_size
        self.rank = rank
        self.world_size = world_size
        self.seed = seed
        self.shuffle = shuffle
        self.position = position
        self.sharing = sharing

    @cached_property
    def batches_per_epoch(self) -> int:
        """Global batches in one whole epoch; by tokens: in the first, others have a few more or less."""
        if self.sharing is None or self.sharing.tokens_per_rank is None:
            return -(-self.num_samples // (self.batch_size * self.world_size))
        return sum(1 for _ in self._global_batches(self._order(0), begin=0))

    def __iter__(self) -> Iterator[BatchPlan]:
        """Yield this rank's plans, for ever."""
        epoch, consumed = self.position.epoch, self.position.consumed
        while True:
            order = self._order(epoch)
            for bounds in self._global_batches(order, consumed):
                start, stop = int(bounds[0]), int(bounds[-1])
                ordinals = self._share(order, bounds)
                yield BatchPlan(order[ordinals], ordinals, epoch, start, SamplerPosition(epoch, stop))
            epoch, consumed = epoch + 1, 0

    def _order(self, epoch: int) -> np.ndarray:
        return epoch_order(self.num_samples, self.seed, epoch, self.shuffle)

    def _global_batches(self, order: np.ndarray, begin: int) -> Iterator[np.ndarray]:
        """The rest of an epoch as global batches; of each, the ordinals between the ranks' shares [world_size + 1]."""
        budget = None if self.sharing is None else self.sharing.tokens_per_rank
        tokens_until = np.empty(0) if budget is None else self._tokens_until(order)
        while begin < self.num_samples:
            if budget is None:
                count = min(self.batch_size * self.world_size, self.num_samples - begin)
                bounds = even_bounds(begin, count, self.world_size)
            else:
                bounds = budget_bounds(tokens_until, begin, self.world_size, budget, self.batch_size)
            yield bounds
            begin = int(bounds[-1])

    def _tokens_until(self, order: np.ndarray) -> np.ndarray:
        """int64 [S + 1]: tokens of the first 0, 1, … samples of an epoch."""
        assert self.sharing is not None
        return np.concatenate([[0], np.cumsum(self.sharing.loads.tokens[order])])

    def _share(self, order: np.ndarray, bounds: np.ndarray) -> np.ndarray:
        """This rank's ordinals of a global batch, ascending; int64."""
        if self.sharing is None or not self.sharing.balance or self.world_size == 1:
            return np.arange(bounds[self.rank], bounds[self.rank + 1], dtype=np.int64)
        chosen, loads = order[bounds[0] : bounds[-1]], self.sharing.loads
        ranks = rebalanced(
            np.diff(bounds),
            Loads(loads.tokens[chosen], loads.costs[chosen]),
            self.batch_size,
            self.sharing.tokens_per_rank,
        )
        return bounds[0] + np.flatnonzero(ranks == self.rank)


class EvalSampler:
    """One pass over all samples in their own order; every rank yields equally many plans, some perhaps empty."""

    def __init__(self, num_samples: int, batch_size: int, rank: int, world_size: int) -> None:
        self.num_samples = num_samples
        self.batch_size = batch_size
        self.rank = rank
        self.world_size = world_size

    def __len__(self) -> int:
        """Plans of every rank."""
        return -(-self.num_samples // (self.batch_size * self.world_size))

    def __iter__(self) -> Iterator[BatchPlan]:
        """Yield this rank's plans."""
        if self.num_samples:
            endless = TrainSampler(self.num_samples, self.batch_size, self.rank, self.world_size, seed=0, shuffle=False)
            yield from islice(endless, len(self))
