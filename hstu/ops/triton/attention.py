"""HSTU attention by Triton kernels. See :func:`hstu.ops.attention.hstu_attention`."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import triton
from torch import Tensor

from hstu.ops.attention import AttentionRule
from hstu.ops.layout import JaggedLayout
from hstu.ops.relative_bias import NUM_TIME_BUCKETS, RelativeBias, time_buckets
from hstu.ops.triton.attention_backward import attention_backward_keys, attention_backward_queries
from hstu.ops.triton.attention_bias import attention_backward_bias
from hstu.ops.triton.attention_configs import attention_configs, bias_config
from hstu.ops.triton.attention_forward import attention_forward
from hstu.ops.triton.launch import bucket, capability_of, launch, multiplication, strides_of

TIME_SLOTS = 64
"""Copies of the time buckets' sums: so many atomics can proceed side by side."""
BIAS_SHARES = 64
"""Parts that the sequences are cut into for the gradient of the bias."""


def forward(
    q: Tensor, k: Tensor, v: Tensor, layout: JaggedLayout, rule: AttentionRule, bias: RelativeBias | None
) -> Tensor:
    """See :class:`hstu.ops.attention.AttentionKernels`."""
    # As v is laid out would keep the holes of a view; what reads the output wants it dense.
    out = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    if layout.num_tokens:
        call = _Call(q, k, v, layout, rule, bias)
        call.by_rows("forward", attention_forward, out=out, **strides_of(out, "thd", "o"))
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
    """See :class:`hstu.ops.attention.AttentionKernels`. The gradients have the same bits in every run."""
    grad_q, grad_k, grad_v = grads
    call = _Call(q, k, v, layout, rule, bias)
    if layout.num_tokens:
        call.by_keys(grad, grad_k, grad_v)
        call.by_rows(
            "queries",
            attention_backward_queries,
            grad=grad,
            grad_q=grad_q,
            **strides_of(grad, "thd", "g"),
            **strides_of(grad_q, "thd", "gq"),
        )
    return None if bias is None else call.bias_gradients(grad, bias)


@dataclass
class _Call:
    """The arguments that all kernels of one call share."""

    q: Tensor
    k: Tensor
    v: Tensor
    layout: JaggedLayout
    rule: AttentionRule
    bias: RelativeBias | None

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
        has_bias, block_d = self.bias is not None, self._block_d
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

    def bias_gradients(self, grad: Tensor, bias: RelativeBias) -> RelativeBias:
        """Gradients of the position and the time weights, in their types."""
        device, layout, heads = grad.device, self.layout, self.q.shape[1]
        position, time = bias.position_weight, bias.time_weight
        position_totals = torch.zeros(len(position), dtype=torch.int64, device=device)
        time_totals = torch.zeros(TIME_SLOTS, NUM_TIME_BUCKETS, dtype=torch.int64, device=device)
        if not layout.num_tokens:
            return RelativeBias(position_totals.to(position.dtype), time_totals[0].to(time.dtype))
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
        return RelativeBias((position_totals * factor).to(position.dtype), (time_totals.sum(0) * factor).to(time.dtype))

    @property
    def _block_d(self) -> int:
        return max(16, triton.next_power_of_2(self.q.shape[2]))

    def _shared(self, kernel: Any) -> dict[str, Any]:
        layout, rule, bias = self.layout, self.rule, self.bias
        shared = dict(
            q=self.q,
            k=self.k,
            v=self.v,
            **strides_of(self.q, "thd", "q"),
            **strides_of(self.k, "thd", "k"),
            **strides_of(self.v, "thd", "v"),
            offsets=layout.seqlen_offsets,
            candidates=layout.num_candidate_tokens,
            query_times=None if bias is None else layout.query_times,
            token_times=None if bias is None else layout.token_times,
            thresholds=None if bias is None else _bucket_thresholds(self.q.device),
            position_weight=None if bias is None else bias.position_weight.float(),
            time_weight=None if bias is None else bias.time_weight.float(),
            farthest=0 if bias is None else len(bias.position_weight) // 2,
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
