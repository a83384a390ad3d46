"""Collectives for the model, metrics and checkpoints, on gloo and NCCL.

The gradient of a gathered tensor is the plain sum over the ranks that used it: see :mod:`hstu.parallel.data_parallel`.

The differentiable collectives of libraries work on NCCL only. megatron-core 0.16.1 allocates gathered tensors on the
current CUDA device. In torch 2.13, torch.distributed.nn.functional's all-gather into one tensor refuses gloo in
backward, and torch.distributed._functional_collectives is private and has just renamed its functions.
"""

import hashlib
import socket
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from hstu.base.errors import UserError
from hstu.data.batches.batch import PADDING_ID
from hstu.parallel.own_time import own_time

T = TypeVar("T")
Collective = Callable[[Tensor, Any], Tensor]
"""(tensor, process group) → tensor."""


def all_gather(local: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Concatenate the ranks' tensors [n, …], all of one shape, to [ranks · n, …]. Backward: a reduce-scatter (sum)."""
    return _apply(local, lambda own, ranks: gather_copies(own, ranks).flatten(0, 1), reduce_scatter, group)


def split_rows(rows: Tensor, counts: Sequence[int], group: dist.ProcessGroup, scale: float = 1.0) -> Tensor:
    """Return this rank's ``counts[rank]`` rows of a tensor that is equal on all ranks.

    Backward: an all-gather; the gradient is multiplied by ``scale``.
    """
    return _apply(rows, partial(_own_part, counts=counts), partial(_gather_parts, counts=counts), group, scale)


def join_rows(own: Tensor, counts: Sequence[int], group: dist.ProcessGroup, scale: float = 1.0) -> Tensor:
    """Invert ``split_rows``. Backward: ``scale`` times this rank's rows of the gradient, equal on all ranks."""
    return _apply(own, partial(_gather_parts, counts=counts), partial(_own_part, counts=counts), group, scale)


class _WithBackward(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, tensor: Tensor, forward: Collective, backward: Collective, group: dist.ProcessGroup, scale: float
    ) -> Tensor:
        ctx.apply_backward, ctx.group, ctx.scale = backward, group, scale
        with own_time.paused():
            return forward(tensor, group)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        with own_time.paused():
            gradient: Tensor = ctx.apply_backward(gradients[0], ctx.group)
        return gradient if ctx.scale == 1 else gradient.mul_(ctx.scale), None, None, None, None


def _apply(
    tensor: Tensor, forward: Collective, backward: Collective, group: dist.ProcessGroup, scale: float = 1.0
) -> Tensor:
    if dist.get_world_size(group) == 1:
        return tensor
    return _WithBackward.apply(tensor, forward, backward, group, scale)


def _own_part(rows: Tensor, group: dist.ProcessGroup, counts: Sequence[int]) -> Tensor:
    return rows.split(list(counts))[dist.get_rank(group)].clone()


def _gather_parts(own: Tensor, group: dist.ProcessGroup, counts: Sequence[int]) -> Tensor:
    longest = max(counts)
    if longest == 0:
        return own
    if longest > len(own):
        own = torch.cat([own, own.new_zeros((longest - len(own), *own.shape[1:]))])
    by_rank = gather_copies(own, group)
    if min(counts) == longest:
        return by_rank.flatten(0, 1)
    return torch.cat([rows[:count] for rows, count in zip(by_rank, counts, strict=True)])


def gather_copies(local: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Stack the ranks' tensors [n, …], all of one shape, to [ranks, n, …] in rank order, without gradient."""
    ranks, local = dist.get_world_size(group), local.detach().contiguous()
    gathered = local.new_empty((ranks * local.shape[0], *local.shape[1:]))
    dist.all_gather_into_tensor(gathered, local, group=group)
    return gathered.unflatten(0, (ranks, local.shape[0]))


def reduce_scatter(partial_sums: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Sum the ranks' tensors [n, …], all of one shape, and return this rank's n / ranks rows, without gradient."""
    own = partial_sums.new_empty((partial_sums.shape[0] // dist.get_world_size(group), *partial_sums.shape[1:]))
    dist.reduce_scatter_tensor(own, partial_sums.contiguous(), group=group)
    return own


def gather_rows(rows: Tensor, ids: Tensor, largest: int, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """Gather rows [S, D] and ids int64 [S] over ranks of different S. Differentiable.

    Pads each rank to the ``largest`` S with zero rows and PADDING_ID: returns ([ranks · max S, D], [ranks · max S]).
    """
    if padding := largest - rows.shape[0]:
        rows = torch.cat([rows, rows.new_zeros((padding, rows.shape[1]))])
        ids = torch.cat([ids, ids.new_full((padding,), PADDING_ID)])
    return all_gather(rows, group), all_gather(ids, group)


def start_max(own: int, group: dist.ProcessGroup, device: torch.device) -> Callable[[], int]:
    """Start reducing the ranks' integers to their maximum on ``device``. Returns a function that waits for it."""
    largest = torch.tensor(own, pin_memory=device.type == "cuda").to(device, non_blocking=True)
    work = dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group, async_op=True)
    assert work is not None
    wait: Callable[[], Any] = work.wait
    if device.type == "cuda":
        work.wait()  # for the current stream; the host goes on
        largest, copied = largest.to("cpu", non_blocking=True), torch.cuda.Event()
        copied.record()
        wait = copied.synchronize

    def result() -> int:
        wait()
        return int(largest)

    return result


def sum_over_ranks(value: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Return the sum of the ranks' tensors as a new tensor without gradient."""
    total = value.detach().clone()
    if dist.get_world_size(group) > 1:
        with own_time.paused():
            dist.all_reduce(total, group=group)
    return total


def gather_objects(local: Any, group: dist.ProcessGroup) -> list[Any]:
    """Return the ranks' picklable objects in rank order, on every rank."""
    gathered: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(gathered, local, group=group)
    return gathered


def require_equal(facts: Mapping[str, str], group: dist.ProcessGroup, error: type[UserError]) -> None:
    """Raise ``error`` on every rank if ``facts`` (name → value) differ between ranks. The message shows both values."""
    digest = hashlib.sha256(repr(sorted(facts.items())).encode()).digest()
    words = torch.frombuffer(bytearray(digest), dtype=torch.int32).long()
    extremes = torch.stack([words, -words])
    dist.all_reduce(extremes, op=dist.ReduceOp.MAX, group=group)
    if torch.equal(extremes[0], -extremes[1]):
        return
    by_rank = gather_objects((socket.gethostname(), dict(facts)), group)
    host, first = by_rank[0]
    for rank, (other_host, other) in enumerate(by_rank):
        if other != first:
            lines = [
                f"{name} = {first.get(name, 'nothing')} on rank 0 ({host}), "
                f"{other.get(name, 'nothing')} on rank {rank} ({other_host})"
                for name in dict.fromkeys([*first, *other])
                if first.get(name) != other.get(name)
            ]
            head = f"rank 0 and rank {rank} would not train the same run; they differ in:"
            advice = "Start all ranks with the same gin files and bindings, the same code and the same data."
            raise error("\n  ".join([head, *lines]) + f"\n{advice}")


def on_all_ranks(function: Callable[[], T], group: dist.ProcessGroup) -> T:
    """Call ``function`` on every rank and return this rank's result, or raise on all ranks if it fails on any.

    Raises the first UserError in rank order; else this rank's own error, or RuntimeError where ``function`` succeeded.
    """
    result, error = None, None
    try:
        result = function()
    except Exception as caught:
        error = caught
    if start_max(int(error is not None), group, torch.device("cpu"))():
        shared = error if isinstance(error, UserError | None) else repr(error)  # some errors cannot be pickled
        for rank, failure in enumerate(gather_objects(shared, group)):
            if isinstance(failure, UserError):
                raise failure
            if failure is not None:
                raise error or RuntimeError(f"rank {rank} failed: {failure}")
    return cast(T, result)


def on_rank_0(function: Callable[[], T], group: dist.ProcessGroup) -> T:
    """Call ``function`` on the group's first rank alone, and return its result, or raise its error, on every rank."""
    own = on_all_ranks(lambda: function() if dist.get_rank(group) == 0 else None, group)
    shared = [own]
    dist.broadcast_object_list(shared, group=group, group_src=0)
    return cast(T, shared[0])
