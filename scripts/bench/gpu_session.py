"""Measure everything on a GPU that is at hand for minutes: five parts, the most important item of each first.

    python scripts/bench/gpu_session.py --part 1 2 --budget-s 560 --out results        measure
    python scripts/bench/gpu_session.py --part 1 2 --budget-s 560 --out results --dry-run      rehearse on a CPU
    python scripts/bench/gpu_session.py --report results               write docs/benchmarks/gpu/README.md from results

Each item is a process with its own time limit. OUT/part-N.json is complete on the disk after every result, also within
an item, so that a kill loses only what was in progress. Items that end well are skipped by a later call with the same
--out, or with --continue-from and a copy of its files; of the others the results that exist are kept. Where an item
loses its process, another process measures what it had not begun. A budget counts seconds from the start of the call.

With --dry-run all items run on a CPU at tiny sizes: a mistake then costs no time on the GPU. Kernels for GPUs are
compiled and not launched. Records of a rehearsal lie in OUT/dry-run.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from hstu.base.files import replace_text

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from gpu_parts import (  # noqa: E402
    DATA,
    LIMITS_S,
    OUT,
    PARTS,
    REPORT,
    SCRATCH,
    Item,
    failures,
    rows_of,
    state_of,
    without_failures,
)

TAIL, TAIL_WITH_REPORT = 6000, 600
"""Characters of an item's output that are kept, without and with a report."""
LARGEST = 1_000_000
"""Bytes of an item's report beyond which it is left out."""
POLL_S = 0.5
KILL_S = 10.0
REHEARSAL = 4
"""How much longer a rehearsal may take, on slow cores."""
START_S = 15.0
"""Least time for which an item is begun."""
PACKAGES = (
    "torch",
    "triton",
    "fbgemm_gpu",
    "torchrec",
    "megatron.core",
    "gin",
    "cutlass",
    "pyarrow",
    "pytest",
)

NAMES = ("operator", "case", "stream", "length", "lengths", "variant")
"""What a line of a part's table begins with."""
SHOWN = (
    *("step_ms", "mfu_percent", "tflops", "peak_memory_gb", "busy_ms", "idle_ms", "overlap_ms", "difference"),
    *("forward_gflops", "backward_gflops", "gflops", "gb_s", "ms", "version", "errors", "losses_equal"),
)
"""Results in a part's table. All others are in the records only."""


class Records:
    """The file of a part: one record per item, complete on the disk after each change."""

    def __init__(self, file: Path, earlier: Path | None = None) -> None:
        self.file = file
        file.parent.mkdir(parents=True, exist_ok=True)
        source = file if file.exists() or earlier is None else earlier
        self.items: dict[str, Any] = json.loads(source.read_text(encoding="utf-8")) if source.exists() else {}

    def done(self, name: str) -> bool:
        """Whether the item has ended well before."""
        record = self.items.get(name, {})
        return record.get("exit_code") == 0 and not failures(record)

    def write(self, name: str, record: Mapping[str, Any]) -> None:
        """Replace the record of an item."""
        self.items[name] = record
        lines = (f"{json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}" for key, value in self.items.items())
        replace_text(self.file, "{\n" + ",\n".join(lines) + "\n}\n")


