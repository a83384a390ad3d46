"""Position encoding by Triton kernels. See :func:`hstu.ops.positions.add_positions`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hstu.ops.triton.launch import launch
from hstu.ops.triton.row_kernels import add_table_rows
from hstu.ops.triton.rows import row_config, row_grid, sums_by_key


def add_positions(x: Tensor, table: Tensor, positions: Tensor) -> Tensor:
    """See :func:`hstu.ops.positions.add_positions`. The table's gradient has the same bits in every run."""
    encoded: Tensor = _AddPositions.apply(x, table, positions)
    return encoded


class _AddPositions(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, table: Tensor, positions: Tensor) -> Tensor:
        ctx.save_for_backward(positions)
        ctx.table, ctx.dtype = (len(table), table.dtype), x.dtype
        out = torch.empty(x.shape, dtype=torch.promote_types(x.dtype, table.dtype), device=x.device)
        if x.numel():
            launch(
                add_table_rows,
                row_grid(*x.shape),
                row_config(x.shape[1]),
                (),
                x=x,
                table=table,
                positions=positions,
                out=out,
                num_rows=len(x),
                last=len(table) - 1,
                stride_xr=x.stride(0),
                stride_xc=x.stride(1),
                stride_tr=table.stride(0),
                stride_tc=table.stride(1),
                stride_or=out.stride(0),
                WIDTH=x.shape[1],
            )
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (positions,) = ctx.saved_tensors
        num_positions, table_dtype = ctx.table
        grad_table = None
        if ctx.needs_input_grad[1]:
            keys = positions.clamp(max=num_positions - 1)
            grad_table = sums_by_key(grad, keys, num_positions).to(table_dtype)
        return grad.to(ctx.dtype), grad_table, None
