"""HSTU attention by Triton kernels: host functions and tile sizes."""

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import triton
from torch import Tensor

from hstu.ops.kernels import AttentionInputs, Gradient, RelativeBias
from hstu.ops.layout import NUM_TIME_BUCKETS, JaggedLayout, bucket_thresholds, fixed_point_scale, to_device
from hstu.ops.triton import attention_kernels as kernels
from hstu.ops.triton.attention_tiles import Batch, Bias, Mode
from hstu.ops.triton.launch import capability_of, launcher, precision_for
from hstu.ops.triton.primitives import Heads, heads, matrix

TIME_SLOTS = 64
"""Copies of the totals of the time buckets, so that atomics on one bucket rarely collide."""
BIAS_GROUPS = 64
"""Number of groups of sequences for the gradient of the bias."""


def forward(inputs: AttentionInputs) -> Tensor:
    """See :data:`hstu.ops.kernels.AttentionForward`."""
    # Not empty_like: v has gaps between its heads, and the consumer of the output needs it contiguous.
    out = torch.empty(inputs.q.shape, dtype=inputs.v.dtype, device=inputs.v.device)
    if inputs.layout.num_tokens:
        _Call(inputs).launcher(_FORWARD)(out=heads(out))
    return out


def backward(grad: Tensor, inputs: AttentionInputs, grads: tuple[Gradient, Gradient, Gradient]) -> RelativeBias | None:
    """See :data:`hstu.ops.kernels.AttentionBackward`. The gradients have the same bits in every run."""
    call = _Call(inputs, silu=grads[0].before_silu is not None)
    of_q, of_k, of_v = grads
    sums_k, sums_v = call.partial_sums(_KEYS, 2)
    (sums_q,) = call.partial_sums(_QUERIES, 1)
    if inputs.layout.num_tokens:
        call.launcher(_KEYS)(
            grad=heads(grad),
            grad_k=heads(of_k.target),
            grad_v=heads(of_v.target),
            before_k=_values(of_k),
            before_v=_values(of_v),
            sums_k=sums_k,
            sums_v=sums_v,
        )
        call.launcher(_QUERIES)(grad=heads(grad), grad_q=heads(of_q.target), before_q=_values(of_q), sums_q=sums_q)
    for gradient, sums in ((of_q, sums_q), (of_k, sums_k), (of_v, sums_v)):
        if gradient.before_silu is not None:
            torch.sum(sums, 0, out=gradient.before_silu.grad_shift)
    return None if inputs.bias is None else call.bias_gradients(grad, inputs.bias)


def _values(gradient: Gradient) -> Heads:
    return heads(None if gradient.before_silu is None else gradient.before_silu.value)


class _Kernel(NamedTuple):
    """A kernel with one program per head and per tile of each sequence."""

    name: str  # Key of its tile sizes in TILES_16_BIT and TILES_FLOAT32
    function: Any
    tile: str  # Name of the constant that holds the rows of a tile


_FORWARD = _Kernel("forward", kernels.attention_forward, "BLOCK_M")
_KEYS = _Kernel("keys", kernels.attention_backward_keys, "BLOCK_N")
_QUERIES = _Kernel("queries", kernels.attention_backward_queries, "BLOCK_M")


