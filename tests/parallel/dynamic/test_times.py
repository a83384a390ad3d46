"""A time stands for the newest batch that was done by then, never for a later one."""

from collections.abc import Callable
from itertools import accumulate, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hstu.parallel.dynamic.content import Entries, StepTimes, last_of_all, newest_before


def noted(moments: list[float], saving: Callable[[int], bool] = lambda _: False, before: Entries = ()) -> Entries:
    """The log of a run with one batch at each moment; ``saving``: whether a save follows that batch."""
    clock = iter(moments)
    times = StepTimes(before, clock=lambda: next(clock))
    for step in range(1, len(moments) + 1):
        times.note(step, saving=saving(step))
    return times.entries


def test_entries_are_a_minute_apart_except_those_of_saves() -> None:
    seconds = [float(second) for second in range(150)]
    assert noted(seconds) == ((0.0, 1), (60.0, 61), (120.0, 121))
    assert noted(seconds, saving=lambda step: step == 31) == ((0.0, 1), (30.0, 31), (90.0, 91))


def test_a_batch_is_noted_once_however_often_it_is_saved() -> None:
    times = StepTimes(clock=iter([0.0, 100.0, 200.0]).__next__)
    for _ in range(3):
        times.note(7, saving=True)
    assert times.entries == ((0.0, 7),)


def test_a_time_stands_for_the_newest_batch_that_was_done_by_then() -> None:
    entries = ((10.0, 1), (70.0, 9), (130.0, 20))
    found = {moment: newest_before(entries, moment) for moment in (9.9, 10.0, 69.9, 70.0, 1e9)}
    assert found == {9.9: None, 10.0: entries[0], 69.9: entries[0], 70.0: entries[1], 1e9: entries[2]}
    assert newest_before((), 1e9) is None


@given(st.lists(st.floats(-200, 5000), max_size=60))
def test_whatever_the_clock_does_no_time_stands_for_a_batch_that_was_done_later(pauses: list[float]) -> None:
    moments = list(accumulate(pauses, initial=1e9))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hstu.parallel.dynamic.content.MAX_ENTRIES", 8)
        entries = noted(moments)
    assert len(entries) <= 8 and entries[0][1] == 1
    assert all(one[0] <= other[0] and one[1] < other[1] for one, other in pairwise(entries))
    for moment, step in entries:
        assert moment >= max(moments[:step]), "all of these batches had been done"


def test_a_log_of_two_years_is_short_and_tells_old_times_roughly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hstu.parallel.dynamic.content.MAX_ENTRIES", 128)
    day, pause = 86400.0, 4000.0
    moments = [pause * step for step in range(int(2 * 366 * day / pause))]
    entries = noted(moments)
    assert len(entries) == 128 and entries[0] == (0.0, 1)
    for age in (3600.0, day, 30 * day, 366 * day):
        found = newest_before(entries, moments[-1] - age)
        assert found is not None and moments[-1] - age - found[0] < 0.1 * age + 2 * pause


def test_a_run_goes_on_with_the_log_of_another() -> None:
    before = ((10.0, 1), (70.0, 50))
    assert noted([75.0] * 60, before=before) == before
    assert noted([75.0 + 60] * 60, before=before) == (*before, (135.0, 51))
    assert noted([5.0] * 60, saving=lambda step: step == 60, before=before) == (*before, (70.0, 60)), "a clock put back"


def test_ranks_have_done_a_batch_when_the_last_one_has() -> None:
    first, second = ((10.0, 1), (70.0, 9), (95.0, 15)), ((10.2, 1), (71.0, 10), (94.0, 15))
    assert last_of_all([first, second]) == ((10.2, 1), (71.0, 9), (95.0, 15))
    assert last_of_all([first]) == first
    assert last_of_all([first, ()]) == (), "an old checkpoint's part has none"


@pytest.mark.parametrize("step", [0, 1])
def test_the_first_note_is_kept_whatever_it_is(step: int) -> None:
    times = StepTimes(clock=lambda: 3.0)
    times.note(step)
    assert times.entries == ((3.0, step),)
