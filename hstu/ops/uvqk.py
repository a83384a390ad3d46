"""The gate, values, queries and keys of a layer: ``split(SiLU(x W_uvqk + b))``. Dispatchers.

Source: HSTU, arXiv 2402.17152, eq. 1.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from hstu.ops.backends import Backend
from hstu.ops.triton import coverage as triton_coverage


def project(x: Tensor, weight: Tensor, bias: Tensor, backend: Backend = Backend.PYTORCH) -> tuple[Tensor, Tensor]:
    """x Wᵀ + b and SiLU of it, each [T, H · 4 · d]. x: [T, D], weight: [H · 4 · d, D], bias: [H · 4 · d], of one type.

    No gradient flows through it: see :func:`through_silu`, and :func:`project_uvqk`.
    """
    if backend.uses_triton and triton_coverage.type_gap(x.dtype) is None:
        from hstu.ops.triton import linear as triton

        return triton.project(x, weight, bias)
    projected = F.linear(x, weight, bias)
    return projected, F.silu(projected)


def activate(projected: Tensor, backend: Backend = Backend.PYTORCH) -> Tensor:
    """SiLU(projected) with the bits of :func:`project`, to recompute it."""
    if backend.uses_triton and triton_coverage.type_gap(projected.dtype) is None:
        from hstu.ops.triton import linear as triton

        return triton.silu(projected)
    return F.silu(projected)


def parts(uvqk: Tensor, head_dim: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """u, v, q, k, each [T, H, d]: views of [T, H · 4 · d], which is in the order [H, 4, d]."""
    u, v, q, k = uvqk.unflatten(1, (-1, 4, head_dim)).unbind(2)
    return u, v, q, k


def through_silu(grad: Tensor, projected: Tensor) -> Tensor:
    """The gradient of ``projected`` from that of SiLU of it, in whose place it is put."""
    return torch.ops.aten.silu_backward.grad_input(grad, projected, grad_input=grad)


def project_uvqk(x: Tensor, weight: Tensor, bias: Tensor, backend: Backend = Backend.PYTORCH) -> Tensor:
    """SiLU(x Wᵀ + b), of which :func:`parts` are u, v, q and k. As :func:`project`, with gradients."""
    activated: Tensor = _Project.apply(x, weight, bias, backend)
    return activated


class _Project(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, backend: Backend) -> Tensor:
        projected, activated = project(x, weight, bias, backend)
        ctx.save_for_backward(x, weight, projected)
        return activated

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, projected = ctx.saved_tensors
        grad = through_silu(grad.clone(), projected)
        return grad @ weight, grad.t() @ x, grad.sum(0), None
