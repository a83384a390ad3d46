"""Whatever goes wrong in the check of a GPU's kernel refuses its operator with the reason; the others are used."""

import faulthandler
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from hstu.ops import check_process
from hstu.ops.check_process import Checked, refusals
from hstu.ops.kernels import KernelShapes

GPU = torch.device("cuda", 0)
SHAPES = KernelShapes(64, 2, 128, 64, torch.bfloat16)
OPERATORS = ("attention", "add_layer_norm", "add_positions")
STUBS = {
    "right": "pass",
    "wrong": "errors = {'dK': (float('nan'), 1e-2)}",
    "does not fit": "import triton; raise triton.runtime.errors.OutOfResources(300000, 232448, 'shared memory')",
    "illegal access": "raise torch.AcceleratorError('CUDA error: an illegal memory access was encountered')",
    "segfault": "os.kill(os.getpid(), signal.SIGSEGV)",
    "exit": "print('the compiler gave up'); sys.exit(3)",
    "silent exit": "sys.exit(0)",
    "endless": "raise KeyboardInterrupt",
}
"""Name of a stub backend → what its check of the second operator does."""
AT_START = "the module cannot be imported"
IN_OTHER_PROCESSES = ("segfault", AT_START)
"""Stubs whose check is run as it is. A process takes seconds to start."""
HEAD = """import os, signal, sys, time, torch
from hstu.ops.self_check import Check

def checks(device, shapes):
    assert str(device) == "cuda:0" and shapes.dtype == torch.bfloat16 and torch.empty(3).isnan().all()
    open(os.environ["STUB_RUNS"], "a").write("processes ")
    yield Check("attention", "attention, causal", right)
    yield Check("add_layer_norm", "add_layer_norm, first", right)
    yield Check("add_layer_norm", "add_layer_norm, second", stub)
    yield Check("add_positions", "add_positions", right)

def right():
    open(os.environ["STUB_RUNS"], "a").write("right ")
    return {"right": (1e-3, 1e-2)}

def stub():
    errors = {"stub": (1e-3, 1e-2)}
"""


