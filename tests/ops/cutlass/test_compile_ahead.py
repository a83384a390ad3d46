"""All CUTLASS kernels compile without a GPU, and docs/benchmarks/kernels lists them."""

import json
from pathlib import Path

import pytest
import torch
from kernel_variants import Compiled, read_cutlass_kernel

pytest.importorskip("cutlass", reason="nvidia-cutlass-dsl is not installed: the CUTLASS kernels are NOT compiled here")

from hstu.ops.cutlass import hopper
from hstu.ops.cutlass.attention import Kernel, Variant, compile_ahead, variants
from hstu.ops.cutlass.compile_ahead import kernel_name

TABLE = Path(__file__).resolve().parents[3] / "docs" / "benchmarks" / "kernels" / "cutlass.json"


def compile_variant(variant: Variant) -> Compiled:
    """What the machine code of a kernel needs."""
    return read_cutlass_kernel(variant, *compile_ahead(variant))


@pytest.mark.parametrize("capability", [80, 90])
def test_a_kernel_compiles_without_a_gpu_and_without_spills(capability: int) -> None:
    compiled = compile_variant(Variant(Kernel.FORWARD, torch.bfloat16, 32, capability))
    assert compiled.spill_instructions == compiled.stack_bytes == 0
    assert (compiled.wgmma > 0, compiled.mma > 0) == (capability == 90, capability == 80)


def test_the_table_has_every_kernel_and_no_spills() -> None:
    rows = json.loads(TABLE.read_text())
    listed = [(row["kernel"], row["head_dim"]) for row in rows]
    assert listed == [(kernel_name(v), v.head_dim) for v in variants()]
    assert not any(row["spill_instructions"] or row["stack_bytes"] for row in rows)


@pytest.mark.parametrize("variant", variants((torch.bfloat16,)))
def test_threads_that_compute_ask_for_no_more_registers_than_the_others_give_up(variant: Variant) -> None:
    """Else ``setmaxnreg.inc`` waits for ever. A kernel of 384 threads starts with 168 per thread."""
    to_load, to_compute = hopper.registers(variant.shape)
    assert hopper.WARPGROUP * (168 - to_load) >= hopper.CONSUMERS * hopper.WARPGROUP * (to_compute - 168)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_kernel_compiles_without_spills(dtype: torch.dtype) -> None:
    for variant in variants((dtype,)):
        compiled = compile_variant(variant)  # raises where registers or shared memory run out
        assert compiled.spill_instructions == compiled.stack_bytes == 0, compiled
