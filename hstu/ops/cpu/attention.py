"""Attention by C++ kernels: csrc/attention.cpp. Layers share a batch's time buckets, up to MOST_BUCKET_BYTES."""

import ctypes
from functools import partial

import torch
from torch import Tensor

from hstu.ops.cpu.build import Arguments, fields, float32, int32, int64, is_bfloat, library, pointer, strides
from hstu.ops.kernels import AttentionInputs, Gradient, RelativeBias
from hstu.ops.layout import bucket_thresholds

MOST_BUCKET_BYTES = 2**26
MOST_BINS = 64  # work items with separate sums of bias gradients


class _Arguments(Arguments):
    """HstuAttention of csrc/attention.h."""

    _fields_ = fields(
        (pointer, "q k v"),
        (strides, "q_strides k_strides v_strides"),
        (pointer, "grad_out"),
        (strides, "grad_out_strides"),
        (pointer, "out grad_q grad_k grad_v"),
        (strides, "out_strides grad_q_strides grad_k_strides grad_v_strides"),
        (pointer, "position_weight time_weight grad_position_weight grad_time_weight"),
        (pointer, "query_times token_times thresholds buckets bucket_offsets offsets candidates order"),
        (
            int64,
            "sequences heads width positions bins contextuals group_tokens max_span full_tokens first_query stop_query",
        ),
        (float32, "alpha inverse_n"),
        (int32, "is_causal contextual_mask is_bfloat threads"),
    )

    def move(self, queries: range | None, *names: str) -> None:
        """Move the first row of tensors that have only the rows of ``queries`` to where token 0 would be."""
        for name in names if queries else ():
            first, _ = getattr(self, f"{name}_strides")
            size = 2 if self.is_bfloat else 4
            setattr(self, name, getattr(self, name) - queries.start * first * size)  # type: ignore[union-attr]


def forward(inputs: AttentionInputs) -> Tensor:
    """See :data:`hstu.ops.kernels.AttentionForward`. float32 or bfloat16, heads of at most WIDEST_HEAD channels."""
    arguments = _prepare(inputs)
    out = torch.empty(inputs.q.shape, dtype=inputs.v.dtype)
    arguments.set(out=out)
    arguments.move(inputs.queries, "out")
    library().hstu_attention(ctypes.byref(arguments), 0)
    return out


def backward(grad: Tensor, inputs: AttentionInputs, grads: tuple[Gradient, Gradient, Gradient]) -> RelativeBias | None:
    """See :data:`hstu.ops.kernels.AttentionBackward`; without ``before_silu``."""
    arguments, bias = _prepare(inputs), inputs.bias
    grad_q, grad_k, grad_v = (each.target for each in grads)
    arguments.set(grad_out=grad, grad_q=grad_q, grad_k=grad_k, grad_v=grad_v)
    arguments.move(inputs.queries, "grad_out", "grad_q")
    sums = [torch.zeros(arguments.bins, len(weight), dtype=torch.float64) for weight in bias or ()]
    if sums:
        arguments.set(grad_position_weight=sums[0], grad_time_weight=sums[1])
    library().hstu_attention(ctypes.byref(arguments), 1)
    return bias and RelativeBias(*(each.sum(0).to(weight.dtype) for each, weight in zip(sums, bias, strict=True)))


def _prepare(inputs: AttentionInputs) -> _Arguments:
    """Arguments that forward and backward share. Computes the time buckets on the first call for a layout."""
    q, k, v, bias, layout, config = inputs.q, inputs.k, inputs.v, inputs.bias, inputs.layout, inputs.config
    order = layout.cached("cpu order", lambda: torch.from_numpy(layout.longest_first))
    arguments = _Arguments(
        sequences=layout.batch_size,
        heads=q.shape[1],
        width=q.shape[2],
        bins=max(1, min(MOST_BINS, layout.batch_size * q.shape[1])),
        first_query=0 if inputs.queries is None else inputs.queries.start,
        stop_query=layout.num_tokens if inputs.queries is None else inputs.queries.stop,
        contextuals=layout.num_contextuals,
        group_tokens=layout.candidate_group_tokens,
        max_span=-1 if config.max_span is None else config.max_span,
        full_tokens=config.full_tokens,
        alpha=config.alpha,
        inverse_n=1 / config.scaling_seqlen,
        is_causal=config.is_causal,
        contextual_mask=config.contextual_mask,
        is_bfloat=is_bfloat((q, k, v)),
    )
    candidates = torch.from_numpy(layout.num_candidate_tokens_host)
    arguments.set(q=q, k=k, v=v, offsets=layout.seqlen_offsets, candidates=candidates, order=order)
    arguments.move(inputs.queries, "q")
    if bias is not None:
        arguments.positions = len(bias.position_weight)
        arguments.set(
            position_weight=bias.position_weight.detach().float().contiguous(),
            time_weight=bias.time_weight.detach().float().contiguous(),
            query_times=layout.query_times,
            token_times=layout.token_times,
            thresholds=bucket_thresholds(q.device),
        )
        buckets, offsets = layout.cached(("cpu buckets", config), partial(_time_buckets, arguments))
        arguments.set(buckets=buckets, bucket_offsets=offsets)
    return arguments


def _time_buckets(arguments: _Arguments) -> tuple[Tensor | None, Tensor]:
    """Time buckets of all pairs, uint8 [bytes], or None if there are too many to keep; offset of each sequence."""
    offsets, buckets = torch.empty(arguments.sequences + 1, dtype=torch.int64), None
    library().hstu_bucket_offsets(ctypes.byref(arguments), pointer(offsets.data_ptr()))
    if int(offsets[-1]) <= MOST_BUCKET_BYTES:
        buckets = torch.empty(int(offsets[-1]), dtype=torch.uint8)
        arguments.set(buckets=buckets, bucket_offsets=offsets)
        library().hstu_fill_buckets(ctypes.byref(arguments))
    return buckets, offsets
