"""Measure on a GPU that is lent for minutes: one stage after the other, the most valuable item first.

    python scripts/bench/gpu_session.py --stage 1 --budget-s 540 --out results
    python scripts/bench/gpu_session.py --stage 1 --budget-s 540 --out results --dry-run    rehearse it on a CPU

Every item is a process with its own time limit. Whatever it does, its record is written before the next item begins:
exit code, seconds, the end of its output, and its report in OUT/stage-N.json. An item that has ended well is skipped by
a later call; one that failed, or that the budget left no time for, is tried again. A budget counts seconds from the
start of the call. The machine, its versions and the ceilings of the device are in every report.

With --dry-run, all items run on a CPU at tiny sizes, so that a mistake costs no time on the GPU. What cannot run there
lists what it would do, or is left out. Records of a rehearsal lie in OUT/dry-run.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
BENCH = "scripts/bench"
REPORT = "REPORT"
"""In a command: the file to which it writes JSON."""
SCRATCH = "SCRATCH"
"""In a command: an empty directory that is deleted after it."""
TAIL, TAIL_WITH_REPORT = 3000, 300
"""Characters of an item's output that are kept, without and with a report."""
LARGEST = 400_000
"""Bytes of an item's report beyond which it is left out."""
KILL_S = 10.0
START_S = 15.0
"""Least time for which an item is begun."""
BENCHMARK = "configs/benchmark_ranking.gin"
SMALL_RUN = (
    *("NetworkArgs.num_layers = 1", "NetworkArgs.hidden_size = 32", "NetworkArgs.kv_channels = 16"),
    *("items/FeatureArgs.max_sequence_length = 8", "TrainerArgs.train_batch_size = 2"),
    *("item/EmbeddingArgs.item_vocab_size_or_capacity = 100", "user/EmbeddingArgs.item_vocab_size_or_capacity = 100"),
)
"""Bindings that make the benchmark's model tiny."""
STRICT = "NetworkArgs.strict_kernel_backend = True"
"""No other kernels than those that the item names."""
ML_1M = "configs/ml_1m_retrieval.gin"


@dataclass(frozen=True)
class Item:
    """A command to run."""

    name: str
    limit_s: float
    """Seconds after which it is killed."""
    command: Sequence[str]
    """Arguments of Python, or a program and its arguments if ``is_program``."""
    rehearsal: Sequence[str] | None
    """The same on a CPU at a tiny size; None: it cannot be rehearsed."""
    is_program: bool = False


def bench(script: str, *options: str) -> list[str]:
    """A benchmark that writes its report."""
    return [f"{BENCH}/{script}.py", *options, "--output", REPORT]


def measured(script: str, limit_s: float, gpu: Sequence[str] = (), tiny: Sequence[str] = (), name: str = "") -> Item:
    """An operator benchmark on both devices."""
    always = ("--no-compile",)
    return Item(
        name or script,
        limit_s,
        bench(script, "--device", "cuda", "--rounds", "10", *always, *gpu),
        bench(script, "--device", "cpu", "--rounds", "1", "--threads", "1", *always, *tiny),
    )


def step(name: str, limit_s: float, *bindings: str, options: Sequence[str] = ("--steps", "40")) -> Item:
    """Steps of the benchmark's model."""
    small = ("--steps", "2") if "--compare" not in options else options
    return Item(
        name,
        limit_s,
        bench("step_gpu", *options, "--bindings", STRICT, *bindings),
        bench("step_gpu", *small, "--bindings", *SMALL_RUN, *bindings),
    )


def self_check(backend: str, limit_s: float) -> Item:
    """All kernels of a backend against PyTorch, with outputs that are filled with nan, each of them twice."""
    module = ["-m", f"hstu.ops.{backend}.self_check"]
    return Item(f"{backend} against PyTorch", limit_s, module, [*module, "--list", "--device", "cpu"])


def sanitizer(tool: str, backend: str) -> Item:
    """The smallest kernels under compute-sanitizer."""
    module = ["-m", f"hstu.ops.{backend}.self_check", "--head-dim", "64", "--dtype", "bfloat16"]
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", sys.executable, *module]
    return Item(f"{tool}, {backend}", 240, command, [*module, "--list", "--device", "cpu"], is_program=True)


