"""Triton kernels are compared with PyTorch before their first use: each operator, in each configuration."""

from dataclasses import replace
from functools import partial

import pytest
import torch

from hstu.ops.kernels import OPERATORS, Backend, KernelShapes
from hstu.ops.select import resolve_kernels
from hstu.ops.self_check import small_layout
from hstu.ops.triton.support import unsupported_reason
from tests.ops.backends import INTERPRETED

SHAPES = KernelShapes(17, 3, 51, 40, torch.float32)
WITH_BIAS = KernelShapes(16, 2, 32, 16, torch.bfloat16, has_bias=True)
IN_THE_DTYPE = ("attention", "norm_mul_dropout", "project_uvqk", "add_layer_norm (bfloat16")
"""Cases whose inputs have the dtype of the run. The others compute in float32."""


def is_run(case: str, shapes: KernelShapes) -> bool:
    """Whether a case of the self check is run for these shapes: what computes in float32, for one of them only."""
    return shapes.dtype == torch.float32 or case.startswith(IN_THE_DTYPE)


IN_FLOAT32 = pytest.param(SHAPES, id="float32", marks=pytest.mark.slow if INTERPRETED else ())


@pytest.mark.parametrize("shapes", [IN_FLOAT32, pytest.param(WITH_BIAS, id="bfloat16")])
def test_all_kernels_pass(device: torch.device, shapes: KernelShapes, monkeypatch: pytest.MonkeyPatch) -> None:
    from hstu.ops.triton import self_check

    if INTERPRETED:
        short = partial(small_layout, num_items=(1, 40, 17), num_candidates=(0, 5, 3))
        monkeypatch.setattr(self_check, "small_layout", short)
    chosen = [check.measure for check in self_check.checks(device, shapes) if is_run(check.case, shapes)]
    if shapes.dtype == torch.float32:
        chosen += [check.measure for check in self_check.checks(device, None)]
    errors = {name: error for measure in chosen for name, error in measure().items()}
    assert len(errors) == (2 + 2 * 12 if shapes.dtype == torch.float32 else 2 * 6)
    assert all(error <= tolerance for error, tolerance in errors.values()), errors


def test_a_wrong_gradient_and_a_kernel_that_does_not_repeat_are_found(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hstu.ops.triton import self_check

    calls = iter(range(100))
    monkeypatch.setitem(self_check.OPERATORS, "add_positions", lambda x, table, _: x + table.sum() * next(calls))
    (errors,) = (check.measure() for check in self_check.checks(device, SHAPES) if check.case == "add_positions")
    assert errors["add_positions"][0] > 0.1
    assert errors["add_positions, repeated"] == (1.0, 0.0)


def test_only_what_the_run_uses_is_checked() -> None:
    checks = pytest.importorskip("hstu.ops.triton.self_check", reason="NEEDS TRITON: pip install -e '.[cpu]'").checks
    cpu = torch.device("cpu")

    def attention(shapes: KernelShapes) -> list[str]:
        return [check.case for check in checks(cpu, shapes) if check.operator == "attention"]

    assert [check.operator for check in checks(cpu, None)] == ["slots"]
    assert "slots" not in {check.operator for check in checks(cpu, WITH_BIAS)}
    names = attention(WITH_BIAS)
    assert len(names) == 2 and all("16 channels, bfloat16" in name and ", bias" in name for name in names)
    names = attention(replace(WITH_BIAS, has_window=True))
    assert len(names) == 4 and sum(", window" in name for name in names) == 2
    assert not attention(KernelShapes(512, 1, 64, 64, torch.float32))


def test_every_operator_with_a_kernel_has_a_check() -> None:
    self_check = pytest.importorskip("hstu.ops.triton.self_check", reason="NEEDS TRITON: pip install -e '.[cpu]'")
    cases = list(self_check.checks(torch.device("cpu"), SHAPES))
    assert {check.operator for check in cases} == set(self_check.OPERATORS)
    assert set(self_check.OPERATORS) == {name for name in OPERATORS if unsupported_reason(name, SHAPES) is None}


def test_the_command_begins_with_the_shapes_of_the_benchmark() -> None:
    self_check = pytest.importorskip("hstu.ops.triton.self_check", reason="NEEDS TRITON: pip install -e '.[cpu]'")
    shapes = list(self_check.all_shapes())
    assert (shapes[0].dtype, shapes[0].head_dim, shapes[0].has_bias) == (torch.bfloat16, 256, False)
    assert shapes[-1] is None, "dynamic tables come last"


def test_the_log_names_what_triton_serves() -> None:
    served = resolve_kernels(Backend.TRITON, KernelShapes(512, 1, 64, 64, torch.bfloat16)).served_by
    assert str(served["attention"]) == "pytorch (triton: heads of 512 > 256 channels)"
    assert str(served["norm_mul_dropout"]) == "triton"
    assert str(served["l2_normalize"]) == "pytorch (triton: no kernel)"
