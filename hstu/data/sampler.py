"""Which samples make up which batch: an order of the epoch that no world size changes, and a cursor into it.

The order of an epoch is one permutation of all samples, a function of (seed, epoch) only. A *global batch* is
the next ``batch_size * world_size`` samples of it, and every rank takes its own contiguous slice. How far the
epoch has been consumed is therefore the whole state: it can be resumed at any world size.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np

from hstu.config.errors import DataError


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


def even_slice(count: int, rank: int, world_size: int) -> tuple[int, int]:
    """Rank's [begin, end) of ``count`` samples, split so that no two ranks differ by more than one."""
    return count * rank // world_size, count * (rank + 1) // world_size


class TrainSampler:
    """Endless batches, epoch after epoch, starting at ``position``.

    The last global batch of an epoch may be smaller; it is split as evenly as possible over the ranks, and every
    rank yields a plan for it (an empty one where there are fewer samples than ranks).
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

    @property
    def batches_per_epoch(self) -> int:
        """Global batches in one whole epoch."""
        return -(-self.num_samples // (self.batch_size * self.world_size))

    def __iter__(self) -> Iterator[BatchPlan]:
        """Yield this rank's plans, for ever."""
        epoch, consumed = self.position.epoch, self.position.consumed
        while True:
            order = epoch_order(self.num_samples, self.seed, epoch, self.shuffle)
            while consumed < self.num_samples:
                count = min(self.batch_size * self.world_size, self.num_samples - consumed)
                begin, end = even_slice(count, self.rank, self.world_size)
                ordinals = np.arange(consumed + begin, consumed + end, dtype=np.int64)
                start, consumed = consumed, consumed + count
                yield BatchPlan(order[ordinals], ordinals, epoch, start, SamplerPosition(epoch, consumed))
            epoch, consumed = epoch + 1, 0


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
