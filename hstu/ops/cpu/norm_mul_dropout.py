"""See :mod:`hstu.ops.norm_mul_dropout`; the arithmetic is in csrc/layer.cpp. Drops what the PyTorch one drops."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

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
from hstu.ops.dropout import Draws, draw

TOKENS_PER_BIN = 256
MOST_BINS = 64


class _Arguments(ctypes.Structure):
    """Mirrors HstuGate of csrc/layer.cpp: same names, same order."""

    _fields_ = [  # ctypes wants a plain list
        *((name, pointer) for name in ("x", "u", "grad_out")),
        ("u_strides", int64 * 2),
        *((name, pointer) for name in ("weight", "bias", "draws", "mean", "inverse_std", "out", "grad_x", "grad_u")),
        *((name, pointer) for name in ("grad_weight", "grad_bias")),
        *((name, int64) for name in ("tokens", "heads", "width", "bins")),
        *((name, float32) for name in ("eps", "scale")),
        *((name, int32) for name in ("least", "is_bfloat", "threads")),
    ]


def norm_mul_dropout(x: Tensor, u: Tensor, weight: Tensor, bias: Tensor, eps: float, dropout: float) -> Tensor:
    """See :func:`hstu.ops.norm_mul_dropout.norm_mul_dropout`. float32 or bfloat16; ``dropout`` 0 in evaluation."""
    draws = draw(x.numel(), dropout) if dropout > 0 else None
    gated: Tensor = _Gate.apply(x, u, weight, bias, eps, draws)
    return gated


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, u: Tensor, weight: Tensor, bias: Tensor, eps: float, draws: Draws | None
    ) -> Tensor:
        x, u = x.contiguous(), with_contiguous_rows(u)
        mean, inverse_std = torch.empty(len(x)), torch.empty(len(x))
        out = torch.empty(len(x), x.shape[1] * x.shape[2], dtype=x.dtype)
        words = None if draws is None else draws.words
        ctx.scale, ctx.least = (1.0, 0) if draws is None else (draws.scale, draws.least)
        arguments, used = _describe(x, u, weight, bias, mean, inverse_std, words, ctx.scale, ctx.least)
        arguments.eps, arguments.out = eps, address(out)
        library().hstu_gate(ctypes.byref(arguments), 0)
        del used
        ctx.save_for_backward(x, u, weight, bias, mean, inverse_std, words)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        x, u, weight, bias, mean, inverse_std, words = ctx.saved_tensors
        arguments, used = _describe(x, u, weight, bias, mean, inverse_std, words, ctx.scale, ctx.least)
        grad_out = grad_out.contiguous()
        grad_x, grad_u = torch.empty_like(x), torch.empty(u.shape, dtype=u.dtype)
        sums = torch.zeros(2, arguments.bins, len(weight))
        arguments.grad_out, arguments.grad_x, arguments.grad_u = map(address, (grad_out, grad_x, grad_u))
        arguments.grad_weight, arguments.grad_bias = map(address, sums)
        library().hstu_gate(ctypes.byref(arguments), 1)
        del used
        grad_weight, grad_bias = sums.sum(1, dtype=torch.float64)
        return grad_x, grad_u, grad_weight.to(weight.dtype), grad_bias.to(bias.dtype), None, None


def _describe(
    x: Tensor,
    u: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    inverse_std: Tensor,
    words: Tensor | None,
    scale: float,
    least: int,
) -> tuple[_Arguments, list[Tensor]]:
    """What forward and backward both take, and the tensors that must live as long."""
    used = [weight.detach().float().contiguous(), bias.detach().float().contiguous()]
    arguments = _Arguments(
        x=address(x),
        u=address(u),
        u_strides=strides(u),
        weight=address(used[0]),
        bias=address(used[1]),
        draws=address(words),
        mean=address(mean),
        inverse_std=address(inverse_std),
        tokens=len(x),
        heads=x.shape[1],
        width=x.shape[2],
        bins=max(1, min(MOST_BINS, len(x) // TOKENS_PER_BIN)),
        scale=scale,
        least=least,
        is_bfloat=is_bfloat((x, u)),
        threads=num_threads(),
    )
    return arguments, used
