"""Parameters that are cut over a tensor-parallel group, told by the attributes that Megatron gives them."""

from __future__ import annotations

from collections.abc import Collection

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hstu.parallel.cut_tensor import CutTensor


def shard_dim(parameter: Tensor) -> int | None:
    """The dimension along which a parameter is cut over the tensor-parallel group; None where each rank has it all."""
    if not getattr(parameter, "tensor_model_parallel", False):
        return None
    dim: int = parameter.partition_dim  # type: ignore[attr-defined]
    return dim


def as_whole(part: Tensor, dim: int, group: dist.ProcessGroup) -> CutTensor:
    """A rank's ``part`` of a tensor as a piece of the whole, for checkpoints; it shares the memory of ``part``."""
    size, start = list(part.size()), [0] * part.ndim
    size[dim] *= dist.get_world_size(group)
    start[dim] = part.shape[dim] * dist.get_rank(group)
    return CutTensor(size, [(start, part)])


def clip_grad_norm(parameters: Collection[nn.Parameter], max_norm: float, group: dist.ProcessGroup | None) -> Tensor:
    """torch.nn.utils.clip_grad_norm_ for the L2 norm of the whole model: each part counts once, and so does the rest.

    ``group``: over which parameters are cut, or None. Returns the norm before clipping; nothing waits for it.
    """
    if group is None:
        return torch.nn.utils.clip_grad_norm_(parameters, max_norm)
    cut = [p.grad for p in parameters if p.grad is not None and shard_dim(p) is not None]
    shared = [p.grad for p in parameters if p.grad is not None and shard_dim(p) is None]
    square = torch.nn.utils.get_total_norm(cut).square()
    dist.all_reduce(square, group=group)
    norm = (square + torch.nn.utils.get_total_norm(shared).square()).sqrt()
    torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm
