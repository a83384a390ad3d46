"""The gated norm by C++ kernels: see csrc/layer.cpp. Drops the same elements as the PyTorch kernel."""

import ctypes
from enum import IntEnum

import torch
from torch import Tensor

from hstu.ops.cpu.build import Arguments, fields, float32, int32, int64, is_bfloat, library, pointer, strides
from hstu.ops.dropout import draw, scale_of
from hstu.ops.kernels import GateInputs, Gradient

TOKENS_PER_BIN = 256
MOST_BINS = 64
WIDEST_VECTOR = 16
"""Numbers per AVX-512 register. Narrower heads do not fill one, so they are first joined into one head."""
_CPU = torch.device("cpu")


class _Pass(IntEnum):
    """Mirrors HstuGatePass of csrc/layer.cpp."""

    FORWARD = 0
    MEASURE = 1
    APPLY = 2
    BACKWARD = 3
    SUMS = 4
    ROWS = 5


class _Arguments(Arguments):
    """HstuGate of csrc/layer.cpp."""

    _fields_ = fields(
        (pointer, "x u grad_out"),
        (strides, "u_strides grad_u_strides"),
        (pointer, "weight bias kept mean rstd along_one along_row out grad_x grad_u grad_weight grad_bias"),
        (int64, "tokens heads width bins"),
        (float32, "eps scale"),
        (int32, "is_bfloat threads"),
    )


def forward(inputs: GateInputs) -> tuple[Tensor, Tensor, Tensor | None]:
    """See :data:`hstu.ops.kernels.GateForward`. float32 or bfloat16; the dropout mask is bool [T, H · d]."""
    x, config = inputs.x, inputs.config
    kept = draw(x.flatten(1).shape, config.dropout, _CPU, config.comm.dropout_stream) if config.dropout > 0 else None
    statistics, out = torch.empty(2, len(x)), torch.empty(len(x), len(inputs.weight), dtype=x.dtype)
    arguments = _prepare(inputs, _joined(inputs.u), statistics, kept)
    arguments.set(out=out)
    if config.comm.tp_size == 1:
        library().hstu_gate(ctypes.byref(arguments), _Pass.FORWARD)
    else:
        library().hstu_gate(ctypes.byref(arguments), _Pass.MEASURE)
        statistics.copy_(config.combine_statistics(statistics))
        library().hstu_gate(ctypes.byref(arguments), _Pass.APPLY)
    return out, statistics, kept


def backward(
    grad: Tensor, inputs: GateInputs, statistics: Tensor, dropout_mask: Tensor | None, grad_u: Gradient
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See :data:`hstu.ops.kernels.GateBackward`; without ``before_silu``."""
    x, u, weight, bias, config = inputs.x, _joined(inputs.u), inputs.weight, inputs.bias, inputs.config
    target = grad_u.target
    joined_grad_u = target if target.shape == u.shape else torch.empty_like(u)
    arguments = _prepare(inputs, u, statistics, dropout_mask)
    out, grad_x = torch.empty(len(x), len(weight), dtype=x.dtype), torch.empty(x.shape, dtype=x.dtype)
    sums, along = torch.zeros(2, arguments.bins, len(weight)), torch.empty(2, len(x))
    arguments.set(grad_out=grad.contiguous(), out=out, grad_x=grad_x, grad_u=joined_grad_u)
    arguments.set(grad_weight=sums[0], grad_bias=sums[1], along_one=along[0], along_row=along[1])
    if config.comm.tp_size == 1:
        library().hstu_gate(ctypes.byref(arguments), _Pass.BACKWARD)
    else:
        library().hstu_gate(ctypes.byref(arguments), _Pass.SUMS)
        along.copy_(config.comm.all_gather(along).mean(0))
        library().hstu_gate(ctypes.byref(arguments), _Pass.ROWS)
    if joined_grad_u is not target:
        target.copy_(joined_grad_u.view(target.shape))
    grad_weight, grad_bias = sums.sum(1, dtype=torch.float64)
    return out, grad_x, grad_weight.to(weight.dtype), grad_bias.to(bias.dtype)


def _joined(u: Tensor) -> Tensor:
    """``u`` as one head of H · d channels if its heads are narrow."""
    return u.reshape(len(u), 1, u.shape[1] * u.shape[2]) if u.shape[2] < WIDEST_VECTOR else u


def _prepare(inputs: GateInputs, u: Tensor, statistics: Tensor, kept: Tensor | None) -> _Arguments:
    """Arguments that forward and backward share. u: ``inputs.u`` joined."""
    x, weight, bias, config = inputs.x, inputs.weight, inputs.bias, inputs.config
    arguments = _Arguments(
        tokens=len(x),
        heads=u.shape[1],
        width=u.shape[2],
        bins=max(1, min(MOST_BINS, len(x) // TOKENS_PER_BIN)),
        eps=config.eps,
        scale=scale_of(config.dropout, _CPU),
        is_bfloat=is_bfloat((x, u)),
    )
    arguments.set(x=x.contiguous(), u=u, kept=kept, mean=statistics[0], rstd=statistics[1])
    arguments.set(weight=weight.detach().float().contiguous(), bias=bias.detach().float().contiguous())
    return arguments