WIDTH_128 = ("NetworkArgs.item_embedding_dim = 128", "NetworkArgs.contextual_embedding_dim = 128")
"""The widths of NVIDIA's benchmark. MLPs take them to the hidden size."""
ML_1M_STEPS = (
    *("pretrain_gr_retrieval.py", "--gin-config-file", ML_1M, "--gin-bindings"),
    *(
        "TrainerArgs.num_train_epochs = None",
        "TrainerArgs.max_train_iters = 100",
        "TrainerArgs.eval_at_end = False",
        "TrainerArgs.ckpt_save_interval = -1",
        f"TrainerArgs.output_dir = '{SCRATCH}'",
    ),
)
COMPARE = ("--compare", "none", "native", "prefetch", "--steps", "3")
UVM = "item/EmbeddingArgs.compute_kernel = 'fused_uvm'"
CACHED = "item/EmbeddingArgs.compute_kernel = 'fused_uvm_caching'"
STAGES: dict[int, tuple[Item, ...]] = {
    1: (  # is it right?
        self_check("cutlass", 300),
        self_check("triton", 420),
        measured("layer_operators", 120, name="machine and ceilings"),
        sanitizer("memcheck", "cutlass"),
        sanitizer("racecheck", "cutlass"),
        sanitizer("memcheck", "triton"),
        sanitizer("racecheck", "triton"),
    ),
    2: (  # the kernels
        measured("attention", 300, ("--length", "4096", "512", "1024"), ("--length", "32"), "attention to 4096"),
        measured("layer", 240, (), ("--length", "32")),
        measured("attention", 300, ("--length", "2048", "8192", "16384"), ("--length", "32"), "attention to 16384"),
        measured("negatives", 120, (), ("--queries", "32", "--pool", "16", "--draws", "4", "--dim", "8")),
        measured("jagged", 90, (), ("--sequences", "4", "--width", "8")),
    ),
    3: (  # the step
        step("step, cutlass", 240),
        Item(
            "host time by module",
            180,
            bench("step_profile", "ranking", BENCHMARK),
            bench("step_profile", "ranking", BENCHMARK, "--steps", "1", "--bindings", *SMALL_RUN),
        ),
        step("step, triton", 240, "NetworkArgs.kernel_backend = 'triton'"),
        step("step, width 128", 240, *WIDTH_128),
        step("equal losses", 300, options=COMPARE),
    ),
    4: (  # dynamic tables, real data, tests
        Item(
            "dynamic tables",
            300,
            bench("dynamic_gpu", "--device", "cuda", "--rounds", "10"),
            bench("dynamic_gpu", "--rounds", "1", "--rows", "300", "--lookups", "256"),
        ),
        Item("ml-1m, 100 steps", 240, ML_1M_STEPS, [*ML_1M_STEPS[:6], "--validate-only", "--quick"]),
        Item(
            "pytest -m gpu",
            580,
            ["-m", "pytest", "-m", "gpu", "--durations=20"],
            ["-m", "pytest", "-m", "gpu", "--durations=20", "tests/ops/cutlass/test_self_check.py"],
        ),
    ),
    5: (  # tables in host memory
        step("step, uvm caching", 240, CACHED, options=("--steps", "20")),
        step("step, uvm caching, prefetch", 240, CACHED, "TrainerArgs.pipeline_type = 'prefetch'"),
        step("step, uvm", 240, UVM, options=("--steps", "20")),
        step("equal losses, uvm caching", 300, CACHED, options=COMPARE),
    ),
}


