"""Shapes and GPUs that the Triton kernels support, importable without Triton. PyTorch serves the rest."""

from __future__ import annotations

import torch

from hstu.ops.kernels import KernelShapes

WIDEST_HEAD = 256
WIDEST_ROW = 16384
WIDEST_VECTOR = 256
MIN_CAPABILITY = (8, 0)
"""First compute capability with bfloat16 products."""
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def device_unsupported_reason(capability: tuple[int, int]) -> str | None:
    """Why GPUs of this compute capability cannot run the kernels; None: they can."""
    if capability >= MIN_CAPABILITY:
        return None
    return f"compute capability {'.'.join(map(str, capability))} < {'.'.join(map(str, MIN_CAPABILITY))}"


def unsupported_reason(operator: str, shapes: KernelShapes) -> str | None:
    """Why no Triton kernel can serve ``operator`` at these shapes; None: one can."""
    if operator in ("l2_normalize", "update_rows"):
        return "no kernel"
    if operator in ("pool_softmax_loss", "sampled_softmax_loss"):
        too_wide = shapes.item_dim > WIDEST_VECTOR
        return f"vectors of {shapes.item_dim} > {WIDEST_VECTOR} numbers" if too_wide else None
    if operator == "attention" and shapes.head_dim > WIDEST_HEAD:
        return f"heads of {shapes.head_dim} > {WIDEST_HEAD} channels"
    inner = shapes.num_heads * shapes.head_dim
    row = {"add_layer_norm": shapes.hidden_size, "norm_mul_dropout": inner}.get(operator, 0)
    if row > WIDEST_ROW:
        return f"rows of {row} > {WIDEST_ROW} numbers"
    return None if shapes.dtype in _DTYPES else f"{shapes.dtype}".removeprefix("torch.")
