import dataclasses
import time
from types import SimpleNamespace
from typing import Any

import pytest
from torch.distributed import HashStore

from hstu.observe.watchdog import RankStatus, Watchdog, name_the_lost, name_the_stuck
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


class CountingStore:
    """A store in memory that counts its operations. After each reading of statuses the living ranks report anew."""

    def __init__(self, ranks: int, frozen: int) -> None:
        self.values = HashStore()
        self.operations = 0
        self.dogs = [self._watchdog(rank, ranks) for rank in range(ranks)]
        self.frozen = frozen
        for dog in self.dogs:
            dog._report()
        self.operations = 0

    def _watchdog(self, rank: int, ranks: int) -> Watchdog:
        heartbeat = Heartbeat()
        heartbeat.mark("training step", iteration=5)
        mesh: Any = SimpleNamespace(rank=rank, world_size=ranks, heartbeat=heartbeat)
        watchdog = Watchdog(mesh, 1.0)
        watchdog._wake_up.close()  # thousands would be too many files
        watchdog._waker.close()
        watchdog._store = self  # type: ignore[assignment]
        return watchdog

    def __getattr__(self, operation: str) -> Any:
        self.operations += 1
        return getattr(self.values, operation)

    def multi_get(self, keys: list[str]) -> list[bytes]:
        found, counted = self.values.multi_get(keys), self.operations + 1
        for dog in self.dogs:
            if dog._mesh.rank != self.frozen:
                dog._report()
        self.operations = counted
        return found


@pytest.mark.parametrize("ranks", [8, 512])
def test_all_ranks_suspect_and_one_reads_the_statuses(ranks: int) -> None:
    store = CountingStore(ranks, frozen=5)
    verdicts = {dog._decide(name_the_stuck, silence_s=0.0) for dog in store.dogs}
    (verdict,) = verdicts
    assert verdict is not None and verdict.startswith("rank 5 (") and "is dead or frozen" in verdict
    assert "alive: ranks 0, 1, 2, 3, 4, 6, 7" in verdict
    assert store.operations == 3 * ranks + 4  # each rank: whether it reads, whether there is a verdict, the verdict


def test_a_reader_that_gives_no_verdict_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hstu.observe.watchdog.SILENCE_S", 0.05)
    monkeypatch.setattr("hstu.observe.watchdog.BEAT_S", 0.01)
    store = CountingStore(4, frozen=0)
    store.compare_set("reader", "", "rank 0 at 1.0")  # frozen since
    verdict = store.dogs[2]._decide(name_the_stuck, silence_s=0.0)
    assert verdict is not None and verdict.startswith("rank 0 (") and store.values.get("reader").startswith(b"rank 2 ")


def test_without_a_verdict_the_next_suspicion_is_read_at_once() -> None:
    store = CountingStore(4, frozen=-1)
    assert store.dogs[1]._decide(lambda _: None, silence_s=0.0) is None
    store.values.delete_key("status 3")
    store.frozen = 3
    verdict = store.dogs[2]._decide(lambda _: None, silence_s=0.0)
    assert verdict == f"rank 3 never started; alive: ranks 0, 1, 2 {store.dogs[0]._status().at}"
