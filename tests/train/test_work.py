"""Tokens and floating-point operations of a batch."""

from __future__ import annotations

import pytest

from hstu.config.args import NetworkArgs
from hstu.data.collate import FeatureRoles
from hstu.train.work import StepWork
from tests.helpers import make_batch
from tests.train.tiny import NETWORK

WITH_ACTIONS = FeatureRoles("item", "action", ("town", "age"))


def work(roles: FeatureRoles = WITH_ACTIONS, **options: object) -> StepWork:
    return StepWork(NetworkArgs(**{**NETWORK, **options}), roles)


def batch(*items: list[int], candidates: list[int] | None = None):  # type: ignore[no-untyped-def]
    return make_batch(list(items), [[0] * len(row) for row in items], num_candidates=candidates)


def test_tokens_are_context_items_and_their_actions() -> None:
    assert work().of(batch([1, 2, 3], [4]))[0] == (2 + 3 * 2) + (2 + 1 * 2)


@pytest.mark.parametrize(
    ("roles", "interleave"), [(WITH_ACTIONS, False), (FeatureRoles("item", None, ("town", "age")), True)]
)
def test_actions_that_are_no_tokens_do_not_count(roles: FeatureRoles, interleave: bool) -> None:
    assert work(roles, interleave_actions=interleave).of(batch([1, 2, 3], [4]))[0] == (2 + 3) + (2 + 1)


def test_padding_is_no_work() -> None:
    assert work().of(batch([1, 2, 3], [4], [], [])) == work().of(batch([1, 2, 3], [4]))
    assert work().of(batch([], [])) == (0, 0.0)


def test_work_grows_in_proportion_to_layers_and_adds_up_over_sequences() -> None:
    one, two = (work(num_layers=layers).of(batch([1, 2, 3]))[1] for layers in (1, 2))
    assert two == pytest.approx(2 * one)
    assert work().of(batch([1, 2, 3], [1, 2, 3]))[1] == pytest.approx(2 * work().of(batch([1, 2, 3]))[1])


def test_attention_makes_one_long_sequence_more_work_than_two_short_ones_of_as_many_tokens() -> None:
    without_context = FeatureRoles("item", "action", ())
    long, short = list(range(40)), list(range(20))
    assert work(without_context).of(batch(long))[0] == work(without_context).of(batch(short, short))[0]
    assert work(without_context).of(batch(long))[1] > work(without_context).of(batch(short, short))[1]


def test_looking_both_ways_is_more_attention() -> None:
    assert work(is_causal=False).of(batch([1, 2, 3]))[1] > work().of(batch([1, 2, 3]))[1]


def test_candidates_that_do_not_see_each_other_are_less_attention() -> None:
    assert work().of(batch([1, 2, 3, 4], candidates=[3]))[1] < work().of(batch([1, 2, 3, 4]))[1]
