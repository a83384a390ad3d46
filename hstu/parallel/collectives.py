"""The few collectives that the model and the metrics need; the same on gloo and NCCL.

Gradients: a rank's loss is ``local sum / global count × data-parallel size`` and the optimizers average over ranks,
so the gradient of a gathered tensor is the plain sum over the ranks that used it.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import FunctionCtx

PADDING_ID = -1


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, local: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group  # type: ignore[attr-defined]
        return gather_copies(local, group).flatten(0, 1)

    @staticmethod
    def backward(ctx: FunctionCtx, *gradients: Tensor) -> tuple[Tensor, None]:
        return _reduce_scatter(gradients[0], ctx.group), None  # type: ignore[attr-defined]


def all_gather(local: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Concatenate the ranks' tensors [n, …] (the same shape on each) to [ranks · n, …].

    Backward: each rank gets the sum over all ranks of the gradients of its part (reduce-scatter).
    """
    if dist.get_world_size(group) == 1:
        return local
    gathered: Tensor = _AllGather.apply(local, group)
    return gathered


class _SplitRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, rows: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group  # type: ignore[attr-defined]
        return rows.chunk(dist.get_world_size(group))[dist.get_rank(group)].clone()

    @staticmethod
    def backward(ctx: FunctionCtx, *gradients: Tensor) -> tuple[Tensor, None]:
        return gather_copies(gradients[0], ctx.group).flatten(0, 1), None  # type: ignore[attr-defined]


def split_rows(rows: Tensor, group: dist.ProcessGroup) -> Tensor:
    """This rank's part [n, …] of rows [ranks · n, …] that all ranks have alike. Backward: gathers the gradients."""
    own: Tensor = _SplitRows.apply(rows, group)
    return own


class _JoinRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, own: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group  # type: ignore[attr-defined]
        return gather_copies(own, group).flatten(0, 1)

    @staticmethod
    def backward(ctx: FunctionCtx, *gradients: Tensor) -> tuple[Tensor, None]:
        group = ctx.group  # type: ignore[attr-defined]
        return gradients[0].chunk(dist.get_world_size(group))[dist.get_rank(group)], None


def join_rows(own: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Undo ``split_rows``. Backward: what follows is the same on all ranks, so each keeps its part of the gradient."""
    rows: Tensor = _JoinRows.apply(own, group)
    return rows


def _reduce_scatter(shares: Tensor, group: dist.ProcessGroup) -> Tensor:
    own = shares.new_empty((shares.shape[0] // dist.get_world_size(group), *shares.shape[1:]))
    dist.reduce_scatter_tensor(own, shares.contiguous(), group=group)
    return own


def gather_copies(local: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The ranks' tensors [n, …] of one shape as [ranks, n, …], in rank order; no gradient flows through it."""
    ranks, local = dist.get_world_size(group), local.detach().contiguous()
    gathered = local.new_empty((ranks * local.shape[0], *local.shape[1:]))
    dist.all_gather_into_tensor(gathered, local, group=group)
    return gathered.unflatten(0, (ranks, local.shape[0]))


def gather_rows(rows: Tensor, ids: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """Gather rows [S, D] with their ids [S] (int64) over ranks of different S, without waiting for the device.

    Every rank is padded to the largest S with zero rows of id -1. Returns ([ranks · max S, D], [ranks · max S]);
    gradients flow back to ``rows``.
    """
    if dist.get_world_size(group) == 1:
        return rows, ids
    padding = max_over_ranks(rows.shape[0], group) - rows.shape[0]
    rows = torch.cat([rows, rows.new_zeros((padding, rows.shape[1]))])
    ids = torch.cat([ids, ids.new_full((padding,), PADDING_ID)])
    return all_gather(rows, group), all_gather(ids, group)


def max_over_ranks(value: int, group: dist.ProcessGroup) -> int:
    """Largest of the ranks' host integers (over gloo: the device is not asked)."""
    largest = torch.tensor(value)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
    return int(largest)


def sum_over_ranks(value: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Sum of the ranks' tensors as a new tensor without gradient."""
    total = value.detach().clone()
    if dist.get_world_size(group) > 1:
        dist.all_reduce(total, group=group)
    return total


def gather_objects(local: Any, group: dist.ProcessGroup) -> list[Any]:
    """The ranks' picklable objects in rank order, on every rank."""
    gathered: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(gathered, local, group=group)
    return gathered
