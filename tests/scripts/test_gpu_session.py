"""The script for a GPU at hand: an item that fails or hangs costs nothing but its limit, and a later call goes on."""

import json
import time
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.profiler import DeviceType

from tests.conftest import REPOSITORY, write_small_store


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script, as if run from its directory. An item is begun if a second is left."""
    monkeypatch.syspath_prepend(str(REPOSITORY / "scripts" / "bench"))
    module = import_module("gpu_session")
    monkeypatch.setattr(module, "START_S", 1.0)
    return module


def run(script: ModuleType, out: Path, *options: str, budget_s: float = 100) -> tuple[int, dict[str, str]]:
    """The exit code of a rehearsal, and how its items ended."""
    code = script.main([f"--budget-s={budget_s}", f"--out={out}", "--dry-run", *(options or ("--part=1",))])
    return code, json.loads((out / "dry-run" / "session.json").read_text())


def item(script: ModuleType, name: str, code: str, limit_s: float = 15) -> Any:
    return script.Item(name, limit_s, [], ["-c", code, script.REPORT, script.SCRATCH])


HANGS = "import os, time; print('hanging', flush=True); os.fork(); time.sleep(1000)"
# Measures three cases. The second one raises, ends the process, or passes.
CASES = f"""
import os, sys
from pathlib import Path
from types import SimpleNamespace
sys.path.insert(0, {str(REPOSITORY / "scripts" / "bench")!r})
from harness import attempt, earlier
file = Path(sys.argv[1])
report = earlier(SimpleNamespace(output=file, resume=True))
for number in range(3):
    attempt(report, "rows", {{"variant": number}}, lambda: SECOND if number == 1 else [{{"by": os.getpid()}}], file)
"""


def rows(out: Path, name: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((out / "dry-run" / f"{name}.json").read_text())["rows"]
    return sorted(found, key=lambda row: row["variant"])


@pytest.mark.slow
def test_every_item_ends_and_a_later_call_measures_what_failed(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    items = item(script, "fails", CASES.replace("SECOND", "1 / 0")), item(script, "hangs", HANGS, limit_s=2)
    monkeypatch.setitem(script.PARTS, 1, (*items, script.Item("not on a CPU", 9, [], None)))
    code, ended = run(script, tmp_path)
    first = rows(tmp_path, "fails")
    assert code == 1 and ended["fails"].startswith("1 of 3 results failed") and "ZeroDivision" in first[1]["error"]
    assert ended["hangs"].startswith("killed") and "not on a CPU" not in ended
    assert "hanging" in capfd.readouterr().out

    items = item(script, "fails", CASES.replace("SECOND", "[{'by': 0}]")), item(script, "hangs", "print('works')")
    monkeypatch.setitem(script.PARTS, 1, items)
    code, ended = run(script, tmp_path)
    later = rows(tmp_path, "fails")
    assert code == 0 and later[0] == first[0] and later[1]["by"] == 0 and ended["hangs"].startswith("ok")


def test_after_a_case_that_ends_the_process_another_process_measures_the_rest(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(script.PARTS, 1, (item(script, "cases", CASES.replace("SECOND", "os.abort()")),))
    code, ended = run(script, tmp_path)
    first, second, third = rows(tmp_path, "cases")
    assert code == 1 and "the process ended" in second["error"] and first["by"] != third["by"]
    assert ended["cases"].startswith("1 of 3 results failed, ok")


def test_an_item_for_which_no_time_is_left_is_not_begun(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(script.PARTS, 1, (item(script, "long", HANGS), item(script, "late", "print(1)")))
    code, ended = run(script, tmp_path, budget_s=2)
    assert code == 1 and list(ended) == ["long"]


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("part", [1, 2, 3, 4, 5])
def test_every_item_of_a_part_can_be_rehearsed(
    script: ModuleType, tmp_path: Path, part: int, capfd: pytest.CaptureFixture[str]
) -> None:
    rng = np.random.default_rng(0)
    items = [rng.integers(0, 300, rng.integers(5, 40)).tolist() for _ in range(200)]
    write_small_store(tmp_path / "data", items, num_items=300)
    code, ended = run(script, tmp_path, f"--part={part}", f"--data={tmp_path / 'data'}", budget_s=1100)
    assert code == 0, (ended, capfd.readouterr().out)


def test_a_profile_is_summed_up(script: ModuleType) -> None:
    def event(name: str, begin: float, end: float, device: DeviceType, stream: int = 7) -> SimpleNamespace:
        span = SimpleNamespace(start=begin, end=end)
        which = {"device_type": device, "device_resource_id": stream, "is_user_annotation": False}
        return SimpleNamespace(name=name, time_range=span, **which)

    events = [
        event("nvjet_gemm", 0, 1000, DeviceType.CUDA),
        event("Memcpy HtoD", 500, 1500, DeviceType.CUDA, stream=20),
        event("nvjet_gemm", 3000, 4000, DeviceType.CUDA),
        event("cudaEventSynchronize", 0, 2000, DeviceType.CPU),
        event("aten::mm", 0, 5000, DeviceType.CPU),
    ]
    report = import_module("step_gpu").summary(events, steps=2)
    assert report["busy_ms"] == 1.25 and report["kernels_per_step"] == 1.5
    assert report["overlap_ms"] == 0.25, "half a millisecond of the copy runs beside the product, in one of two steps"
    assert report["categories"] == {"matrix products": 1.0, "copies": 0.5}
    assert report["idle_ms"] == 0.75
    assert report["gaps"] == [{"us": 1500.0, "after": "Memcpy HtoD", "before": "nvjet_gemm"}]
    assert report["kernels"] == [
        {"name": "nvjet_gemm", "per_step": 1.0, "ms": 1.0},
        {"name": "Memcpy HtoD", "per_step": 0.5, "ms": 0.5},
    ]
    assert report["waits"] == [{"name": "cudaEventSynchronize", "per_step": 0.5, "ms": 1.0}]


def test_every_gpu_kernel_of_ours_has_a_category(script: ModuleType) -> None:
    category_of = import_module("step_gpu").category_of
    cutlass = "kernel_cutlass_kernel_hstuopscutlasssm90{}Sm90_object_at__cutlasscuteatomCopyAtom"
    assert category_of(cutlass.format("Forward")) == category_of("attention_forward") == "attention forward"
    assert category_of(cutlass.format("Backward")) == category_of("attention_backward_keys") == "attention backward"
    assert category_of("linear_silu") == category_of("sm90_xmma_gemm_bf16") == "matrix products"
    assert category_of("silu_kernel") == "SiLU" and category_of("permute_rows") == "tokens"


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
