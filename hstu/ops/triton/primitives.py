"""What several kernels share: matrix products, the sigmoid, and rows of strided tensors.

Counts that change from batch to batch are not specialised (``do_not_specialize``), or Triton would compile again.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def dot(a, b, accumulator, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    """accumulator + a @ b in float32. UPCAST: multiply in float32, as the interpreter cannot multiply bfloat16."""
    if UPCAST:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), accumulator, input_precision="ieee")
    return tl.dot(a, b, accumulator, input_precision=PRECISION)


@triton.jit
def sigmoid(x, FAST: tl.constexpr):
    """1 / (1 + e⁻ˣ) in float32; FAST: by the hardware's tanh, relative error 2⁻¹¹, as good as 16-bit inputs are."""
    if FAST:
        tanh = tl.inline_asm_elementwise(
            "tanh.approx.f32 $0, $1;", "=f,f", [x * 0.5], dtype=tl.float32, is_pure=True, pack=1
        )
        return 0.5 + 0.5 * tanh
    return 1.0 / (1.0 + tl.exp2(-x * LOG2_E))


@triton.jit
def silu_derivative(x, sigmoid_of_x):
    """d/dx of x · sigmoid(x)."""
    return sigmoid_of_x * (1.0 + x * (1.0 - sigmoid_of_x))


@triton.jit
def load_rows(
    base, rows, limit, stride_row, stride_column, WIDTH: tl.constexpr, BLOCK: tl.constexpr, BOUNDED: tl.constexpr
):
    """[rows, BLOCK] of a matrix WIDTH wide; zeros beyond the width and, if BOUNDED, from row ``limit`` on."""
    columns = tl.arange(0, BLOCK)
    pointers = base + rows[:, None] * stride_row + columns[None, :] * stride_column
    if BOUNDED:
        inside = rows[:, None] < limit
        if WIDTH != BLOCK:
            inside = inside & (columns[None, :] < WIDTH)
        return tl.load(pointers, mask=inside, other=0.0)
    if WIDTH != BLOCK:
        return tl.load(pointers, mask=columns[None, :] < WIDTH, other=0.0)
    return tl.load(pointers)


@triton.jit
def store_rows(base, rows, limit, stride_row, stride_column, values, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """The reverse of load_rows, always bounded."""
    columns = tl.arange(0, BLOCK)
    pointers = base + rows[:, None] * stride_row + columns[None, :] * stride_column
    inside = rows[:, None] < limit
    if WIDTH != BLOCK:
        inside = inside & (columns[None, :] < WIDTH)
    tl.store(pointers, values.to(base.dtype.element_ty), mask=inside)
