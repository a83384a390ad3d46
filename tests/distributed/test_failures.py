"""One rank of several fails: the whole run ends in time, says who it was, and damages nothing."""

import json
import os
import pickle
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from hstu.checkpoint.directory import file_problems, read_manifest
from tests.conftest import write_small_store
from tests.distributed.failure_cases import run_with
from tests.distributed.launch import REPOSITORY, EndedRank, Launch, run_to_their_ends
from tests.train.tiny import walks

MARGIN_S = 10
LAUNCH_S = 120
TRAINER = {"train_batch_size": 4, "max_train_iters": 8, "ckpt_save_interval": 2}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    """31 users."""
    path = tmp_path_factory.mktemp("failures") / "store"
    write_small_store(path, **walks(31))
    return str(path)


def run(
    ranks: int,
    store: str,
    output: Path,
    faults: dict[int, str],
    iteration: int,
    lasting: tuple[int, ...] = (),
    **trainer: Any,
) -> list[EndedRank]:
    """A run that saves every two iterations. ``faults``: rank → the fault that it has in ``iteration``."""
    return run_to_their_ends(
        Launch(ranks, LAUNCH_S, lasting=lasting),
        run_with,
        faults,
        iteration,
        store,
        str(output),
        trainer=TRAINER | trainer,
    )


def failed_at(output: Path) -> float:
    """When the last of those that were to fail did; seconds since the epoch."""
    return max(float(path.read_text()) for path in output.glob("failed_at_*"))


def check_all_ended(ranks: Sequence[EndedRank], output: Path, timeout_s: float) -> None:
    """Nobody ends well, and nobody later than promised."""
    assert all(rank.exit_code != 0 for rank in ranks)
    late = [rank.at - failed_at(output) for rank in ranks if rank.at < float("inf")]
    assert max(late) < timeout_s + MARGIN_S, "\n".join(rank.output for rank in ranks)


def check_checkpoints(output: Path, *iterations: int) -> None:
    """These have been committed, and are whole."""
    committed = sorted((output / "checkpoints").glob("iteration_*"))
    assert [path.name for path in committed] == [f"iteration_{iteration:08d}" for iteration in iterations]
    assert not [problem for path in committed for problem in file_problems(path, read_manifest(path))]


def test_a_killed_rank_ends_the_others_at_once_and_is_named(store: str, tmp_path: Path) -> None:
    ranks = run(3, store, tmp_path, {2: "killed"}, iteration=5, collective_timeout_s=60)
    check_all_ended(ranks, tmp_path, timeout_s=10)  # none waits for the timeout
    assert [rank.exit_code for rank in ranks] == [1, 1, -signal.SIGKILL]
    for rank in (0, 1):
        said = ranks[rank].output
        assert re.search(r"the run ends: rank 2 \(\S+, pid \d+\) is dead or frozen: last seen \d+ s ago at iter", said)
        assert "alive: ranks 0, 1 at iteration 5 (training step)" in said
        assert re.search(rf"rank {rank} \(\S+, pid \d+\) was at iteration 5 \(training step\):\nTrace", said)
    log = (tmp_path / "run" / "log.txt").read_text()
    assert "rank 2" in log and "Traceback" in log
    check_checkpoints(tmp_path, 2, 4)


def test_a_rank_that_is_stuck_past_the_timeout_ends_all_and_is_named(store: str, tmp_path: Path) -> None:
    ranks = run(3, store, tmp_path, {2: "asleep over a batch"}, iteration=3, collective_timeout_s=3)
    check_all_ended(ranks, tmp_path, timeout_s=3)
    assert [rank.exit_code for rank in ranks] == [1, 1, 1]
    for rank, ended in enumerate(ranks):
        named = r"the run ends: rank 2 \(\S+, pid \d+\) is stuck at iteration 3 \(loading a batch\) for \d s in \S+"
        assert re.search(named, ended.output)
        assert "ranks 0, 1 at iteration 3 (training step) wait for it" in ended.output
        assert f"rank {rank} (" in ended.output and "most recent call first" in ended.output
    assert "failure_cases.py" in ranks[2].output and "in _train_step" in ranks[0].output
    check_checkpoints(tmp_path, 2)


