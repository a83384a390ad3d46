"""The uvqk projection by Triton kernels: linear layer and SiLU in one pass."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from hstu.ops.triton.launch import bucket, capability_of, launch, multiplication
from hstu.ops.triton.linear_kernels import linear_silu
from hstu.ops.triton.linear_kernels import silu as silu_kernel

# (BLOCK_M, BLOCK_N, BLOCK_K, num_warps, num_stages)
TILES_90 = ((128, 256, 64, 8, 3), (128, 128, 64, 8, 4), (128, 128, 64, 4, 3), (64, 128, 64, 4, 4))
TILES_80 = ((128, 128, 32, 8, 4), (128, 64, 32, 4, 4), (64, 64, 32, 4, 4))
TILES_FLOAT32 = ((64, 64, 32, 8, 2), (32, 64, 32, 4, 2))
GROUP = 8


def project(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """See :func:`hstu.ops.uvqk.project`; sums in float32."""
    projected = torch.empty(len(x), len(weight), dtype=x.dtype, device=x.device)
    activated = torch.empty_like(projected)
    if not projected.numel():
        return projected, activated
    tiles = TILES_FLOAT32 if x.element_size() > 2 else (TILES_80, TILES_90)[capability_of(x.device) >= (9, 0)]
    launch(
        linear_silu,
        lambda meta: (triton.cdiv(len(x), meta["BLOCK_M"]) * triton.cdiv(len(weight), meta["BLOCK_N"]),),
        [
            triton.Config(
                {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "GROUP": GROUP}, num_warps=warps, num_stages=stages
            )
            for m, n, k, warps, stages in tiles
        ],
        (bucket(len(x)), tuple(weight.shape), x.dtype),
        x=x,
        weight=weight,
        bias=bias,
        projected=projected,
        activated=activated,
        num_rows=len(x),
        stride_xr=x.stride(0),
        stride_xc=x.stride(1),
        stride_wr=weight.stride(0),
        stride_wc=weight.stride(1),
        stride_pr=projected.stride(0),
        WIDTH_IN=x.shape[1],
        WIDTH_OUT=len(weight),
        **{name: constant for name, constant in multiplication(linear_silu, x.dtype).items() if name != "FAST"},
    )
    return projected, activated


def silu(x: Tensor) -> Tensor:
    """SiLU: the very bits that :func:`project` made of ``x``."""
    x = x.contiguous()
    out = torch.empty_like(x)
    if x.numel():
        launch(
            silu_kernel,
            lambda meta: (triton.cdiv(x.numel(), meta["BLOCK"]),),
            [triton.Config({"BLOCK": 1024}, num_warps=4, num_stages=1)],
            (),
            x=x,
            out=out,
            num_elements=x.numel(),
        )
    return out
