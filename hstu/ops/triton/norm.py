"""Layer norm and the gated, dropped-out norm by Triton kernels.

The dropout's pattern is a function of a seed: nothing of it is kept.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from hstu.ops.norm_mul_dropout import GateRule
from hstu.ops.triton.launch import launch, strides_of
from hstu.ops.triton.norm_kernels import norm_mul_dropout_backward, norm_mul_dropout_forward, row_statistics

PROGRAMS = 1024
"""At most so many rows at a time, and so many partial sums of the affine gradients."""
_SEEDS = 1 << 31


def normalise(x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """See :func:`hstu.ops.layer_norm.normalise`; x has any strides."""
    return _forward(x.unsqueeze(1), None, weight, bias, GateRule(eps, 0.0), 0, dtype)


def normalise_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, statistics: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`hstu.ops.layer_norm.normalise_backward`."""
    rows = x.unsqueeze(1)
    rule = GateRule(0.0, 0.0)  # nothing to drop, and of eps nothing is asked
    grad_x, grad_weight, grad_bias = _backward(grad, rows, None, weight, bias, rule, statistics, 0, None, None)
    return grad_x.squeeze(1), grad_weight, grad_bias


def forward(x: Tensor, u: Tensor, weight: Tensor, bias: Tensor, rule: GateRule) -> tuple[Tensor, Tensor, Tensor | None]:
    """See :class:`hstu.ops.norm_mul_dropout.GateKernels`; the pattern is a seed, int64 [] on the host.

    It is drawn from torch's generator of the CPU: whoever sets that back repeats it, and no device is asked.
    """
    seed = torch.randint(_SEEDS, (), device="cpu") if rule.dropout > 0 else None
    if seed is not None:  # generators of the ranks agree
        seed = (seed + rule.ranks.rank * 0x9E3779B1) % _SEEDS
    gated, statistics = _forward(x, u, weight, bias, rule, 0 if seed is None else int(seed), x.dtype)
    return gated, statistics, seed


def backward(
    grad: Tensor,
    x: Tensor,
    u: Tensor,
    weight: Tensor,
    bias: Tensor,
    rule: GateRule,
    statistics: Tensor,
    pattern: Tensor | None,
    grad_u: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See :class:`hstu.ops.norm_mul_dropout.GateKernels`."""
    gated = torch.empty(len(x), len(weight), dtype=x.dtype, device=x.device)
    seed = 0 if pattern is None else int(pattern)
    return gated, *_backward(grad, x, u, weight, bias, rule, statistics, seed, grad_u, gated)


def _forward(
    x: Tensor, u: Tensor | None, weight: Tensor, bias: Tensor, rule: GateRule, seed: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """[T, H · d] of ``dtype``, and the statistics. x, u: [T, H, d]."""
    statistics = _statistics(x, rule)
    out = torch.empty(len(x), len(weight), dtype=dtype, device=x.device)
    if len(x):
        launch(
            norm_mul_dropout_forward,
            _row_programs(x),
            _configs(x),
            (),
            **_shared(x, u, weight, bias, statistics, rule.dropout, seed),
            out=out,
            stride_ot=out.stride(0),
            eps=float(rule.eps),
            GIVEN=rule.ranks.count > 1,
        )
    return out, statistics


def _backward(
    grad: Tensor,
    x: Tensor,
    u: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    rule: GateRule,
    statistics: Tensor,
    seed: int,
    grad_u: Tensor | None,
    gated: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias; those of u and what forward returned are written where there is a gate."""
    grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    sums = torch.zeros(2, *_row_programs(x)({}), len(weight), dtype=torch.float32, device=x.device)
    row_sums = torch.empty(2, len(x), dtype=torch.float32, device=x.device)

    def run(which: str) -> None:
        launch(
            norm_mul_dropout_backward,
            _row_programs(x),
            _configs(x),
            (),
            **_shared(x, u, weight, bias, statistics, rule.dropout, seed),
            grad=grad,
            grad_x=grad_x,
            grad_u=grad_u,
            gated=gated,
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

    if rule.ranks.count > 1:
        if len(x):
            run("sums")
        row_sums = rule.ranks.gather(row_sums).mean(0)
    if len(x):
        run("all" if rule.ranks.count == 1 else "rows")
    grad_weight, grad_bias = sums.sum(1)
    return grad_x, grad_weight.to(weight.dtype), grad_bias.to(bias.dtype)


_GATE_STRIDES = ("stride_ut", "stride_uh", "stride_ud")
_GATE_GRAD_STRIDES = ("stride_gut", "stride_guh", "stride_gud")


def _shared(
    x: Tensor,
    u: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    statistics: Tensor,
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
        mean=statistics[0],
        inverse_std=statistics[1],
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


def _statistics(x: Tensor, rule: GateRule) -> Tensor:
    """Mean and inverse deviation float32 [2, T]: where heads are split those of whole rows, else yet to be written."""
    own = torch.empty(2, len(x), dtype=torch.float32, device=x.device)
    if rule.ranks.count == 1:
        return own
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
    return rule.over_all_heads(own)


def _row_programs(x: Tensor) -> Any:
    return lambda meta: (min(PROGRAMS, max(1, len(x))),)


def _block(width: int) -> int:
    return max(16, triton.next_power_of_2(width))


def _configs(x: Tensor) -> list[triton.Config]:
    """16 columns a thread at least, 16 warps at most."""
    width = _block(x.shape[1] * x.shape[2])
    return [triton.Config({}, num_warps=min(16, max(1, width // 512)), num_stages=1)]
