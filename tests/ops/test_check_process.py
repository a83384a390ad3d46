"""Whatever goes wrong in the check of a GPU's kernel refuses its operator with the reason; the others are used."""

import faulthandler
import json
import time
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import torch

from hstu.ops import check_process
from hstu.ops.check_process import refusals, remembered
from hstu.ops.kernels import Backend, KernelShapes

GPU = torch.device("cuda", 0)
SHAPES = KernelShapes(64, 2, 128, 64, torch.bfloat16)
OPERATORS = ("attention", "add_layer_norm", "add_positions")
HEAD = """import os, signal, sys, torch
from hstu.ops.compile_ahead import Job
from hstu.ops.self_check import Check

def jobs(backend, shapes, capability, operators):
    assert backend == "triton" and capability == 90 and shapes.head_dim == 64
    return [Job("good", lambda: note("compiled")), Job("bad", lambda: 1 / 0)]

def checks(backend, device, shapes):
    assert str(device) == "cuda:0" and shapes.dtype == torch.bfloat16 and torch.empty(3).isnan().all()
    note("process")
    yield Check("attention", "attention, causal", right)
    yield Check("add_layer_norm", "add_layer_norm, first", right)
    yield Check("add_layer_norm", "add_layer_norm, second", stub)
    yield Check("add_positions", "add_positions", right)

def note(word):
    open(__file__ + ".runs", "a").write(word + " ")

def right():
    note("right")
    return {"right": (1e-3, 1e-2)}

def stub():
    errors = {"stub": (1e-3, 1e-2)}
"""


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of stubs, on a machine with an H100 and an empty cache."""
    pytest.importorskip("triton", reason="NEEDS TRITON: pip install -e '.[cpu,dev]'")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


Refused = Callable[..., dict[str, str]]


@pytest.fixture
def refused(machine: Path, monkeypatch: pytest.MonkeyPatch) -> Refused:
    def run(body: str, *, here: bool = True) -> dict[str, str]:
        """What is refused where the second check of add_layer_norm does ``body``; in this process, which is faster."""
        module = f"stub_{len(list(machine.glob('*.py')))}_{machine.name}"
        (machine / f"{module}.py").write_text(f"{HEAD}    {body}\n    return errors\n")
        monkeypatch.setattr(check_process, "CHECKS", module)
        if here:
            monkeypatch.setattr(check_process, "_exit_code", run_here)
        return refusals(Backend.TRITON, GPU, SHAPES, OPERATORS)

    return run


def run_here(command: list[str], report: Path, output: Path) -> int | None:
    """What the process of ``command`` runs, in this one. KeyboardInterrupt: the process is killed."""
    with pytest.MonkeyPatch.context() as patch, output.open("w") as file, redirect_stdout(file):
        patch.setattr(faulthandler, "enable", lambda: None)  # pytest has enabled it
        try:
            check_process.main(*command[command.index("hstu.ops.check_process") + 1 :])
        except SystemExit as end:
            return int(str(end.code))
        except KeyboardInterrupt:
            return None
        except ModuleNotFoundError as problem:
            print(f"ModuleNotFoundError: {problem}")
            return 1
        finally:
            torch.use_deterministic_algorithms(False)
    return 0


def runs(machine: Path) -> list[str]:
    (file,) = machine.glob("*.runs")
    return file.read_text().split()


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("errors = {'dK': (float('nan'), 1e-2)}", "dK differs from PyTorch by nan, more than 0.01"),
        ("raise torch.AcceleratorError('CUDA error: an illegal access')", "raised AcceleratorError: CUDA error: an il"),
        ("print('the compiler gave up'); sys.exit(3)", "ended with exit code 3 (the compiler gave up), in add_layer_n"),
        ("sys.exit(0)", "ended with exit code 0 (no output), in add_layer_norm, second"),
        ("raise KeyboardInterrupt", "the self check did not go on for 240 s, in add_layer_norm, second"),
    ],
)
def test_a_fault_refuses_its_operator_alone(refused: Refused, body: str, reason: str) -> None:
    found = refused(body)
    assert list(found) == ["add_layer_norm"], "the operators before and after it are right"
    assert reason in found["add_layer_norm"]


def test_a_process_that_crashes_compiles_first_and_refuses_its_operator(refused: Refused, machine: Path) -> None:
    found = refused("os.kill(os.getpid(), signal.SIGSEGV)", here=False)
    assert list(found) == ["add_layer_norm"]
    assert "the self check was killed by SIGSEGV, in add_layer_norm, second" in found["add_layer_norm"]
    assert runs(machine) == ["compiled", "process", "right", "right", "compiled", "process", "right"]


def test_a_process_that_cannot_begin_refuses_all(refused: Refused) -> None:
    found = refused("pass\n\nimport no_such_package\n\ndef more():\n    errors = {}")
    (reason,) = set(found.values())
    assert list(found) == list(OPERATORS)
    assert "exit code 1 (ModuleNotFoundError: No module named 'no_such_package'), in its start" in reason


def test_a_process_that_does_not_go_on_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check_process, "TIME_LIMIT_S", 1.0)
    report = tmp_path / "report"
    report.touch()
    begun = time.monotonic()
    assert check_process._exit_code(["sleep", "1000"], report, tmp_path / "output") is None
    assert time.monotonic() - begun < 30


@pytest.mark.parametrize(("is_usable", "processes"), [(True, 1), (False, 2)])
def test_only_an_exception_that_leaves_the_gpu_unusable_needs_a_new_process(
    refused: Refused, machine: Path, monkeypatch: pytest.MonkeyPatch, is_usable: bool, processes: int
) -> None:
    monkeypatch.setattr(check_process, "is_usable", lambda device: is_usable)
    assert list(refused("raise RuntimeError")) == ["add_layer_norm"]
    assert runs(machine).count("process") == processes and runs(machine).count("right") == 3, "no case runs twice"


def test_an_operator_without_a_case_is_refused(refused: Refused) -> None:
    assert refused("return errors") == {}
    assert list(refusals(Backend.TRITON, GPU, SHAPES, ["attention", "jagged_concat"])) == ["jagged_concat"]


def test_a_package_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(check_process.PACKAGES, Backend.TRITON, "no-such-package")
    reason = "no-such-package is not installed"
    assert refusals(Backend.TRITON, GPU, SHAPES, OPERATORS) == dict.fromkeys(OPERATORS, reason)


def test_a_result_is_remembered_for_its_key_and_a_failure_for_an_hour(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    file = tmp_path / "hstu" / "checks.json"
    ran: list[str] = []
    answers: dict[str, str | None] = dict.fromkeys(OPERATORS)

    def check(operators: Sequence[str]) -> dict[str, str | None]:
        ran.extend(operators)
        return {operator: answers[operator] for operator in operators}

    def checked(*operators: str, key: str = "key") -> list[str]:
        """What is checked the first of two times."""
        ran.clear()
        expected = {operator: answers[operator] for operator in operators if answers[operator]}
        assert remembered(key, operators, check) == expected
        now = list(ran)
        assert remembered(key, operators, check) == expected and ran == now
        return now

    assert checked("attention") == ["attention"]
    assert checked("attention", "add_positions") == ["add_positions"]
    answers["add_positions"] = "raised OutOfMemoryError"
    assert checked(*OPERATORS, key="other GPU") == list(OPERATORS)
    everything = json.loads(file.read_text())
    for known in everything.values():
        for operator, (reason, checked_at) in known.items():
            known[operator] = reason, checked_at - check_process.FAILURE_S - 60
    file.write_text(json.dumps(everything))
    assert checked(*OPERATORS, key="other GPU") == ["add_positions"]
    file.write_text("{damaged")
    assert checked("attention") == ["attention"]


def test_a_cache_that_cannot_be_written_does_not_stop_the_check(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    answer = {"attention": "raised OutOfResources"}
    assert remembered("key", ["attention"], lambda _: dict(answer)) == answer
