"""Falling back is said in one line, or refused; on a CPU the C++ kernels stand in for those of GPUs."""

import logging
from pathlib import Path

import pytest
import torch

from hstu.config.errors import ConfigError
from hstu.ops.cpu import build, self_check
from hstu.ops.kernels import Backend, KernelShapes
from hstu.ops.pytorch.operators import REFERENCE_KERNELS
from hstu.ops.select import resolve_kernels, select_backend, select_kernels

CPU = torch.device("cpu")
SHAPES = KernelShapes(64, 1, 64, 64, torch.float32)
FAST = pytest.mark.parametrize("requested", ["cutlass", "triton"])


@pytest.fixture
def compiler() -> None:
    try:
        build.library_file()
    except build.KernelsUnavailable as reason:
        pytest.skip(f"NEEDS A C++ COMPILER: {reason}")


def choose(requested: str, caplog: pytest.LogCaptureFixture) -> tuple[Backend, str]:
    with caplog.at_level(logging.INFO, logger="hstu.ops.select"):
        backend = select_backend(requested, strict=False, device=CPU, shapes=SHAPES)
    (record,) = (record for record in caplog.records if record.name == "hstu.ops.select")
    return backend, record.message


def test_what_was_asked_for_is_used_in_silence(caplog: pytest.LogCaptureFixture) -> None:
    assert select_backend("pytorch", strict=True, device=CPU, shapes=SHAPES) is Backend.PYTORCH
    assert not caplog.records


@FAST
def test_on_a_cpu_the_cpp_kernels_are_used(requested: str, caplog: pytest.LogCaptureFixture, compiler: None) -> None:
    backend, line = choose(requested, caplog)
    assert backend is Backend.CPU
    assert requested in line and "C++ kernels are used" in line


@FAST
def test_without_a_compiler_pytorch_is_used_and_the_line_says_what_to_install(
    requested: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    backend, line = choose(requested, caplog)
    assert backend is Backend.PYTORCH
    assert "pytorch is used" in line and "apt-get install g++" in line


def test_a_kernel_that_is_wrong_is_not_used_and_the_line_has_the_numbers(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, compiler: None
) -> None:
    twice = ("attention", lambda x: 2 * x, lambda x: x, [torch.randn(3, requires_grad=True)])
    monkeypatch.setattr(self_check, "library_file", lambda: tmp_path / "kernels.so")
    monkeypatch.setattr(self_check, "_cases", lambda: iter([twice]))
    backend, line = choose("cutlass", caplog)
    assert backend is Backend.PYTORCH
    assert "attention differs from PyTorch by" in line


def test_kernels_are_checked_once_per_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    same = ("gate", lambda x: x * 1, lambda x: x, [torch.randn(3, requires_grad=True)])
    cases = iter([same])  # a second walk would find none
    monkeypatch.setattr(self_check, "library_file", lambda: tmp_path / "kernels.so")
    monkeypatch.setattr(self_check, "_cases", lambda: [next(cases)])
    self_check.check_kernels()
    self_check.check_kernels()
    with pytest.raises(StopIteration):
        next(cases)


@pytest.mark.parametrize(
    ("capability", "requested", "chosen", "said"),
    [
        ((8, 0), "cutlass", Backend.CUTLASS, None),
        ((9, 0), "cutlass", Backend.CUTLASS, None),
        ((8, 6), "cutlass", Backend.TRITON, "8.6: CUTLASS kernels are for 8.0 and 9.0; triton is used"),
        ((8, 9), "cutlass", Backend.TRITON, "8.9: CUTLASS kernels are for 8.0 and 9.0; triton is used"),
        ((10, 0), "cutlass", Backend.TRITON, "10.0: CUTLASS kernels are for 8.0 and 9.0; triton is used"),
        ((12, 0), "cutlass", Backend.TRITON, "12.0: CUTLASS kernels are for 8.0 and 9.0; triton is used"),
        ((12, 0), "triton", Backend.TRITON, None),
        ((7, 5), "cutlass", Backend.PYTORCH, "compute capability 7.5 < 8.0; pytorch is used"),
    ],
)
def test_triton_serves_gpus_without_cutlass_kernels(
    capability: tuple[int, int],
    requested: str,
    chosen: Backend,
    said: str | None,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where the kernels turn out right, the choice depends on the compute capability alone."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr("hstu.ops.select.refusal", lambda *_: None)
    with caplog.at_level(logging.INFO, logger="hstu.ops.select"):
        assert select_backend(requested, strict=False, device=torch.device("cuda", 0), shapes=SHAPES) is chosen
    lines = [record.getMessage() for record in caplog.records]
    assert (len(lines) == 1 and said in lines[0]) if said else not lines


@FAST
def test_another_backend_is_an_error_where_strict(requested: str) -> None:
    with pytest.raises(ConfigError, match="strict_kernel_backend"):
        select_backend(requested, strict=True, device=CPU, shapes=SHAPES)


def test_the_printed_kernels_name_what_pytorch_serves_and_why() -> None:
    kernels = resolve_kernels(Backend.CPU, KernelShapes(512, 1, 64, 64, torch.bfloat16))
    assert "attention: pytorch (heads of 512 > 256 channels)" in str(kernels)
    assert "norm_mul_dropout: cpu, " in str(kernels)
    assert "sampled_softmax_loss: cpu" in str(kernels) and "pool_softmax_loss: cpu" in str(kernels)
    assert kernels.attention is REFERENCE_KERNELS.attention
    assert kernels.norm_mul_dropout is not REFERENCE_KERNELS.norm_mul_dropout


def test_the_reference_kernels_serve_every_dtype() -> None:
    kernels = select_kernels("pytorch", True, CPU, KernelShapes(512, 1, 64, 64, torch.float64))
    assert kernels == REFERENCE_KERNELS
    assert str(kernels) == "all operators: pytorch"
