"""Relative attention bias: learned values by distance in the sequence and by logarithmic difference in time.

Source: HSTU, arXiv 2402.17152, sec. 3.3 (relative attention bias).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

NUM_TIME_BUCKETS = 128
TIME_BUCKET_WIDTH = 0.301
"""Width of a time bucket in natural log seconds: ⌊ln(max(1, |Δt|)) / 0.301⌋."""


@dataclass
class RelativeBias:
    """The two tables of a layer, shared by its heads.

    For query i and key j the bias is ``position_weight[P - 1 + clamp(position_i - position_j, ±(P - 1))] +
    time_weight[bucket(query_time_i - token_time_j)]``.
    """

    position_weight: Tensor
    """[2 P - 1], P the longest possible sequence of tokens."""
    time_weight: Tensor
    """[NUM_TIME_BUCKETS]."""


def time_buckets(delta_s: Tensor) -> Tensor:
    """Bucket of each time difference (int64 seconds, any sign): uint8 of the same shape."""
    # float64: exact for any real time stamp, so that all devices agree on the bucket.
    log = delta_s.abs().clamp_(min=1).double().log_()
    return log.div_(TIME_BUCKET_WIDTH).clamp_(max=NUM_TIME_BUCKETS - 1).to(torch.uint8)


def distance_index(position_i: Tensor, position_j: Tensor, num_weights: int) -> Tensor:
    """Row of ``position_weight`` (of ``num_weights`` = 2 P - 1 rows) for each pair: int64, broadcast shape."""
    farthest = num_weights // 2
    return (position_i - position_j).clamp_(-farthest, farthest).add_(farthest)
