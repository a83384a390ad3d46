"""Compute dtype of the dense model."""

from __future__ import annotations

import torch

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
"""NetworkArgs.dtype_str → dtype."""


def mixed_precision(dtype_str: str, device_type: str) -> torch.autocast:
    """Run matrix products in this dtype; "float32" disables an enclosing autocast. Parameters stay float32."""
    dtype = DTYPES[dtype_str]
    if dtype == torch.float32:
        return torch.autocast(device_type, enabled=False)
    return torch.autocast(device_type, dtype=dtype)
