"""See :mod:`hstu.ops.attention`; the arithmetic is in csrc/attention.cpp.

Time buckets, one byte a pair that some query sees, are made once a batch and
kept for all layers, unless they are too many.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hstu.ops.attention import AttentionRule
from hstu.ops.cpu.library import (
    address,
    float32,
    int32,
    int64,
    is_bfloat,
    library,
    num_threads,
    pointer,
    strides,
    with_contiguous_rows,
)
from hstu.ops.layout import JaggedLayout, offsets_of
from hstu.ops.relative_bias import NUM_TIME_BUCKETS, RelativeBias

MOST_BUCKET_BYTES = 2**26
MOST_BINS = 64  # parts that the work is dealt to, each with bias gradients of its own


class _Arguments(ctypes.Structure):
    """Mirrors HstuAttention of csrc/attention.h: same names, same order."""

    _fields_ = [  # ctypes wants a plain list
        *((name, pointer) for name in ("q", "k", "v")),
        *((f"{name}_strides", int64 * 2) for name in ("q", "k", "v")),
        ("grad_out", pointer),
        ("grad_out_strides", int64 * 2),
        *((name, pointer) for name in ("out", "grad_q", "grad_k", "grad_v")),
        *((f"{name}_strides", int64 * 2) for name in ("out", "grad_q", "grad_k", "grad_v")),
        *((name, pointer) for name in ("position_weight", "time_weight", "grad_position_weight", "grad_time_weight")),
        *((name, pointer) for name in ("query_times", "token_times", "buckets", "bucket_offsets")),
        *((name, pointer) for name in ("offsets", "candidates", "order")),
        *((name, int64) for name in ("sequences", "heads", "width", "positions", "bins")),
        *((name, int64) for name in ("contextuals", "group_tokens")),
        *((name, float32) for name in ("alpha", "inverse_n")),
        *((name, int32) for name in ("is_causal", "contextual_mask", "is_bfloat", "threads")),
    ]


@dataclass
class _Plan:
    """What depends on the layout and the mask alone."""

    offsets: np.ndarray
    """int64 [B + 1]."""
    candidates: np.ndarray
    order: np.ndarray
    """int64 [B]: the dearest sequences first."""
    buckets: Tensor | None = None
    bucket_offsets: np.ndarray | None = None


def forward(
    q: Tensor, k: Tensor, v: Tensor, layout: JaggedLayout, rule: AttentionRule, bias: RelativeBias | None
) -> Tensor:
    """See :class:`hstu.ops.attention.AttentionKernels`. float32 or bfloat16, heads of at most WIDEST_ROW channels."""
    arguments = _describe(q, k, v, layout, rule, bias)
    out = torch.empty(v.shape, dtype=v.dtype)
    _set(arguments, out=out)
    library().hstu_attention(ctypes.byref(arguments), 0)
    return out


def backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: JaggedLayout,
    rule: AttentionRule,
    bias: RelativeBias | None,
    grads: tuple[Tensor, Tensor, Tensor],
) -> RelativeBias | None:
    """See :class:`hstu.ops.attention.AttentionKernels`."""
    arguments = _describe(q, k, v, layout, rule, bias)
    _set(arguments, grad_out=with_contiguous_rows(grad))
    _set(arguments, **dict(zip(("grad_q", "grad_k", "grad_v"), grads, strict=True)))
    sums: list[Tensor] = []
    if bias is not None:
        widths = (len(bias.position_weight), NUM_TIME_BUCKETS)
        sums = [torch.zeros(arguments.bins, width, dtype=torch.float64) for width in widths]
        arguments.grad_position_weight, arguments.grad_time_weight = map(address, sums)
    library().hstu_attention(ctypes.byref(arguments), 1)
    if bias is None:
        return None
    position, time = (total.sum(0) for total in sums)
    return RelativeBias(position.to(bias.position_weight.dtype), time.to(bias.time_weight.dtype))


def _describe(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: JaggedLayout,
    rule: AttentionRule,
    bias: RelativeBias | None,
) -> _Arguments:
    """Everything but what forward and backward write, and the buckets made if they have not been."""
    plan = _plan(layout, rule)
    arguments = _Arguments(
        offsets=plan.offsets.ctypes.data,
        candidates=plan.candidates.ctypes.data,
        order=plan.order.ctypes.data,
        sequences=layout.batch_size,
        heads=q.shape[1],
        width=q.shape[2],
        bins=max(1, min(MOST_BINS, layout.batch_size * q.shape[1])),
        contextuals=layout.num_contextuals,
        group_tokens=layout.candidate_group_tokens,
        alpha=rule.alpha,
        inverse_n=1 / rule.scaling_seqlen,
        is_causal=rule.is_causal,
        contextual_mask=rule.contextual_mask,
        is_bfloat=is_bfloat((q, k, v)),
        threads=num_threads(),
    )
    _set(arguments, q=with_contiguous_rows(q), k=with_contiguous_rows(k), v=with_contiguous_rows(v))
    if bias is not None:
        assert layout.query_times is not None and layout.token_times is not None
        weights = [weight.detach().float().contiguous() for weight in (bias.position_weight, bias.time_weight)]
        arguments.positions = len(bias.position_weight)
        arguments.position_weight, arguments.time_weight = map(address, weights)
        arguments.query_times, arguments.token_times = address(layout.query_times), address(layout.token_times)
        _keep(arguments, *weights)
        _set_buckets(arguments, plan)
    return arguments


def _set(arguments: _Arguments, **tensors: Tensor) -> None:
    """Put addresses and strides of [T, H, d] tensors in; they live as long as ``arguments``."""
    for name, tensor in tensors.items():
        setattr(arguments, name, tensor.data_ptr())
        setattr(arguments, f"{name}_strides", strides(tensor))
    _keep(arguments, *tensors.values())


def _keep(arguments: _Arguments, *tensors: Tensor) -> None:
    arguments.kept = (*getattr(arguments, "kept", ()), *tensors)


def _plan(layout: JaggedLayout, rule: AttentionRule) -> _Plan:
    key = ("cpu attention", rule)
    if key not in layout.cache:
        seqlens = layout.seqlens.astype(np.int64)
        layout.cache[key] = _Plan(
            offsets=np.append(offsets_of(seqlens), seqlens.sum()),
            candidates=np.ascontiguousarray(layout.num_candidate_tokens_host, dtype=np.int64),
            order=np.argsort(-seqlens, kind="stable"),
        )
    plan: _Plan = layout.cache[key]
    return plan


def _set_buckets(arguments: _Arguments, plan: _Plan) -> None:
    if plan.bucket_offsets is None:
        offsets = np.empty(arguments.sequences + 1, dtype=np.int64)
        library().hstu_bucket_offsets(ctypes.byref(arguments), pointer(offsets.ctypes.data))
        plan.bucket_offsets = offsets
        if offsets[-1] <= MOST_BUCKET_BYTES:
            plan.buckets = torch.empty(int(offsets[-1]), dtype=torch.uint8)
            arguments.buckets, arguments.bucket_offsets = plan.buckets.data_ptr(), offsets.ctypes.data
            library().hstu_fill_buckets(ctypes.byref(arguments))
    arguments.buckets, arguments.bucket_offsets = address(plan.buckets), plan.bucket_offsets.ctypes.data
