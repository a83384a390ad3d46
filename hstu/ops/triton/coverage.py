"""What the Triton kernels do not do, known from the model alone: PyTorch does that, and the log says so."""

from __future__ import annotations

import torch

WIDEST_HEAD = 256
WIDEST_ROW = 16384
WIDEST_VECTOR = 256
LEAST_CAPABILITY = (8, 0)
"""Compute capability from which on GPUs multiply bfloat16."""
_TYPES = (torch.bfloat16, torch.float16, torch.float32)


def attention_gap(head_dim: int, dtype: torch.dtype) -> str | None:
    """Why hstu_attention has no Triton kernel for such heads; None: it has one."""
    if head_dim > WIDEST_HEAD:
        return f"heads of {head_dim} > {WIDEST_HEAD} channels"
    return type_gap(dtype)


def norm_gap(width: int, dtype: torch.dtype) -> str | None:
    """Why norms over rows of this width have no Triton kernel."""
    if width > WIDEST_ROW:
        return f"rows of {width} > {WIDEST_ROW} numbers"
    return type_gap(dtype)


def softmax_gap(width: int, dtype: torch.dtype) -> str | None:
    """Why the softmax losses have no Triton kernel for vectors of this width and type of arithmetic."""
    if width > WIDEST_VECTOR:
        return f"vectors of {width} > {WIDEST_VECTOR} numbers"
    return None if dtype == torch.float32 else f"{dtype}".removeprefix("torch.")


def type_gap(dtype: torch.dtype) -> str | None:
    """Why other kernels do not serve this type."""
    return None if dtype in _TYPES else f"{dtype}".removeprefix("torch.")
