"""Preprocess a generated dataset under a memory limit, once undisturbed and once with kills; prints one JSON object.

python scripts/bench/generate_data.py kuairand --output DIR/raw --rows 30000000
python scripts/bench/preprocess_cpu.py --raw DIR/raw --work DIR [--memory_limit 4GB --kills 2]

The kernel enforces the limit on the private memory of the process (RLIMIT_DATA): an allocation beyond it fails. The
second run is killed by SIGKILL at equal intervals, and started again each time. Its store must equal the first one byte
for byte. Peaks are read from /proc every 50 ms: VmData counts towards the limit, VmHWM includes pages of mapped files.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import resource
import shutil
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

from harness import ROOT, command_line, publish

from hstu.data.preprocess.engine import memory_bytes
from hstu.data.store import SequenceStore

_POLL_S = 0.05
_PEAKS = ("VmData", "RssAnon", "VmHWM")


def start(options: argparse.Namespace, folder: Path) -> subprocess.Popen[bytes]:
    """Start preprocessing in ``folder``. Relative paths make both stores record the same command line."""
    command = [sys.executable, str(ROOT / "scripts" / "preprocess_dataset.py"), "--dataset_name", options.dataset]
    command += [
        "--raw_path",
        str(options.raw.resolve()),
        "--output",
        "store",
        "--memory_limit",
        options.memory_limit,
        "--no_report",
    ]
    limit = memory_bytes(options.memory_limit)
    folder.mkdir(parents=True, exist_ok=True)
    return subprocess.Popen(
        command, cwd=folder, preexec_fn=partial(resource.setrlimit, resource.RLIMIT_DATA, (limit, limit)), stdout=2
    )


def watch(process: subprocess.Popen[bytes], until_s: float | None, partial_store: Path) -> dict[str, float]:
    """Wait for the end, or kill the process after ``until_s`` seconds. Returns its peaks in bytes, and its seconds."""
    begun, peaks = time.monotonic(), dict.fromkeys((*_PEAKS, "scratch"), 0)
    while process.poll() is None:
        if until_s is not None and time.monotonic() - begun > until_s:
            process.kill()
            process.wait()
            break
        try:
            status = Path(f"/proc/{process.pid}/status").read_text()
            used = sum(file.stat().st_size for file in partial_store.rglob("*") if file.is_file())
        except OSError:  # the process has just ended or renamed a file
            continue
        peaks["scratch"] = max(peaks["scratch"], used)
        for name in _PEAKS:
            if found := re.search(rf"{name}:\s+(\d+) kB", status):
                peaks[name] = max(peaks[name], int(found[1]) * 1024)
        time.sleep(_POLL_S)
    return {**peaks, "seconds": time.monotonic() - begun}


def digests(store: Path) -> dict[str, str]:
    """SHA-256 of every file."""
    return {file.name: hashlib.file_digest(file.open("rb"), "sha256").hexdigest() for file in sorted(store.iterdir())}


def killed_and_resumed(options: argparse.Namespace, folders: list[Path], every_s: float) -> dict[str, Any]:
    """The second run: the peaks of its parts, and whether its store equals the first one."""
    unfinished = folders[1] / ".store.partial"
    killed = [watch(start(options, folders[1]), every_s, unfinished) for _ in range(options.kills)]
    process = start(options, folders[1])
    resumed = watch(process, None, unfinished)
    equal = process.returncode == 0 and digests(folders[0] / "store") == digests(folders[1] / "store")
    return {"killed": killed, "resumed": resumed, "byte_equal": equal}


def main() -> int:
    """Measure and print. Returns 0 if the stores are equal."""
    parser = command_line(__doc__)
    parser.add_argument("--raw", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True, help="directory for the stores, which are removed again")
    parser.add_argument("--dataset", default="kuairand-27k")
    parser.add_argument("--memory_limit", default="4GB")
    parser.add_argument("--kills", type=int, default=2, help="0: no second run")
    options = parser.parse_args()
    report: dict[str, Any] = {"dataset": options.dataset, "memory_limit": options.memory_limit}
    folders = [options.work / name for name in ("undisturbed", "killed")]
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)
    process = start(options, folders[0])
    report["undisturbed"] = watch(process, None, folders[0] / ".store.partial")
    if process.returncode:
        return process.returncode
    whole = report["undisturbed"]["seconds"]
    if options.kills:
        report |= killed_and_resumed(options, folders, whole / (options.kills + 1))
    store = SequenceStore.open(folders[0] / "store")
    begun = time.perf_counter()
    SequenceStore.open(folders[0] / "store")
    report |= {
        "events": store.num_events,
        "users": store.num_users,
        "items": store.cardinality(store.item_feature),
        "raw_bytes": sum(file.stat().st_size for file in options.raw.iterdir()),
        "store_bytes": sum(file.stat().st_size for file in (folders[0] / "store").iterdir()),
        "rows_per_s": store.num_events / whole,
        "open_s": time.perf_counter() - begun,
    }
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)
    publish(report)
    return 0 if report.get("byte_equal", True) else 1


if __name__ == "__main__":
    sys.exit(main())
