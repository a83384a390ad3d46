import dataclasses
import time
from typing import Any

from hstu.observe.watchdog import RankStatus, name_the_lost, name_the_stuck
from hstu.parallel.mesh import Heartbeat


def status(rank: int, **given: Any) -> RankStatus:
    usual = {"host": "h", "pid": 7, "iteration": 5, "stage": "training step", "marks": 20, "idle_s": 9.0}
    told = {"code": "x.py:1, in f", "waiting": True, "reported_at": time.time(), "ended": False}
    return RankStatus(rank=rank, **{**usual, **told, **given})


def test_a_rank_whose_place_has_not_been_told_anew_is_lost() -> None:
    before = {0: status(0, reported_at=time.time() - 3), 1: status(1, reported_at=time.time() - 3)}
    after = {0: status(0), 1: before[1]}
    assert name_the_lost(before, after) == (
        "rank 1 (h, pid 7) is dead or frozen: last seen 3 s ago at iteration 5 (training step); "
        "alive: rank 0 at iteration 5 (training step)"
    )
    assert name_the_lost(before, {0: status(0), 1: status(1)}) is None


def test_ranks_that_left_or_never_came_are_lost_too() -> None:
    before = {0: status(0, reported_at=1.0), 1: status(1), 2: None}
    lost = name_the_lost(before, {0: status(0), 1: dataclasses.replace(status(1), ended=True), 2: None})
    assert lost is not None
    assert "rank 1 (h, pid 7) has left at iteration 5" in lost and "rank 2 never started" in lost


def test_the_rank_with_the_fewest_marks_is_stuck() -> None:
    statuses = [status(0), status(1), status(2, marks=19, stage="loading a batch", waiting=False)]
    assert name_the_stuck(statuses) == (
        "rank 2 (h, pid 7) is stuck at iteration 5 (loading a batch) for 9 s in x.py:1, in f; "
        "ranks 0, 1 at iteration 5 (training step) wait for it"
    )


def test_of_ranks_with_as_many_marks_the_one_that_waits_for_nobody_is_stuck() -> None:
    assert name_the_stuck([status(0), status(1, waiting=False)]).startswith("rank 1 (h, pid 7) is stuck")
    undecided = "no rank makes progress, and none is behind the others: ranks 0, 1 at iteration 5 (training step)"
    for waiting in (True, False):
        assert name_the_stuck([status(0, waiting=waiting), status(1, waiting=waiting)]) == undecided


def test_an_error_leaves_the_stage_in_which_it_came_up() -> None:
    heartbeat = Heartbeat()
    with heartbeat.during("saving"):
        assert (heartbeat.stage, heartbeat.marks) == ("saving", 1)
    assert (heartbeat.stage, heartbeat.marks) == ("starting", 2)
    try:
        with heartbeat.during("loading"):
            raise ValueError
    except ValueError:
        assert heartbeat.stage == "loading"
