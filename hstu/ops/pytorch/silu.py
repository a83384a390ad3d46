"""The end of a backward in plain PyTorch: the gradient of u, v, q or k, or of what it is the SiLU of."""

from __future__ import annotations

import torch
from torch import Tensor

from hstu.ops.kernels import Preactivation


def write_gradient(grad: Tensor, target: Tensor, before_silu: Preactivation | None) -> None:
    """Write the gradient of an activation [T, H, d], or that of ``before_silu``, to ``target`` and ``grad_shift``.

    grad: of float32 at least.
    """
    if before_silu is not None:
        grad = torch.ops.aten.silu_backward(grad, before_silu.value.to(grad.dtype))
        before_silu.grad_shift.copy_(grad.sum(0))
    target.copy_(grad)
