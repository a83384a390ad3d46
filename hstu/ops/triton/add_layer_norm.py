"""Triton kernels of the residual stream and its LayerNorm: one pass over memory forward, one backward.

Each program processes one row at a time and reads it once. It sums the gradients of the affine weights in registers;
PyTorch adds the sums of all programs, so there are no atomics.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hstu.ops.kernels import AddLayerNormInputs
from hstu.ops.triton.launch import row_launcher
from hstu.ops.triton.primitives import Matrix, elements, matrix

FORWARD_PROGRAMS = 8 * 132
BACKWARD_PROGRAMS = 4 * 132
"""Largest numbers of programs. All run at once on the 132 multiprocessors of an H100, each with room for 12 or 6.
Each backward program writes one row of partial sums of the affine gradients."""


def forward(inputs: AddLayerNormInputs) -> tuple[Tensor, Tensor, Tensor]:
    """See :data:`hstu.ops.kernels.AddLayerNormForward`; x and update have any strides."""
    x, update = inputs.x, inputs.update
    total = x if update is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)
    normalized = torch.empty(x.shape, dtype=inputs.dtype, device=x.device)
    statistics = torch.empty(2, len(x), dtype=torch.float32, device=x.device)
    if len(x):
        _over_rows(add_layer_norm_forward, x, FORWARD_PROGRAMS)(
            x=matrix(x),
            update=_matrix_or_none(update),
            weight=inputs.weight,
            bias=inputs.bias,
            total=matrix(total),
            normalized=matrix(normalized),
            mean=statistics[0],
            rstd=statistics[1],
            eps=float(inputs.eps),
            HAS_UPDATE=update is not None,
        )
    return total, normalized, statistics


def backward(
    grad: Tensor, grad_total: Tensor, inputs: AddLayerNormInputs, statistics: Tensor, update_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """See :data:`hstu.ops.kernels.AddLayerNormBackward`; the gradients and the sum have any strides."""
    total, weight, bias = inputs.x, inputs.weight, inputs.bias
    grad_x = torch.empty(total.shape, dtype=total.dtype, device=total.device)
    rounded = update_dtype not in (None, total.dtype)
    grad_update = torch.empty(total.shape, dtype=update_dtype, device=total.device) if rounded else None
    programs = min(BACKWARD_PROGRAMS, max(1, len(total)))
    sums = torch.zeros(2, programs, len(weight), dtype=torch.float32, device=total.device)
    if len(total):
        _over_rows(add_layer_norm_backward, total, programs)(
            total=matrix(total),
            weight=weight,
            mean=statistics[0],
            rstd=statistics[1],
            grad=matrix(grad),
            grad_total=matrix(grad_total),
            grad_x=matrix(grad_x),
            grad_update=_matrix_or_none(grad_update),
            weight_sums=sums[0],
            bias_sums=sums[1],
            ROUNDED=rounded,
        )
    if update_dtype == total.dtype:
        grad_update = grad_x
    grad_weight, grad_bias = sums.sum(1)
    return grad_x, grad_update, grad_weight.to(weight.dtype), grad_bias.to(bias.dtype)


def _matrix_or_none(tensor: Tensor | None) -> Matrix:
    return Matrix(None, 0, 0) if tensor is None else matrix(tensor)


def _over_rows(kernel: Any, x: Tensor, programs: int) -> Callable[..., object]:
    return partial(row_launcher(kernel, min(programs, len(x)), x.shape[1]), num_rows=len(x))


@triton.jit
def _load_row(tensor, row, columns, WIDTH: tl.constexpr):
    return tl.load(elements(tensor, row, columns), mask=columns < WIDTH, other=0.0).to(tl.float32)


@triton.jit
def _store_row(tensor, row, columns, values, WIDTH: tl.constexpr):
    tl.store(elements(tensor, row, columns), values.to(tensor.data.dtype.element_ty), mask=columns < WIDTH)


@triton.jit(do_not_specialize=["num_rows"], do_not_specialize_on_alignment=["mean", "rstd"])
def add_layer_norm_forward(
    x, update, weight, bias, total, normalized, mean, rstd, num_rows, eps,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, HAS_UPDATE: tl.constexpr,
):  # fmt: skip
    """normalized = norm(total) · weight + bias; writes total = x + update if HAS_UPDATE. Grid: (programs,)."""
    columns = tl.arange(0, BLOCK)
    inside = columns < WIDTH
    scale = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    shift = tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)
    for row in tl.range(tl.program_id(0).to(tl.int64), num_rows, tl.num_programs(0)):
        values = _load_row(x, row, columns, WIDTH)
        if HAS_UPDATE:
            values += _load_row(update, row, columns, WIDTH)
            _store_row(total, row, columns, values, WIDTH)
            # Normalize the rounded sum, because backward and recomputation start from it.
            values = values.to(total.data.dtype.element_ty).to(tl.float32)
        center = tl.sum(values, axis=0) / WIDTH
        centered = tl.where(inside, values - center, 0.0)
        inverse = tl.rsqrt(tl.sum(centered * centered, axis=0) / WIDTH + eps)
        tl.store(mean + row, center)
        tl.store(rstd + row, inverse)
        _store_row(normalized, row, columns, centered * inverse * scale + shift, WIDTH)


@triton.jit(do_not_specialize=["num_rows"], do_not_specialize_on_alignment=["mean", "rstd"])
def add_layer_norm_backward(
    total, weight, mean, rstd, grad, grad_total, grad_x, grad_update, weight_sums, bias_sums, num_rows,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROUNDED: tl.constexpr,
):  # fmt: skip
    """grad_x = grad_total + gradient through the norm; grad_update = grad_x if ROUNDED. Grid: (programs,).

    Each program writes one row of weight_sums and of bias_sums, [programs, WIDTH].
    """
    columns = tl.arange(0, BLOCK)
    inside = columns < WIDTH
    scale = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    weight_sum = tl.zeros((BLOCK,), tl.float32)
    bias_sum = tl.zeros((BLOCK,), tl.float32)
    for row in tl.range(tl.program_id(0).to(tl.int64), num_rows, tl.num_programs(0)):
        values = _load_row(total, row, columns, WIDTH)
        upstream = _load_row(grad, row, columns, WIDTH)
        beside_norm = _load_row(grad_total, row, columns, WIDTH)
        inverse = tl.load(rstd + row)
        normalized = tl.where(inside, (values - tl.load(mean + row)) * inverse, 0.0)
        weight_sum += upstream * normalized
        bias_sum += upstream
        scaled = upstream * scale
        mean_scaled = tl.sum(scaled, axis=0) / WIDTH
        mean_product = tl.sum(scaled * normalized, axis=0) / WIDTH
        of_x = (scaled - mean_scaled - normalized * mean_product) * inverse + beside_norm
        _store_row(grad_x, row, columns, of_x, WIDTH)
        if ROUNDED:
            _store_row(grad_update, row, columns, of_x, WIDTH)
    sums = tl.program_id(0) * WIDTH + columns
    tl.store(weight_sums + sums, weight_sum, mask=inside)
    tl.store(bias_sums + sums, bias_sum, mask=inside)
