"""Compile kernels for a GPU that is not there, and read what came out."""

from __future__ import annotations

from hstu.ops.cutlass.kernels import Variant, compile_ahead
from hstu.ops.triton.compile_ahead import Compiled, read_cubin

LARGEST_SHARED_BYTES = {80: 166912, 90: 232448}
"""What a CTA can have on an A100 and on an H100."""
BARRIER_BYTES = 1024
"""The mbarriers, before buffers that are aligned to as much."""


def compile_variant(variant: Variant) -> Compiled:
    """Compile a kernel and read its machine code.

    Raises RuntimeError where it needs more shared memory than the GPU has, or where the compiler made the asynchronous
    products wait for each other, which it does when registers run out.
    """
    ptx, cubin = compile_ahead(variant)
    shape = variant.shape
    stationary = 1 if variant.num_inputs == 3 else 2
    numbers = (stationary * shape.block + 2 * shape.stages * shape.tile) * shape.head_dim
    compiled = Compiled(
        kernel=f"{variant.kernel.value}_sm{variant.capability}",
        capability=variant.capability,
        config=f"{shape.block} × {shape.tile}",
        shared_bytes=numbers * variant.dtype.itemsize + (BARRIER_BYTES if variant.capability == 90 else 0),
        **read_cubin(cubin),
    )
    if compiled.shared_bytes > LARGEST_SHARED_BYTES[variant.capability]:
        raise RuntimeError(f"{variant}: {compiled.shared_bytes} bytes of shared memory are too many")
    if compiled.wgmma_waits > 2 * ptx.count("wgmma.wait_group"):
        raise RuntimeError(f"{variant}: the compiler lets warp-group products wait for each other")
    return compiled
