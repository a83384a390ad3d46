"""Compile kernels without a GPU, and read registers, spills and instructions from their machine code."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from hstu.ops.compile_ahead import Job
from hstu.ops.cutlass.attention import Kernel, Variant, compile_ahead, save_compiled, variants
from hstu.ops.cutlass.bias import table_bytes
from hstu.ops.cutlass.support import unsupported_reason
from hstu.ops.kernels import KernelShapes
from hstu.ops.triton.compile_ahead import Compiled, read_cubin

LARGEST_SHARED_BYTES = {80: 166912, 90: 232448}
"""Most shared memory of a CTA on an A100 and on an H100."""
BARRIER_BYTES = 1024
"""Space of the mbarriers: the buffers behind them are aligned to 1024 bytes."""


def jobs(shapes: KernelShapes | None, capability: int, operators: Sequence[str]) -> list[Job]:
    """The kernels that serve these shapes; none if Triton serves them."""
    if "attention" not in operators or shapes is None or unsupported_reason("attention", shapes) is not None:
        return []
    needed = (shapes.has_bias, capability)
    return [
        Job(f"{kernel_name(variant)} ({variant.head_dim} channels)", partial(save_compiled, variant))
        for variant in variants((shapes.dtype,), (shapes.head_dim,))
        if (variant.has_bias, variant.capability) == needed
    ]


def kernel_name(variant: Variant) -> str:
    """The name of a kernel in tables."""
    return f"{variant.kernel.value}{'_with_bias' if variant.has_bias else ''}_sm{variant.capability}"


def compile_variant(variant: Variant) -> Compiled:
    """Compile a kernel and read its machine code.

    Raises:
        RuntimeError: the kernel needs more shared memory than the GPU has, or the compiler has serialized the
            asynchronous products, as it does when registers run out.
    """
    ptx, cubin = compile_ahead(variant)
    shape = variant.shape
    stationary = 1 if variant.num_inputs == 3 else 2
    numbers = (stationary * shape.block + 2 * shape.stages * shape.tile) * shape.head_dim
    of_slopes = shape.stages * shape.block * shape.tile * 2 if variant.is_split else 0
    of_bias = table_bytes(shape.tile, variant.kernel is Kernel.QUERIES) if variant.has_bias else 0
    compiled = Compiled(
        kernel=kernel_name(variant),
        capability=variant.capability,
        config=f"{shape.block} × {shape.tile}",
        shared_bytes=numbers * variant.dtype.itemsize
        + of_slopes
        + of_bias
        + (BARRIER_BYTES if variant.capability == 90 else 0),
        **read_cubin(cubin),
    )
    if compiled.shared_bytes > LARGEST_SHARED_BYTES[variant.capability]:
        raise RuntimeError(
            f"{variant}: {compiled.shared_bytes} bytes of shared memory exceed "
            f"{LARGEST_SHARED_BYTES[variant.capability]}"
        )
    if compiled.wgmma_waits > 2 * ptx.count("wgmma.wait_group"):
        raise RuntimeError(f"{variant}: the compiler has serialized the products of warp groups")
    return compiled
