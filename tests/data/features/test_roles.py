"""Which features of a store become which inputs, and those that follow from the times of events, by the calendar."""

import math
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hstu.base.errors import ConfigError
from hstu.config.args import DatasetArgs
from hstu.data.features.roles import resolve_roles
from hstu.data.store.layout import TIME_FEATURES
from tests.conftest import MakeStore, write_small_store
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


def test_roles_follow_the_users_choice_and_order(make_store: MakeStore) -> None:
    store = make_store([[1, 2]], actions=[[1, 2]], context={"a": [0], "b": [0], "c": [0]})

    def roles(**chosen: Any) -> tuple[str, ...]:
        return resolve_roles(store, DatasetArgs(dataset_name="toy", max_sequence_length=9, **chosen)).names

    assert roles() == ("a", "b", "c", "item_id", "action")
    assert roles(contextual_feature_names=["c", "a"]) == ("c", "a", "item_id", "action")
    with pytest.raises(ConfigError) as error:
        roles(contextual_feature_names=["d"], item_feature_name="movie", action_feature_name="a")
    assert len(error.value.problems) == 3
    assert "'d' is no context feature" in str(error.value) and "allowed: a, b, c" in str(error.value)
    assert roles(side_feature_names=["time_gap"])[-1] == "time_gap"
    store.timestamp_feature, store.time_features = None, {}
    with pytest.raises(ConfigError, match=r"'time_gap' .*computed from times, and the data has none: .* with --time$"):
        roles(side_feature_names=["time_gap"])
