"""Tokens and floating-point operations of a batch."""

from typing import Any

import numpy as np
import pytest

from hstu.config.args import NetworkArgs
from hstu.data.batches.batch import HSTUBatch
from hstu.data.features.roles import FeatureRoles
from hstu.observe.throughput import FlopCounter
from hstu.ops.costs import sequence_flops
from tests.helpers import make_batch
from tests.train.tiny import NETWORK

WITH_ACTIONS = FeatureRoles("item", "action", ("town", "age"))


def counter(roles: FeatureRoles = WITH_ACTIONS, **options: Any) -> FlopCounter:
    return FlopCounter(NetworkArgs(**{**NETWORK, **options}), roles)


def batch(*items: list[int], candidates: list[int] | None = None) -> HSTUBatch:
    return make_batch(list(items), [[0] * len(row) for row in items], num_candidates=candidates)


def test_tokens_are_context_items_and_their_actions() -> None:
    assert counter().count(batch([1, 2, 3], [4]))[0] == (2 + 3 * 2) + (2 + 1 * 2)


@pytest.mark.parametrize(
    ("roles", "interleave"), [(WITH_ACTIONS, False), (FeatureRoles("item", None, ("town", "age")), True)]
)
def test_actions_that_are_no_tokens_do_not_count(roles: FeatureRoles, interleave: bool) -> None:
    assert counter(roles, interleave_actions=interleave).count(batch([1, 2, 3], [4]))[0] == (2 + 3) + (2 + 1)


def test_layers_after_a_truncation_cost_as_much_as_shorter_sequences() -> None:
    def flops(layers: int, items: int, **options: Any) -> float:
        return counter(num_layers=layers, **options).count(batch([0] * items, candidates=[2]))[1]

    truncated = flops(3, 9, truncate_after_layer=1, truncate_to_items=4)
    assert truncated == flops(1, 9) + flops(2, 4 + 2)
    assert flops(3, 5, truncate_after_layer=1, truncate_to_items=4) == flops(3, 5), "a history that is short"


def test_padding_costs_nothing() -> None:
    assert counter().count(batch([1, 2, 3], [4], [], [])) == counter().count(batch([1, 2, 3], [4]))
    assert counter().count(batch([], [])) == (0, 0.0)


def test_attention_makes_one_long_sequence_dearer_than_two_short_ones_with_as_many_tokens() -> None:
    without_context = counter(FeatureRoles("item", "action", ()))
    long, short = list(range(40)), list(range(20))
    assert without_context.count(batch(long))[0] == without_context.count(batch(short, short))[0]
    assert without_context.count(batch(long))[1] > without_context.count(batch(short, short))[1]


def test_candidates_and_their_actions_count_apart_from_history() -> None:
    shape: dict[str, Any] = {"num_layers": 2, "hidden_size": 16, "num_heads": 2, "head_dim": 8}
    expected = sequence_flops(np.array([2 + 4 * 2]), np.array([3 * 2]), **shape)
    assert counter().count(batch([1, 2, 3, 4], candidates=[3]))[1] == expected
