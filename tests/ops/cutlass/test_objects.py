"""A CUTLASS kernel that was compiled ahead is loaded from a copied file, and compiled where that is of no use."""

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
from hstu.ops.kernels import KernelShapes
from tests.ops.cutlass.test_launch import check_arguments

VARIANT = Variant(Kernel.FORWARD, torch.bfloat16, 32, 80)


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


def test_shapes_that_triton_serves_have_no_jobs() -> None:
    assert compile_ahead.jobs(KernelShapes(48, 2, 96, 48, torch.bfloat16), 90, ["attention"]) == []
    assert compile_ahead.jobs(None, 90, ["slots"]) == []
