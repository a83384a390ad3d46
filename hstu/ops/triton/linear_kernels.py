"""Kernels of the uvqk projection: a linear layer that leaves SiLU of its result, too."""

from __future__ import annotations

import triton
import triton.language as tl

from hstu.ops.triton.primitives import dot, sigmoid


@triton.jit(do_not_specialize=["num_rows"])
def linear_silu(
    x, weight, bias, projected, activated, num_rows,
    stride_xr, stride_xc, stride_wr, stride_wc, stride_pr,
    WIDTH_IN: tl.constexpr, WIDTH_OUT: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """projected = x weightᵀ + bias, activated = SiLU(projected); both dense rows. Grid: (tiles,).

    GROUP tiles of rows take turns on the same columns, so that a tile of the weight is read from the L2 cache.
    """
    row_tiles = tl.cdiv(num_rows, BLOCK_M)
    column_tiles: tl.constexpr = (WIDTH_OUT + BLOCK_N - 1) // BLOCK_N
    group = tl.program_id(0) // (GROUP * column_tiles)
    in_group = tl.program_id(0) % (GROUP * column_tiles)
    group_rows = tl.minimum(row_tiles - group * GROUP, GROUP)
    row_tile = group * GROUP + in_group % group_rows
    column_tile = in_group // group_rows

    rows = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    depth = tl.arange(0, BLOCK_K)
    # Rows and columns beyond the end read others, which needs no mask, and are not stored.
    x_pointers = x + (rows % num_rows)[:, None].to(tl.int64) * stride_xr + depth[None, :] * stride_xc
    w_pointers = weight + (columns % WIDTH_OUT)[:, None] * stride_wr + depth[None, :] * stride_wc
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for first in tl.range(0, WIDTH_IN, BLOCK_K):
        if WIDTH_IN % BLOCK_K == 0:
            a = tl.load(x_pointers)
            b = tl.load(w_pointers)
        else:
            inside = (first + depth)[None, :] < WIDTH_IN
            a = tl.load(x_pointers, mask=inside, other=0.0)
            b = tl.load(w_pointers, mask=inside, other=0.0)
        total = dot(a, b.T, total, PRECISION, UPCAST)
        x_pointers += BLOCK_K * stride_xc
        w_pointers += BLOCK_K * stride_wc
    total += tl.load(bias + columns % WIDTH_OUT).to(tl.float32)[None, :]
    # The activation is that of the rounded value, which backward and recomputation start from.
    rounded = total.to(projected.dtype.element_ty)
    places = rows[:, None].to(tl.int64) * stride_pr + columns[None, :]
    inside = (rows < num_rows)[:, None] & (columns < WIDTH_OUT)[None, :]
    tl.store(projected + places, rounded, mask=inside)
    value = rounded.to(tl.float32)
    tl.store(activated + places, (value * sigmoid(value, False)).to(activated.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["num_elements"])
def silu(x, out, num_elements, BLOCK: tl.constexpr):
    """out = SiLU(x), dense, by the formula of linear_silu: the same bits. Grid: (blocks,)."""
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = places < num_elements
    value = tl.load(x + places, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + places, (value * sigmoid(value, False)).to(out.dtype.element_ty), mask=inside)
