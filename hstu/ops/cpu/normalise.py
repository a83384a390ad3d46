"""See :mod:`hstu.ops.normalise`; the arithmetic is in csrc/layer.cpp."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hstu.ops.cpu.library import address, float32, int32, int64, library, num_threads, pointer


class _Arguments(ctypes.Structure):
    """Mirrors HstuUnit of csrc/layer.cpp: same names, same order."""

    _fields_ = [  # ctypes wants a plain list
        *((name, pointer) for name in ("x", "unit", "grad_out", "out", "norms", "grad_x")),
        *((name, int64) for name in ("rows", "width")),
        ("eps", float32),
        ("threads", int32),
    ]


def l2_normalise(vectors: Tensor, eps: float) -> Tensor:
    """See :func:`hstu.ops.normalise.l2_normalise`. float32."""
    unit: Tensor = _Unit.apply(vectors, eps)
    return unit


class _Unit(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float) -> Tensor:
        x, out, norms = x.contiguous(), torch.empty(x.shape), torch.empty(len(x))
        arguments = _Arguments(x=address(x), out=address(out), norms=address(norms))
        _run(arguments, x, eps, is_backward=False)
        ctx.save_for_backward(out, norms)
        ctx.eps = eps
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, None]:
        unit, norms = ctx.saved_tensors
        grad_out, grad_x = grad_out.contiguous(), torch.empty(unit.shape)
        arguments = _Arguments(
            unit=address(unit), grad_out=address(grad_out), norms=address(norms), grad_x=address(grad_x)
        )
        _run(arguments, unit, ctx.eps, is_backward=True)
        return grad_x, None


def _run(arguments: _Arguments, rows: Tensor, eps: float, is_backward: bool) -> None:
    arguments.rows, arguments.width = rows.shape
    arguments.eps, arguments.threads = eps, num_threads()
    library().hstu_unit(ctypes.byref(arguments), int(is_backward))
