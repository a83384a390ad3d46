"""Triton kernels are compared with PyTorch before their first use; a wrong kernel is refused with its error."""

from dataclasses import replace
from functools import partial

import pytest
import torch

from hstu.config.errors import ConfigError
from hstu.ops.kernels import Backend, KernelShapes
from hstu.ops.select import resolve_kernels, select_backend
from hstu.ops.self_check import small_layout
from tests.ops.backends import INTERPRETED

GPU = torch.device("cuda", 0)


SHAPES = KernelShapes(17, 3, 51, 40, torch.float32)
WITH_BIAS = KernelShapes(16, 2, 32, 16, torch.bfloat16, has_bias=True)
IN_THE_DTYPE = ("attention", "norm_mul_dropout", "project_uvqk", "add_layer_norm (bfloat16")
"""Cases whose inputs have the dtype of the run. The others compute in float32."""


def is_run(case: str, shapes: KernelShapes) -> bool:
    """Whether a case of the self check is run for these shapes: what computes in float32, for one of them only."""
    return shapes.dtype == torch.float32 or case.startswith(IN_THE_DTYPE)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with an H100."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))


IN_FLOAT32 = pytest.param(SHAPES, id="float32", marks=pytest.mark.slow if INTERPRETED else ())


@pytest.mark.parametrize("shapes", [IN_FLOAT32, pytest.param(WITH_BIAS, id="bfloat16")])
def test_all_kernels_pass(device: torch.device, shapes: KernelShapes, monkeypatch: pytest.MonkeyPatch) -> None:
    from hstu.ops.triton import self_check

    if INTERPRETED:
        short = partial(small_layout, num_items=(1, 40, 17), num_candidates=(0, 5, 3))
        monkeypatch.setattr(self_check, "small_layout", short)
    chosen = [measure for name, measure in self_check.checks(device, shapes) if is_run(name, shapes)]
    errors = {name: error for measure in chosen for name, error in measure().items()}
    assert len(errors) == (1 + 2 * 12 if shapes.dtype == torch.float32 else 2 * 6)
    assert all(error <= tolerance for error, tolerance in errors.values()), errors


def test_a_wrong_gradient_and_a_kernel_that_does_not_repeat_are_found(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hstu.ops.triton import self_check

    calls = iter(range(100))
    monkeypatch.setitem(self_check.OPERATORS, "add_positions", lambda x, table, _: x + table.sum() * next(calls))
    errors = dict(self_check.checks(device, SHAPES))["add_positions"]()
    assert errors["add_positions"][0] > 0.1
    assert errors["add_positions, repeated"] == (1.0, 0.0)


def test_every_configuration_that_may_be_chosen_is_run() -> None:
    launch = pytest.importorskip("hstu.ops.triton.launch", reason="NEEDS TRITON: pip install -e '.[cpu]'")
    import triton
    from triton.runtime.errors import OutOfResources

    ran: list[tuple[str, int]] = []

    def kernel(name: str, too_large: int) -> object:
        def run(*, SIZE: int, **_: object) -> None:
            if too_large == SIZE:
                raise OutOfResources(2, 1, "shared memory")
            ran.append((name, SIZE))

        return {(): run}

    configs = [triton.Config({"SIZE": size}, num_warps=4, num_stages=1) for size in (1, 2, 3)]
    for _ in launch.each_configuration():
        launch.launcher(kernel("few", 0), (), configs[:2])()
        launch.launcher(kernel("many", 2), (), configs)()
    assert ran == [("few", 1), ("many", 1), ("few", 2), ("many", 3), ("few", 2), ("many", 3)]
    assert launch.may_measure()


def test_only_what_the_run_uses_is_checked() -> None:
    checks = pytest.importorskip("hstu.ops.triton.self_check", reason="NEEDS TRITON: pip install -e '.[cpu]'").checks
    cpu = torch.device("cpu")
    assert [name for name, _ in checks(cpu, None)] == ["slots of dynamic tables"]
    attention = [name for name, _ in checks(cpu, WITH_BIAS) if "attention" in name]
    assert len(attention) == 2 and all("16 channels, bfloat16" in name and ", bias" in name for name in attention)
    attention = [name for name, _ in checks(cpu, replace(WITH_BIAS, has_window=True)) if "attention" in name]
    assert len(attention) == 4 and sum(", window" in name for name in attention) == 2
    assert not [name for name, _ in checks(cpu, KernelShapes(512, 1, 64, 64, torch.float32)) if "attention" in name]


def test_right_kernels_are_used_and_stand_in_for_cutlass(
    machine: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    refused = {"CUTLASS": "dK differs from PyTorch by 0.5"}
    monkeypatch.setattr("hstu.ops.select.refusal", lambda kernels, device, shapes: refused.get(kernels.name))
    assert select_backend("triton", strict=True, device=GPU, shapes=SHAPES) is Backend.TRITON
    assert not caplog.records
    assert select_backend("cutlass", strict=False, device=GPU, shapes=SHAPES) is Backend.TRITON
    assert "dK differs from PyTorch by 0.5" in caplog.text and "triton is used" in caplog.text


def test_refused_kernels_are_replaced_by_pytorch_with_the_reason(
    machine: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("hstu.ops.select.refusal", lambda kernels, device, shapes: "add_layer_norm differs")
    assert select_backend("triton", strict=False, device=GPU, shapes=SHAPES) is Backend.PYTORCH
    assert "add_layer_norm differs" in caplog.text and "pytorch is used" in caplog.text
    with pytest.raises(ConfigError, match=r"add_layer_norm.*strict_kernel_backend"):
        select_backend("triton", strict=True, device=GPU, shapes=SHAPES)


def test_an_old_gpu_is_refused_with_the_reason(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert select_backend("triton", strict=False, device=GPU, shapes=SHAPES) is Backend.PYTORCH
    assert "compute capability 7.5 < 8.0" in caplog.text


def test_the_table_names_what_triton_serves() -> None:
    table = str(resolve_kernels(Backend.TRITON, KernelShapes(512, 1, 64, 64, torch.bfloat16)))
    assert "attention: pytorch (heads of 512 > 256 channels)" in table
    assert "norm_mul_dropout: triton" in table and "l2_normalize: pytorch (no kernel)" in table
