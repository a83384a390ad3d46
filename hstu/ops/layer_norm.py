"""LayerNorm over the last dimension, rounded to the type that follows. Dispatchers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hstu.ops.backends import Backend
from hstu.ops.triton import coverage as triton_coverage


def normalise(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype, backend: Backend
) -> tuple[Tensor, Tensor]:
    """LayerNorm of x [T, D], computed in float32 at least: [T, D] of ``dtype``, and mean and inverse deviation [2, T].

    weight, bias: [D].
    """
    if backend.uses_triton and triton_coverage.norm_gap(x.shape[1], x.dtype) is None:
        from hstu.ops.triton import norm as triton

        return triton.normalise(x, weight, bias, eps, dtype)
    wide = torch.promote_types(x.dtype, torch.float32)
    y, mean, inverse_std = torch.native_layer_norm(x.to(wide), weight.shape, weight.to(wide), bias.to(wide), eps)
    return y.to(dtype), torch.stack([mean, inverse_std]).squeeze(2)


def normalise_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, statistics: Tensor, backend: Backend
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias."""
    if backend.uses_triton and triton_coverage.norm_gap(x.shape[1], x.dtype) is None:
        from hstu.ops.triton import norm as triton

        return triton.normalise_backward(grad, x, weight, bias, statistics)
    wide = torch.promote_types(x.dtype, torch.float32)
    mean, inverse_std = statistics.unsqueeze(2)
    grad_x, grad_weight, grad_bias = torch.ops.aten.native_layer_norm_backward(
        grad.to(wide), x.to(wide), weight.shape, mean, inverse_std, weight.to(wide), bias.to(wide), [True] * 3
    )
    return grad_x.to(x.dtype), grad_weight.to(weight.dtype), grad_bias.to(bias.dtype)


def layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    dtype: torch.dtype | None = None,
    backend: Backend = Backend.PYTORCH,
) -> Tensor:
    """x [T, D] → [T, D] of ``dtype``, x's own where that is None. weight, bias: [D]."""
    y: Tensor = _LayerNorm.apply(x, weight, bias, eps, dtype or x.dtype, backend)
    return y


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype, backend: Backend
    ) -> Tensor:
        y, statistics = normalise(x, weight, bias, eps, dtype, backend)
        ctx.save_for_backward(x, weight, bias, statistics)
        ctx.backend = backend
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, statistics = ctx.saved_tensors
        return *normalise_backward(grad, x, weight, bias, statistics, ctx.backend), None, None, None