DEAD = r"the run ends: rank 1 \(\S+, pid \d+\) is dead or frozen"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("faults", "iteration", "lasting", "collective_timeout_s", "ended_after_s", "said"),
    [
        ({1: "frozen"}, 3, (1,), 4, 4, DEAD),
        # A launcher stops the ranks, which feel nothing of a killed one, and kills them after 30 s.
        ({0: "asleep through SIGTERM", 1: "killed", 2: "asleep through SIGTERM"}, 3, (), 100, 20, DEAD),
        # Rank 0 serves the store.
        ({0: "killed"}, 5, (), 60, 10, r"the launcher, or rank 0 .*, is dead or out of reach"),
        (
            {1: "bad data"}, 3, (), 60, 10,
            r"the run ends: rank 1 \(\S+, pid \d+\) failed at iteration 3 \(.*\): DataError: row 7 is torn",
        ),
    ],
    ids=["frozen", "killed beside sleepers", "rank 0 killed", "error"],
)  # fmt: skip
def test_a_rank_that_is_dead_or_frozen_or_fails_is_named_by_the_others(
    store: str,
    tmp_path: Path,
    faults: dict[int, str],
    iteration: int,
    lasting: tuple[int, ...],
    collective_timeout_s: int,
    ended_after_s: int,
    said: str,
) -> None:
    ranks = run(3, store, tmp_path, faults, iteration, lasting, collective_timeout_s=collective_timeout_s)
    check_all_ended(ranks, tmp_path, ended_after_s)
    failed = next(rank for rank, fault in faults.items() if "asleep" not in fault)
    assert all(re.search(said, ended.output) for rank, ended in enumerate(ranks) if rank != failed)
    if faults[failed] == "bad data":
        assert [rank.exit_code for rank in ranks] == [1, 3, 1]
    check_checkpoints(tmp_path, *range(2, iteration, 2))


def test_a_loss_that_is_no_number_on_one_rank_ends_all_and_is_not_saved(store: str, tmp_path: Path) -> None:
    ranks = run(2, store, tmp_path, {1: "no number"}, iteration=4, pipeline_type="native")
    check_all_ended(ranks, tmp_path, timeout_s=10)
    assert [rank.exit_code for rank in ranks] == [1, 1]
    for rank in ranks:
        assert re.search(
            r"error: the loss is not finite at iteration 4: nan on rank 1, whose batch has the users in rows \d+, \d+",
            rank.output,
        )
        assert "nan on rank 0" not in rank.output and "Traceback" not in rank.output
    check_checkpoints(tmp_path, 2)


def test_sigterm_over_an_evaluation_commits_a_checkpoint_in_time_and_all_exit_with_0(
    store: str, tmp_path: Path
) -> None:
    faults = dict.fromkeys(range(2), "told to stop over an evaluation")
    ranks = run(2, store, tmp_path, faults, iteration=3, ckpt_save_interval=100, eval_interval=3, max_train_iters=300)
    assert [rank.exit_code for rank in ranks] == [0, 0], ranks[0].output
    assert max(rank.at for rank in ranks) - failed_at(tmp_path) < 30
    check_checkpoints(tmp_path, 3)
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["status"] == "stopped"


def read_records(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "run" / "metrics.jsonl").read_text().splitlines()]


TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node")


def torchrun(
    ranks: int, store: str, output: Path, faults: dict[int, str], *options: str, **trainer: Any
) -> subprocess.CompletedProcess[str]:
    """A run like ``run`` whose faults are in iteration 5."""
    arguments = {"faults": faults, "iteration": 5, "store": store, "output": str(output), "trainer": TRAINER | trainer}
    (output / "arguments").write_bytes(pickle.dumps(arguments))
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    return subprocess.run(
        [*TORCHRUN, str(ranks), *options, "-m", run_with.__module__, str(output / "arguments")],
        cwd=REPOSITORY,
        env=environment | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=LAUNCH_S * 2,
    )


@pytest.mark.slow
def test_torch_alone_gives_a_restarted_rank_the_store_of_the_attempt_before(tmp_path: Path) -> None:
    """The defect of torch 2.13 for which mesh.start gives each attempt a part of the store of its own.

    A rank that comes early finds the addresses of the others as they were before.
    """
    program = tmp_path / "program.py"
    program.write_text(
        "import os, sys, torch.distributed as dist\n"
        "store, rank, _ = next(dist.rendezvous('env://'))\n"
        "if os.environ['TORCHELASTIC_RESTART_COUNT'] == '0':\n"
        "    store.set(f'address {rank}', 'old')\n"
        "    store.wait(['address 0', 'address 1'])\n"
        "    sys.exit(1)\n"
        "os.write(1, store.get(f'address {1 - rank}') + b'\\n')\n"
    )
    ended = subprocess.run(
        [*TORCHRUN, "2", "--max-restarts", "1", str(program)], capture_output=True, text=True, timeout=LAUNCH_S
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.split() == ["old", "old"]


@pytest.mark.slow
def test_torchrun_restarts_a_run_which_goes_on_from_its_last_checkpoint(store: str, tmp_path: Path) -> None:
    ended = torchrun(2, store, tmp_path, {1: "killed"}, "--max-restarts", "1", ckpt_load_dir="auto")
    assert ended.returncode == 0, ended.stderr
    assert "resuming from " in ended.stdout and "iteration_00000004" in ended.stdout
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["status"], summary["iterations"]) == ("done", 8)
    check_checkpoints(tmp_path, 2, 4, 6, 8)
    kinds = [record.get("iter", record["kind"]) for record in read_records(tmp_path)]
    assert kinds == [1, 2, 3, 4, "resumed", 5, 6, 7, 8]
