"""List the CUTLASS kernels to compile before a run."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from hstu.ops.compile_ahead import Job
from hstu.ops.cutlass.attention import Variant, save_compiled, variants
from hstu.ops.kernels import Backend, KernelShapes
from hstu.ops.support import CUTLASS_CAPABILITY, unsupported_reason


def jobs(shapes: KernelShapes | None, capability: int, operators: Sequence[str]) -> list[Job]:
    """Compile jobs for the kernels that serve these shapes; empty if Triton serves them.

    Backward kernels also without SiLU, as context parallelism and benchmarks launch them.
    """
    is_other = divmod(capability, 10) != CUTLASS_CAPABILITY or "attention" not in operators
    if is_other or shapes is None or unsupported_reason(Backend.CUTLASS, "attention", shapes):
        return []
    fused = list(variants((shapes.dtype,), (shapes.head_dim,)))
    without_silu = [replace(variant, through_silu=False) for variant in fused if variant.through_silu]
    return [
        Job(f"{kernel_name(variant)} ({variant.head_dim} channels)", partial(save_compiled, variant))
        for variant in (*fused, *without_silu)
    ]


def kernel_name(variant: Variant) -> str:
    """Kernel name for tables."""
    return f"{variant.kernel.value}_sm90"
