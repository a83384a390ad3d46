"""See :mod:`hstu.ops.norm_mul_dropout`; the arithmetic is in csrc/layer.cpp. Drops what the PyTorch one drops."""

from __future__ import annotations

import ctypes
from enum import IntEnum

import torch
from torch import Tensor

from hstu.ops.cpu.library import (
    address,
    float32,
    int32,
    int64,
    is_bfloat,
    library,
    num_threads,
    pointer,
    strides,
    with_contiguous_rows,
)
from hstu.ops.dropout import draw, scale_of
from hstu.ops.norm_mul_dropout import GateRule

TOKENS_PER_BIN = 256
MOST_BINS = 64
_CPU = torch.device("cpu")


class _Pass(IntEnum):
    """Mirrors HstuGatePass of csrc/layer.cpp."""

    FORWARD = 0
    MEASURE = 1
    APPLY = 2
    BACKWARD = 3
    SUMS = 4
    ROWS = 5


class _Arguments(ctypes.Structure):
    """Mirrors HstuGate of csrc/layer.cpp: same names, same order."""

    _fields_ = [  # ctypes wants a plain list
        *((name, pointer) for name in ("x", "u", "grad_out")),
        *((f"{name}_strides", int64 * 2) for name in ("u", "grad_u")),
        *((name, pointer) for name in ("weight", "bias", "kept", "mean", "inverse_std", "along_one", "along_row")),
        *((name, pointer) for name in ("out", "grad_x", "grad_u", "grad_weight", "grad_bias")),
        *((name, int64) for name in ("tokens", "heads", "width", "bins")),
        *((name, float32) for name in ("eps", "scale")),
        *((name, int32) for name in ("is_bfloat", "threads", "which")),
    ]


def forward(x: Tensor, u: Tensor, weight: Tensor, bias: Tensor, rule: GateRule) -> tuple[Tensor, Tensor, Tensor | None]:
    """See :class:`hstu.ops.norm_mul_dropout.GateKernels`. float32 or bfloat16; the pattern is bool [T, H · d]."""
    kept = draw(x.flatten(1).shape, rule.dropout, _CPU, rule.ranks) if rule.dropout > 0 else None
    statistics, out = torch.empty(2, len(x)), torch.empty(len(x), len(weight), dtype=x.dtype)
    call = _Call(x, u, weight, bias, rule, statistics, kept)
    call.arguments.out = address(out)
    if rule.ranks.count == 1:
        call.run(_Pass.FORWARD)
        return out, statistics, kept
    call.run(_Pass.MEASURE)
    statistics.copy_(rule.over_all_heads(statistics))
    call.run(_Pass.APPLY)
    return out, statistics, kept


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
    call = _Call(x, u, weight, bias, rule, statistics, pattern)
    grad = grad.contiguous()
    out, grad_x = torch.empty(len(x), len(weight), dtype=x.dtype), torch.empty(x.shape, dtype=x.dtype)
    sums, along = torch.zeros(2, call.arguments.bins, len(weight)), torch.empty(2, len(x))
    call.arguments.grad_out, call.arguments.out, call.arguments.grad_x = map(address, (grad, out, grad_x))
    call.arguments.grad_u, call.arguments.grad_u_strides = address(grad_u), strides(grad_u)
    call.arguments.grad_weight, call.arguments.grad_bias = map(address, sums)
    call.arguments.along_one, call.arguments.along_row = map(address, along)
    if rule.ranks.count == 1:
        call.run(_Pass.BACKWARD)
    else:
        call.run(_Pass.SUMS)
        along.copy_(rule.ranks.gather(along).mean(0))
        call.run(_Pass.ROWS)
    grad_weight, grad_bias = sums.sum(1, dtype=torch.float64)
    return out, grad_x, grad_weight.to(weight.dtype), grad_bias.to(bias.dtype)


class _Call:
    """What all passes take, and the tensors that must live as long."""

    def __init__(
        self,
        x: Tensor,
        u: Tensor,
        weight: Tensor,
        bias: Tensor,
        rule: GateRule,
        statistics: Tensor,
        kept: Tensor | None,
    ) -> None:
        x, u = x.contiguous(), with_contiguous_rows(u)
        affine = [tensor.detach().float().contiguous() for tensor in (weight, bias)]
        self._used = x, u, affine, statistics, kept
        self.arguments = _Arguments(
            x=address(x),
            u=address(u),
            u_strides=strides(u),
            weight=address(affine[0]),
            bias=address(affine[1]),
            kept=address(kept),
            mean=address(statistics[0]),
            inverse_std=address(statistics[1]),
            tokens=len(x),
            heads=x.shape[1],
            width=x.shape[2],
            bins=max(1, min(MOST_BINS, len(x) // TOKENS_PER_BIN)),
            eps=rule.eps,
            scale=scale_of(rule.dropout, _CPU),
            is_bfloat=is_bfloat((x, u)),
            threads=num_threads(),
        )

    def run(self, which: _Pass) -> None:
        self.arguments.which = which
        library().hstu_gate(ctypes.byref(self.arguments))
