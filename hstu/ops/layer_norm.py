"""LayerNorm over the last dimension, rounded to the type that follows. Dispatcher."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hstu.ops.backends import Backend
from hstu.ops.triton import coverage as triton_coverage


def layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    dtype: torch.dtype | None = None,
    backend: Backend = Backend.PYTORCH,
) -> Tensor:
    """x [T, D] → [T, D] of ``dtype``, or of what PyTorch gives where that is None. weight, bias: [D]."""
    if backend.uses_triton and triton_coverage.norm_gap(x.shape[1], x.dtype) is None:
        from hstu.ops.triton.norm import layer_norm as triton

        return triton(x, weight, bias, eps, dtype)
    y = F.layer_norm(x, weight.shape, weight, bias, eps)
    return y if dtype is None else y.to(dtype)
