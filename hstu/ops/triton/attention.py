"""HSTU attention by Triton kernels. See :func:`hstu.ops.attention.hstu_attention`."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from hstu.ops.attention import AttentionRule, apply_with_bias
from hstu.ops.layout import JaggedLayout
from hstu.ops.relative_bias import NUM_TIME_BUCKETS, RelativeBias, time_buckets
from hstu.ops.triton.attention_backward import attention_backward_keys, attention_backward_queries
from hstu.ops.triton.attention_bias import attention_backward_bias
from hstu.ops.triton.attention_configs import attention_configs, bias_config
from hstu.ops.triton.attention_forward import attention_forward
from hstu.ops.triton.launch import bucket, capability_of, launch, multiplication, strides_of

MAX_HEAD_DIM = 256
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
TIME_SLOTS = 64
"""Copies of the time buckets' sums: so many atomics can proceed side by side."""
BIAS_SHARES = 64
"""Parts that the sequences are cut into for the gradient of the bias."""


def attention(
    q: Tensor, k: Tensor, v: Tensor, layout: JaggedLayout, rule: AttentionRule, bias: RelativeBias | None
) -> Tensor:
    """See :func:`hstu.ops.attention.hstu_attention`. The gradients have the same bits in every run."""
    if q.shape[2] > MAX_HEAD_DIM or q.dtype not in DTYPES:
        raise ValueError(f"head dim {q.shape[2]} of {q.dtype}: at most {MAX_HEAD_DIM}, in float16, bfloat16 or float32")
    if k.shape != q.shape or v.shape != q.shape or not q.dtype == k.dtype == v.dtype:
        raise ValueError("q, k and v must agree in shape and type")
    return apply_with_bias(_Attention, q, k, v, layout, rule, bias)


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
    ) -> Tensor:
        ctx.save_for_backward(q, k, v, position_weight, time_weight)
        ctx.layout, ctx.rule = layout, rule
        # As v is laid out would keep the holes of a view; what reads the output wants it dense.
        out = torch.empty(v.shape, dtype=v.dtype, device=v.device)
        if layout.num_tokens:
            call = _Call(q, k, v, position_weight, time_weight, layout, rule)
            call.by_rows("forward", attention_forward, out=out, **strides_of(out, "thd", "o"))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, position_weight, time_weight = ctx.saved_tensors
        grad_q, grad_k, grad_v = _empty_beside(q), _empty_beside(k), _empty_beside(v)
        grad_bias: tuple[Tensor | None, Tensor | None] = None, None
        call = _Call(q, k, v, position_weight, time_weight, ctx.layout, ctx.rule)
        if ctx.layout.num_tokens:
            call.by_keys(grad, grad_k, grad_v)
            call.by_rows(
                "queries",
                attention_backward_queries,
                grad=grad,
                grad_q=grad_q,
                **strides_of(grad, "thd", "g"),
                **strides_of(grad_q, "thd", "gq"),
            )
        if any(ctx.needs_input_grad[3:5]):
            grad_bias = call.bias_gradients(grad)
        return grad_q, grad_k, grad_v, *grad_bias, None, None


