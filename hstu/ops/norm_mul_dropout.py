"""What gates the output of the attention: ``Dropout(LayerNorm(O over all heads) ⊙ U)``. Dispatcher.

Source: HSTU, arXiv 2402.17152, eq. 3.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hstu.ops.backends import Backend
from hstu.ops.cpu.coverage import type_gap
from hstu.ops.ranks import Ranks
from hstu.ops.triton import coverage as triton_coverage


@dataclass(frozen=True)
class GateRule:
    """What does not depend on the batch."""

    eps: float
    dropout: float
    """0 in evaluation."""
    ranks: Ranks = field(default_factory=Ranks)
    """Of several, each has some of the heads; the norm spans all: they exchange two numbers a row, both ways."""

    def over_all_heads(self, own: Tensor) -> Tensor:
        """Mean and inverse deviation [2, T] of whole rows, of which ``own`` are mean and variance of this rank's part.

        From the variance about each part's mean, not the plain mean square: that cancels where the mean is large.
        """
        means, variances = self.ranks.gather(own).unbind(1)
        mean = means.mean(0)
        return torch.stack([mean, torch.rsqrt((variances + (means - mean).square()).mean(0) + self.eps)])


class GateKernels(Protocol):
    """A backend. x, u: [T, H, d] of one type; weight, bias: [H · d]."""

    def forward(
        self, x: Tensor, u: Tensor, weight: Tensor, bias: Tensor, rule: GateRule
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Gated [T, H · d] of x's type, mean and inverse deviation [2, T], and what repeats the dropout's pattern.

        The norm is computed in float32 at least. The pattern is None where nothing is dropped.
        """

    def backward(
        self,
        grad: Tensor,
        x: Tensor,
        u: Tensor,
        weight: Tensor,
        bias: Tensor,
        rule: GateRule,
        statistics: Tensor,
        pattern: Tensor | None,
        grad_u: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Gated, once more, and the gradients of x, weight and bias; that of u is written to ``grad_u``."""


def gate_kernels(width: int, dtype: torch.dtype, backend: Backend) -> GateKernels:
    """What serves rows of ``width`` numbers of a type."""
    if backend is Backend.CPU and type_gap(dtype) is None:
        from hstu.ops.cpu import norm_mul_dropout as cpu

        return cpu
    if backend.uses_triton and triton_coverage.norm_gap(width, dtype) is None:
        from hstu.ops.triton import norm as triton

        return triton
    from hstu.ops.pytorch import norm_mul_dropout as pytorch

    return pytorch


def norm_mul_dropout(
    x: Tensor, u: Tensor, weight: Tensor, bias: Tensor, rule: GateRule, backend: Backend = Backend.PYTORCH
) -> Tensor:
    """x, u: [T, H, d]; weight, bias: [H · d]. Returns [T, H · d] of x's type."""
    gated: Tensor = _Gate.apply(x, u, weight, bias, rule, gate_kernels(len(weight), x.dtype, backend))
    return gated


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, u: Tensor, weight: Tensor, bias: Tensor, rule: GateRule, kernels: GateKernels
    ) -> Tensor:
        gated, statistics, pattern = kernels.forward(x, u, weight, bias, rule)
        ctx.save_for_backward(x, u, weight, bias, statistics, pattern)
        ctx.rule, ctx.kernels = rule, kernels
        return gated

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, statistics, pattern = ctx.saved_tensors
        tokens, heads, width = inputs[1].shape  # a layer's gradient of u is a view, too
        grad_u = torch.empty(tokens, heads, 2, width, dtype=grad.dtype, device=grad.device)[:, :, 0]
        _, grad_x, *grad_affine = ctx.kernels.backward(grad, *inputs, ctx.rule, statistics, pattern, grad_u)
        return grad_x, grad_u, *grad_affine, None, None
