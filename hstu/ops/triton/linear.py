"""The uvqk projection by Triton kernels: a linear layer and SiLU in one pass."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from hstu.ops.triton.launch import capability_of, launcher, precision_for
from hstu.ops.triton.primitives import dot, elements, matrix, sigmoid

# (BLOCK_M, BLOCK_N, BLOCK_K, num_warps, num_stages); the first that fits the device runs
TILES_90 = ((128, 256, 64, 8, 3), (128, 128, 64, 8, 4), (128, 128, 64, 4, 3), (64, 128, 64, 4, 4))
TILES_80 = ((128, 128, 32, 8, 4), (128, 64, 32, 4, 4), (64, 64, 32, 4, 4))
TILES_FLOAT32 = ((64, 64, 32, 8, 2), (32, 64, 32, 4, 2))
GROUP = 8
"""Number of row tiles computed in turn for the same columns, so that a weight tile stays in the L2 cache."""


def project(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """See :class:`hstu.ops.kernels.ProjectionKernels`; sums are in float32."""
    projected = torch.empty(len(x), len(weight), dtype=x.dtype, device=x.device)
    activated = torch.empty_like(projected)
    if not projected.numel():
        return projected, activated
    tiles = TILES_FLOAT32 if x.element_size() > 2 else (TILES_80, TILES_90)[capability_of(x.device) >= (9, 0)]
    launcher(
        linear_silu,
        lambda meta: (triton.cdiv(len(x), meta["BLOCK_M"]) * triton.cdiv(len(weight), meta["BLOCK_N"]),),
        [
            triton.Config(
                {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "GROUP": GROUP}, num_warps=warps, num_stages=stages
            )
            for m, n, k, warps, stages in tiles
        ],
    )(
        x=matrix(x),
        weight=matrix(weight),
        bias=bias,
        projected=matrix(projected),
        activated=matrix(activated),
        num_rows=len(x),
        WIDTH_IN=x.shape[1],
        WIDTH_OUT=len(weight),
        precision=precision_for(linear_silu, x.dtype),
    )
    return projected, activated


def silu(x: Tensor) -> Tensor:
    """SiLU with the same bits as in :func:`project`."""
    x = x.contiguous()
    out = torch.empty_like(x)
    if x.numel():
        launcher(
            silu_kernel,
            lambda meta: (triton.cdiv(x.numel(), meta["BLOCK"]),),
            [triton.Config({"BLOCK": 1024}, num_warps=4, num_stages=1)],
        )(x=x, out=out, num_elements=x.numel())
    return out


@triton.jit(do_not_specialize=["num_rows"])
def linear_silu(
    x, weight, bias, projected, activated, num_rows,
    WIDTH_IN: tl.constexpr, WIDTH_OUT: tl.constexpr, precision: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """projected = x weightᵀ + bias and activated = SiLU(projected), both of contiguous rows. Grid: (tiles,)."""
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
    # Rows and columns beyond the end wrap around, so that loads need no mask. They are not stored.
    x_pointers = elements(x, (rows % num_rows)[:, None], depth[None, :])
    w_pointers = elements(weight, (columns % WIDTH_OUT)[:, None], depth[None, :])
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for first in tl.range(0, WIDTH_IN, BLOCK_K):
        if WIDTH_IN % BLOCK_K == 0:
            a = tl.load(x_pointers)
            b = tl.load(w_pointers)
        else:
            inside = (first + depth)[None, :] < WIDTH_IN
            a = tl.load(x_pointers, mask=inside, other=0.0)
            b = tl.load(w_pointers, mask=inside, other=0.0)
        total = dot(a, b.T, total, precision)
        x_pointers += BLOCK_K * x.stride_column
        w_pointers += BLOCK_K * weight.stride_column
    total += tl.load(bias + columns % WIDTH_OUT).to(tl.float32)[None, :]
    # Activate the rounded value, because backward and recomputation start from it.
    rounded = total.to(projected.data.dtype.element_ty)
    offsets = rows[:, None].to(tl.int64) * projected.stride_row + columns[None, :]
    inside = (rows < num_rows)[:, None] & (columns < WIDTH_OUT)[None, :]
    tl.store(projected.data + offsets, rounded, mask=inside)
    value = rounded.to(tl.float32)
    activation = value * sigmoid(value, False)
    tl.store(activated.data + offsets, activation.to(activated.data.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["num_elements"])
def silu_kernel(x, out, num_elements, BLOCK: tl.constexpr):
    """out = SiLU(x) of contiguous elements, with the arithmetic and the bits of linear_silu. Grid: (blocks,)."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < num_elements
    value = tl.load(x + index, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + index, (value * sigmoid(value, False)).to(out.dtype.element_ty), mask=inside)
