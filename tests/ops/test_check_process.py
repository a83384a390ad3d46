"""Whatever goes wrong in the check of a GPU's kernels refuses the backend with the reason; the run goes on."""

import faulthandler
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from hstu.ops import check_process
from hstu.ops.check_process import Checked, refusal
from hstu.ops.kernels import KernelShapes

GPU = torch.device("cuda", 0)
SHAPES = KernelShapes(64, 2, 128, 64, torch.bfloat16)
ENDLESS = "endless"
STUBS = {
    "right": "pass",
    "wrong": "errors = {'dK': (float('nan'), 1e-2)}",
    "does not fit": "import triton; raise triton.runtime.errors.OutOfResources(300000, 232448, 'shared memory')",
    "illegal access": "raise torch.AcceleratorError('CUDA error: an illegal memory access was encountered')",
    "segfault": "os.kill(os.getpid(), signal.SIGSEGV)",
    "exit": "print('the compiler gave up'); sys.exit(3)",
    ENDLESS: "time.sleep(1000)",
    "no package": "import no_such_package",
}
"""Name of a stub backend → what its check does."""
IN_THIS_PROCESS = ("wrong", "does not fit", "illegal access", "no package")
"""Stubs whose check ends by itself with a report. A process takes seconds to start."""
HEAD = """import os, signal, sys, time, torch

def checks(device, shapes):
    assert str(device) == "cuda:0" and shapes.dtype == torch.bfloat16 and torch.empty(3).isnan().all()
    yield "attention", attention

def attention():
    open(os.environ["STUB_RUNS"], "a").write("x")
    errors = {"attention": (1e-3, 1e-2)}
"""


def stub(folder: Path, name: str, body: str) -> Checked:
    """A backend whose module is written to ``folder``."""
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
def refusals(machine: Path) -> dict[str, str | None]:
    """The answer for every stub."""
    kernels = {name: stub(machine, name, body) for name, body in STUBS.items()}
    elsewhere = [name for name in kernels if name not in (ENDLESS, *IN_THIS_PROCESS)]
    with ThreadPoolExecutor(2) as pool, pytest.MonkeyPatch.context() as patch:
        pending = {name: pool.submit(refusal, kernels[name], GPU, SHAPES) for name in elsewhere}
        answers = {name: each.result() for name, each in pending.items()}
        patch.setattr(check_process, "TIME_LIMIT_S", 3.0)
        begun = time.monotonic()
        answers[ENDLESS] = refusal(kernels[ENDLESS], GPU, SHAPES)
        assert time.monotonic() - begun < 30
        patch.setattr(check_process, "_exit_code", run_here)
        patch.syspath_prepend(str(machine))
        return answers | {name: refusal(kernels[name], GPU, SHAPES) for name in IN_THIS_PROCESS}


def run_here(command: list[str], report: Path, output: Path) -> int:
    """What the process of ``command`` runs, in this one."""
    output.touch()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(faulthandler, "enable", lambda: None)  # pytest has enabled it
        try:
            check_process.main(*command[command.index("hstu.ops.check_process") + 1 :])
        finally:
            torch.use_deterministic_algorithms(False)
    return 0


def test_right_kernels_are_used(refusals: dict[str, str | None]) -> None:
    assert refusals["right"] is None


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("wrong", "the Stub kernel of dK differs from PyTorch by nan, more than 0.01"),
        ("does not fit", "raised OutOfResources: out of resource: shared memory, Required: 300000"),
        ("illegal access", "raised AcceleratorError: CUDA error: an illegal memory access was encountered"),
        ("segfault", "the self check of the Stub kernels was killed by SIGSEGV, in attention"),
        ("exit", "ended with exit code 3 (the compiler gave up), in attention"),
        (ENDLESS, "the self check of the Stub kernels did not go on for 3 s"),
        ("no package", "raised ModuleNotFoundError: No module named 'no_such_package'"),
    ],
)
def test_every_fault_is_a_reason_not_to_use_the_backend(
    refusals: dict[str, str | None], fault: str, reason: str
) -> None:
    assert reason in str(refusals[fault])


def test_a_package_that_is_missing_is_named() -> None:
    missing = Checked("Stub", "no-such-package", "stub", Path())
    assert refusal(missing, GPU, SHAPES) == "no-such-package is not installed"


def test_a_result_is_remembered_until_kernels_gpu_or_shapes_change_and_a_failure_for_an_hour(
    machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[object] = []
    answer: list[str | None] = [None]
    monkeypatch.setattr(check_process, "cache_directory", lambda: machine / "other cache")
    monkeypatch.setattr(check_process, "_check", lambda *arguments: ran.append(arguments) or answer[0])
    kernels = stub(machine, "remembered", "pass")

    def times_checked(shapes: KernelShapes = SHAPES) -> int:
        before = len(ran)
        assert [refusal(kernels, GPU, shapes), refusal(kernels, GPU, shapes)] == answer * 2
        return len(ran) - before

    def age(seconds: float) -> None:
        for record in (machine / "other cache").glob("*.json"):
            os.utime(record, (time.time() - seconds,) * 2)

    assert times_checked() == 1
    age(1e6)
    assert times_checked() == 0
    assert times_checked(KernelShapes(128, 2, 128, 64, torch.bfloat16)) == 1
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    assert times_checked() == 1
    answer[0] = "raised OutOfMemoryError"
    kernels.sources.joinpath("stub_remembered.py").write_text("# changed")
    assert times_checked() == 1
    age(check_process.FAILURE_S + 60)
    assert times_checked() == 1
    for record in (machine / "other cache").glob("*.json"):
        record.write_text("{damaged")
    assert times_checked() == 1


def test_a_cache_that_cannot_be_written_does_not_stop_the_check(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (machine / "file").touch()
    monkeypatch.setattr(check_process, "cache_directory", lambda: machine / "file" / "below")
    monkeypatch.setattr(check_process, "_check", lambda *_: "raised OutOfResources")
    assert refusal(stub(machine, "uncached", "pass"), GPU, SHAPES) == "raised OutOfResources"
