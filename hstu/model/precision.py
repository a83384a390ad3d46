"""Compute dtype of the dense model."""

from __future__ import annotations

import torch

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
"""NetworkArgs.dtype_str → dtype."""


def mixed_precision(dtype_str: str, device_type: str) -> torch.autocast:
    """A context in which matrix products run in this dtype; parameters stay float32.

    "float32" disables an enclosing autocast.
    """
    dtype = DTYPES[dtype_str]
    if dtype == torch.float32:
        return torch.autocast(device_type, enabled=False)
    return torch.autocast(device_type, dtype=dtype)
