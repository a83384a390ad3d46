"""See :mod:`hstu.ops.uvqk`; the arithmetic of backward is in csrc/layer.cpp."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from hstu.ops.cpu.library import address, int32, int64, is_bfloat, library, num_threads, pointer


class _Arguments(ctypes.Structure):
    """Mirrors HstuUvqk of csrc/layer.cpp: same names, same order."""

    _fields_ = [  # ctypes wants a plain list
        ("projected", pointer),
        ("grads", pointer * 4),
        ("grad_projected", pointer),
        *((name, int64) for name in ("tokens", "heads", "width")),
        *((name, int32) for name in ("is_bfloat", "threads")),
    ]


def split_uvqk(projected: Tensor, head_dim: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See :func:`hstu.ops.uvqk.split_uvqk`. float32 or bfloat16."""
    parts: tuple[Tensor, Tensor, Tensor, Tensor] = _SplitUvqk.apply(projected, head_dim)
    return parts


class _SplitUvqk(torch.autograd.Function):
    """Its backward reads four gradients where they lie; autograd's would stack them first."""

    @staticmethod
    def forward(ctx: Any, projected: Tensor, head_dim: int) -> tuple[Tensor, ...]:
        ctx.save_for_backward(projected)
        ctx.head_dim = head_dim
        ctx.set_materialize_grads(False)
        return F.silu(projected).unflatten(1, (-1, 4, head_dim)).unbind(2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor, None]:
        projected = ctx.saved_tensors[0].contiguous()
        grads = tuple(None if grad is None else grad.contiguous() for grad in grads)
        grad_projected = torch.empty_like(projected)
        arguments = _Arguments(
            projected=address(projected),
            grads=(pointer * 4)(*map(address, grads)),
            grad_projected=address(grad_projected),
            tokens=len(projected),
            heads=projected.shape[1] // (4 * ctx.head_dim),
            width=ctx.head_dim,
            is_bfloat=is_bfloat([projected, *(grad for grad in grads if grad is not None)]),
            threads=num_threads(),
        )
        library().hstu_uvqk_backward(ctypes.byref(arguments))
        return grad_projected, None