@dataclass
class _Call:
    """Arguments that all kernels of one call share."""

    inputs: AttentionInputs
    silu: bool = False
    """Whether backward writes the gradients of the pre-activations, not of q, k and v."""

    def launcher(self, kernel: _Kernel) -> Callable[..., object]:
        longest = int(self.inputs.layout.seqlens.max())
        launch = launcher(
            kernel.function,
            lambda meta: (
                triton.cdiv(longest, meta[kernel.tile]),
                self.inputs.q.shape[1],
                self.inputs.layout.batch_size,
            ),
            self._configs(kernel),
        )
        shared = self._shared(kernel.function, exact=self._block_d > 128)
        return functools.partial(launch, **shared, inverse_n=1.0 / self.inputs.config.scaling_seqlen)

    def partial_sums(self, kernel: _Kernel, count: int) -> Iterable[Any]:
        """Zeros [count, tiles, H, d] for the sums of ``count`` gradients over the rows of tiles; None without SiLU."""
        if not self.silu:
            return (None,) * count
        smallest = min(config.kwargs[kernel.tile] for config in self._configs(kernel))
        slots = self.inputs.layout.num_tokens // smallest + self.inputs.layout.batch_size  # see slot_of
        return torch.zeros(count, slots, *self.inputs.q.shape[1:], dtype=torch.float32, device=self.inputs.q.device)

    def _configs(self, kernel: _Kernel) -> list[triton.Config]:
        """Configurations of a kernel; the first that fits the device runs."""
        q, key = self.inputs.q, (kernel.name, self.inputs.bias is not None)
        tiles_16_bit = TILES_16_BIT[key][capability_of(q.device) >= (9, 0)]
        by_width = TILES_FLOAT32[key] if q.element_size() > 2 else tiles_16_bit
        tiles = next(by_width[width] for width in sorted(by_width) if self._block_d <= width)
        return [
            triton.Config({"BLOCK_M": m, "BLOCK_N": n}, num_warps=warps, num_stages=stages)
            for m, n, warps, stages in tiles
        ]

    def bias_gradients(self, grad: Tensor, bias: RelativeBias) -> RelativeBias:
        """Gradients of the position and time weights, in the dtypes of the weights."""
        device, layout, num_heads = grad.device, self.inputs.layout, self.inputs.q.shape[1]
        position, time = bias.position_weight, bias.time_weight
        position_totals = torch.zeros(len(position), dtype=torch.int64, device=device)
        time_totals = torch.zeros(TIME_SLOTS, NUM_TIME_BUCKETS, dtype=torch.int64, device=device)
        if not len(grad):
            return RelativeBias(position_totals.to(position.dtype), time_totals[0].to(time.dtype))
        scale = fixed_point_scale(grad, self.inputs.v, pairs=num_heads * int((layout.seqlens**2).sum()))
        config = bias_config(self._block_d, self.inputs.q.element_size(), capability_of(grad.device))
        tiles = triton.cdiv(int(layout.seqlens.max()), config.kwargs["BLOCK"])
        sees_later_keys = not self.inputs.config.is_causal or (
            self.inputs.config.contextual_mask and layout.num_contextuals > 0
        )
        diagonals_above = tiles - 1 if sees_later_keys else 0
        launcher(
            kernels.attention_backward_bias,
            lambda meta: (tiles + diagonals_above, min(BIAS_GROUPS, layout.batch_size)),
            [config],
        )(
            **self._shared(kernels.attention_backward_bias, exact=True),
            grad=heads(grad),
            position_totals=position_totals,
            time_totals=matrix(time_totals),
            scale=scale,
            num_slots=TIME_SLOTS,
            num_sequences=layout.batch_size,
            num_heads=num_heads,
            first_diagonal=-diagonals_above,
        )
        factor = 1 / (scale.double() * self.inputs.config.scaling_seqlen)
        return RelativeBias((position_totals * factor).to(position.dtype), (time_totals.sum(0) * factor).to(time.dtype))

    @property
    def _block_d(self) -> int:
        return max(16, triton.next_power_of_2(self.inputs.q.shape[2]))

    def _shared(self, kernel: Any, exact: bool) -> dict[str, Any]:
        layout, config, bias = self.inputs.layout, self.inputs.config, self.inputs.bias
        window = config.max_span is not None
        no_bias = Bias(None, None, None, None, None, 0)
        return dict(
            q=heads(self.inputs.q),
            k=heads(self.inputs.k),
            v=heads(self.inputs.v),
            batch=Batch(
                layout.seqlen_offsets,
                layout.num_candidate_tokens,
                _longest_first(layout),
                layout.num_contextuals,
                layout.candidate_group_tokens,
                config.max_span or 0,
                config.full_tokens if window else 0,
                _bounds(self.inputs.queries, layout),
            ),
            bias=no_bias if bias is None else _bias_argument(bias, layout),
            alpha=float(config.alpha),
            mode=Mode(
                width=self.inputs.q.shape[2],
                block_d=self._block_d,
                causal=config.is_causal,
                contextual=(config.is_causal or window) and config.contextual_mask and layout.num_contextuals > 0,
                candidates=layout.num_candidate_tokens is not None,
                window=window,
                bias=bias is not None,
                precision=precision_for(kernel, self.inputs.q.dtype, exact=exact),
                silu=self.silu and kernel is not kernels.attention_backward_bias,
                ranges=self.inputs.queries is not None,
            ),
        )


