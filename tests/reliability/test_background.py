"""Saving while training goes on (ckpt_async), in runs of real processes.

Signals to the processes of a run: what each stops, and what it leaves.
"""

import json
import os
import pickle
import re
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from hstu.checkpoint.directory import file_problems, read_manifest
from tests.distributed.failure_cases import run_with
from tests.distributed.launch import REPOSITORY, EndedRank, Launch, run_ranks, run_to_their_ends
from tests.distributed.test_failures import TORCHRUN

TIMEOUT_S = 120
SAVED = [2, 4, 5]
TRAINER = {"train_batch_size": 4, "max_train_iters": 5, "ckpt_save_interval": 2, "eval_interval": 3}


def run(ranks: int, store: str, output: Path, fault: str = "nothing", at: int = 0, **trainer: Any) -> list[EndedRank]:
    """A run that saves every two iterations. Its last rank has the fault in, or saving, iteration ``at``."""
    launch, faults = Launch(ranks, TIMEOUT_S), {ranks - 1: fault}
    return run_to_their_ends(launch, run_with, faults, at, store, str(output), trainer=TRAINER | trainer)


def committed(output: Path) -> dict[int, dict[str, Any]]:
    """Iteration → the files of its checkpoint, after checking that all are intact."""
    found = {}
    for path in sorted((output / "checkpoints").glob("iteration_*")):
        files = read_manifest(path)
        assert not file_problems(path, files)
        found[int(path.name.removeprefix("iteration_"))] = files
    return found


@pytest.mark.parametrize(
    ("ranks", "optimizer", "more"),
    [
        (2, "adam", {}),
        pytest.param(2, "rowwise_adagrad", {"rows": 7}, marks=pytest.mark.slow, id="dynamic"),
    ],
)
def test_a_late_write_saves_the_state_at_the_time_of_the_save(
    store: str, tmp_path: Path, ranks: int, optimizer: str, more: dict[str, Any]
) -> None:
    """Writing is slow: training has updated the weights in place when they are written."""
    kinds: dict[str, Any] = {"waiting": {}, "background": {"ckpt_async": True, "ckpt_keep_last": 9}}
    waiting, background = (
        run_ranks(
            Launch(ranks, TIMEOUT_S),
            run_with,
            {0: "slow saves" if kind == "background" else "nothing"},
            0,
            store,
            str(tmp_path / kind),
            optimizer={"optimizer_str": optimizer},
            network={"hidden_dropout": 0.2},
            trainer=TRAINER | trainer,
            **more,
        )
        for kind, trainer in kinds.items()
    )
    expected, found = (committed(tmp_path / kind) for kind in kinds)
    assert list(found) == list(expected) == SAVED
    for iteration, files in expected.items():
        of_state = {name for name in files if name not in ("operative.gin", "run.json", "tensors/.metadata")}
        assert any(name.startswith("tensors/") for name in of_state)
        assert {name: found[iteration][name] for name in of_state} == {name: files[name] for name in of_state}
    at_once, steps_meanwhile = json.loads((tmp_path / "background" / "at_once").read_text())
    assert at_once == 1, "only one checkpoint is written at a time"
    assert steps_meanwhile > 0, "training went on meanwhile"
    assert all(stall < 0.3 for stall in background[0]["stalls_s"][:1]), "the first save has no earlier one to wait for"
    assert len({rank["marks"] for rank in background}) == 1, "the watchdog compares the ranks' marks"
    assert background[0]["iterations"] == waiting[0]["iterations"] == 5


@pytest.mark.parametrize("background", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_failed_write_on_one_rank_ends_all_ranks_and_keeps_the_last_commit(
    store: str, tmp_path: Path, background: bool
) -> None:
    ranks = run(2, store, tmp_path, "refused", at=4, ckpt_async=background, max_train_iters=1000)
    assert [rank.exit_code for rank in ranks] == [1, 1]
    message = r"error: cannot save \S+/iteration_00000004: checkpointing failed on rank 1: \[Errno 28\] No space left"
    for rank in ranks:
        assert re.search(message, rank.output), rank.output
        assert "Traceback" not in rank.output
    assert list(committed(tmp_path)) == [2]
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["iteration_00000002", "latest"]
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])["iter"]
    assert last == 4 if not background else last <= 6, "a failed save is reported before the next one"


def test_a_rank_killed_while_it_writes_in_the_background_ends_the_others(store: str, tmp_path: Path) -> None:
    trainer = {"ckpt_async": True, "max_train_iters": 10**6, "collective_timeout_s": 20}
    ranks = run(2, store, tmp_path, "killed while saving", at=4, **trainer)
    assert [rank.exit_code for rank in ranks] == [1, -signal.SIGKILL]
    assert re.search(r"the run ends: rank 1 \(\S+, pid \d+\) is dead or frozen", ranks[0].output)
    assert list(committed(tmp_path)) == [2]


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
    assert f"'TrainerArgs.output_dir = \"{tmp_path}/run\"' 'TrainerArgs.ckpt_load_dir = \"auto\"'" in ranks[0].output
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
