"""HSTU attention over jagged sequences: ``SiLU(α Q Kᵀ + bias) / N ⊙ mask @ V``. Dispatcher.

Source: HSTU, arXiv 2402.17152, sec. 3.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hstu.ops.backends import Backend
from hstu.ops.cpu.coverage import attention_gap
from hstu.ops.cutlass import coverage as cutlass_coverage
from hstu.ops.layout import JaggedLayout
from hstu.ops.relative_bias import RelativeBias
from hstu.ops.triton import coverage as triton_coverage


@dataclass(frozen=True)
class AttentionRule:
    """What does not depend on the batch: the scale of scores, the divisor and the kind of mask."""

    alpha: float
    """Factor of Q Kᵀ."""
    scaling_seqlen: int
    """Divisor N: a constant, so that a result never depends on who else is in the batch."""
    is_causal: bool = True
    """False: bidirectional over context and history. Candidates never see another group, nor what follows."""
    contextual_mask: bool = True
    """True: contextual tokens see all context and history."""


class AttentionKernels(Protocol):
    """A backend. q, k, v: [T, H, d] of one type, any strides; attention stays within the sequences of ``layout``."""

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, layout: JaggedLayout, rule: AttentionRule, bias: RelativeBias | None
    ) -> Tensor:
        """[T, H, d] of the inputs' type, dense; scores are computed in float32 at least."""

    def backward(
        self,
        grad: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        layout: JaggedLayout,
        rule: AttentionRule,
        bias: RelativeBias | None,
        grads: tuple[Tensor, Tensor, Tensor],
    ) -> RelativeBias | None:
        """Write the gradients of q, k and v to ``grads``: any strides, dense channels. Returns that of the bias."""


def attention_kernels(head_dim: int, dtype: torch.dtype, backend: Backend, *, has_bias: bool) -> AttentionKernels:
    """What serves heads of ``head_dim`` channels of a type."""
    if backend is Backend.CPU and attention_gap(head_dim, dtype) is None:
        from hstu.ops.cpu import attention as cpu

        return cpu
    if backend is Backend.CUTLASS and cutlass_coverage.attention_gap(head_dim, dtype, has_bias=has_bias) is None:
        from hstu.ops.cutlass import attention as cutlass

        return cutlass
    if backend.uses_triton and triton_coverage.attention_gap(head_dim, dtype) is None:
        from hstu.ops.triton import attention as triton

        return triton
    from hstu.ops.pytorch import attention as pytorch

    return pytorch


def hstu_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: JaggedLayout,
    *,
    alpha: float,
    scaling_seqlen: int,
    is_causal: bool = True,
    contextual_mask: bool = True,
    bias: RelativeBias | None = None,
    backend: Backend = Backend.PYTORCH,
) -> Tensor:
    """Attend within each sequence of ``layout``.

    q, k, v: [T, H, d], any float type, any strides. Returns [T, H, d] of the same type; scores are computed in
    float32 at least. ``bias`` needs the layout's times.
    """
    rule = AttentionRule(alpha, scaling_seqlen, is_causal, contextual_mask)
    return attend(
        q, k, v, layout, rule, bias, attention_kernels(q.shape[2], q.dtype, backend, has_bias=bias is not None)
    )


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: JaggedLayout,
    rule: AttentionRule,
    bias: RelativeBias | None,
    kernels: AttentionKernels,
) -> Tensor:
    """:func:`hstu_attention` by these kernels."""
    weights = (None, None) if bias is None else (bias.position_weight, bias.time_weight)
    out: Tensor = _Attention.apply(q, k, v, *weights, layout, rule, kernels)
    return out


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        position_weight: Tensor | None,
        time_weight: Tensor | None,
        layout: JaggedLayout,
        rule: AttentionRule,
        kernels: AttentionKernels,
    ) -> Tensor:
        ctx.save_for_backward(q, k, v, position_weight, time_weight)
        ctx.layout, ctx.rule, ctx.kernels = layout, rule, kernels
        with torch.autocast(q.device.type, enabled=False):
            return kernels.forward(q, k, v, layout, rule, as_bias(position_weight, time_weight, layout))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, position_weight, time_weight = ctx.saved_tensors
        tokens, heads, width = q.shape
        grads = torch.empty(tokens, heads, 3, width, dtype=q.dtype, device=q.device).unbind(2)  # as a layer's lie
        bias = as_bias(position_weight, time_weight, ctx.layout)
        with torch.autocast(q.device.type, enabled=False):
            grad_bias = ctx.kernels.backward(grad, q, k, v, ctx.layout, ctx.rule, bias, grads)
        of_weights = (None, None) if grad_bias is None else (grad_bias.position_weight, grad_bias.time_weight)
        return *grads, *of_weights, None, None, None


def as_bias(position_weight: Tensor | None, time_weight: Tensor | None, layout: JaggedLayout) -> RelativeBias | None:
    """The bias that weights, or None twice, make; ValueError where the layout has not the times that it needs."""
    if position_weight is None or time_weight is None:
        return None
    if layout.token_times is None:
        raise ValueError("a relative bias needs the times of the layout")
    return RelativeBias(position_weight, time_weight)
