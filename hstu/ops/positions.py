"""Absolute position encoding: one learned vector a position. Dispatcher."""

from __future__ import annotations

from torch import Tensor

from hstu.ops.backends import Backend
from hstu.ops.triton import coverage as triton_coverage


def add_positions(x: Tensor, table: Tensor, positions: Tensor, backend: Backend = Backend.PYTORCH) -> Tensor:
    """x [T, D] + table[positions]; table: [num_position_buckets, D], positions: int64 [T], beyond share the last."""
    if backend.uses_triton and triton_coverage.type_gap(x.dtype) is None:
        from hstu.ops.triton.positions import add_positions as triton

        return triton(x, table, positions)
    from hstu.ops.pytorch.positions import add_positions as pytorch

    return pytorch(x, table, positions)
