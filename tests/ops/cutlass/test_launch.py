"""All CUTLASS kernels compile without a GPU, and docs/benchmarks/kernels lists them.

What a launch passes on and calls: values, and kernels that were compiled ahead.
"""

import ctypes
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from kernel_variants import Compiled, read_cutlass_kernel

pytest.importorskip("cutlass", reason="nvidia-cutlass-dsl is not installed: the CUTLASS kernels are NOT compiled here")

from hstu.ops.compile_ahead import compile_all
from hstu.ops.cutlass import attention, hopper, objects
from hstu.ops.cutlass.attention import Kernel, Variant
from hstu.ops.cutlass.objects import LaunchArguments
from hstu.ops.kernels import KernelShapes

TABLE = Path(__file__).resolve().parents[3] / "docs" / "benchmarks" / "kernels" / "cutlass.json"
CPU = torch.device("cpu")
VARIANT = Variant(Kernel.FORWARD, torch.bfloat16, 32)
THROUGH_SILU = Variant(Kernel.QUERIES, torch.bfloat16, 32, through_silu=True)


def check_arguments(function: Any, variant: Variant) -> None:
    """Compare our memory with the DSL's."""
    expected, _kept_alive = function.generate_execution_args(*attention._examples(variant))
    tensors = len(variant.elements)
    arguments = LaunchArguments(*attention._examples(variant))
    arguments.write(*[16] * tensors, *[8] * 2 * tensors, 16, *[1] * 5, *[1.0] * 2, 1, 0)
    ours, _ = function.generate_execution_args(*arguments.values)
    assert len(ours) == len(expected)
    is_narrow = [0] * (3 * tensors + 1) + [1] * 7 + [1, 0]
    for given, wanted, narrow in zip(ours, expected, is_narrow, strict=True):
        assert ctypes.string_at(given, 4 if narrow else 8) == ctypes.string_at(wanted, 4 if narrow else 8)


def test_a_launch_passes_on_what_the_dsl_makes_of_the_arguments() -> None:
    check_arguments(attention._compile(THROUGH_SILU), THROUGH_SILU)


@pytest.fixture(scope="module")
def carried(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The object file of VARIANT, compiled in another process and copied to the cache of another machine."""
    made, found = tmp_path_factory.mktemp("made"), tmp_path_factory.mktemp("found")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(made))
        jobs = attention.jobs(KernelShapes(32, 2, 64, 32, torch.bfloat16), 90, ["attention"])
        forward = [job for job in jobs if job.name == "forward_sm90 (32 channels)"]
        assert len(jobs) == 5 and [result.error for result in compile_all(forward, 2)] == [None]
        shutil.copytree(made, found, dirs_exist_ok=True)
        patch.setenv("XDG_CACHE_HOME", str(found))
        yield objects.object_file(VARIANT)


def test_a_launch_loads_the_carried_object(carried: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def compile_now(*_: object) -> Any:
        raise AssertionError("compiled again")

    monkeypatch.setattr(attention, "_compile", compile_now)
    check_arguments(attention.compiled.__wrapped__(VARIANT)[0], VARIANT)
    attention.save_compiled(VARIANT)


def test_a_carried_object_has_the_machine_code_of_a_compilation_at_the_launch(carried: Path) -> None:
    assert attention.compile_ahead(VARIANT)[1] in carried.read_bytes()


def test_an_object_of_other_sources_or_of_another_kernel_is_not_loaded(
    carried: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert objects.load(VARIANT) is not None
    assert objects.load(Variant(Kernel.FORWARD, torch.float16, 32)) is None
    monkeypatch.setattr(objects, "_compiler", lambda: "another version")
    assert objects.load(VARIANT) is None


def test_a_damaged_object_is_compiled_again(carried: Path) -> None:
    whole = carried.read_bytes()
    try:
        carried.write_bytes(whole[: len(whole) // 2])
        assert objects.load(VARIANT) is None
    finally:
        carried.write_bytes(whole)


# --- every kernel, compiled ---


def compile_variant(variant: Variant) -> Compiled:
    """What the machine code of a kernel needs."""
    return read_cutlass_kernel(variant, *attention.compile_ahead(variant))


def test_a_kernel_compiles_without_a_gpu_and_without_spills() -> None:
    compiled = compile_variant(VARIANT)
    assert compiled.spill_instructions == compiled.stack_bytes == 0 < compiled.wgmma


def test_the_table_has_every_kernel_and_no_spills() -> None:
    rows = json.loads(TABLE.read_text())
    listed = [(row["kernel"], row["head_dim"]) for row in rows]
    assert listed == [(attention.kernel_name(v), v.head_dim) for v in attention.variants()]
    assert not any(row["spill_instructions"] or row["stack_bytes"] for row in rows)


@pytest.mark.parametrize("variant", attention.variants((torch.bfloat16,)))
def test_threads_that_compute_ask_for_no_more_registers_than_the_others_give_up(variant: Variant) -> None:
    """Else ``setmaxnreg.inc`` waits for ever. A kernel of 384 threads starts with 168 per thread."""
    to_load, to_compute = hopper.registers(variant.shape)
    assert hopper.WARPGROUP * (168 - to_load) >= hopper.CONSUMERS * hopper.WARPGROUP * (to_compute - 168)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_kernel_compiles_without_spills(dtype: torch.dtype) -> None:
    for variant in attention.variants((dtype,)):
        compiled = compile_variant(variant)  # raises where registers or shared memory run out
        assert compiled.spill_instructions == compiled.stack_bytes == 0, compiled
