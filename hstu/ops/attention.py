"""HSTU attention over jagged sequences: ``SiLU(α Q Kᵀ + bias) / N ⊙ mask @ V``. Dispatcher."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.autograd import Function

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
    float32 at least. ``bias`` needs the layout's times. Source: HSTU, arXiv 2402.17152, sec. 3.
    """
    rule = AttentionRule(alpha, scaling_seqlen, is_causal, contextual_mask)
    if backend is Backend.CPU and attention_gap(q.shape[2], q.dtype) is None:
        from hstu.ops.cpu.attention import attention as cpu

        return cpu(q, k, v, layout, rule, bias)
    if (
        backend is Backend.CUTLASS
        and cutlass_coverage.attention_gap(q.shape[2], q.dtype, has_bias=bias is not None) is None
    ):
        from hstu.ops.cutlass.attention import attention as cutlass

        return cutlass(q, k, v, layout, rule)
    if backend.uses_triton and triton_coverage.attention_gap(q.shape[2], q.dtype) is None:
        from hstu.ops.triton.attention import attention as triton

        return triton(q, k, v, layout, rule, bias)
    from hstu.ops.pytorch.attention import attention as pytorch

    return pytorch(q, k, v, layout, rule, bias)


def apply_with_bias(
    function: type[Function],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: JaggedLayout,
    rule: AttentionRule,
    bias: RelativeBias | None,
) -> Tensor:
    """Call a backend's autograd function, which takes the weights of the bias, or None twice, between v and layout."""
    if bias is not None and layout.token_times is None:
        raise ValueError("a relative bias needs the times of the layout")
    weights = (None, None) if bias is None else (bias.position_weight, bias.time_weight)
    out: Tensor = function.apply(q, k, v, *weights, layout, rule)
    return out
