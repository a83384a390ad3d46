"""Kernels are compared with PyTorch before their first use."""

import importlib
from dataclasses import replace

import pytest
import torch

from hstu.ops import self_check
from hstu.ops.kernels import OPERATORS, Backend, KernelShapes
from hstu.ops.select import resolve_kernels
from hstu.ops.self_check import checks
from tests.ops.backends import INTERPRETED, ON_A_GPU

GPU = torch.device("cuda", 0)
SHAPES = KernelShapes(17, 3, 51, 40, torch.float32)
WITH_BIAS = KernelShapes(16, 2, 32, 16, torch.bfloat16, has_bias=True)
IN_THE_DTYPE = ("attention", "norm_mul_dropout", "project_uvqk", "add_layer_norm (bfloat16")
"""Cases whose inputs have the dtype of the run. The others compute in float32."""


def is_run(case: str, shapes: KernelShapes) -> bool:
    """Whether a case of the self check is run for these shapes: what computes in float32, for one of them only."""
    return shapes.dtype == torch.float32 or case.startswith(IN_THE_DTYPE)


SLOW = pytest.mark.slow if INTERPRETED else ()


@pytest.mark.parametrize(
    "shapes", [pytest.param(SHAPES, id="float32", marks=SLOW), pytest.param(WITH_BIAS, id="bfloat16", marks=SLOW)]
)
def test_all_kernels_pass(device: torch.device, shapes: KernelShapes, monkeypatch: pytest.MonkeyPatch) -> None:
    if INTERPRETED:
        monkeypatch.setattr(self_check, "ITEMS", (1, 40, 0, 17))
        monkeypatch.setattr(self_check, "CANDIDATES", (0, 5, 0, 3))
    chosen = [check for check in checks(Backend.TRITON, device, shapes) if is_run(check.case, shapes)]
    if shapes.dtype == torch.float32:
        chosen += checks(Backend.TRITON, device, None)
    errors = {name: error for check in chosen for name, error in check.measure().items()}
    assert {check.operator for check in chosen} >= {"attention", "norm_mul_dropout", "project_uvqk", "add_layer_norm"}
    assert all(error <= tolerance for error, tolerance in errors.values()), errors


def test_a_wrong_gradient_and_a_kernel_that_does_not_repeat_are_found() -> None:
    calls = iter(range(100))
    case = next(case for case in self_check.cases(SHAPES) if case.name == "add_positions")
    errors = self_check.errors(case, lambda x, table, _: x + table.sum() * next(calls), torch.device("cpu"))
    assert errors["add_positions"][0] > 0.1
    assert errors["add_positions, repeated"] == (1.0, 0.0)


def test_only_what_the_run_uses_is_checked() -> None:
    pytest.importorskip("triton", reason="NEEDS TRITON: pip install -e '.[cpu,dev]'")

    def of(shapes: KernelShapes | None, operator: str) -> list[str]:
        found = checks(Backend.TRITON, torch.device("cpu"), shapes)
        return [check.case for check in found if check.operator == operator]

    assert len(of(None, "slots")) == 1 and not of(WITH_BIAS, "slots")
    names = of(WITH_BIAS, "attention")
    assert len(names) == 3 and all("16 channels, bfloat16" in name and ", bias" in name for name in names)
    names = of(replace(WITH_BIAS, has_window=True), "attention")
    assert len(names) == 6 and sum(", window" in name for name in names) == 3
    assert not of(KernelShapes(512, 1, 64, 64, torch.float32), "attention")


@pytest.mark.parametrize("backend", [Backend.TRITON, Backend.CPU])
def test_every_operator_with_a_kernel_has_a_check(backend: Backend) -> None:
    pytest.importorskip("triton", reason="NEEDS TRITON: pip install -e '.[cpu,dev]'")
    of_backend = importlib.import_module(f"hstu.ops.{backend}.operators").OPERATORS
    served = resolve_kernels(backend, SHAPES).served_by
    assert {check.operator for check in checks(backend, torch.device("cpu"), SHAPES)} == set(of_backend)
    assert set(of_backend) == {name for name in OPERATORS if served[name].backend is backend}


ON_CUTLASS = KernelShapes(64, 4, 64, 64, torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.skipif(not ON_A_GPU, reason="NEEDS AN NVIDIA GPU")
@pytest.mark.parametrize(
    ("backend", "head_dim", "has_bias"),
    [
        *(("cutlass", 256, False), ("cutlass", 64, False), ("cutlass", 128, False)),
        *(("triton", 256, False), ("triton", 64, True)),
    ],
)
def test_all_kernels_pass_on_a_gpu(backend: str, head_dim: int, has_bias: bool) -> None:
    shapes = replace(ON_CUTLASS, head_dim=head_dim, has_bias=has_bias)
    errors = {name: error for check in checks(backend, GPU, shapes) for name, error in check.measure().items()}
    assert len(errors) >= 3 * 3
    assert all(error <= tolerance for error, tolerance in errors.values()), errors
