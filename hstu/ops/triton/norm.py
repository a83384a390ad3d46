"""Layer norm and the gated, dropped-out norm by Triton kernels.

Both keep their inputs and two numbers a row. The dropout's pattern is a function of a seed: nothing of it is kept.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from hstu.ops.norm_mul_dropout import SplitHeads
from hstu.ops.triton.launch import launch, strides_of
from hstu.ops.triton.norm_kernels import norm_mul_dropout_backward, norm_mul_dropout_forward, row_statistics

MAX_WIDTH = 16384
"""Columns of a row: what one program holds in registers."""
PROGRAMS = 1024
"""At most so many rows at a time, and so many partial sums of the affine gradients."""
_SEEDS = 1 << 31


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype | None = None) -> Tensor:
    """LayerNorm of x [T, D] over D, computed in float32: [T, D] of ``dtype`` (x's own by default), any strides.

    To spend a second computation in place of keeping the result for what follows, run it again on x
    (:class:`hstu.model.recompute.recomputed_in_backward`): the result has the same bits.
    """
    normalised: Tensor = _Norm.apply(x.unsqueeze(1), None, weight, bias, eps, 0.0, 0, None, dtype or x.dtype)
    return normalised


def norm_mul_dropout(
    x: Tensor,
    u: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    dropout: float,
    training: bool,
    split_heads: SplitHeads | None = None,
) -> Tensor:
    """See :func:`hstu.ops.norm_mul_dropout.norm_mul_dropout`.

    One number drawn from torch's generator of the CPU seeds the dropout: checkpointing repeats it, no device is asked.
    """
    dropout = dropout if training else 0.0
    seed = int(torch.randint(_SEEDS, (), device="cpu")) if dropout > 0 else 0
    if split_heads is not None:  # generators of the ranks agree
        seed = (seed + split_heads.rank * 0x9E3779B1) % _SEEDS
    gated: Tensor = _Norm.apply(x, u, weight, bias, eps, dropout, seed, split_heads, x.dtype)
    return gated


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        u: Tensor | None,
        weight: Tensor,
        bias: Tensor,
        eps: float,
        dropout: float,
        seed: int,
        split_heads: SplitHeads | None,
        dtype: torch.dtype,
    ) -> Tensor:
        width = x.shape[1] * x.shape[2]
        if width > MAX_WIDTH:
            raise ValueError(f"rows of {width} columns: at most {MAX_WIDTH}")
        mean, inverse_std = _statistics_over_ranks(x, eps, split_heads)
        out = torch.empty(len(x), width, dtype=dtype, device=x.device)
        if len(x):
            launch(
                norm_mul_dropout_forward,
                _row_programs(x),
                _configs(x),
                (),
                **_shared(x, u, weight, bias, mean, inverse_std, dropout, seed),
                out=out,
                stride_ot=out.stride(0),
                eps=float(eps),
                GIVEN=split_heads is not None,
            )
        ctx.save_for_backward(x, u, weight, bias, mean, inverse_std)
        ctx.dropout, ctx.seed, ctx.split_heads = dropout, seed, split_heads
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, u, weight, bias, mean, inverse_std = ctx.saved_tensors
        grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        grad_u = None if u is None else torch.empty(u.shape, dtype=u.dtype, device=u.device)
        sums = torch.zeros(2, *_row_programs(x)({}), len(weight), dtype=torch.float32, device=x.device)
        row_sums = torch.empty(2, len(x), dtype=torch.float32, device=x.device)

        def run(which: str) -> None:
            launch(
                norm_mul_dropout_backward,
                _row_programs(x),
                _configs(x),
                (),
                **_shared(x, u, weight, bias, mean, inverse_std, ctx.dropout, ctx.seed),
                grad=grad,
                grad_x=grad_x,
                grad_u=grad_u,
                weight_sums=sums[0],
                bias_sums=sums[1],
                row_sums=row_sums,
                stride_gt=grad.stride(0),
                stride_gd=grad.stride(1),
                stride_st=row_sums.stride(0),
                **strides_of(grad_x, "thd", "gx"),
                **(strides_of(grad_u, "thd", "gu") if grad_u is not None else dict.fromkeys(_GATE_GRAD_STRIDES, 0)),
                PASS=which,
            )

        if ctx.split_heads is not None:
            if len(x):
                run("sums")
            row_sums = ctx.split_heads.gather(row_sums).mean(0)
        if len(x):
            run("all" if ctx.split_heads is None else "rows")
        grad_weight, grad_bias = sums.sum(1)
        return grad_x, grad_u, grad_weight.to(weight.dtype), grad_bias.to(bias.dtype), *(None,) * 5


_GATE_STRIDES = ("stride_ut", "stride_uh", "stride_ud")
_GATE_GRAD_STRIDES = ("stride_gut", "stride_guh", "stride_gud")


def _shared(
    x: Tensor,
    u: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    inverse_std: Tensor,
    dropout: float,
    seed: int,
) -> dict[str, Any]:
    """The arguments that forward and backward share."""
    width = x.shape[1] * x.shape[2]
    return dict(
        x=x,
        u=u,
        weight=weight,
        bias=bias,
        mean=mean,
        inverse_std=inverse_std,
        num_rows=len(x),
        dropout=float(dropout),
        seed=seed,
        **strides_of(x, "thd", "x"),
        **(dict.fromkeys(_GATE_STRIDES, 0) if u is None else strides_of(u, "thd", "u")),
        WIDTH=width,
        HEAD=x.shape[2],
        BLOCK=_block(width),
        GATED=u is not None,
        DROPPED=dropout > 0,
    )


def _statistics_over_ranks(x: Tensor, eps: float, split_heads: SplitHeads | None) -> tuple[Tensor, Tensor]:
    """Mean and inverse deviation float32 [T]: where heads are split those of whole rows, else yet to be written."""
    own = torch.empty(2, len(x), dtype=torch.float32, device=x.device)
    if split_heads is None:
        return own[0], own[1]
    if len(x):
        launch(
            row_statistics,
            _row_programs(x),
            _configs(x),
            (),
            x=x,
            mean=own[0],
            variance=own[1],
            num_rows=len(x),
            **strides_of(x, "thd", "x"),
            WIDTH=x.shape[1] * x.shape[2],
            HEAD=x.shape[2],
            BLOCK=_block(x.shape[1] * x.shape[2]),
        )
    means, variances = split_heads.gather(own).unbind(1)
    mean = means.mean(0)
    return mean, torch.rsqrt((variances + (means - mean).square()).mean(0) + eps)


def _row_programs(x: Tensor) -> Any:
    return lambda meta: (min(PROGRAMS, max(1, len(x))),)


def _block(width: int) -> int:
    return max(16, triton.next_power_of_2(width))


def _configs(x: Tensor) -> list[triton.Config]:
    """16 columns a thread at least, 16 warps at most."""
    width = _block(x.shape[1] * x.shape[2])
    return [triton.Config({}, num_warps=min(16, max(1, width // 512)), num_stages=1)]
