"""Signals to the processes of a run: what each stops, and what it leaves."""

import json
import os
import pickle
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.distributed.failure_cases import run_with
from tests.distributed.launch import REPOSITORY, Launch, run_to_their_ends
from tests.distributed.test_failures import TORCHRUN
from tests.reliability.test_background import TIMEOUT_S, TRAINER, committed, run


@pytest.mark.parametrize("fault", ["Ctrl-C", pytest.param("SIGTERM to all processes", marks=pytest.mark.slow)])
def test_a_signal_to_ranks_and_workers_saves_the_current_iteration_and_exits_with_0(
    store: str, tmp_path: Path, fault: str
) -> None:
    trainer = {"data_workers": 2, "max_train_iters": 1000, "ckpt_save_interval": 100, "ckpt_async": True}
    ranks = run(2, store, tmp_path, fault, 7, **trainer)
    assert [rank.exit_code for rank in ranks] == [0, 0], ranks[0].output + ranks[1].output
    assert list(committed(tmp_path)) == [7]
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["status"] == "stopped"
    name = fault.split()[0] if "SIG" in fault else "SIGINT"
    assert f"{name}: stopping after iteration 7" in ranks[0].output
    assert "Traceback" not in ranks[0].output + ranks[1].output


def test_a_clean_stop_ends_with_0_however_long_rank_0_needs_for_trackers_and_curves(store: str, tmp_path: Path) -> None:
    trainer = TRAINER | {"max_train_iters": 1000, "ckpt_save_interval": 100}
    faults = {0: "SIGTERM and a slow end"}
    ranks = run_to_their_ends(Launch(2, TIMEOUT_S), run_with, faults, 2, store, str(tmp_path), trainer=trainer)
    assert [rank.exit_code for rank in ranks] == [0, 0], ranks[0].output + ranks[1].output
    assert list(committed(tmp_path)) == [2]
    assert ranks[1].at < ranks[0].at - 0.5, "no rank waits for the curves"
    assert "curves.png is not drawn: it takes longer than 1 s" in ranks[0].output


def test_the_second_interrupt_ends_the_run_at_once_without_a_traceback(store: str, tmp_path: Path) -> None:
    (rank,) = run(1, store, tmp_path, "Ctrl-C twice", 7, data_workers=1, max_train_iters=1000, ckpt_save_interval=100)
    assert rank.exit_code == -signal.SIGINT
    assert "Ctrl-C again ends the run at once" in rank.output and "Traceback" not in rank.output
    assert not committed(tmp_path)


def test_a_killed_data_worker_ends_the_run_with_a_message(store: str, tmp_path: Path) -> None:
    trainer = {"data_workers": 2, "max_train_iters": 100_000, "ckpt_save_interval": 100_000}
    ranks = run(2, store, tmp_path, "worker lost soon", 7, **trainer)
    assert [rank.exit_code for rank in ranks] == [1, 3], ranks[-1].output
    assert "error: a data worker died (" in ranks[-1].output
    assert "Traceback" not in ranks[-1].output


def processes_of(output: Path) -> list[int]:
    """Ids of all processes that were started for the run in this directory."""
    mark, found = f"STOPPED_RUN={output}".encode(), []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            found += [int(path.parent.name)] if mark in path.read_bytes().split(b"\0") else []
        except OSError:  # it has ended
            continue
    return found


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_ranks_and_workers_end_with_torchrun(store: str, tmp_path: Path, number: signal.Signals) -> None:
    trainer = {"max_train_iters": 10**6, "ckpt_save_interval": 10**6, "eval_interval": 50, "data_workers": 1}
    arguments = {"faults": {}, "iteration": 0, "store": store, "output": str(tmp_path), "trainer": trainer}
    (tmp_path / "arguments").write_bytes(pickle.dumps(arguments))
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    environment |= {"OMP_NUM_THREADS": "1", "STOPPED_RUN": str(tmp_path)}
    command = [*TORCHRUN, "2", "-m", run_with.__module__, str(tmp_path / "arguments")]
    with (tmp_path / "output").open("w") as text:
        process = subprocess.Popen(command, cwd=REPOSITORY, env=environment, stdout=text, stderr=subprocess.STDOUT)
    metrics, deadline = tmp_path / "run" / "metrics.jsonl", time.monotonic() + 120
    while not (metrics.exists() and metrics.read_text().count('"train"') >= 3):
        assert process.poll() is None and time.monotonic() < deadline, (tmp_path / "output").read_text()
        time.sleep(0.05)
    process.send_signal(number)
    assert process.wait(60) == (-signal.SIGKILL if number == signal.SIGKILL else 1)
    deadline = time.monotonic() + 60
    while processes_of(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not processes_of(tmp_path), (tmp_path / "output").read_text()
    if number != signal.SIGKILL:
        summary = json.loads((tmp_path / "run" / "summary.json").read_text())
        assert summary["status"] == "stopped" and list(committed(tmp_path)) == [summary["iterations"]]
