"""What the CUTLASS kernels do not do, known from the model alone: Triton does that, and the log says so."""

from __future__ import annotations

import torch

HEAD_DIMS = (32, 64, 128, 256)
DTYPES = (torch.bfloat16, torch.float16)
CAPABILITIES = {(8, 0): 80, (9, 0): 90}
"""Compute capabilities that there are kernels for, and by what name."""


def attention_gap(head_dim: int, dtype: torch.dtype, *, has_bias: bool) -> str | None:
    """Why hstu_attention has no CUTLASS kernel for such heads; None: it has one."""
    if has_bias:
        return "relative bias"
    if head_dim not in HEAD_DIMS:
        return f"heads of {head_dim} channels, not {', '.join(map(str, HEAD_DIMS))}"
    return None if dtype in DTYPES else f"{dtype}".removeprefix("torch.")
