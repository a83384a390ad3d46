"""Features that follow from the times of events, against the calendar."""

import math
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from hstu.data.store.layout import TIME_FEATURES
from tests.conftest import write_small_store
from tests.data.toy_store import ToyStore

TIMES = st.lists(st.lists(st.integers(0, 2**36), min_size=1, max_size=6).map(sorted), min_size=1, max_size=4)


@given(TIMES)
def test_hours_days_and_gaps_are_those_of_the_calendar(times: list[list[int]]) -> None:
    store = ToyStore([[0] * len(row) for row in times], times=times)
    got = {name: store.time_codes(name, np.arange(store.num_events)) for name in TIME_FEATURES}
    moments = [datetime.fromtimestamp(second, UTC) for row in times for second in row]
    assert got["hour_of_day"].tolist() == [moment.hour for moment in moments]
    assert got["day_of_week"].tolist() == [moment.weekday() for moment in moments]
    expected = [
        0 if place == 0 else min(1 + int(math.log2(1 + row[place] - row[place - 1])), 40)
        for row in times
        for place in range(len(row))
    ]
    assert got["time_gap"].tolist() == expected
    for name, meta in TIME_FEATURES.items():
        assert meta.cardinality is not None and got[name].max() < meta.cardinality
        assert np.array_equal(store.time_codes(name, np.arange(0, store.num_events, 2)), got[name][::2])


def test_a_store_with_times_has_them_unless_a_column_of_its_own_has_the_name(tmp_path: Path) -> None:
    items, times = [[0, 1], [1]], [[0, 7200], [86_400]]
    store = write_small_store(tmp_path / "store", items, timestamps=times)
    assert store.sequence("hour_of_day").tolist() == [0, 2, 0]
    assert store.cardinality("day_of_week") == 7
    hours = {"hour_of_day": [[0, 1], [1]]}
    own = write_small_store(tmp_path / "own", items, timestamps=times, event_features=hours)
    assert own.sequence("hour_of_day").tolist() == [0, 1, 1] and "hour_of_day" not in own.time_features
