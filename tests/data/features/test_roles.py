"""Which features of a store become which inputs of the model."""

from typing import Any

import pytest

from hstu.base.errors import ConfigError
from hstu.config.args import DatasetArgs
from hstu.data.features.roles import resolve_roles
from tests.conftest import MakeStore


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
