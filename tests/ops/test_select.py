"""Each operator falls back by itself, and says why, or is an error; on a CPU the C++ kernels stand in for a GPU's."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from hstu.base.errors import ConfigError
from hstu.ops import check_process
from hstu.ops.kernels import OPERATORS, Backend, Kernels, KernelShapes
from hstu.ops.pytorch.operators import REFERENCE_KERNELS
from hstu.ops.select import resolve_kernels, select_kernels, select_slot_kernels
from hstu.ops.self_check import Check
from tests.ops.backends import require_compiler

CPU = torch.device("cpu")
GPU = torch.device("cuda", 0)
SHAPES = KernelShapes(64, 1, 64, 64, torch.float32)
BFLOAT16 = KernelShapes(64, 1, 64, 64, torch.bfloat16)


def on_cpu(requested: str) -> dict[str, str]:
    """Operator → what serves it."""
    return said(select_kernels(requested, strict=False, device=CPU, shapes=SHAPES))


def said(kernels: Kernels) -> dict[str, str]:
    return {operator: str(served) for operator, served in kernels.served_by.items()}


def test_without_a_compiler_pytorch_is_used_and_the_reason_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    line = on_cpu("cutlass")["attention"]
    assert line.startswith("pytorch (cpu: ") and "apt-get install g++" in line


def test_a_cpu_kernel_that_is_wrong_is_not_used_and_the_check_is_run_once_per_machine(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    require_compiler()
    ran: list[str] = []
    backend_operators = [operator for operator, served in on_cpu("cutlass").items() if served == "cpu"]

    def checks(backend: str, device: torch.device, shapes: KernelShapes) -> Iterator[Check]:
        for operator in backend_operators:
            ran.append(operator)
            yield Check(operator, operator, {"dK": (0.5 if operator == "attention" else 0.0, 1e-4)}.copy)

    monkeypatch.setattr(check_process, "checks", checks)
    monkeypatch.setattr(check_process, "cache_directory", lambda: tmp_path)
    for _ in range(2):
        served = on_cpu("cutlass")
        assert served["norm_mul_dropout"] == "cpu" and "dK differs from PyTorch by 0.5" in served["attention"]
    assert len(ran) == 3 * len(backend_operators)


class Machine:
    """A GPU whose self checks are not run."""

    def __init__(self) -> None:
        self.faults: dict[tuple[str, str], str] = {}
        """(Backend, operator) → why the self check refuses it."""
        self.checked: list[tuple[str, str]] = []

    def refusals(
        self, backend: Backend, device: torch.device, shapes: KernelShapes | None, operators: Sequence[str]
    ) -> Mapping[str, str]:
        self.checked += [(backend.value, operator) for operator in operators]
        return {operator: fault for operator in operators if (fault := self.faults.get((backend.value, operator)))}


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    """A machine with an H100."""
    pytest.importorskip("triton", reason="NEEDS TRITON: pip install -e '.[cpu,dev]'")
    pytest.importorskip("cutlass", reason="NEEDS CUTLASS: pip install nvidia-cutlass-dsl")
    machine = Machine()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr("hstu.ops.select.refusals", machine.refusals)
    return machine


def on_gpu(requested: str) -> dict[str, str]:
    """Operator → what serves it."""
    return said(select_kernels(requested, strict=False, device=GPU, shapes=BFLOAT16))


def test_right_kernels_are_used_and_only_those_that_are_used_are_checked(machine: Machine) -> None:
    select_kernels("cutlass", strict=True, device=GPU, shapes=BFLOAT16)
    served = on_gpu("cutlass")
    assert served["attention"] == "cutlass" and served["add_layer_norm"] == "triton (cutlass: no kernel)"
    assert ("cutlass", "attention") in machine.checked and ("triton", "add_layer_norm") in machine.checked
    assert not {("triton", "attention"), ("triton", "slots")} & set(machine.checked)


def test_a_refused_operator_falls_back_alone(machine: Machine) -> None:
    right = on_gpu("cutlass")
    machine.faults["triton", "sampled_softmax_loss"] = "it hangs"
    right |= {"sampled_softmax_loss": "pytorch (cutlass: no kernel; triton: it hangs)"}
    assert on_gpu("cutlass") == right
    machine.faults["cutlass", "attention"] = "dK differs"
    assert on_gpu("cutlass") == right | {"attention": "triton (cutlass: dK differs)"}
    machine.faults["triton", "attention"] = "it hangs"
    kernels = select_kernels("cutlass", strict=False, device=GPU, shapes=BFLOAT16)
    assert said(kernels) == right | {"attention": "pytorch (cutlass: dK differs; triton: it hangs)"}
    refused = [operator for operator in OPERATORS if kernels.served_by[operator].is_refused]
    assert refused == ["attention", "sampled_softmax_loss"]
    assert on_gpu("triton")["attention"] == "pytorch (triton: it hangs)"


def test_where_strict_one_error_names_all_refused_operators(machine: Machine) -> None:
    machine.faults = {
        ("cutlass", "attention"): "dK differs",
        ("triton", "add_layer_norm"): "it hangs",
        ("triton", "attention"): "not asked for",
    }
    with pytest.raises(ConfigError) as raised:
        select_kernels("cutlass", strict=True, device=GPU, shapes=BFLOAT16)
    first, *lines = str(raised.value).splitlines()
    assert "kernel_backend 'cutlass'" in first and "strict_kernel_backend = False" in first
    assert lines == [
        "  kernel attention: pytorch (cutlass: dK differs; triton: not asked for)",
        "  kernel add_layer_norm: pytorch (cutlass: no kernel; triton: it hangs)",
    ]


def test_dynamic_tables_need_their_own_kernels_alone(machine: Machine) -> None:
    machine.faults["triton", "attention"] = "it hangs"
    kernels, reason = select_slot_kernels(GPU)
    assert kernels is not None and reason is None and machine.checked == [("triton", "slots")]
    machine.faults["triton", "slots"] = "wrong"
    assert select_slot_kernels(GPU) == (None, "wrong")


NOT_FOR_CUTLASS = "CUTLASS kernels are for 9.0"


@pytest.mark.parametrize(
    ("capability", "requested", "attention"),
    [
        ((9, 0), "cutlass", "cutlass"),
        ((8, 0), "cutlass", f"triton (cutlass: compute capability 8.0: {NOT_FOR_CUTLASS})"),
        ((12, 0), "cutlass", f"triton (cutlass: compute capability 12.0: {NOT_FOR_CUTLASS})"),
        ((12, 0), "triton", "triton"),
        ((7, 5), "triton", "pytorch (triton: compute capability 7.5 < 8.0)"),
    ],
)
def test_triton_serves_gpus_without_cutlass_kernels(
    capability: tuple[int, int], requested: str, attention: str, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the kernels turn out right, the choice depends on the compute capability alone."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert on_gpu(requested)["attention"] == attention


@pytest.mark.parametrize("requested", ["cutlass", "triton"])
def test_where_strict_a_cpu_is_an_error(requested: str) -> None:
    with pytest.raises(ConfigError, match="strict_kernel_backend"):
        select_kernels(requested, strict=True, device=CPU, shapes=SHAPES)


@pytest.mark.parametrize(
    ("backend", "shapes", "attention"),
    [
        (Backend.CPU, {"head_dim": 512}, "pytorch (cpu: heads of 512 > 256 channels)"),
        (Backend.TRITON, {"head_dim": 512}, "pytorch (triton: heads of 512 > 256 channels)"),
        (Backend.CUTLASS, {"head_dim": 256}, "cutlass"),
        (Backend.CUTLASS, {"head_dim": 128, "has_bias": True}, "triton (cutlass: a relative bias)"),
        (Backend.CUTLASS, {"head_dim": 50}, "triton (cutlass: heads of 50 channels, not 32, 64, 128, 256)"),
        (Backend.CUTLASS, {"has_window": True}, "triton (cutlass: NetworkArgs.max_attention_span)"),
    ],
)
def test_shapes_that_a_backend_cannot_serve_are_named(backend: Backend, shapes: dict[str, Any], attention: str) -> None:
    kernels = resolve_kernels(backend, replace(BFLOAT16, **shapes))
    served = said(kernels)
    assert served["attention"] == attention
    assert (kernels.attention is REFERENCE_KERNELS.attention) == attention.startswith("pytorch")
    other = "triton (cutlass: no kernel)" if backend is Backend.CUTLASS else str(backend)
    assert {served[name] for name in ("norm_mul_dropout", "sampled_softmax_loss")} == {other}
    without = {Backend.CPU: "cpu", Backend.TRITON: "pytorch (triton: no kernel)"}
    assert served["pool_softmax_loss"] == without.get(backend, "pytorch (cutlass: no kernel; triton: no kernel)")
    assert kernels.norm_mul_dropout is not REFERENCE_KERNELS.norm_mul_dropout


def test_the_reference_kernels_serve_every_dtype() -> None:
    kernels = select_kernels("pytorch", True, CPU, KernelShapes(512, 1, 64, 64, torch.float64))
    assert kernels == REFERENCE_KERNELS
