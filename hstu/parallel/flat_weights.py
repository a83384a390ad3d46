"""Weights in one buffer, split evenly over the ranks with equal dense weights for the update (ZeRO stage 1).

The buffer is split into equal ranges, one per rank, regardless of weight boundaries. Each rank keeps optimizer states
for its range, updates it, and all-gathers the buffer in place, once per step.

torch.distributed.optim.ZeroRedundancyOptimizer (torch 2.13) assigns whole weights to ranks, so the largest weight
determines the memory. It fails with fewer weights than ranks, and ``found_inf`` does not reach its inner optimizer.
Source: Rajbhandari et al., ZeRO, SC 2020.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Self

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hstu.parallel.shards import ShardedView, WeightShares, swap_values

Box = tuple[tuple[int, ...], tuple[int, ...]]
"""(offset, shape) of a box in a tensor."""
ALIGNMENT = 128
"""Weights and ranges start at multiples of this (512 bytes), for the speed and rounding of separate weights."""


@dataclass(frozen=True)
class FlatLayout:
    """Layout of weights in a buffer that is split into equal ranges, one per rank."""

    starts: Mapping[str, int]
    """Weight → offset of its first element."""
    numels: Mapping[str, int]
    range_size: int

    @classmethod
    def of(cls, numels: Mapping[str, int], ranks: int) -> Self:
        """Lay out weights one after another. ``numels``: weight → number of elements."""
        starts, end = {}, 0
        for name, numel in numels.items():
            starts[name] = end
            end += _aligned(numel)
        return cls(starts, dict(numels), _aligned(-(-end // ranks)))

    def owned(self, rank: int) -> dict[str, range]:
        """Return for each weight the range, possibly empty, of its elements that belong to ``rank``."""
        begin, end = rank * self.range_size, (rank + 1) * self.range_size
        return {
            name: range(*(min(max(bound - start, 0), self.numels[name]) for bound in (begin, end)))
            for name, start in self.starts.items()
        }


def _aligned(count: int) -> int:
    return -(-count // ALIGNMENT) * ALIGNMENT


class FlatWeights(WeightShares):
    """float32 weights in one buffer, of which this rank updates its own range."""

    def __init__(self, weights: Mapping[str, nn.Parameter], group: dist.ProcessGroup) -> None:
        """Move ``weights``, equal on all ranks of ``group``, to a new buffer. The Parameter objects stay the same."""
        ranks, self._rank, self._group = dist.get_world_size(group), dist.get_rank(group), group
        self._sizes = {name: weight.size() for name, weight in weights.items()}
        self._layout = FlatLayout.of({name: size.numel() for name, size in self._sizes.items()}, ranks)
        self._elements = self._layout.owned(self._rank)
        first = next(iter(weights.values()))
        self._buffer = first.detach().new_zeros(ranks * self._layout.range_size)
        for name, whole in self._wholes(self._buffer).items():
            weights[name].data = whole.copy_(weights[name].detach())
        super().__init__(weights, {name: self._own_part(name, weight.detach()) for name, weight in weights.items()})

    def gather(self) -> None:
        """See WeightShares."""
        self._gather_ranges(self._buffer)

    @contextmanager
    def lend(self, owned: Mapping[str, Tensor]) -> Iterator[None]:
        """See WeightShares. Needs memory for all weights, or none if ``owned`` is empty."""
        values = {}
        if owned:
            buffer = torch.empty_like(self._buffer)
            values = self._wholes(buffer)
            for name, part in owned.items():
                self._own_part(name, values[name]).copy_(part)
            self._gather_ranges(buffer)
        swap_values(self.weights, values)
        try:
            yield
        finally:
            swap_values(self.weights, values)

    def view(self, name: str, owned: Tensor) -> ShardedView:
        """See WeightShares."""
        size, elements, shards = self._sizes[name], self._elements[name], []
        for offset, shape in boxes(size, elements.start, elements.stop):
            count = math.prod(shape)
            shards.append((offset, owned[:count].view(shape)))
            owned = owned[count:]
        return ShardedView(size, shards)

    def _own_part(self, name: str, gradient: Tensor) -> Tensor:
        elements = self._elements[name]
        return gradient.view(-1)[elements.start : elements.stop]

    def _wholes(self, buffer: Tensor) -> dict[str, Tensor]:
        return {
            name: buffer[start : start + self._layout.numels[name]].view(self._sizes[name])
            for name, start in self._layout.starts.items()
        }

    def _gather_ranges(self, buffer: Tensor) -> None:
        dist.all_gather_into_tensor(buffer, buffer.chunk(dist.get_world_size(self._group))[self._rank], self._group)


def boxes(size: Sequence[int], start: int, stop: int) -> Iterator[Box]:
    """Split elements [start, stop) of a tensor into boxes; for a matrix: part of a row, whole rows, part of a row."""
    if start >= stop:
        return
    if len(size) <= 1:
        yield ((start,), (stop - start,)) if size else ((), ())
        return
    row = math.prod(size[1:])
    first, last = -(-start // row), stop // row
    begun = (first - 1) * row
    yield from _in_row(first - 1, boxes(size[1:], start - begun, min(stop - begun, row)))
    if first < last:
        yield (first, *(0 for _ in size[1:])), (last - first, *size[1:])
    if first <= last:  # else all are within one row
        yield from _in_row(last, boxes(size[1:], 0, stop - last * row))


def _in_row(row: int, boxes: Iterator[Box]) -> Iterator[Box]:
    return (((row, *offset), (1, *shape)) for offset, shape in boxes)