def _bias_argument(bias: RelativeBias, layout: JaggedLayout) -> Bias:
    thresholds = bucket_thresholds(layout.seqlen_offsets.device)
    tables = bias.position_weight.float(), bias.time_weight.float()
    return Bias(layout.query_times, layout.token_times, thresholds, *tables, len(bias.position_weight) // 2)


def _bounds(queries: range | None, layout: JaggedLayout) -> Tensor | None:
    """First and stop token of the queries on the device: int64 [2]."""
    if queries is None:
        return None
    device = layout.seqlen_offsets.device
    return layout.cached(("triton", queries), lambda: to_device(np.array([queries.start, queries.stop]), device))


def _longest_first(layout: JaggedLayout) -> Tensor:
    """Indices of the sequences by falling length: int32 [B] on the device."""
    device = layout.seqlen_offsets.device
    return layout.cached(("triton", "order"), lambda: to_device(layout.longest_first.astype(np.int32), device))


Tiles = dict[int, tuple[tuple[int, int, int, int], ...]]
"""Widest tile (block_d) served → (BLOCK_M, BLOCK_N, num_warps, num_stages). The first that fits the device runs.

None spills registers up to head dim 128 (tests/ops/triton/test_compile_ahead.py), except "keys" at 128 with a bias and
a window, by 11 instructions. With a bias, a tile also holds times, buckets and gathered weights.
"""
# 16-bit inputs: (kernel, has bias) → tiles for compute capability 8.x, tiles for 9.0 and later.
TILES_16_BIT: dict[tuple[str, bool], tuple[Tiles, Tiles]] = {
    ("forward", False): (
        {64: ((64, 64, 4, 3), (128, 32, 4, 4)), 128: ((64, 64, 4, 2),), 256: ((64, 64, 8, 1), (64, 32, 8, 2))},
        {
            64: ((128, 64, 8, 3), (64, 64, 4, 3), (128, 128, 8, 2)),
            128: ((128, 64, 8, 3), (128, 64, 8, 2), (64, 64, 4, 3)),
            256: ((128, 64, 8, 2), (128, 32, 8, 3)),
        },
    ),
    ("forward", True): (
        {32: ((64, 64, 8, 1),), 128: ((64, 32, 8, 1),), 256: ((32, 32, 8, 1),)},
        {
            64: ((64, 64, 8, 1), (64, 32, 4, 2), (128, 32, 8, 2)),
            128: ((64, 32, 8, 1), (64, 32, 8, 2)),
            256: ((64, 32, 8, 1), (32, 32, 4, 1)),
        },
    ),
    ("keys", False): (
        {
            64: ((32, 64, 4, 2),),
            128: ((64, 64, 8, 2), (32, 64, 4, 2), (32, 64, 8, 2)),
            256: ((32, 32, 8, 1), (32, 64, 8, 1)),
        },
        {
            64: ((64, 128, 8, 2), (64, 64, 4, 2)),
            128: ((32, 128, 8, 2), (64, 64, 8, 2), (32, 128, 8, 3)),
            256: ((64, 64, 8, 2), (32, 64, 8, 2), (16, 64, 8, 2)),
        },
    ),
    ("keys", True): (
        {32: ((64, 64, 8, 1),), 128: ((32, 64, 8, 1),), 256: ((32, 32, 8, 1),)},
        {
            64: ((64, 64, 8, 1), (32, 64, 4, 2)),
            128: ((32, 64, 8, 2), (32, 64, 8, 3)),
            256: ((32, 32, 8, 1), (16, 32, 8, 1)),
        },
    ),
    ("queries", False): (
        {
            64: ((128, 64, 8, 2), (64, 64, 4, 2)),
            128: ((64, 64, 8, 2), (128, 32, 8, 2)),
            256: ((64, 32, 8, 1), (64, 32, 8, 2)),
        },
        {
            64: ((128, 64, 8, 3), (64, 64, 4, 3)),
            128: ((128, 64, 8, 2), (64, 64, 8, 2), (128, 32, 8, 3)),
            256: ((128, 32, 8, 2), (64, 64, 8, 2)),
        },
    ),
    ("queries", True): (
        {32: ((64, 64, 8, 1),), 128: ((64, 32, 8, 1),), 256: ((32, 32, 8, 1),)},
        {64: ((64, 64, 8, 1), (64, 32, 8, 2)), 128: ((64, 32, 8, 1), (64, 32, 4, 1)), 256: ((32, 32, 8, 1),)},
    ),
}
_FORWARD_FLOAT32: Tiles = {64: ((32, 32, 4, 1),), 128: ((32, 16, 8, 1),), 256: ((16, 16, 8, 1),)}
_KEYS_FLOAT32: Tiles = {64: ((32, 32, 8, 1),), 128: ((16, 16, 4, 1),), 256: ((16, 16, 8, 1),)}
TILES_FLOAT32: dict[tuple[str, bool], Tiles] = {
    ("forward", False): _FORWARD_FLOAT32,
    ("forward", True): _FORWARD_FLOAT32,
    ("keys", False): _KEYS_FLOAT32,
    ("keys", True): {**_KEYS_FLOAT32, 128: ((16, 16, 8, 1),)},
    ("queries", False): {128: ((16, 16, 4, 1),), 256: ((16, 16, 8, 1),)},
    ("queries", True): {64: ((16, 16, 4, 1),), 128: ((16, 16, 4, 2),), 256: ((16, 16, 8, 1),)},
}


def bias_config(block_d: int, itemsize: int, capability: tuple[int, int]) -> triton.Config:
    """Configuration of the kernel for the gradients of the bias; its grid depends on the tile size."""
    if itemsize > 2:
        return triton.Config({"BLOCK": 16}, num_warps=4 if block_d <= 64 else 8, num_stages=1)
    if block_d > 128:
        return triton.Config({"BLOCK": 16}, num_warps=4, num_stages=1)
    return triton.Config({"BLOCK": 64 if capability >= (9, 0) else 32}, num_warps=8, num_stages=1)
