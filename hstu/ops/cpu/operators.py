"""Operators that have C++ kernels, and the shapes that these support. PyTorch serves the others."""

from __future__ import annotations

from typing import Any

import torch

from hstu.ops.cpu import attention, norm_mul_dropout, row_update, softmax_loss
from hstu.ops.kernels import AttentionKernels, GateKernels, KernelShapes

WIDEST_ROW = 256
DTYPES = (torch.float32, torch.bfloat16)

OPERATORS: dict[str, Any] = {
    "attention": AttentionKernels(attention.forward, attention.backward, differentiates_silu=False),
    "norm_mul_dropout": GateKernels(norm_mul_dropout.forward, norm_mul_dropout.backward, differentiates_silu=False),
    "sampled_softmax_loss": softmax_loss.SampledSoftmaxLoss.apply,
    "pool_softmax_loss": softmax_loss.PoolSoftmaxLoss.apply,
    "l2_normalize": softmax_loss.l2_normalize,
    "update_rows": row_update.update_rows,
}


def unsupported_reason(operator: str, shapes: KernelShapes) -> str | None:
    """Why no C++ kernel can serve ``operator`` at these shapes; None if one can."""
    if operator not in OPERATORS:
        return "no kernel"
    if operator == "attention" and shapes.head_dim > WIDEST_ROW:
        return f"heads of {shapes.head_dim} > {WIDEST_ROW} channels"
    if operator == "sampled_softmax_loss" and shapes.item_dim > WIDEST_ROW:
        return f"vectors of {shapes.item_dim} > {WIDEST_ROW} numbers"
    if operator in ("attention", "norm_mul_dropout") and shapes.dtype not in DTYPES:
        return f"{shapes.dtype}".removeprefix("torch.")
    return None