class Records:
    """The file of a stage: one record per item, complete on the disk after each change."""

    def __init__(self, file: Path) -> None:
        self.file = file
        file.parent.mkdir(parents=True, exist_ok=True)
        self.items: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}

    def done(self, name: str) -> bool:
        """Whether the item has ended well before."""
        return bool(self.items.get(name, {}).get("exit_code") == 0)

    def write(self, name: str, record: Mapping[str, Any]) -> None:
        """Replace the record of an item."""
        self.items[name] = record
        written = self.file.with_suffix(".new")
        lines = (f"{json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}" for key, value in self.items.items())
        with written.open("w", encoding="utf-8") as file:
            file.write("{\n" + ",\n".join(lines) + "\n}\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(written, self.file)


def run(item: Item, limit_s: float, rehearse: bool) -> dict[str, Any]:
    """Run an item to its end or its limit; returns its record."""
    command = list(item.rehearsal or ()) if rehearse else list(item.command)
    with tempfile.TemporaryDirectory() as folder:
        report, output = Path(folder) / "report.json", Path(folder) / "output"
        places = {REPORT: str(report), SCRATCH: str(Path(folder) / "scratch")}
        for name, place in places.items():
            command = [part.replace(name, place) for part in command]
        if rehearse or not item.is_program:
            command = [sys.executable, *command]
        paths = filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
        if rehearse:
            environment |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        begun = time.monotonic()
        code = _exit_code(command, limit_s, environment, output)
        record: dict[str, Any] = {
            "exit_code": code,
            "seconds": round(time.monotonic() - begun, 1),
            "tail": output.read_text(encoding="utf-8", errors="replace")[-TAIL:],
        }
        if code is None:
            record["killed_after_s"] = limit_s
        if report.exists() and report.stat().st_size <= LARGEST:
            record["report"] = _json_or_text(report.read_text(encoding="utf-8"))
            record["tail"] = record["tail"][-TAIL_WITH_REPORT:]
    return record


def _exit_code(command: list[str], limit_s: float, environment: Mapping[str, str], output: Path) -> int | str | None:
    """The exit code; None if the limit ended it; why, if it cannot be started."""
    with output.open("wb") as sink:
        try:
            process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=sink, stderr=subprocess.STDOUT, start_new_session=True
            )
        except OSError as error:
            return str(error)
    try:
        return process.wait(limit_s)
    except BaseException as stop:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        with suppress(subprocess.TimeoutExpired):  # stuck in the driver
            process.wait(KILL_S)
        if isinstance(stop, subprocess.TimeoutExpired):
            return None
        raise


def _json_or_text(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text[-TAIL:]


def machine() -> dict[str, Any]:
    """The GPU and its driver, by nvidia-smi."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return {"gpu": None}
    fields = "name,driver_version,memory.total,clocks.max.sm,power.limit,clocks_event_reasons.active"
    done = subprocess.run([program, f"--query-gpu={fields}", "--format=csv,noheader"], capture_output=True, text=True)
    return {"fields": fields, "gpu": done.stdout.strip() or done.stderr.strip()}


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", type=int, choices=tuple(STAGES), required=True)
    parser.add_argument("--budget-s", type=float, required=True, help="seconds for this call")
    parser.add_argument("--out", type=Path, required=True, help="directory of the records")
    parser.add_argument("--only", nargs="+", help="items whose names contain one of these")
    parser.add_argument("--dry-run", action="store_true", help="rehearse on a CPU at tiny sizes")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Run the items of a stage; returns 1 if one of them has failed or was not run."""
    options = parse(argv)
    ends = time.monotonic() + options.budget_s
    folder = options.out / "dry-run" if options.dry_run else options.out
    records = Records(folder / f"stage-{options.stage}.json")
    records.write("machine", machine() | {"python": sys.version, "at": time.strftime("%Y-%m-%d %H:%M:%S")})
    rows = []
    for item in STAGES[options.stage]:
        left = ends - time.monotonic()
        if options.only and not any(part in item.name for part in options.only):
            continue
        if records.done(item.name):
            state = "done before"
        elif options.dry_run and item.rehearsal is None:
            state = "not on a CPU"
        elif left < START_S:
            state = "no time left"
        else:
            print(f"{item.name} …", flush=True)
            record = run(item, min(item.limit_s, left), options.dry_run)
            records.write(item.name, record)
            code = record["exit_code"]
            state = "ok" if code == 0 else "killed at its limit" if code is None else f"failed ({code})"
            state += f" after {record['seconds']} s"
            if code != 0:
                print(record["tail"][-600:], flush=True)
        rows.append((item.name, state))
    print(*(f"{name:32} {state}" for name, state in rows), sep="\n")
    print(f"records: {records.file}")
    return 0 if all(state.startswith(("ok", "done", "not on")) for _, state in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
