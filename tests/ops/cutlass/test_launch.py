"""All CUTLASS kernels compile without a GPU, and docs/benchmarks/kernels lists them.

What a launch passes on and calls: values, tables of a relative bias, and kernels that were compiled ahead.
"""

import ctypes
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from kernel_variants import Compiled, read_cutlass_kernel

pytest.importorskip("cutlass", reason="nvidia-cutlass-dsl is not installed: the CUTLASS kernels are NOT compiled here")

from hstu.ops.compile_ahead import compile_all
from hstu.ops.cutlass import attention, compile_ahead, hopper, objects
from hstu.ops.cutlass.attention import Kernel, Variant
from hstu.ops.cutlass.bias import CELL_BITS, NUM_CELLS, BiasArguments, BiasSums, cells
from hstu.ops.cutlass.objects import LaunchArguments
from hstu.ops.kernels import AttentionConfig, AttentionInputs, Gradient, KernelShapes, RelativeBias
from hstu.ops.layout import NUM_TIME_BUCKETS, bucket_thresholds, time_buckets
from hstu.ops.self_check import small_layout

TABLE = Path(__file__).resolve().parents[3] / "docs" / "benchmarks" / "kernels" / "cutlass.json"
CPU = torch.device("cpu")
VARIANT = Variant(Kernel.FORWARD, torch.bfloat16, 32)
WITH_BIAS = Variant(Kernel.QUERIES, torch.bfloat16, 32, has_bias=True, through_silu=True)


def check_arguments(function: Any, variant: Variant, of_bias: list[float], narrow_of_bias: list[int]) -> None:
    """Compare our memory with the DSL's."""
    expected, _kept_alive = function.generate_execution_args(*attention._examples(variant))
    tensors = len(variant.elements)
    arguments = LaunchArguments(*attention._examples(variant))
    arguments.write(*[16] * tensors, *[8] * 2 * tensors, 16, *[1] * 5, *[1.0] * 2, *of_bias, 1, 0)
    ours, _ = function.generate_execution_args(*arguments.values)
    assert len(ours) == len(expected)
    is_narrow = [0] * (3 * tensors + 1) + [1] * 7 + narrow_of_bias + [1, 0]
    for given, wanted, narrow in zip(ours, expected, is_narrow, strict=True):
        assert ctypes.string_at(given, 4 if narrow else 8) == ctypes.string_at(wanted, 4 if narrow else 8)


def test_a_launch_passes_on_what_the_dsl_makes_of_the_arguments() -> None:
    check_arguments(attention._compile(WITH_BIAS), WITH_BIAS, [16] * 9 + [1, 1.0], [0] * 9 + [1, 1])


def test_without_any_token_the_gradients_of_a_bias_are_zeros() -> None:
    layout = small_layout(CPU, (0, 0), (0, 0), num_contextuals=0)
    empty = torch.empty(layout.num_tokens, 2, 64, dtype=torch.bfloat16)
    bias, config = RelativeBias(torch.ones(2 * 9 - 1), torch.ones(NUM_TIME_BUCKETS)), AttentionConfig(1.0, 1)
    inputs = AttentionInputs(empty, empty, empty, layout, config, bias)
    grads = attention.backward(empty, inputs, (Gradient(empty), Gradient(empty), Gradient(empty)))
    assert grads is not None
    assert not grads.position_weight.any() and not grads.time_weight.any()
    assert grads.position_weight.shape == bias.position_weight.shape


@pytest.fixture(scope="module")
def carried(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The object file of VARIANT, compiled in another process and copied to the cache of another machine."""
    made, found = tmp_path_factory.mktemp("made"), tmp_path_factory.mktemp("found")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(made))
        jobs = compile_ahead.jobs(KernelShapes(32, 2, 64, 32, torch.bfloat16), 90, ["attention"])
        forward = [job for job in jobs if job.name == "forward_sm90 (32 channels)"]
        assert len(jobs) == 3 and [result.error for result in compile_all(forward, 2)] == [None]
        shutil.copytree(made, found, dirs_exist_ok=True)
        patch.setenv("XDG_CACHE_HOME", str(found))
        yield objects.object_file(VARIANT)


def test_a_launch_loads_the_carried_object(carried: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def compile_now(*_: object) -> Any:
        raise AssertionError("compiled again")

    monkeypatch.setattr(attention, "_compile", compile_now)
    check_arguments(attention.compiled.__wrapped__(VARIANT)[0], VARIANT, [], [])
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


def kernel_buckets(differences: torch.Tensor) -> torch.Tensor:
    """Buckets by the arithmetic of ``hstu.ops.cutlass.bias.bucket_of``."""
    thresholds, below = cells(CPU)
    bits = differences.double().view(torch.int64) & 0x7FFFFFFFFFFFFFFF
    cell = ((bits >> 32) - 0x3FF00000).clamp(min=0) >> (20 - CELL_BITS)
    return below[cell] + (bits >= thresholds[cell]).int()


def test_the_cell_of_a_time_difference_gives_its_bucket_exactly() -> None:
    exact = torch.arange(-100_000, 100_000)
    thresholds = bucket_thresholds(CPU)
    borders = thresholds[thresholds < 2**52]
    drawn = torch.from_numpy(np.exp(np.random.default_rng(0).uniform(0, 36, 200_000)).astype(np.int64))
    for differences in (exact, borders - 1, borders, borders + 1, -borders, drawn, torch.tensor([2**53])):
        assert torch.equal(kernel_buckets(differences), time_buckets(differences).int())


def test_every_cell_lies_in_two_buckets_at_most() -> None:
    _, below = cells(CPU)
    assert len(below) == NUM_CELLS and int(below.diff()[1 << CELL_BITS :].max()) <= 1


def test_distances_beyond_the_table_have_its_outermost_weights_and_gradients() -> None:
    layout = small_layout(CPU)
    longest = int(layout.seqlens.max())
    bias = RelativeBias(torch.arange(2.0 * 10 - 1), torch.zeros(NUM_TIME_BUCKETS))
    arguments = BiasArguments.of(bias, layout)
    assert arguments.center == longest and len(arguments.position_weight) == 2 * longest + 1
    assert arguments.position_weight[longest - 9 : longest + 10].tolist() == list(range(19))
    assert arguments.position_weight[0] == 0 and arguments.position_weight[-1] == 18
    sums = BiasSums(torch.ones(2 * longest + 1, dtype=torch.int64), torch.zeros(128, dtype=torch.int64), torch.ones(1))
    gradients = sums.gradients(bias, AttentionConfig(1.0, 1)).position_weight
    assert gradients.tolist() == [longest - 8] + [1] * 17 + [longest - 8]


def test_the_table_of_a_model_is_read_as_it_is() -> None:
    bias = RelativeBias(torch.randn(2 * 1000 - 1), torch.randn(NUM_TIME_BUCKETS))
    arguments = BiasArguments.of(bias, small_layout(CPU))
    assert arguments.center == 999 and arguments.position_weight.data_ptr() == bias.position_weight.data_ptr()


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
    assert listed == [(compile_ahead.kernel_name(v), v.head_dim) for v in attention.variants()]
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
