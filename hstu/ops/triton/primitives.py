"""Building blocks of the kernels: tensors with strides, matrix products and the sigmoid.

A kernel takes a tensor and its strides as one named tuple, and related constants as one frozen dataclass. Counts that
change between batches are marked ``do_not_specialize``, and vectors that start anywhere in another vector
``do_not_specialize_on_alignment``; otherwise Triton would recompile for them.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

LOG2_E = tl.constexpr(1.4426950408889634)


class Matrix(NamedTuple):
    """A matrix in memory: its first element and its strides."""

    data: Any
    stride_row: Any
    stride_column: Any


class Heads(NamedTuple):
    """A tensor [T, H, d] in memory: its first element and its strides."""

    data: Any
    stride_token: Any
    stride_head: Any
    stride_channel: Any


@dataclass(frozen=True)
class Precision:
    """How a kernel multiplies tiles and computes the sigmoid."""

    products: str = "ieee"
    """``input_precision`` of ``tl.dot``: "ieee", "tf32", or "tf32x3", three TF32 products per float32 product."""
    upcast: bool = False
    """Multiply in float32, because the interpreter cannot multiply bfloat16."""
    fast_sigmoid: bool = False
    """Use the hardware's tanh, whose relative error of 2⁻¹¹ matches 16-bit inputs."""


def matrix(tensor: Tensor | None) -> Matrix:
    """A two-dimensional tensor as a kernel argument; None: the kernel does not access it."""
    return Matrix(None, 0, 0) if tensor is None else Matrix(tensor, *tensor.stride())


def heads(tensor: Tensor | None) -> Heads:
    """A tensor [T, H, d] as a kernel argument; None: the kernel does not access it."""
    return Heads(None, 0, 0, 0) if tensor is None else Heads(tensor, *tensor.stride())


@triton.jit
def elements(matrix, rows, columns):
    """Pointers in broadcast shape. Casts to int64, because Triton's int32 overflows where row · stride ≥ 2³¹."""
    of_row = tl.cast(rows, tl.int64) * matrix.stride_row
    return matrix.data + of_row + tl.cast(columns, tl.int64) * matrix.stride_column


@triton.jit
def rows_of_head(tensor, start, head):
    """One head of [T, H, d] from token ``start`` on, as a matrix [T, d]."""
    data = tensor.data + start.to(tl.int64) * tensor.stride_token + tl.cast(head, tl.int64) * tensor.stride_head
    return Matrix(data, tensor.stride_token, tensor.stride_channel)


@triton.jit
def load_rows(source, rows, limit, WIDTH: tl.constexpr, BLOCK: tl.constexpr, BOUNDED: tl.constexpr):
    """[rows, BLOCK] of a matrix of WIDTH columns; zeros beyond them and, if BOUNDED, from row ``limit`` on."""
    columns = tl.arange(0, BLOCK)
    pointers = elements(source, rows[:, None], columns[None, :])
    if BOUNDED:
        inside = rows[:, None] < limit
        if WIDTH != BLOCK:
            inside = inside & (columns[None, :] < WIDTH)
        return tl.load(pointers, mask=inside, other=0.0)
    if WIDTH != BLOCK:
        return tl.load(pointers, mask=columns[None, :] < WIDTH, other=0.0)
    return tl.load(pointers)


@triton.jit
def store_rows(target, rows, limit, values, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Write ``values`` [rows, BLOCK] to a matrix of WIDTH columns, up to row ``limit``."""
    columns = tl.arange(0, BLOCK)
    pointers = elements(target, rows[:, None], columns[None, :])
    inside = rows[:, None] < limit
    if WIDTH != BLOCK:
        inside = inside & (columns[None, :] < WIDTH)
    tl.store(pointers, values.to(target.data.dtype.element_ty), mask=inside)


@triton.jit
def dot(a, b, accumulator, precision: tl.constexpr):
    """accumulator + a @ b in float32."""
    if precision.upcast:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), accumulator, input_precision="ieee")
    return tl.dot(a, b, accumulator, input_precision=precision.products)


@triton.jit
def sigmoid(x, FAST: tl.constexpr):
    """1 / (1 + e⁻ˣ) in float32. FAST: see :class:`Precision`."""
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
