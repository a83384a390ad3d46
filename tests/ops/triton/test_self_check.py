"""Triton kernels are compared with PyTorch before their first use; a wrong kernel is refused with its error."""

from pathlib import Path

import pytest
import torch

from hstu.config.errors import ConfigError
from hstu.ops.select import resolve_kernels, select_backend
from hstu.ops.types import Backend, KernelShapes

GPU = torch.device("cuda", 0)


@pytest.fixture
def checks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):  # type: ignore[no-untyped-def]
    """The self check on a machine with an H100, with an empty cache directory."""
    self_check = pytest.importorskip("hstu.ops.triton.self_check")
    monkeypatch.setattr("hstu.ops.self_check.cache_directory", lambda: tmp_path)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    return self_check


def test_all_kernels_pass(device: torch.device) -> None:
    from hstu.ops.triton.self_check import kernel_errors

    errors = kernel_errors(device)
    assert len(errors) == 13
    assert all(error <= tolerance for error, tolerance in errors.values()), errors


def test_kernels_are_checked_once_per_device(checks, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    runs: list[torch.device] = []
    monkeypatch.setattr(checks, "kernel_errors", lambda device: runs.append(device) or {"attention": (1e-6, 1e-4)})
    checks.check_kernels(GPU)
    checks.check_kernels(GPU)
    assert len(runs) == 1
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    checks.check_kernels(GPU)
    assert len(runs) == 2


def test_a_wrong_kernel_is_refused_with_the_numbers(
    checks,  # type: ignore[no-untyped-def]
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(checks, "kernel_errors", lambda device: {"layer_norm": (float("nan"), 1e-4)})
    assert select_backend("triton", strict=False, device=GPU) is Backend.PYTORCH
    assert "layer_norm differs from PyTorch by nan" in caplog.text and "pytorch is used" in caplog.text
    with pytest.raises(ConfigError, match=r"layer_norm.*strict_kernel_backend"):
        select_backend("triton", strict=True, device=GPU)


def test_right_kernels_are_used_and_stand_in_for_cutlass(
    checks,  # type: ignore[no-untyped-def]
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(checks, "kernel_errors", lambda device: {"attention": (1e-6, 1e-4)})
    assert select_backend("triton", strict=True, device=GPU) is Backend.TRITON
    assert not caplog.records
    monkeypatch.setattr("hstu.ops.select.cutlass_unsupported_reason", lambda device: "dK differs from PyTorch by 0.5")
    assert select_backend("cutlass", strict=False, device=GPU) is Backend.TRITON
    assert "dK differs from PyTorch by 0.5" in caplog.text and "triton is used" in caplog.text


def test_an_old_gpu_is_refused_with_the_reason(
    checks, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert select_backend("triton", strict=False, device=GPU) is Backend.PYTORCH
    assert "compute capability 7.5 < 8.0" in caplog.text


def test_the_table_names_what_triton_serves() -> None:
    table = str(resolve_kernels(Backend.TRITON, KernelShapes(512, 1, 64, 64, torch.bfloat16)))
    assert "attention: pytorch (heads of 512 > 256 channels)" in table
    assert "norm_mul_dropout: triton" in table and "l2_normalize: pytorch (no kernel)" in table
