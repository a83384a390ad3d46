"""Runs that are started where another one is writing."""

import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from hstu.checkpoint.directory import check_files, complete_checkpoints
from hstu.observe.records import read_metrics
from tests.distributed.failure_cases import run_with
from tests.distributed.launch import REPOSITORY, Launch, run_to_their_ends

TIMEOUT_S = 120
SAVING = {"ckpt_save_interval": 2, "ckpt_keep_last": 2, "eval_interval": 10**6, "log_interval": 1}


def start(store: str, output: Path, fault: str = "nothing", **trainer: Any) -> subprocess.Popen[str]:
    """Start a run of one rank in a process of its own."""
    options = {"faults": {0: fault}, "iteration": 0, "store": store, "output": str(output)}
    output.mkdir()
    (output / "options").write_bytes(pickle.dumps(options | {"trainer": SAVING | trainer}))
    command = [sys.executable, "-m", run_with.__module__, str(output / "options")]
    return subprocess.Popen(
        command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, stdin=subprocess.DEVNULL
    )


def wait_for_a_save(directory: Path, live: subprocess.Popen[str]) -> None:
    """Wait until the live run has committed another checkpoint."""
    before, begun = complete_checkpoints(directory), time.monotonic()
    while complete_checkpoints(directory) == before:
        assert live.poll() is None and time.monotonic() - begun < TIMEOUT_S
        time.sleep(0.1)


@pytest.mark.slow
def test_a_second_start_is_refused_and_does_not_harm_the_live_run(store: str, tmp_path: Path) -> None:
    live = start(store, tmp_path / "live", "slow saves", max_train_iters=10**6)
    own = {"ckpt_save_dir": tmp_path / "live" / "checkpoints", "output_dir": tmp_path / "live" / "run"}
    checkpoints = own["ckpt_save_dir"]
    wait_for_a_save(checkpoints, live)
    for option, load in zip(own, ("auto", ""), strict=True):
        trainer = SAVING | {"ckpt_load_dir": load, option: str(own[option])}
        output = str(tmp_path / option)
        (second,) = run_to_their_ends(Launch(1, TIMEOUT_S), run_with, {}, 0, store, output, trainer=trainer)
        assert second.exit_code == 2 and live.poll() is None
        assert f"TrainerArgs.{option}: the directory" in second.output and "in use by a run" in second.output
    wait_for_a_save(checkpoints, live)
    live.send_signal(signal.SIGTERM)
    text, _ = live.communicate(timeout=TIMEOUT_S)
    assert live.returncode == 0, text
    assert len(complete_checkpoints(checkpoints)) == 2
    assert not list(checkpoints.glob("set_aside*")) and not list(checkpoints.glob(".*"))
    for path in complete_checkpoints(checkpoints):
        check_files(path, "damaged")
    records = read_metrics(tmp_path / "live" / "run" / "metrics.jsonl")
    done = [record["iter"] for record in records if record["kind"] == "train"]
    assert done == list(range(1, len(done) + 1)), "another run has written to metrics.jsonl"


@pytest.mark.slow
def test_of_two_runs_that_start_together_one_trains(store: str, tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    both = [start(store, tmp_path / one, max_train_iters=6, ckpt_save_dir=str(shared)) for one in "ab"]
    texts = [run.communicate(timeout=TIMEOUT_S)[0] for run in both]
    assert sorted(run.returncode for run in both) == [0, 2], texts
    for path in complete_checkpoints(shared):
        check_files(path, "damaged")