class Runner:
    """Runs items one after the other and records them."""

    def __init__(self, records: Records, options: argparse.Namespace) -> None:
        self.records, self.options = records, options

    def run(self, item: Item, limit_s: float) -> dict[str, Any]:
        """Run an item to its end or its limit; returns its record, which is also in the file."""
        ends = time.monotonic() + limit_s
        with tempfile.TemporaryDirectory() as folder:
            report = Path(folder) / "report.json"
            kept = without_failures(self.records.items.get(item.name, {}).get("report"))
            if kept:
                report.write_text(json.dumps(kept), encoding="utf-8")
            while True:
                before = len(rows_of({"report": _read(report)}))
                record = self._run_once(item, max(1.0, ends - time.monotonic()), Path(folder), report)
                more = len(rows_of(record)) > before
                if not (record["exit_code"] and item.resumes and more and ends - time.monotonic() > START_S):
                    return record

    def _run_once(self, item: Item, limit_s: float, folder: Path, report: Path) -> dict[str, Any]:
        output, begun = folder / "output", time.monotonic()
        earlier_s = self.records.items.get(item.name, {}).get("seconds", 0.0) if report.exists() else 0.0

        def record(code: int | str | None, **more: Any) -> dict[str, Any]:
            found = _read(report)
            text = output.read_text(encoding="utf-8", errors="replace") if output.exists() else ""
            tail = text[-(TAIL if found is None else TAIL_WITH_REPORT) :]
            spent = round(time.monotonic() - begun, 1)
            record = {"exit_code": code, "seconds": spent, **more, "tail": tail}
            if earlier_s:
                record["seconds_before"] = earlier_s
            return record if found is None else record | {"report": found}

        self.records.write(item.name, record("it was running when the session ended"))
        with output.open("wb") as sink:
            try:
                process = subprocess.Popen(
                    self._command(item, folder, report),
                    cwd=ROOT,
                    env=self._environment(),
                    stdout=sink,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            except OSError as error:
                found = record(str(error))
                self.records.write(item.name, found)
                return found
        try:
            changed = 0.0
            while time.monotonic() - begun < limit_s:
                with suppress(subprocess.TimeoutExpired):
                    process.wait(POLL_S)
                    break
                if report.exists() and report.stat().st_mtime != changed:
                    changed = report.stat().st_mtime
                    self.records.write(item.name, record("it was running when the session ended"))
        finally:
            if process.poll() is None:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                with suppress(subprocess.TimeoutExpired):  # stuck in the driver
                    process.wait(KILL_S)
                found = record(None, killed_after_s=round(limit_s, 1))
            else:
                found = record(process.returncode)
            self.records.write(item.name, found)
        return found

    def _command(self, item: Item, folder: Path, report: Path) -> list[str]:
        rehearse = self.options.dry_run
        command = list((item.rehearsal or ()) if rehearse else item.command)
        places = {REPORT: report, SCRATCH: folder / "scratch", OUT: self.records.file.parent, DATA: self.options.data}
        for name, place in places.items():
            command = [part.replace(name, str(place)) for part in command]
        return command if item.is_program and not rehearse else [sys.executable, *command]

    def _environment(self) -> dict[str, str]:
        paths = filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}
        if self.options.dry_run:
            environment |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        return environment


def _read(report: Path) -> Any:
    """An item's report; None if it has none yet."""
    if not report.exists() or report.stat().st_size > LARGEST:
        return None
    text = report.read_text(encoding="utf-8")
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


def imports(output: Path) -> None:
    """Import every package, each with its version and time, and multiply matrices on the GPU."""
    from harness import attempt

    def load(name: str) -> list[dict[str, Any]]:
        begun = time.perf_counter()
        module = importlib.import_module(name)
        version = getattr(module, "__version__", "")
        return [{"version": str(version), "seconds": round(time.perf_counter() - begun, 1)}]

    def multiply() -> list[dict[str, Any]]:
        import torch

        if not torch.cuda.is_available():
            return [{"refused": f"PyTorch {torch.__version__} sees no GPU"}]
        a = torch.ones(64, 64, device="cuda", dtype=torch.bfloat16)
        capability = torch.cuda.get_device_capability()
        return [{"device": torch.cuda.get_device_name(), "capability": capability, "sum": float((a @ a).sum())}]

    report: dict[str, Any] = {}
    for name in PACKAGES:
        attempt(report, "imports", {"variant": name}, partial(load, name), output)
    attempt(report, "imports", {"variant": "a product on the GPU"}, multiply, output)


