"""Compute type of the dense model."""

from __future__ import annotations

import torch

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
"""NetworkArgs.dtype_str → type."""


def mixed_precision(dtype_str: str, device_type: str) -> torch.autocast:
    """A context in which matrix products run in this type; parameters and the residual stream stay float32.

    With "float32" it turns an enclosing autocast off.
    """
    dtype = DTYPES[dtype_str]
    if dtype == torch.float32:
        return torch.autocast(device_type, enabled=False)
    return torch.autocast(device_type, dtype=dtype)
