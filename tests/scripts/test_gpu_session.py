"""The script for a lent GPU: an item that fails or hangs costs nothing but its limit, and a later call goes on."""

import json
import re
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from torch.profiler import DeviceType

from tests.conftest import REPOSITORY, write_small_store


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script, as if run from its directory."""
    monkeypatch.syspath_prepend(str(REPOSITORY / "scripts" / "bench"))
    return import_module("gpu_session")


@pytest.fixture
def parts(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The plan. An item is begun if a second is left."""
    module = import_module("gpu_parts")
    monkeypatch.setattr(script, "START_S", 1.0)
    return module


def run(script: ModuleType, out: Path, *options: str, part: int = 1, budget_s: float = 100) -> tuple[int, Any]:
    """The exit code and the records of a rehearsal."""
    code = script.main([f"--part={part}", f"--budget-s={budget_s}", f"--out={out}", "--dry-run", *options])
    return code, json.loads((out / "dry-run" / f"part-{part}.json").read_text())


def item(parts: ModuleType, name: str, code: str, limit_s: float = 60, **more: Any) -> Any:
    return parts.Item(name, 1, limit_s, [], ["-c", code, parts.REPORT, parts.SCRATCH], **more)


WRITES = "import sys; open(sys.argv[1], 'w').write('{\"ms\": 3}'); print('measured'); sys.exit(CODE)"
HANGS = "import os, time; print('hanging', flush=True); os.fork(); time.sleep(1000)"
# Measures three cases. The second one ends the process, or hangs.
CASES = f"""
import os, sys, time
from pathlib import Path
sys.path.insert(0, {str(REPOSITORY / "scripts" / "bench")!r})
from harness import attempt
file = Path(sys.argv[1])
report = __import__("json").loads(file.read_text()) if file.exists() else {{}}
for number in range(3):
    attempt(report, "rows", {{"variant": number}}, lambda: SECOND if number == 1 else [{{"by": os.getpid()}}], file)
"""


