"""Features that follow from the times of events, against the calendar."""

import math
import tempfile
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from hstu.data.features.time_features import time_codes
from hstu.data.store.layout import TIME_FEATURES
from tests.conftest import write_small_store
from tests.data.toy_store import ToyStore

TIMES = st.lists(st.lists(st.integers(0, 2**36), min_size=1, max_size=6).map(sorted), min_size=1, max_size=4)


@given(TIMES)
def test_hours_days_and_gaps_are_those_of_the_calendar(times: list[list[int]]) -> None:
    store = ToyStore([[0] * len(row) for row in times], times=times)
    events = np.arange(store.num_events)
    now = store.sequence("time")
    got = {name: time_codes(name, events, now, store.offsets(), np.full(len(now), now.min())) for name in TIME_FEATURES}
    moments = [datetime.fromtimestamp(second, UTC) for row in times for second in row]
    assert got["hour_of_day"].tolist() == [moment.hour for moment in moments]
    assert got["day_of_week"].tolist() == [moment.weekday() for moment in moments]
    expected = [
        0 if place == 0 else min(1 + int(math.log2(1 + row[place] - row[place - 1])), 40)
        for row in times
        for place in range(len(row))
    ]
    assert got["time_gap"].tolist() == expected
    assert got["item_age"].tolist() == [min(int(math.log2(1 + second - now.min())), 39) for second in now.tolist()]
    for name, meta in TIME_FEATURES.items():
        assert meta.cardinality is not None and got[name].max() < meta.cardinality
        first = np.full(len(events[::2]), now.min())
        assert np.array_equal(time_codes(name, events[::2], now, store.offsets(), first), got[name][::2])


def test_a_store_with_times_has_them_unless_a_column_of_its_own_has_the_name(tmp_path: Path) -> None:
    items, times = [[0, 1], [1]], [[0, 7200], [86_400]]
    store = write_small_store(tmp_path / "store", items, timestamps=times)
    assert store.sequence("hour_of_day").tolist() == [0, 2, 0]
    assert store.cardinality("day_of_week") == 7
    hours = {"hour_of_day": [[0, 1], [1]]}
    own = write_small_store(tmp_path / "own", items, timestamps=times, event_features=hours)
    assert own.sequence("hour_of_day").tolist() == [0, 1, 1] and "hour_of_day" not in own.time_features


@settings(max_examples=25, deadline=None)
@given(st.lists(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 2**20)), min_size=1, max_size=6), min_size=1))
def test_the_age_of_an_item_counts_from_its_first_event_and_sees_no_later_one(
    histories: list[list[tuple[int, int]]],
) -> None:
    histories = [sorted(events, key=lambda event: event[1]) for events in histories]
    with tempfile.TemporaryDirectory() as folder:
        items, times = ([[event[place] for event in events] for events in histories] for place in (0, 1))
        store = write_small_store(Path(folder) / "store", items, timestamps=times, num_items=7)
        flat = [event for events in histories for event in events]
        # Only the events up to an event's own time are looked at.
        expected = [
            int(math.log2(1 + second - min(earlier for other, earlier in flat if other == item and earlier <= second)))
            for item, second in flat
        ]
        assert store.sequence("item_age").tolist() == expected
        assert store.first_times()[6] == np.iinfo(np.int64).max, "an item without events"
        some = np.arange(len(flat))[::-2]
        assert store.time_codes("item_age", some).tolist() == [expected[place] for place in some]


def test_a_damaged_item_does_not_change_the_ages_of_the_others(tmp_path: Path) -> None:
    store = write_small_store(tmp_path / "store", [[0, 1, 0]], timestamps=[[5, 6, 9]], num_items=2)
    codes = np.load(tmp_path / "store" / "sequence.item_id.npy", mmap_mode="r+")
    codes[1] = -1
    assert store.first_times().tolist() == [5, np.iinfo(np.int64).max]
