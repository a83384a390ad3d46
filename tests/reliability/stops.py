"""Stop real runs under torchrun with data workers: ``python -m tests.reliability.stops --times 20``.

Each run gets SIGTERM, Ctrl-C or SIGKILL (of torchrun alone) at a seeded moment after its third iteration. After the
first two it must have committed the iteration at which it stopped; after any, no process of it may be left.
"""

import argparse
import json
import os
import pickle
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.conftest import write_small_store
from tests.distributed.failure_cases import run_with
from tests.distributed.launch import REPOSITORY
from tests.reliability.test_background import committed
from tests.train.tiny import walks

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node")
TRAINER = {"train_batch_size": 4, "max_train_iters": 10**6, "ckpt_save_interval": 10**6, "eval_interval": 50}


@dataclass(frozen=True)
class Stop:
    """What a run left behind. ``seconds``: from the signal to the end of torchrun."""

    exit_code: int
    seconds: float
    problems: tuple[str, ...]
    output: str


def processes_of(output: Path) -> list[int]:
    """Ids of all processes that were started for the run in this directory."""
    mark, found = f"STOPPED_RUN={output}".encode(), []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            found += [int(path.parent.name)] if mark in path.read_bytes().split(b"\0") else []
        except OSError:  # it has ended
            continue
    return found


def stop(
    number: signal.Signals, store: Path, output: Path, ranks: int = 2, workers: int = 2, after_s: float = 0
) -> Stop:
    """Start a run, send torchrun the signal, and wait for its end."""
    output.mkdir()
    trainer = {**TRAINER, "data_workers": workers}
    arguments = {"faults": {}, "iteration": 0, "store": str(store), "output": str(output), "trainer": trainer}
    (output / "arguments").write_bytes(pickle.dumps(arguments))
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    environment |= {"OMP_NUM_THREADS": "1", "STOPPED_RUN": str(output)}
    command = [sys.executable, *TORCHRUN, str(ranks), "-m", run_with.__module__, str(output / "arguments")]
    with (output / "output").open("w") as text:
        process = subprocess.Popen(command, cwd=REPOSITORY, env=environment, stdout=text, stderr=subprocess.STDOUT)
    metrics, deadline = output / "run" / "metrics.jsonl", time.monotonic() + 120
    while not (metrics.exists() and metrics.read_text().count('"train"') >= 3):
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"the run did not start:\n{(output / 'output').read_text()}")
        time.sleep(0.05)
    time.sleep(after_s)
    process.send_signal(number)
    begun = time.monotonic()
    code = process.wait(60)
    seconds = time.monotonic() - begun
    while processes_of(output) and time.monotonic() < begun + 60:
        time.sleep(0.05)
    problems = [f"processes {processes_of(output)} are left"] if processes_of(output) else []
    text_of_run = (output / "output").read_text()
    if number != signal.SIGKILL:
        summary = json.loads((output / "run" / "summary.json").read_text())
        if summary["status"] != "stopped" or list(committed(output)) != [summary["iterations"]]:
            problems.append(f"status {summary['status']!r}, committed {list(committed(output))}")
    return Stop(code, seconds, tuple(problems), text_of_run)


def main(argv: Sequence[str] | None = None) -> int:
    """Print one line per signal; return 1 if a run failed a check."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--times", type=int, default=20, help="of each signal")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--signals", nargs="+", default=["SIGTERM", "SIGINT", "SIGKILL"])
    options = parser.parse_args(argv)
    rng, failed = random.Random(options.seed), 0
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "store"
        write_small_store(store, **walks(31))
        for name in options.signals:
            stops = []
            for index in range(options.times):
                output = Path(folder) / f"{name}{index}"
                one = stop(signal.Signals[name], store, output, rng.choice((1, 2, 3)), rng.choice((1, 2)), rng.random())
                stops.append(one)
                for problem in one.problems:
                    print(f"FAILED {name}: {problem}\n{one.output[-3000:]}", flush=True)
            failed += sum(bool(one.problems) for one in stops)
            slowest, codes = max(one.seconds for one in stops), sorted({one.exit_code for one in stops})
            good = sum(not one.problems for one in stops)
            print(
                f"{name}: {good} of {len(stops)} good, at most {slowest:.1f} s, torchrun exits with {codes}", flush=True
            )
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