def test_every_item_is_recorded_whatever_it_does_and_only_what_failed_is_repeated(
    script: ModuleType,
    parts: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    items = [
        item(parts, "fails", WRITES.replace("CODE", "7")),
        item(parts, "hangs", HANGS, limit_s=1),
        item(parts, "is killed", "import os; os.kill(os.getpid(), 11)"),
        item(parts, "works", WRITES.replace("CODE", "0")),
        parts.Item("needs a GPU", 1, 60, ["-c", "raise"], None),
    ]
    monkeypatch.setitem(script.PARTS, 1, tuple(items))
    code, records = run(script, tmp_path)
    assert code == 1
    assert list(records) == ["machine", "fails", "hangs", "is killed", "works"]
    codes = {name: records[name]["exit_code"] for name in list(records)[1:]}
    assert codes == {"fails": 7, "hangs": None, "is killed": -11, "works": 0}
    assert records["works"]["report"] == records["fails"]["report"] == {"ms": 3}
    assert records["works"]["tail"] == "measured\n" and records["hangs"]["tail"] == "hanging\n"
    assert records["hangs"]["seconds"] < 30
    assert "killed after" in capfd.readouterr().out

    monkeypatch.setitem(script.PARTS, 1, (item(parts, "fails", WRITES.replace("CODE", "0")), *items[3:]))
    works = records["works"]
    code, records = run(script, tmp_path)
    assert code == 0 and records["fails"]["exit_code"] == 0 and records["works"] == works
    assert "done before" in (shown := capfd.readouterr().out) and "not on a CPU" in shown


def test_an_item_for_which_no_time_is_left_is_not_begun(
    script: ModuleType,
    parts: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    items = item(parts, "long", HANGS), item(parts, "late", WRITES.replace("CODE", "0"))
    monkeypatch.setitem(script.PARTS, 1, items)
    begun = time.monotonic()
    code, records = run(script, tmp_path, budget_s=2)
    assert time.monotonic() - begun < 30
    assert code == 1 and records["long"]["exit_code"] is None and "late" not in records
    assert "no time left" in capfd.readouterr().out


def test_after_a_case_that_ends_the_process_another_process_measures_the_rest(
    script: ModuleType, parts: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(script.PARTS, 1, (item(parts, "cases", CASES.replace("SECOND", "os.abort()"), resumes=True),))
    code, records = run(script, tmp_path)
    first, second, third = records["cases"]["report"]["rows"]
    assert code == 1 and "the process ended" in second["error"]
    assert first["by"] != third["by"] and records["cases"]["exit_code"] == 0


def test_a_kill_of_the_session_keeps_the_results_that_exist_and_a_later_call_measures_the_others(
    script: ModuleType, parts: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = (
        f"import sys; sys.path.insert(0, {str(REPOSITORY / 'scripts' / 'bench')!r}); import gpu_session as script\n"
    )
    hangs = CASES.replace("SECOND", "time.sleep(1000)")
    program += f"item = script.Item('cases', 1, 60, [], ['-c', {hangs!r}, {parts.REPORT!r}], resumes=True)\n"
    program += f"script.PARTS[1] = (item,)\nscript.main(['--part=1', '--out={tmp_path}', '--dry-run'])"
    session = subprocess.Popen([sys.executable, "-c", program])
    file = tmp_path / "dry-run" / "part-1.json"
    try:
        for _ in range(600):
            records = json.loads(file.read_text()) if file.exists() else {}
            if len(records.get("cases", {}).get("report", {}).get("rows", ())) == 2:
                break
            time.sleep(0.1)
    finally:
        for child in psutil.Process(session.pid).children(recursive=True):
            child.kill()
        session.kill()
        session.wait()
    assert (kept := json.loads(file.read_text())["cases"]["report"]["rows"])[0]["by"]
    assert "running when the session ended" in str(records["cases"]["exit_code"])

    monkeypatch.setitem(script.PARTS, 1, (item(parts, "cases", CASES.replace("SECOND", "[{'by': 0}]"), resumes=True),))
    code, records = run(script, tmp_path / "later", f"--continue-from={file.parent}")
    rows = {row["variant"]: row for row in records["cases"]["report"]["rows"]}
    assert code == 0 and rows[0] == kept[0] and rows[1]["by"] == 0 and len(rows) == 3


def test_all_parts_fit_half_an_hour_and_each_fits_its_limit(parts: ModuleType) -> None:
    names = {part: [each.name for each in items] for part, items in parts.PARTS.items()}
    assert sorted(names) == sorted(parts.LIMITS_S) == [1, 2, 3, 4, 5]
    assert all(len(set(items)) == len(items) for items in names.values())
    for part, items in parts.PARTS.items():
        assert sum(each.expected_s for each in items) <= parts.LIMITS_S[part] <= 540
        for each in items:
            assert each.expected_s < each.limit_s <= parts.LIMITS_S[part]
            scripts = [argument for argument in each.command if argument.endswith(".py")]
            assert all((REPOSITORY / script).exists() for script in scripts)
    assert sum(each.expected_s for items in parts.PARTS.values() for each in items) <= parts.TOTAL_S <= 1800 - 180


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("part", [1, 2, 3, 4, 5])
def test_every_item_of_a_part_can_be_rehearsed(
    script: ModuleType, tmp_path: Path, part: int, capfd: pytest.CaptureFixture[str]
) -> None:
    rng = np.random.default_rng(0)
    items = [rng.integers(0, 300, rng.integers(5, 40)).tolist() for _ in range(200)]
    write_small_store(tmp_path / "data", items, num_items=300)
    code, _ = run(script, tmp_path, f"--data={tmp_path / 'data'}", part=part, budget_s=1100)
    assert code == 0, capfd.readouterr().out


def test_the_report_has_measurements_beside_estimates_and_names_what_failed(
    script: ModuleType, parts: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = {"variant": "cutlass", "step_ms": 171.5, "tokens_per_s": 764_000, "tflops": 372.4, "mfu_percent": 37.7}
    step |= {"peak_memory_gb": 41.0, "busy_ms": 168.0, "idle_ms": 3.5, "host_ms": 13.0, "gaps": [], "messages": []}
    step |= {"categories": {"attention forward": 16.2, "matrix products": 48.0}}
    attention = {"length": 4096, "variant": "ours, cutlass", "forward_gflops": 601e3, "backward_gflops": 355e3}
    attention |= {"gflops": 4e5, "errors": {"O": 0.002, "dQ": 0.004}}
    ended = {"exit_code": 0, "seconds": 9.0, "tail": ""}
    refused = {"variant": "triton", "refused": "ConfigError: no Triton"}
    records = {2: {"the step": ended | {"report": {"steps": [step, refused]}}}}
    ceilings = {"bfloat16_gflops": 798e3, "float32_gflops": 5e4, "copy_gb_s": 3000.0}
    records[3] = {"attention": ended | {"report": {"ceilings": ceilings, "lengths": [attention]}}}
    for part, items in records.items():
        folder = tmp_path / f"call-{part}"
        folder.mkdir()
        machine = {"gpu": "NVIDIA H100", "at": "today"}
        (folder / f"part-{part}.json").write_text(json.dumps({"machine": machine} | items))
    assert script.main([f"--report={tmp_path}", f"--page={tmp_path / 'page.md'}"]) == 0
    page = (tmp_path / "page.md").read_text()
    assert "| cutlass | 171.5 | 764000 | 372.4 | 37.7 |" in page
    estimate = r"[0-9.]+ to [0-9.]+"
    assert "| NVIDIA | 187 |" in page and re.search(rf"\| estimate \| {estimate} \|", page)
    assert re.search(rf"\| attention forward \| 16.2 \| {estimate} \|", page)
    assert re.search(rf"\| 4,096 \| 601 / 355 \| {estimate} / {estimate} \| 622 / 360 \| 4.0e-03 \|", page)
    assert "798 TFLOPS" in page and "- the step, triton: ConfigError: no Triton" in page
    assert "| 3 | layer | not run |" in page and "rehearsal" not in page


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
