"""Processor time and bytes of whole training steps of real gloo ranks, of several checkouts in turn.

    python scripts/bench/step_ranks.py --checkouts ../before . --output real_ranks.json

Runs the entry scripts of each checkout on its own ml-100k data, 2, 4 and 8 ranks, and prints a record per run. Of the
steps between two log lines it measures the processor time of all processes, of their threads and of the data loaders,
and what the loopback interface sends, so nothing else may use that. Needs Linux.
"""

from __future__ import annotations

import re
import subprocess
import sys
import time
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil
from harness import Row, command_line, publish, write

FIRST, LAST = 10, 60
"""The iterations whose log lines begin and end the measurement."""
BINDINGS = (
    "TrainerArgs.num_train_epochs = None",
    f"TrainerArgs.max_train_iters = {LAST + 5}",
    "TrainerArgs.log_interval = 5",
    "TrainerArgs.eval_interval = 0",
    "TrainerArgs.eval_at_end = False",
    "TrainerArgs.ckpt_save_interval = -1",
)


def now(launcher: int) -> dict[str, float]:
    """Milliseconds of the processor, kB sent and milliseconds of the wall clock so far."""
    times = [process.cpu_times() for process in psutil.Process(launcher).children(recursive=True)]
    sent = psutil.net_io_counters(pernic=True)["lo"].bytes_sent
    return {"cpu_ms": 1e3 * sum(t.user + t.system for t in times), "sent_kb": sent / 1e3, "wall_ms": 1e3 * time.time()}


def measure(checkout: Path, task: str, ranks: int) -> Row:
    """Train a few steps. ``cpu_ms`` and ``sent_kb`` are per step and rank, ``wall_ms`` per step."""
    with TemporaryDirectory() as folder:
        launch = ["torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks), f"pretrain_gr_{task}.py"]
        settings = ["--gin-config-file", f"configs/ml_100k_{task}.gin", "--gin-bindings", *BINDINGS]
        command = [sys.executable, "-m", *launch, *settings, f"TrainerArgs.output_dir = '{folder}'"]
        run = subprocess.Popen(command, cwd=checkout, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        assert run.stdout is not None
        found = {int(line[1]): now(run.pid) for line in map(re.compile(r"iter +(\d+)/").search, run.stdout) if line}
    if run.wait():
        raise SystemExit(f"{' '.join(command)} failed in {checkout}")
    steps = {name: (found[LAST][name] - found[FIRST][name]) / (LAST - FIRST) for name in found[LAST]}
    return {name: round(value / (1 if name == "wall_ms" else ranks), 1) for name, value in steps.items()}


def main() -> None:
    """Command line."""
    parser = command_line(__doc__, rounds=2, output=True)
    parser.add_argument("--checkouts", type=Path, nargs="+", required=True, help="with ml-100k in tmp_data")
    options = parser.parse_args()
    rows: list[Row] = []
    for turn, task, ranks in product(range(options.rounds), ("ranking", "retrieval"), (2, 4, 8)):
        for checkout in options.checkouts[:: -1 if turn % 2 else 1]:
            rows.append({"task": task, "ranks": ranks, "checkout": str(checkout), **measure(checkout, task, ranks)})
            write(rows, options.output)
    publish(rows)


if __name__ == "__main__":
    main()
