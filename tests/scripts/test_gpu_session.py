"""The script for a lent GPU: an item that fails or hangs costs nothing but its limit, and a later call goes on."""

import json
import time
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch.profiler import DeviceType

from tests import gpu_plan
from tests.conftest import REPOSITORY


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script, as if run from its directory."""
    monkeypatch.syspath_prepend(str(REPOSITORY / "scripts" / "bench"))
    return import_module("gpu_session")


def run(script: ModuleType, out: Path, *options: str, stage: int = 1, budget_s: float = 100) -> tuple[int, Any]:
    """The exit code and the records of a rehearsal."""
    code = script.main([f"--stage={stage}", f"--budget-s={budget_s}", f"--out={out}", "--dry-run", *options])
    return code, json.loads((out / "dry-run" / f"stage-{stage}.json").read_text())


def item(script: ModuleType, name: str, code: str, limit_s: float = 60) -> Any:
    return script.Item(name, limit_s, [], ["-c", code, script.REPORT, script.SCRATCH])


WRITES = "import sys; open(sys.argv[1], 'w').write('{\"ms\": 3}'); print('measured'); sys.exit(CODE)"
HANGS = "import os, time; print('hanging', flush=True); os.fork(); time.sleep(1000)"


def test_every_item_is_recorded_whatever_it_does_and_only_what_failed_is_repeated(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    items = [
        item(script, "fails", WRITES.replace("CODE", "7")),
        item(script, "hangs", HANGS, limit_s=1),
        item(script, "is killed", "import os; os.kill(os.getpid(), 11)"),
        item(script, "works", WRITES.replace("CODE", "0")),
        script.Item("needs a GPU", 60, ["-c", "raise"], None),
    ]
    monkeypatch.setitem(script.STAGES, 1, tuple(items))
    code, records = run(script, tmp_path)
    assert code == 1
    assert list(records) == ["machine", "fails", "hangs", "is killed", "works"]
    assert {name: records[name]["exit_code"] for name in list(records)[1:]} == {
        "fails": 7,
        "hangs": None,
        "is killed": -11,
        "works": 0,
    }
    assert records["works"]["report"] == records["fails"]["report"] == {"ms": 3}
    assert records["works"]["tail"] == "measured\n" and records["hangs"]["tail"] == "hanging\n"
    assert records["hangs"]["seconds"] < 30
    assert "killed at its limit" in capfd.readouterr().out

    monkeypatch.setitem(script.STAGES, 1, (item(script, "fails", WRITES.replace("CODE", "0")), *items[3:]))
    works = records["works"]
    code, records = run(script, tmp_path)
    assert code == 0 and records["fails"]["exit_code"] == 0 and records["works"] == works
    assert "works" in (shown := capfd.readouterr().out) and "done before" in shown and "not on a CPU" in shown


def test_an_item_for_which_no_time_is_left_is_not_begun(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(script, "START_S", 1.0)
    monkeypatch.setitem(
        script.STAGES, 1, (item(script, "long", HANGS), item(script, "late", WRITES.replace("CODE", "0")))
    )
    begun = time.monotonic()
    code, records = run(script, tmp_path, budget_s=2)
    assert time.monotonic() - begun < 30
    assert code == 1 and records["long"]["exit_code"] is None and "late" not in records
    assert "no time left" in capfd.readouterr().out


def test_the_stages_are_complete(script: ModuleType) -> None:
    names = {stage: [each.name for each in items] for stage, items in script.STAGES.items()}
    assert sorted(names) == [1, 2, 3, 4, 5]
    assert all(len(set(items)) == len(items) for items in names.values())
    for each in (each for items in script.STAGES.values() for each in items):
        assert 0 < each.limit_s <= gpu_plan.LIMIT_S
        assert (each.limit_s == gpu_plan.LIMIT_S) == (each.name == "pytest -m gpu")
        scripts = [part for part in each.command if part.endswith(".py")]
        assert all((REPOSITORY / part).exists() for part in scripts)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("stage", [1, 2, 3, 4, 5])
def test_every_item_of_a_stage_can_be_rehearsed(
    script: ModuleType, tmp_path: Path, stage: int, capfd: pytest.CaptureFixture[str]
) -> None:
    code, _ = run(script, tmp_path, stage=stage, budget_s=880)
    assert code == 0, capfd.readouterr().out


def test_a_profile_is_summed_up(script: ModuleType) -> None:
    def event(name: str, begin: float, end: float, device: DeviceType) -> SimpleNamespace:
        span = SimpleNamespace(start=begin, end=end)
        return SimpleNamespace(name=name, time_range=span, device_type=device, is_user_annotation=False)

    events = [
        event("gemm", 0, 1000, DeviceType.CUDA),
        event("copy", 500, 1500, DeviceType.CUDA),  # on another stream
        event("gemm", 3000, 4000, DeviceType.CUDA),
        event("cudaEventSynchronize", 0, 2000, DeviceType.CPU),
        event("aten::mm", 0, 5000, DeviceType.CPU),
    ]
    report = import_module("step_gpu").summary(events, steps=2)
    assert report["busy_ms"] == 1.25 and report["kernels_per_step"] == 1.5
    assert report["kernels"] == [
        {"name": "gemm", "per_step": 1.0, "ms": 1.0},
        {"name": "copy", "per_step": 0.5, "ms": 0.5},
    ]
    assert report["waits"] == [{"name": "cudaEventSynchronize", "per_step": 0.5, "ms": 1.0}]


def test_on_a_gpu_several_launches_share_a_pair_of_events(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    harness = import_module("harness")
    monkeypatch.setitem(harness.LAUNCHES, "cpu", 5)
    called: list[str] = []

    class Slow(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            called.append("forward")
            time.sleep(0.01)
            return x * 1

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
            called.append("backward")
            time.sleep(0.02)
            return grad

    x = torch.ones(3, requires_grad=True)
    times = harness.time_passes({"slow": harness.Pass(lambda: Slow.apply(x), [x])}, torch.device("cpu"), rounds=2)
    rounds = 2 + harness.WARM_UP
    assert called.count("forward") == 5 * rounds + 1 and called.count("backward") == 5 * rounds
    assert 10 <= times["slow"]["forward_ms"] < 19 and 20 <= times["slow"]["backward_ms"] < 38
