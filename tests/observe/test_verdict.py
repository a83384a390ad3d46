from __future__ import annotations

import dataclasses
import time
from typing import Any

from hstu.observe.verdict import name_the_lost, name_the_stuck
from hstu.parallel.progress import Place, Progress


def place(rank: int, **given: Any) -> Place:
    usual = {"host": "h", "pid": 7, "iteration": 5, "stage": "training step", "marks": 20, "idle_s": 9.0}
    told = {"code": "x.py:1, in f", "waiting": True, "told_at": time.time(), "ended": False}
    return Place(rank=rank, **{**usual, **told, **given})


def test_a_rank_whose_place_has_not_been_told_anew_is_lost() -> None:
    before = {0: place(0, told_at=time.time() - 3), 1: place(1, told_at=time.time() - 3)}
    after = {0: place(0), 1: before[1]}
    assert name_the_lost(before, after) == (
        "rank 1 (h, pid 7) is dead or frozen: last seen 3 s ago at iteration 5 (training step); "
        "left: rank 0 at iteration 5 (training step)"
    )
    assert name_the_lost(before, {0: place(0), 1: place(1)}) is None


def test_ranks_that_left_or_never_came_are_lost_too() -> None:
    before = {0: place(0, told_at=1.0), 1: place(1), 2: None}
    lost = name_the_lost(before, {0: place(0), 1: dataclasses.replace(place(1), ended=True), 2: None})
    assert lost is not None
    assert "rank 1 (h, pid 7) has left at iteration 5" in lost and "rank 2 never came up" in lost


def test_the_rank_with_the_fewest_marks_is_stuck() -> None:
    places = [place(0), place(1), place(2, marks=19, stage="loading a batch", waiting=False)]
    assert name_the_stuck(places) == (
        "rank 2 (h, pid 7) is stuck at iteration 5 (loading a batch) for 9 s in x.py:1, in f; "
        "ranks 0, 1 at iteration 5 (training step) wait for it"
    )


def test_of_ranks_with_as_many_marks_the_one_that_waits_for_nobody_is_stuck() -> None:
    assert name_the_stuck([place(0), place(1, waiting=False)]).startswith("rank 1 (h, pid 7) is stuck")
    undecided = "no rank goes on, and none is behind the others: ranks 0, 1 at iteration 5 (training step)"
    for waiting in (True, False):
        assert name_the_stuck([place(0, waiting=waiting), place(1, waiting=waiting)]) == undecided


def test_an_error_leaves_the_stage_in_which_it_came_up() -> None:
    progress = Progress()
    with progress.during("saving"):
        assert (progress.stage, progress.marks) == ("saving", 1)
    assert (progress.stage, progress.marks) == ("starting", 2)
    try:
        with progress.during("loading"):
            raise ValueError
    except ValueError:
        assert progress.stage == "loading"
