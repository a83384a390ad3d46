"""CUTLASS kernels are compared with PyTorch before their first use; a wrong kernel is refused with its error."""

import dataclasses

import pytest
import torch

from hstu.config.errors import ConfigError
from hstu.ops.kernels import Backend, KernelShapes
from hstu.ops.select import resolve_kernels, select_backend

GPU = torch.device("cuda", 0)


SHAPES = KernelShapes(64, 4, 64, 64, torch.bfloat16)


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with an H100 where Triton runs."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr("hstu.ops.select.triton_unsupported_reason", lambda device, shapes: None)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="NEEDS AN NVIDIA GPU: the CUTLASS kernels are not run")
@pytest.mark.parametrize(("head_dim", "has_bias"), [(256, False), (64, True), (128, True)])
def test_all_kernels_pass(head_dim: int, has_bias: bool) -> None:
    from hstu.ops.cutlass.self_check import checks

    shapes = KernelShapes(head_dim, 4, 64, 64, torch.bfloat16, has_bias)
    errors = {name: error for _, measure in checks(GPU, shapes) for name, error in measure().items()}
    assert len(errors) == 3 * (8 if has_bias else 6)
    assert all(error <= tolerance for error, tolerance in errors.values()), errors


def test_only_the_head_dim_and_dtype_of_the_run_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("cutlass", reason="nvidia-cutlass-dsl is not installed: the CUTLASS kernels are NOT checked")
    from hstu.ops.cutlass.self_check import checks

    names = [name for name, _ in checks(GPU, SHAPES)]
    assert len(names) == 3 and all("64 channels, bfloat16," in name for name in names)
    with_bias = [name for name, _ in checks(GPU, dataclasses.replace(SHAPES, has_bias=True))]
    assert len(with_bias) == 3 and all("64 channels, bfloat16, relative bias" in name for name in with_bias)
    assert not list(checks(GPU, dataclasses.replace(SHAPES, head_dim=256, has_bias=True)))


def test_right_kernels_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hstu.ops.select.refusal", lambda kernels, device, shapes: None)
    assert select_backend("cutlass", strict=True, device=GPU, shapes=SHAPES) is Backend.CUTLASS


def test_refused_kernels_are_replaced_by_triton_with_the_reason(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("hstu.ops.select.refusal", lambda kernels, device, shapes: f"{kernels.name}: dK differs")
    assert select_backend("cutlass", strict=False, device=GPU, shapes=SHAPES) is Backend.TRITON
    assert "CUTLASS: dK differs" in caplog.text and "triton is used" in caplog.text
    with pytest.raises(ConfigError, match=r"dK.*strict_kernel_backend"):
        select_backend("cutlass", strict=True, device=GPU, shapes=SHAPES)


def test_another_gpu_is_refused_with_the_reason(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    assert select_backend("cutlass", strict=False, device=GPU, shapes=SHAPES) is Backend.TRITON
    assert "compute capability 8.9: CUTLASS kernels are for 8.0 and 9.0" in caplog.text


def test_the_table_names_what_cutlass_serves() -> None:
    def table(head_dim: int, *, has_bias: bool, has_window: bool = False) -> str:
        shapes = KernelShapes(head_dim, 4, 64, 64, torch.bfloat16, has_bias, has_window)
        return str(resolve_kernels(Backend.CUTLASS, shapes))

    assert "attention: cutlass, add_layer_norm: triton" in table(256, has_bias=False)
    assert "attention: cutlass, add_layer_norm: triton" in table(128, has_bias=True)
    with_bias = "attention: triton (no cutlass: heads of 256 channels with a relative bias, not 32, 64, 128)"
    assert with_bias in table(256, has_bias=True)
    assert "attention: triton (no cutlass: heads of 50 channels, not 32, 64, 128, 256)" in table(50, has_bias=False)
    window = table(64, has_bias=False, has_window=True)
    assert "attention: triton (no cutlass: NetworkArgs.max_attention_span), " in window