def stub(folder: Path, name: str, body: str) -> Checked:
    """A backend of three operators whose module is written to ``folder``."""
    module = f"stub_{name.replace(' ', '_')}"
    (folder / f"{module}.py").write_text(f"{HEAD}    {body}\n    return errors\n")
    return Checked("Stub", "torch", module, folder)


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of the stubs, on a machine with an H100 and an empty cache."""
    pytest.importorskip("triton", reason="NEEDS TRITON: pip install -e '.[cpu]'")
    folder = tmp_path_factory.mktemp("stubs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(check_process, "cache_directory", lambda: folder / "cache")
        patch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100")
        patch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
        patch.setenv("PYTHONPATH", str(folder))
        patch.setenv("STUB_RUNS", str(folder / "runs"))
        yield folder


@pytest.fixture(scope="module")
def refused(machine: Path) -> dict[str, dict[str, str]]:
    """The answer for every stub."""
    kernels = {name: stub(machine, name, body) for name, body in STUBS.items()}
    kernels[AT_START] = stub(machine, AT_START, "pass\n\nimport no_such_package\n\ndef more():\n    errors = {}")
    with ThreadPoolExecutor(2) as pool, pytest.MonkeyPatch.context() as patch:
        pending = {name: pool.submit(refusals, kernels[name], GPU, SHAPES, OPERATORS) for name in IN_OTHER_PROCESSES}
        answers = {name: each.result() for name, each in pending.items()}
        patch.setattr(check_process, "_exit_code", run_here)
        patch.syspath_prepend(str(machine))
        here = kernels.keys() - answers
        return answers | {name: refusals(kernels[name], GPU, SHAPES, OPERATORS) for name in here}


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
        finally:
            torch.use_deterministic_algorithms(False)
    return 0


def test_right_kernels_are_used(refused: dict[str, dict[str, str]]) -> None:
    assert refused["right"] == {}


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("wrong", "dK differs from PyTorch by nan, more than 0.01"),
        ("does not fit", "raised OutOfResources: out of resource: shared memory, Required: 300000"),
        ("illegal access", "raised AcceleratorError: CUDA error: an illegal memory access was encountered"),
        ("segfault", "the self check was killed by SIGSEGV, in add_layer_norm, second"),
        ("exit", "ended with exit code 3 (the compiler gave up), in add_layer_norm, second"),
        ("silent exit", "ended with exit code 0 (no output), in add_layer_norm, second"),
        ("endless", "the self check did not go on for 240 s, in add_layer_norm, second"),
    ],
)
def test_a_fault_refuses_its_operator_alone(refused: dict[str, dict[str, str]], fault: str, reason: str) -> None:
    assert list(refused[fault]) == ["add_layer_norm"], "the operators before and after it are right"
    assert reason in refused[fault]["add_layer_norm"]


def test_a_process_that_does_not_go_on_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check_process, "TIME_LIMIT_S", 1.0)
    report = tmp_path / "report"
    report.touch()
    begun = time.monotonic()
    assert check_process._exit_code(["sleep", "1000"], report, tmp_path / "output") is None
    assert time.monotonic() - begun < 30


def test_a_process_that_cannot_begin_refuses_all(refused: dict[str, dict[str, str]]) -> None:
    assert list(refused[AT_START]) == list(OPERATORS)
    (reason,) = set(refused[AT_START].values())
    assert "exit code 1 (ModuleNotFoundError: No module named 'no_such_package'), in its start" in reason


@pytest.mark.parametrize(("is_usable", "processes"), [(True, 1), (False, 2)])
def test_only_an_exception_that_leaves_the_gpu_unusable_needs_a_new_process(
    machine: Path, monkeypatch: pytest.MonkeyPatch, is_usable: bool, processes: int
) -> None:
    monkeypatch.setattr(check_process, "_exit_code", run_here)
    monkeypatch.setattr(check_process, "is_usable", lambda device: is_usable)
    monkeypatch.syspath_prepend(str(machine))
    monkeypatch.setenv("STUB_RUNS", str(machine / f"{processes} processes"))
    kernels = stub(machine, f"raises {processes}", "raise RuntimeError")
    assert list(refusals(kernels, GPU, SHAPES, OPERATORS)) == ["add_layer_norm"]
    runs = (machine / f"{processes} processes").read_text().split()
    assert runs.count("processes") == processes and runs.count("right") == 3, "no case runs twice"


def test_an_operator_without_a_case_is_refused(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check_process, "_exit_code", run_here)
    monkeypatch.syspath_prepend(str(machine))
    kernels = stub(machine, "lacks a case", "return errors")
    assert list(refusals(kernels, GPU, SHAPES, ["attention", "jagged_concat"])) == ["jagged_concat"]


def test_a_package_that_is_missing_is_named() -> None:
    missing = Checked("Stub", "no-such-package", "stub", Path())
    reason = "no-such-package is not installed"
    assert refusals(missing, GPU, SHAPES, OPERATORS) == dict.fromkeys(OPERATORS, reason)


def test_a_result_is_remembered_until_kernels_gpu_or_shapes_change_and_a_failure_for_an_hour(
    machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[str] = []
    answers: dict[str, str | None] = dict.fromkeys(OPERATORS)

    def check(
        kernels: Checked, device: torch.device, shapes: KernelShapes, operators: list[str]
    ) -> dict[str, str | None]:
        ran.extend(operators)
        return {operator: answers[operator] for operator in operators}

    monkeypatch.setattr(check_process, "cache_directory", lambda: machine / "other cache")
    monkeypatch.setattr(check_process, "_check", check)
    kernels = stub(machine, "remembered", "pass")

    def checked(*operators: str, shapes: KernelShapes = SHAPES) -> list[str]:
        """What is checked the first of two times."""
        before = len(ran)
        expected = {operator: answers[operator] for operator in operators if answers[operator]}
        assert refusals(kernels, GPU, shapes, operators) == expected
        now = len(ran)
        assert refusals(kernels, GPU, shapes, operators) == expected and len(ran) == now
        return ran[before:]

    def age(seconds: float) -> None:
        for record in (machine / "other cache").glob("*.json"):
            os.utime(record, (time.time() - seconds,) * 2)

    assert checked("attention") == ["attention"]
    age(1e6)
    assert checked("attention", "add_positions") == ["add_positions"]
    assert checked("attention", shapes=KernelShapes(128, 2, 128, 64, torch.bfloat16)) == ["attention"]
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    assert checked("attention") == ["attention"]
    answers["add_positions"] = "raised OutOfMemoryError"
    kernels.sources.joinpath("stub_remembered.py").write_text("# changed")
    assert checked(*OPERATORS) == list(OPERATORS)
    age(check_process.FAILURE_S + 60)
    assert checked(*OPERATORS) == ["add_positions"]
    for record in (machine / "other cache").glob("*.json"):
        record.write_text("{damaged")
    assert checked("attention") == ["attention"]


def test_a_cache_that_cannot_be_written_does_not_stop_the_check(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (machine / "file").touch()
    monkeypatch.setattr(check_process, "cache_directory", lambda: machine / "file" / "below")
    answer = {"attention": "raised OutOfResources"}
    monkeypatch.setattr(check_process, "_check", lambda *_: answer)
    assert refusals(stub(machine, "uncached", "pass"), GPU, SHAPES, ["attention"]) == answer


COMPILER = """import os
from hstu.ops.compile_ahead import Job

def jobs(shapes, capability, operators):
    assert capability == 90 and shapes.head_dim == 64 and operators == ["attention", "add_layer_norm", "add_positions"]
    return [Job("good", compiles), Job("bad", fails)]

def compiles():
    open(os.environ["STUB_RUNS"], "a").write("compiled ")

def fails():
    raise ValueError("no such instruction")
"""


def test_kernels_are_compiled_before_the_check_and_a_failure_is_left_to_it(
    machine: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (machine / "stub_compiler.py").write_text(COMPILER)
    monkeypatch.setenv("STUB_RUNS", str(machine / "compiled_runs"))
    monkeypatch.syspath_prepend(str(machine))
    caplog.set_level("INFO")
    real = check_process._exit_code

    def here_or_there(command: list[str], report: Path, output: Path) -> int | None:
        return (run_here if "hstu.ops.check_process" in command else real)(command, report, output)

    monkeypatch.setattr(check_process, "_exit_code", here_or_there)
    kernels = replace(stub(machine, "compiled first", "pass"), compiler="stub_compiler")
    assert refusals(kernels, GPU, SHAPES, OPERATORS) == {}
    assert (machine / "compiled_runs").read_text().startswith("compiled processes ")
    assert "kernel compilation for Stub: compiled=1 failed=1" in caplog.text
