"""What the C++ kernels do not do, known from the model alone: PyTorch does that, and the log says so at the start."""

from __future__ import annotations

import torch

WIDEST_ROW = 256
_TYPES = (torch.float32, torch.bfloat16)


def attention_gap(head_dim: int, dtype: torch.dtype) -> str | None:
    """Why hstu_attention has no C++ kernel for such heads; None: it has one."""
    if head_dim > WIDEST_ROW:
        return f"heads of {head_dim} > {WIDEST_ROW} channels"
    return type_gap(dtype)


def sampled_softmax_gap(width: int, dtype: torch.dtype) -> str | None:
    """Why sampled_softmax_loss has no C++ kernel for vectors of this width and type of arithmetic."""
    if width > WIDEST_ROW:
        return f"vectors of {width} > {WIDEST_ROW} numbers"
    return None if dtype == torch.float32 else f"{dtype}".removeprefix("torch.")


def type_gap(dtype: torch.dtype) -> str | None:
    """Why other kernels do not serve this type."""
    return None if dtype in _TYPES else f"{dtype}".removeprefix("torch.")
