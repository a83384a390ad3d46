"""The uvqk projection by Triton kernels: linear layer, SiLU and the split into u, v, q and k in one pass."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from hstu.ops.triton.launch import bucket, capability_of, launch, multiplication, strides_of
from hstu.ops.triton.linear_kernels import linear_silu, silu_split_backward
from hstu.ops.triton.linear_kernels import silu as silu_kernel
from hstu.ops.triton.rows import row_config

# (BLOCK_M, BLOCK_N, BLOCK_K, num_warps, num_stages)
TILES_90 = ((128, 256, 64, 8, 3), (128, 128, 64, 8, 4), (128, 128, 64, 4, 3), (64, 128, 64, 4, 4))
TILES_80 = ((128, 128, 32, 8, 4), (128, 64, 32, 4, 4), (64, 64, 32, 4, 4))
TILES_FLOAT32 = ((64, 64, 32, 8, 2), (32, 64, 32, 4, 2))
GROUP = 8


def uvqk(x: Tensor, weight: Tensor, bias: Tensor, head_dim: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """x [T, D], weight [H · 4 · d, D], bias [H · 4 · d] → u, v, q, k, each [T, H, d] and a view of one tensor, and
    what they are SiLU of: [T, H · 4 · d], without a gradient, for whoever recomputes them.

    Computes in autocast's type where that is on, with sums in float32.
    """
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    with torch.autocast(device, enabled=False):
        return _Uvqk.apply(x.to(dtype), weight.to(dtype), bias.to(dtype), head_dim)


def silu(x: Tensor) -> Tensor:
    """SiLU, without a gradient: the very bits that :func:`uvqk` and :func:`split_uvqk` made of ``x``."""
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


def split_uvqk(projected: Tensor, head_dim: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See :func:`hstu.ops.uvqk.split_uvqk`: for a projection that other code has computed."""
    parts: tuple[Tensor, Tensor, Tensor, Tensor] = _Split.apply(projected, head_dim)
    return parts


class _Split(torch.autograd.Function):
    """Its backward reads four gradients where they lie; autograd's would stack them first."""

    @staticmethod
    def forward(ctx: Any, projected: Tensor, head_dim: int) -> tuple[Tensor, ...]:
        ctx.save_for_backward(projected)
        return silu(projected).unflatten(1, (-1, 4, head_dim)).unbind(2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (projected,) = ctx.saved_tensors
        grad = torch.empty(projected.shape, dtype=projected.dtype, device=projected.device)
        if grad.numel():
            _through_silu(projected, grads, grad)
        return grad, None


class _Uvqk(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, head_dim: int) -> tuple[Tensor, ...]:
        projected = torch.empty(len(x), len(weight), dtype=x.dtype, device=x.device)
        activated = torch.empty_like(projected)
        if projected.numel():
            _project(x, weight, bias, projected, activated)
        ctx.save_for_backward(x, weight, projected)
        ctx.mark_non_differentiable(projected)
        return *activated.unflatten(1, (-1, 4, head_dim)).unbind(2), projected

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, projected = ctx.saved_tensors
        grad = torch.empty_like(projected)
        if grad.numel():
            _through_silu(projected, grads[:4], grad)
        return grad @ weight, grad.t() @ x, grad.sum(0, dtype=torch.float32).to(grad.dtype), None


def _project(x: Tensor, weight: Tensor, bias: Tensor, projected: Tensor, activated: Tensor) -> None:
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


def _through_silu(projected: Tensor, grads: tuple[Tensor, ...], grad_projected: Tensor) -> None:
    """Write the gradient of the projection, from those of u, v, q and k where they lie."""
    _, heads, head_dim = grads[0].shape
    config = row_config(heads * head_dim)
    strides: dict[str, int] = {}
    for name, grad in zip("uvqk", grads, strict=True):
        strides |= strides_of(grad, "thd", name)
    launch(
        silu_split_backward,
        lambda meta: (
            triton.cdiv(len(projected), meta["ROWS"]),
            triton.cdiv(heads * head_dim, meta["BLOCK"]),
            len(grads),
        ),
        config,
        (),
        projected=projected,
        **dict(zip(("grad_u", "grad_v", "grad_q", "grad_k"), grads, strict=True)),
        grad_projected=grad_projected,
        num_rows=len(projected),
        stride_pr=projected.stride(0),
        stride_pc=projected.stride(1),
        stride_gr=grad_projected.stride(0),
        **strides,
        HEADS=heads,
        HEAD=head_dim,
    )
