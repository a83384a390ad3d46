"""Shapes and GPUs that the CUTLASS kernels support; imports without CUTLASS. Triton serves the others."""

from __future__ import annotations

import torch

from hstu.ops.kernels import KernelShapes

HEAD_DIMS = (32, 64, 128, 256)
BIAS_HEAD_DIMS = (32, 64, 128)
"""With a relative bias: wider heads leave no registers and shared memory for the sums of its gradients."""
DTYPES = (torch.bfloat16, torch.float16)
CAPABILITIES = {(8, 0): 80, (9, 0): 90}
"""Compute capability → number of its architecture."""


def device_unsupported_reason(capability: tuple[int, int]) -> str | None:
    """Why GPUs of this compute capability cannot run the kernels; None if they can."""
    if capability in CAPABILITIES:
        return None
    served = " and ".join(".".join(map(str, known)) for known in CAPABILITIES)
    return f"compute capability {'.'.join(map(str, capability))}: CUTLASS kernels are for {served}"


def unsupported_reason(operator: str, shapes: KernelShapes) -> str | None:
    """Why no CUTLASS kernel can serve ``operator`` at these shapes; None if one can."""
    if operator != "attention":
        return "no kernel"
    if shapes.has_window:
        return "NetworkArgs.max_attention_span"
    return head_unsupported_reason(shapes.head_dim, shapes.dtype, shapes.has_bias)


def head_unsupported_reason(head_dim: int, dtype: torch.dtype, has_bias: bool) -> str | None:
    """Why no kernel serves heads of ``head_dim`` channels of a dtype; None if one does."""
    if dtype not in DTYPES:
        return f"{dtype}".removeprefix("torch.")
    served = BIAS_HEAD_DIMS if has_bias else HEAD_DIMS
    if head_dim in served:
        return None
    with_bias = " with a relative bias" if has_bias else ""
    return f"heads of {head_dim} channels{with_bias}, not {', '.join(map(str, served))}"