@dataclass
class _Call:
    """The arguments that all kernels of one call share."""

    q: Tensor
    k: Tensor
    v: Tensor
    position_weight: Tensor | None
    time_weight: Tensor | None
    layout: JaggedLayout
    rule: AttentionRule

    def by_rows(self, name: str, kernel: Any, **further: Any) -> None:
        self._launch(name, kernel, "BLOCK_M", **further)

    def by_keys(self, grad: Tensor, grad_k: Tensor, grad_v: Tensor) -> None:
        self._launch(
            "keys",
            attention_backward_keys,
            "BLOCK_N",
            grad=grad,
            grad_k=grad_k,
            grad_v=grad_v,
            **strides_of(grad, "thd", "g"),
            **strides_of(grad_k, "thd", "gk"),
            **strides_of(grad_v, "thd", "gv"),
        )

    def _launch(self, name: str, kernel: Any, tile: str, **further: Any) -> None:
        has_bias, block_d = self.position_weight is not None, self._block_d
        longest = int(self.layout.seqlens.max())
        launch(
            kernel,
            lambda meta: (triton.cdiv(longest, meta[tile]), self.q.shape[1], self.layout.batch_size),
            attention_configs(name, block_d, self.q.element_size(), has_bias, capability_of(self.q.device)),
            (block_d, self.q.dtype, has_bias, self.rule.is_causal, bucket(longest)),
            **self._shared(kernel),
            **further,
            order=_longest_first(self.layout),
            inverse_n=1.0 / self.rule.scaling_seqlen,
            BIAS=has_bias,
        )

    def bias_gradients(self, grad: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of the position and the time weights, in their types."""
        assert self.position_weight is not None and self.time_weight is not None
        device, layout, heads = grad.device, self.layout, self.q.shape[1]
        position_totals = torch.zeros(len(self.position_weight), dtype=torch.int64, device=device)
        time_totals = torch.zeros(TIME_SLOTS, NUM_TIME_BUCKETS, dtype=torch.int64, device=device)
        if not layout.num_tokens:
            return position_totals.to(self.position_weight.dtype), time_totals[0].to(self.time_weight.dtype)
        scale = _fixed_point_scale(grad, self.v, pairs=heads * int((layout.seqlens**2).sum()))
        config = bias_config(self._block_d, self.q.element_size(), capability_of(grad.device))
        tiles = triton.cdiv(int(layout.seqlens.max()), config.kwargs["BLOCK"])
        looks_ahead = not self.rule.is_causal or (self.rule.contextual_mask and layout.num_contextuals > 0)
        tiles_ahead = tiles - 1 if looks_ahead else 0
        launch(
            attention_backward_bias,
            lambda meta: (tiles + tiles_ahead, min(BIAS_SHARES, layout.batch_size)),
            [config],
            (),
            **self._shared(attention_backward_bias),
            **strides_of(grad, "thd", "g"),
            grad=grad,
            position_totals=position_totals,
            time_totals=time_totals,
            scale=scale,
            stride_slot=time_totals.stride(0),
            num_slots=TIME_SLOTS,
            num_sequences=layout.batch_size,
            num_heads=heads,
            first_diagonal=-tiles_ahead,
        )
        factor = 1 / (scale.double() * self.rule.scaling_seqlen)
        return (
            (position_totals * factor).to(self.position_weight.dtype),
            (time_totals.sum(0) * factor).to(self.time_weight.dtype),
        )

    @property
    def _block_d(self) -> int:
        return max(16, triton.next_power_of_2(self.q.shape[2]))

    def _shared(self, kernel: Any) -> dict[str, Any]:
        layout, rule, has_bias = self.layout, self.rule, self.position_weight is not None
        shared = dict(
            q=self.q,
            k=self.k,
            v=self.v,
            **strides_of(self.q, "thd", "q"),
            **strides_of(self.k, "thd", "k"),
            **strides_of(self.v, "thd", "v"),
            offsets=layout.seqlen_offsets,
            candidates=layout.num_candidate_tokens,
            query_times=layout.query_times if has_bias else None,
            token_times=layout.token_times if has_bias else None,
            thresholds=_bucket_thresholds(self.q.device) if has_bias else None,
            position_weight=None if self.position_weight is None else self.position_weight.float(),
            time_weight=None if self.time_weight is None else self.time_weight.float(),
            farthest=0 if self.position_weight is None else len(self.position_weight) // 2,
            alpha=float(rule.alpha),
            num_contextuals=layout.num_contextuals,
            group_tokens=layout.candidate_group_tokens,
            WIDTH=self.q.shape[2],
            BLOCK_D=self._block_d,
            CAUSAL=rule.is_causal,
            CONTEXTUAL=rule.is_causal and rule.contextual_mask and layout.num_contextuals > 0,
            CANDIDATES=layout.num_candidate_tokens is not None,
            **multiplication(kernel, self.q.dtype, exact=self._block_d > 128 or kernel is attention_backward_bias),
        )
        return shared


def _empty_beside(x: Tensor) -> Tensor:
    """For the gradient of x: dense."""
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _longest_first(layout: JaggedLayout) -> Tensor:
    """int32 [B] on the device: sequences by falling length."""
    key = ("triton", "longest first")
    if key not in layout.cache:
        order = np.argsort(-layout.seqlens, kind="stable").astype(np.int32)
        layout.cache[key] = torch.from_numpy(order).to(layout.seqlen_offsets.device, non_blocking=True)
    return layout.cache[key]


def _fixed_point_scale(grad: Tensor, v: Tensor, pairs: int) -> Tensor:
    """float32 [1]: what sums of score gradients are multiplied by so that no sum of ``pairs`` leaves 62 bits.

    |dL/dscore| ≤ ‖grad‖ ‖v‖ · max |SiLU'| < 1.1 ‖grad‖ ‖v‖, before the division by N. Not finite where the
    gradient is not, and then nor is the result.
    """
    largest = [torch.linalg.vector_norm(x, dim=-1, dtype=torch.float32).amax() for x in (grad, v)]
    bound = (largest[0] * largest[1] * 1.1).clamp_min(1e-12) * float(pairs)
    return (2.0**62 / bound).view(1)


@functools.cache
def _bucket_thresholds(device: torch.device) -> Tensor:
    """int64 [128]: the least time difference of each bucket, found by bisection in the very formula."""
    low = torch.zeros(NUM_TIME_BUCKETS, dtype=torch.int64)  # always below the bucket
    high = torch.full_like(low, 1 << 62)
    wanted = torch.arange(NUM_TIME_BUCKETS)
    for _ in range(63):
        middle = low + (high - low) // 2
        reached = time_buckets(middle) >= wanted
        high, low = torch.where(reached, middle, high), torch.where(reached, low, middle)
    return high.to(device)
