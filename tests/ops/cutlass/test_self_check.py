"""CUTLASS kernels are compared with PyTorch before their first use; a wrong kernel is refused with its error."""

from pathlib import Path

import pytest
import torch

from hstu.config.errors import ConfigError
from hstu.ops.select import resolve_kernels, select_backend
from hstu.ops.types import Backend, KernelShapes

GPU = torch.device("cuda", 0)


@pytest.fixture
def checks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):  # type: ignore[no-untyped-def]
    """The self check on a machine with an H100 where Triton runs, with an empty cache directory."""
    pytest.importorskip("cutlass", reason="nvidia-cutlass-dsl is not installed: the CUTLASS kernels are NOT checked")
    from hstu.ops.cutlass import self_check

    monkeypatch.setattr("hstu.ops.self_check.cache_directory", lambda: tmp_path)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr("hstu.ops.select.triton_unsupported_reason", lambda device: None)
    return self_check


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="NEEDS AN NVIDIA GPU: the CUTLASS kernels are not run")
def test_all_kernels_pass() -> None:
    from hstu.ops.cutlass.self_check import kernel_errors

    errors = kernel_errors(torch.device("cuda", 0))
    assert len(errors) == 4 * 4 * 4
    assert all(error <= tolerance for error, tolerance in errors.values()), errors


def test_right_kernels_are_used_and_are_checked_once_per_device(checks, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    runs: list[torch.device] = []
    monkeypatch.setattr(checks, "kernel_errors", lambda device: runs.append(device) or {"attention": (1e-3, 1e-2)})
    for _ in range(2):
        assert select_backend("cutlass", strict=True, device=GPU) is Backend.CUTLASS
    assert len(runs) == 1
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    select_backend("cutlass", strict=True, device=GPU)
    assert len(runs) == 2


def test_a_wrong_kernel_is_refused_with_the_numbers(
    checks,  # type: ignore[no-untyped-def]
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(checks, "kernel_errors", lambda device: {"dK (64 channels)": (float("nan"), 1e-2)})
    assert select_backend("cutlass", strict=False, device=GPU) is Backend.TRITON
    assert "dK (64 channels) differs from PyTorch by nan" in caplog.text and "triton is used" in caplog.text
    with pytest.raises(ConfigError, match=r"dK.*strict_kernel_backend"):
        select_backend("cutlass", strict=True, device=GPU)


def test_another_gpu_is_refused_with_the_reason(
    checks, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    assert select_backend("cutlass", strict=False, device=GPU) is Backend.TRITON
    assert "compute capability 8.9: CUTLASS kernels are for 8.0 and 9.0" in caplog.text


def test_the_table_names_what_cutlass_serves() -> None:
    def table(head_dim: int, *, has_bias: bool) -> str:
        return str(resolve_kernels(Backend.CUTLASS, KernelShapes(head_dim, 4, 64, 64, torch.bfloat16, has_bias)))

    assert "attention: cutlass, layer_norm: triton" in table(256, has_bias=False)
    assert "attention: triton (no cutlass: relative bias)" in table(256, has_bias=True)
    assert "attention: triton (no cutlass: heads of 50 channels, not 32, 64, 128, 256)" in table(50, has_bias=False)
