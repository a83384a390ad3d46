"""What the GPU backends share for the relative bias: thresholds of the time buckets, and sums in fixed point."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from hstu.ops.layout import NUM_TIME_BUCKETS, time_buckets


@functools.cache
def bucket_thresholds() -> Tensor:
    """int64 [128] on the CPU: the smallest time difference of each bucket, found by bisection of the formula itself."""
    low = torch.zeros(NUM_TIME_BUCKETS, dtype=torch.int64)  # always below the bucket
    high = torch.full_like(low, 1 << 62)
    wanted = torch.arange(NUM_TIME_BUCKETS)
    for _ in range(63):
        middle = low + (high - low) // 2
        reached = time_buckets(middle) >= wanted
        high, low = torch.where(reached, middle, high), torch.where(reached, low, middle)
    return high


def fixed_point_scale(grad: Tensor, v: Tensor, pairs: int) -> Tensor:
    """float32 [1]: the factor with which no sum of ``pairs`` score gradients exceeds 62 bits.

    |dL/dscore| ≤ ‖grad‖ ‖v‖ · max |SiLU'| < 1.1 ‖grad‖ ‖v‖, before the division by N. The factor is not finite where
    the gradient is not, and then nor is the result.
    """
    largest = [torch.linalg.vector_norm(x, dim=-1, dtype=torch.float32).amax() for x in (grad, v)]
    bound = (largest[0] * largest[1] * 1.1).clamp_min(1e-12) * float(pairs)
    return (2.0**62 / bound).view(1)
