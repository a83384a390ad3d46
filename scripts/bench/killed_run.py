"""Kill a run on MovieLens-1M and start it again: its losses must be those of an undisturbed run, bit for bit.

python scripts/bench/killed_run.py tmp_data/ml-1m /tmp/scratch [--iterations 200 --output killed.json]
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from gpu_parts import DATA, ML_1M, ON_ML_1M
from harness import ROOT, Row, attempt, command_line, publish

from hstu.observe.records import read_metrics

LOG_INTERVAL, TIMEOUT_S = 5, 120.0


def start(options: Any, folder: Path) -> subprocess.Popen[bytes]:
    """Start training in ``folder``, from its latest checkpoint if it has one."""
    trainer = (
        *("num_train_epochs = None", f"max_train_iters = {options.iterations}", f"log_interval = {LOG_INTERVAL}"),
        *("eval_interval = 0", "eval_at_end = False", "deterministic = True", "ckpt_load_dir = 'auto'"),
        *(f"ckpt_save_interval = {options.iterations // 4}", f"ckpt_save_dir = '{folder / 'checkpoints'}'"),
        f"output_dir = '{folder / 'run'}'",
    )
    bindings = [each.replace(DATA, str(options.data)) for each in ON_ML_1M]
    bindings += [f"TrainerArgs.{each}" for each in trainer] + ["NetworkArgs.hidden_dropout = 0.2", *options.bindings]
    command = [sys.executable, "pretrain_gr_retrieval.py", "--gin-config-file", ML_1M, "--gin-bindings", *bindings]
    return subprocess.Popen(command, cwd=ROOT)


def losses(folder: Path) -> dict[int, float]:
    """Iteration → the mean loss since the iteration that was logged before."""
    file = folder / "run" / "metrics.jsonl"
    records = read_metrics(file) if file.exists() else []
    return {record["iter"]: record["loss"] for record in records if record["kind"] == "train"}


def finish(process: subprocess.Popen[bytes]) -> None:
    """Wait for the end of a run."""
    try:
        if code := process.wait(TIMEOUT_S):
            raise RuntimeError(f"the run ended with exit code {code}")
    finally:
        process.kill()


def measure(options: Any) -> list[Row]:
    """The undisturbed run and the other one."""
    whole, killed = options.scratch / "whole", options.scratch / "killed"
    finish(start(options, whole))
    process, begun = start(options, killed), time.monotonic()
    wanted = options.iterations * 3 // 5
    while max(losses(killed), default=0) < wanted and process.poll() is None:
        if time.monotonic() - begun > TIMEOUT_S:
            process.kill()
            raise RuntimeError(f"the run did not reach iteration {wanted} in {TIMEOUT_S:.0f} s")
        time.sleep(0.05)
    process.kill()
    process.wait()
    reached, resumes = max(losses(killed)), time.monotonic()
    if reached >= options.iterations:
        raise RuntimeError("the run ended before it was killed")
    finish(start(options, killed))
    expected, found = losses(whole), losses(killed)
    row: Row = {
        "killed_at": reached,
        "resumed_s": round(time.monotonic() - resumes, 1),
        "losses_equal": found == expected,
    }
    if found != expected:
        row["error"] = f"losses differ: {[i for i in expected if found.get(i) != expected[i]][:5]}"
    return [row]


def main() -> None:
    """Run and print."""
    parser = command_line(__doc__, output=True)
    parser.add_argument("data", type=Path)
    parser.add_argument("scratch", type=Path)
    parser.add_argument("--iterations", type=int, default=200)
    parser.add_argument("--bindings", nargs="*", default=[])
    options = parser.parse_args()
    report: Row = {}
    attempt(report, "runs", {"variant": "killed and resumed"}, lambda: measure(options), options.output)
    publish(report)


if __name__ == "__main__":
    main()