def lines_of(record: Mapping[str, Any]) -> list[str]:
    """The results of an item in short lines; the output of one that failed without results."""
    lines = []
    for row in rows_of(record):
        name = " ".join(str(row[key]) for key in NAMES if key in row)
        if message := row.get("error") or row.get("refused"):
            lines.append(f"{'ERROR' if 'error' in row else 'refused'} {name}: {message[:300]}")
            continue
        found = [f"{unit}={row[unit]}" for unit in SHOWN if row.get(unit) or (unit == "difference" and unit in row)]
        found += [f"{category}: {ms} ms" for category, ms in row.get("categories", {}).items()]
        lines += [f"{name}: {' '.join(found)}"] if found else []
        messages = (f"  {message[:300]}" for message in row.get("messages", ()) if "kernel" in message.lower())
        lines += [message for message in messages if message not in lines]
    return lines or [line[:300] for line in record["tail"].splitlines()[-1 if record["exit_code"] == 0 else -8 :]]


def run_part(part: int, options: argparse.Namespace, ends: float) -> bool:
    """Run the items of a part and print its table; returns whether all ended well."""
    folder = options.out / "dry-run" if options.dry_run else options.out
    name = f"part-{part}.json"
    earlier = options.continue_from / name if options.continue_from else None
    records = Records(folder / name, earlier)
    records.write("machine", machine() | {"python": sys.version, "at": time.strftime("%Y-%m-%d %H:%M:%S")})
    patience = REHEARSAL if options.dry_run else 1
    ends = min(ends, time.monotonic() + patience * LIMITS_S[part])
    runner, rows = Runner(records, options), []
    for item in PARTS[part]:
        left = ends - time.monotonic()
        if options.only and not any(text in item.name for text in options.only):
            continue
        if records.done(item.name):
            state = "done before"
        elif options.dry_run and item.rehearsal is None:
            state = "not on a CPU"
        elif left < START_S:
            state = "no time left"
        else:
            print(f"{item.name} …", flush=True)
            state = state_of(runner.run(item, min(patience * item.limit_s, left)))
        rows.append((item.name, state))
    print(f"\npart {part}")
    for item_name, state in rows:
        print(f"{item_name:34} {state}")
        if item_name in records.items:
            print("".join(f"    {line}\n" for line in lines_of(records.items[item_name])), end="")
    print(f"records: {records.file}", flush=True)
    return all(state.startswith(("ok", "done", "not on")) for _, state in rows)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--part", type=int, nargs="+", choices=tuple(PARTS), help="in this order")
    what.add_argument("--report", type=Path, metavar="DIR", help="write the report of the records in this directory")
    what.add_argument("--imports", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--budget-s", type=float, default=540.0, help="seconds for this call (540)")
    parser.add_argument("--out", type=Path, default=Path("results"), help="directory of the records")
    parser.add_argument(
        "--continue-from", type=Path, metavar="DIR", help="records of an earlier call, which are not changed"
    )
    parser.add_argument("--data", type=Path, default=Path("tmp_data/ml-1m"), help="preprocessed MovieLens-1M")
    parser.add_argument("--only", nargs="+", help="items whose names contain one of these")
    parser.add_argument("--dry-run", action="store_true", help="rehearse on a CPU at tiny sizes")
    parser.add_argument("--page", type=Path, default=ROOT / "docs/benchmarks/gpu/README.md", help="file of the report")
    options = parser.parse_args(argv)
    options.out, options.data = options.out.absolute(), options.data.absolute()
    return options


def main(argv: list[str] | None = None) -> int:
    """Run the parts; returns 1 if an item has failed or was not run."""
    options = parse(argv)
    if options.imports:
        imports(options.imports)
        return 0
    if options.report:
        from gpu_report import write_page

        write_page(options.report, options.page)
        return 0
    ends = time.monotonic() + options.budget_s
    return 0 if all([run_part(part, options, ends) for part in options.part]) else 1


if __name__ == "__main__":
    sys.exit(main())
