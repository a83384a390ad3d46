"""What a launch calls: the values that the DSL would pass on, and kernels that were compiled ahead."""

import ctypes
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("cutlass", reason="nvidia-cutlass-dsl is not installed: the CUTLASS kernels are NOT compiled here")

from hstu.ops.compile_ahead import compile_all
from hstu.ops.cutlass import attention, compile_ahead, objects
from hstu.ops.cutlass.attention import Kernel, Variant
from hstu.ops.cutlass.objects import LaunchArguments
from hstu.ops.kernels import AttentionConfig, AttentionInputs, Gradient, KernelShapes, RelativeBias
from hstu.ops.layout import NUM_TIME_BUCKETS
from hstu.ops.self_check import small_layout

VARIANT = Variant(Kernel.FORWARD, torch.bfloat16, 32, 80)
WITH_BIAS = Variant(Kernel.QUERIES, torch.bfloat16, 32, 80, has_bias=True, through_silu=True)


def check_arguments(function: Any, variant: Variant, of_bias: list[float], narrow_of_bias: list[int]) -> None:
    """Compare the memory of ours with that of the DSL."""
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
    layout = small_layout(torch.device("cpu"), (0, 0), (0, 0), num_contextuals=0)
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
        jobs = compile_ahead.jobs(KernelShapes(32, 2, 64, 32, torch.bfloat16), 80, ["attention"])
        forward = [job for job in jobs if job.name == "forward_sm80 (32 channels)"]
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
    assert objects.load(Variant(Kernel.FORWARD, torch.float16, 32, 80)) is None
    monkeypatch.setattr(objects, "_compiler", lambda: "another version")
    assert objects.load(VARIANT) is None


def test_a_damaged_object_is_compiled_again(carried: Path) -> None:
    whole = carried.read_bytes()
    try:
        carried.write_bytes(whole[: len(whole) // 2])
        assert objects.load(VARIANT) is None
    finally:
        carried.write_bytes(whole)
