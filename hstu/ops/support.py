"""Shapes and GPUs that the kernels of each backend support. Needs neither Triton nor CUTLASS. PyTorch supports all."""

import torch

from hstu.ops.kernels import OPERATORS, Backend, KernelShapes

WIDEST_HEAD = 256
WIDEST_ROW = 16384
WIDEST_VECTOR = 256
CUTLASS_HEAD_DIMS = (32, 64, 128, 256)
CUTLASS_CAPABILITY = (9, 0)
"""Compute capability of GPUs with CUTLASS kernels."""
MIN_TRITON_CAPABILITY = (8, 0)
"""First compute capability with bfloat16 products."""
_ON_CPUS_ONLY = ("l2_normalize", "pool_softmax_loss", "update_rows")
"""Operators that have kernels for CPUs alone, which serve all shapes."""
WITH_A_KERNEL = {
    Backend.CPU: ("attention", "norm_mul_dropout", "sampled_softmax_loss", *_ON_CPUS_ONLY),
    Backend.TRITON: tuple(operator for operator in OPERATORS if operator not in _ON_CPUS_ONLY),
    Backend.CUTLASS: ("attention",),
}
_DTYPES = {
    Backend.CPU: (torch.float32, torch.bfloat16),
    Backend.TRITON: (torch.bfloat16, torch.float16, torch.float32),
    Backend.CUTLASS: (torch.bfloat16, torch.float16),
}


def device_unsupported_reason(backend: Backend, capability: tuple[int, int]) -> str | None:
    """Why GPUs of this compute capability cannot run the kernels of ``backend``; None if they can."""
    own, least, only = (".".join(map(str, each)) for each in (capability, MIN_TRITON_CAPABILITY, CUTLASS_CAPABILITY))
    if backend is Backend.TRITON and capability < MIN_TRITON_CAPABILITY:
        return f"compute capability {own} < {least}"
    if backend is Backend.CUTLASS and capability != CUTLASS_CAPABILITY:
        return f"compute capability {own}: CUTLASS kernels are for {only}"
    return None


def unsupported_reason(backend: Backend, operator: str, shapes: KernelShapes) -> str | None:
    """Why ``backend`` has no kernel for ``operator`` at these shapes; None if it has one."""
    if operator not in WITH_A_KERNEL[backend]:
        return "no kernel"
    if operator in _ON_CPUS_ONLY:
        return None
    if operator == "sampled_softmax_loss":
        too_wide = shapes.item_dim > WIDEST_VECTOR
        return f"vectors of {shapes.item_dim} > {WIDEST_VECTOR} numbers" if too_wide else None
    if operator == "attention" and shapes.head_dim > WIDEST_HEAD and backend is not Backend.CUTLASS:
        return f"heads of {shapes.head_dim} > {WIDEST_HEAD} channels"
    inner = shapes.num_heads * shapes.head_dim
    row = {"add_layer_norm": shapes.hidden_size, "norm_mul_dropout": inner}.get(operator, 0)
    if row > WIDEST_ROW and backend is Backend.TRITON:
        return f"rows of {row} > {WIDEST_ROW} numbers"
    if backend is Backend.CUTLASS and shapes.has_bias:
        return "a relative bias"
    if backend is Backend.CUTLASS and shapes.has_window:
        return "NetworkArgs.max_attention_span"
    if backend is Backend.CUTLASS and shapes.has_ranges:
        return "ContextParallelArgs.context_parallel_size does not divide the heads"
    if shapes.dtype not in _DTYPES[backend]:
        return f"{shapes.dtype}".removeprefix("torch.")
    if backend is not Backend.CUTLASS or shapes.head_dim in CUTLASS_HEAD_DIMS:
        return None
    return f"heads of {shapes.head_dim} channels, not {', '.join(map(str, CUTLASS_HEAD_DIMS))}"
