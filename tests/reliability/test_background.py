"""Saving while training goes on (ckpt_async), by runs of real processes."""

from __future__ import annotations

import json
import re
import signal
from pathlib import Path
from typing import Any

import pytest

from hstu.checkpoint.manifest import file_problems, read_manifest
from tests.distributed.launch import run_ranks, run_to_their_ends
from tests.distributed.test_failures import failed_at

HERE = "tests.reliability.cases:run_with"
TIMEOUT_S = 120
SAVED = [2, 4, 6, 8, 9]
TRAINER = {"train_batch_size": 4, "max_train_iters": 9, "ckpt_save_interval": 2, "eval_interval": 3}


def asked(store: str, output: Path, deed: str = "nothing", at: int = 0, **trainer: Any) -> dict[str, Any]:
    """A run that saves every two iterations; what befalls rank 0 in saving iteration ``at``."""
    given = {"deeds": {"0": deed}, "iteration": at, "store": store, "output": str(output)}
    return {**given, "trainer": TRAINER | trainer}


def committed(output: Path) -> dict[int, dict[str, Any]]:
    """Iteration → the files of each checkpoint, all of them whole."""
    found = {}
    for path in sorted((output / "checkpoints").glob("iteration_*")):
        files = read_manifest(path)
        assert not file_problems(path, files)
        found[int(path.name.removeprefix("iteration_"))] = files
    return found


@pytest.mark.parametrize(
    ("ranks", "optimizer", "more"),
    [
        (1, "adam", {}),
        (2, "adam", {}),
        pytest.param(2, "rowwise_adagrad", {"sharding": "table_wise"}, marks=pytest.mark.slow),
        pytest.param(2, "adam", {"rows": 7}, marks=pytest.mark.slow, id="dynamic"),
    ],
)
def test_what_is_written_later_is_what_was_there_when_it_was_saved(
    store: str, tmp_path: Path, ranks: int, optimizer: str, more: dict[str, Any]
) -> None:
    """Slow writing: the weights, which are updated in place, have long changed when they are written."""
    kinds = {"waiting": asked(store, tmp_path / "waiting")}
    kinds["background"] = asked(store, tmp_path / "background", "slow", ckpt_async=True, ckpt_keep_last=9)
    for kind in kinds.values():
        kind |= {"optimizer": {"optimizer_str": optimizer}, "network": {"hidden_dropout": 0.2}, **more}
    waiting, background = (run_ranks(HERE, ranks, TIMEOUT_S, **kind) for kind in kinds.values())
    expected, found = (committed(tmp_path / kind) for kind in kinds)
    assert list(found) == list(expected) == SAVED
    for iteration, files in expected.items():
        of_state = {name for name in files if name not in ("operative.gin", "tensors/.metadata")}
        of_state = {name for name in of_state if not name.startswith("dynamic_times")}  # as other runs have
        assert any(name.startswith("tensors/") for name in of_state)
        assert {name: found[iteration][name] for name in of_state} == {name: files[name] for name in of_state}
    at_once, steps_meanwhile = json.loads((tmp_path / "background" / "at_once").read_text())
    assert at_once == 1, "one is in flight"
    assert steps_meanwhile > 0, "training has gone on"
    assert all(stall < 0.3 for stall in background[0]["stalls_s"][:1]), "the first one has none to wait for"
    assert len({rank["marks"] for rank in background}) == 1, "the watchdog compares them"
    assert background[0]["iterations"] == waiting[0]["iterations"] == 9


@pytest.mark.parametrize("background", [False, True])
def test_a_refused_write_on_one_rank_ends_all_and_leaves_the_last_commit(
    store: str, tmp_path: Path, background: bool
) -> None:
    given = asked(store, tmp_path, at=4, ckpt_async=background, max_train_iters=1000)
    ranks = run_to_their_ends(HERE, 2, TIMEOUT_S, **given | {"deeds": {"1": "refused"}})
    assert [rank.exit_code for rank in ranks] == [1, 1]
    for rank in ranks:
        told = r"error: cannot save \S+/iteration_00000004: checkpointing failed on rank 1: \[Errno 28\] No space left"
        assert re.search(told, rank.output), rank.output
        assert "Traceback" not in rank.output
    assert list(committed(tmp_path)) == [2]
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["iteration_00000002", "latest"]
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])["iter"]
    assert last == 4 if not background else last <= 6, "a failed save is told before the next one"


@pytest.mark.parametrize("background", [pytest.param(False, marks=pytest.mark.slow), True])
def test_sigterm_commits_where_the_run_stands_and_ends_well(store: str, tmp_path: Path, background: bool) -> None:
    given = asked(store, tmp_path, at=5, ckpt_async=background, max_train_iters=1000, ckpt_save_interval=500)
    ranks = run_to_their_ends(HERE, 2, TIMEOUT_S, **given | {"deeds": {"1": "SIGTERM"}})
    assert list(committed(tmp_path)) == [5]
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["status"] == "stopped"
    assert ranks[1].at - failed_at(tmp_path) < 30
    assert [rank.exit_code for rank in ranks] == [0, 0]


def test_a_rank_killed_while_it_writes_beside_training_ends_the_others(store: str, tmp_path: Path) -> None:
    given = asked(store, tmp_path, at=4, ckpt_async=True, max_train_iters=10**6, collective_timeout_s=20)
    ranks = run_to_their_ends(HERE, 2, TIMEOUT_S, **given | {"deeds": {"1": "killed"}})
    assert [rank.exit_code for rank in ranks] == [1, -signal.SIGKILL]
    assert re.search(r"the run ends: rank 1 \(\S+, pid \d+\) is dead or frozen", ranks[0].output)
    assert list(committed(tmp_path)) == [2]
