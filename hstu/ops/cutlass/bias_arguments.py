"""The relative bias on the host: the tables that the CUTLASS kernels read, and the sums of its gradients."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from hstu.ops.kernels import AttentionConfig, RelativeBias
from hstu.ops.layout import NUM_TIME_BUCKETS, JaggedLayout, bucket_thresholds, fixed_point_scale, time_buckets

CELL_BITS = 2
"""Bits of the fraction of a time difference that choose its cell. A cell then has at most one bucket threshold."""
NUM_CELLS = 64 << CELL_BITS


@dataclass(frozen=True)
class BiasArguments:
    """What the kernels read."""

    query_times: Tensor
    """float64 [T], exact up to 2^53 seconds."""
    token_times: Tensor
    """float64 [T]."""
    position_weight: Tensor
    """float32 [2 center + 1], by distance from -center on."""
    time_weight: Tensor
    """float32 [NUM_TIME_BUCKETS]."""
    center: int
    """No distance of the batch is larger."""

    @classmethod
    def of(cls, bias: RelativeBias, layout: JaggedLayout) -> BiasArguments:
        """The arguments for a batch. Times are converted once per layout."""
        key = ("cutlass", "times")
        if key not in layout.cache:
            assert layout.query_times is not None and layout.token_times is not None
            layout.cache[key] = layout.query_times.double(), layout.token_times.double()
        position, farthest = bias.position_weight.float(), len(bias.position_weight) // 2
        center = max(farthest, int(layout.seqlens.max(initial=0)))
        if center > farthest:  # distances beyond the table have its outermost weights
            distances = torch.arange(-center, center + 1, device=position.device)
            position = position[distances.clamp_(-farthest, farthest).add_(farthest)]
        query_times, token_times = layout.cache[key]
        time = bias.time_weight.float().contiguous()
        return cls(query_times, token_times, position.contiguous(), time, center)


@dataclass(frozen=True)
class BiasSums:
    """The sums that the kernel of dQ adds to: Σ dL/dscore · N · scale, by distance and by time bucket."""

    position: Tensor
    """int64 [2 center + 1]."""
    time: Tensor
    """int64 [NUM_TIME_BUCKETS]."""
    scale: Tensor
    """float32 [1]."""

    @classmethod
    def zeros(cls, arguments: BiasArguments, grad: Tensor, v: Tensor, layout: JaggedLayout) -> BiasSums:
        """Sums of zero, with the scale for these gradients of the output and these values."""
        size = len(arguments.position_weight)
        totals = torch.zeros(size + NUM_TIME_BUCKETS, dtype=torch.int64, device=grad.device)
        pairs = grad.shape[1] * int((layout.seqlens**2).sum())
        scale = fixed_point_scale(grad, v, pairs) if pairs else torch.ones(1, device=grad.device)
        return cls(totals[:size], totals[size:], scale)

    def gradients(self, bias: RelativeBias, config: AttentionConfig) -> RelativeBias:
        """Gradients of the weights, in their dtypes."""
        position, farthest = self.position, len(bias.position_weight) // 2
        beyond = len(position) // 2 - farthest
        if beyond > 0:
            outermost = position[: beyond + 1].sum(0, keepdim=True), position[-beyond - 1 :].sum(0, keepdim=True)
            position = torch.cat([outermost[0], position[beyond + 1 : -beyond - 1], outermost[1]])
        factor = 1 / (self.scale.double() * config.scaling_seqlen)
        return RelativeBias(
            (position * factor).to(bias.position_weight.dtype), (self.time * factor).to(bias.time_weight.dtype)
        )


@functools.cache
def cells(device: torch.device) -> tuple[Tensor, Tensor]:
    """The bits of a float64 threshold, int64 [NUM_CELLS], and the bucket below it, int32 [NUM_CELLS].

    The cell of a difference is the exponent of its float64 and the upper bits of its fraction.
    """
    index = torch.arange(NUM_CELLS)
    fraction = (index % (1 << CELL_BITS) + (1 << CELL_BITS)) / (1 << CELL_BITS)
    low = torch.ldexp(fraction.double(), (index >> CELL_BITS).double()).ceil().clamp(max=2.0**62).long()
    buckets = time_buckets(low).int()
    thresholds = torch.cat([bucket_thresholds().double(), torch.tensor([torch.inf], dtype=torch.float64)])
    return thresholds[buckets.long() + 1].view(torch.int64).to(device), buckets.to(device)
