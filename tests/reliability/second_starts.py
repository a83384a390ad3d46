"""Start runs where another one is writing: ``python -m tests.reliability.second_starts --starts 20``.

The live run saves all the time. Every second start uses its directory of checkpoints or its run directory, with and
without ckpt_load_dir = "auto". Then pairs of runs are started together.
"""

import argparse
import itertools
import pickle
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from hstu.checkpoint.directory import check_files, complete_checkpoints
from hstu.observe.records import read_metrics
from tests.conftest import write_small_store
from tests.distributed.failure_cases import run_with
from tests.distributed.launch import Launch, run_to_their_ends
from tests.train.tiny import walks

REPOSITORY = Path(__file__).resolve().parents[2]
TIMEOUT_S = 120
SAVING = {"ckpt_save_interval": 2, "ckpt_keep_last": 2, "eval_interval": 10**6, "log_interval": 1}
SHARED = ("ckpt_save_dir", "output_dir")


def start(store: Path, output: Path, fault: str = "nothing", **trainer: Any) -> subprocess.Popen[str]:
    """Start a run of one rank in a process of its own."""
    options = {"faults": {0: fault}, "iteration": 0, "store": str(store), "output": str(output)}
    output.mkdir(exist_ok=True)
    (output / "options").write_bytes(pickle.dumps(options | {"trainer": SAVING | trainer}))
    command = [sys.executable, "-m", "tests.distributed.failure_cases", str(output / "options")]
    return subprocess.Popen(
        command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, stdin=subprocess.DEVNULL
    )


def beside_a_live_run(place: Path, starts: int) -> Counter[str]:
    """Start ``starts`` runs in the directories of a live one, stop the live one, and count what happened."""
    store, counts = place / "store", Counter[str]()
    write_small_store(store, **walks(31))
    live = start(store, place / "live", "slow saves", max_train_iters=10**6)
    own = {"ckpt_save_dir": str(place / "live" / "checkpoints"), "output_dir": str(place / "live" / "run")}
    wait_for(lambda: complete_checkpoints(place / "live" / "checkpoints"), live)
    for number, option, load in zip(range(starts), itertools.cycle(SHARED), itertools.cycle(("", "", "auto", "auto"))):
        trainer = SAVING | {"ckpt_load_dir": load, option: own[option]}
        (second,) = run_to_their_ends(
            Launch(1, TIMEOUT_S), run_with, {}, 0, str(store), str(place / f"second{number}"), trainer=trainer
        )
        text = second.output
        refused = second.exit_code == 2 and f"TrainerArgs.{option}: the directory" in text and "in use by a run" in text
        counts["refused" if refused else f"not refused: {text}"] += 1
        counts["live run harmed"] += live.poll() is not None
    before = len(iterations(place / "live"))
    wait_for(lambda: len(iterations(place / "live")) > before, live)
    live.send_signal(signal.SIGTERM)
    text, _ = live.communicate(timeout=TIMEOUT_S)
    counts["live run ended well" if live.returncode == 0 else f"live run failed: {text}"] += 1
    check_intact(place / "live")
    done = iterations(place / "live")
    assert done == list(range(1, len(done) + 1)), "another run has written to metrics.jsonl"
    return counts


def together(place: Path, pairs: int) -> Counter[str]:
    """Start pairs of runs with the same directory of checkpoints, and count how many of a pair trained."""
    store, counts = place / "store", Counter[str]()
    if not store.exists():
        write_small_store(store, **walks(31))
    for number in range(pairs):
        both = [
            start(store, place / f"pair{number}{one}", max_train_iters=6, ckpt_save_dir=str(place / f"shared{number}"))
            for one in "ab"
        ]
        texts = [run.communicate(timeout=TIMEOUT_S)[0] for run in both]
        assert sorted(run.returncode for run in both) == [0, 2], texts
        counts["one of two trained"] += 1
        for path in complete_checkpoints(place / f"shared{number}"):
            check_files(path, "damaged")
    return counts


def iterations(output: Path) -> list[int]:
    """Return the iterations in metrics.jsonl."""
    return [record["iter"] for record in read_metrics(output / "run" / "metrics.jsonl") if record["kind"] == "train"]


def check_intact(output: Path) -> None:
    """Raise if a checkpoint is damaged or if a run had to set another one's aside."""
    directory = output / "checkpoints"
    for path in complete_checkpoints(directory):
        check_files(path, "damaged")
    assert len(complete_checkpoints(directory)) == 2 and not list(directory.glob("set_aside*"))
    assert not list(directory.glob(".*"))


def wait_for(condition: Any, live: subprocess.Popen[str]) -> None:
    """Wait until the live run has done something."""
    begun = time.monotonic()
    while not condition():
        assert live.poll() is None and time.monotonic() - begun < TIMEOUT_S
        time.sleep(0.1)


def main() -> int:
    """Print the counts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--starts", type=int, default=20)
    parser.add_argument("--pairs", type=int, default=6)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        print(dict(beside_a_live_run(Path(folder), options.starts)), flush=True)
        print(dict(together(Path(folder), options.pairs)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
