from __future__ import annotations

from itertools import islice, takewhile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hstu.config.errors import DataError
from hstu.data.balance import Loads, Sharing
from hstu.data.sampler import BatchPlan, EvalSampler, SamplerPosition, TrainSampler, epoch_order


def epoch_of_plans(world_size: int, epoch: int = 0, position: SamplerPosition | None = None, **options) -> list:
    """All ranks' plans of one epoch: a list of global batches, each a list over ranks."""
    samplers = [
        TrainSampler(rank=rank, world_size=world_size, position=position, **options) for rank in range(world_size)
    ]
    ranks = [list(takewhile(lambda plan: plan.epoch == epoch, sampler)) for sampler in samplers]
    assert len({len(plans) for plans in ranks}) == 1
    return list(zip(*ranks, strict=True))


def samples_of(global_batches: list) -> list[int]:
    return [int(index) for plans in global_batches for plan in plans for index in plan.indices]


worlds = st.integers(1, 5)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 60), st.integers(1, 7), worlds, st.booleans())
def test_an_epoch_is_its_permutation_whatever_the_world_size(
    num_samples: int, batch_size: int, world_size: int, shuffle: bool
) -> None:
    batches = epoch_of_plans(world_size, num_samples=num_samples, batch_size=batch_size, seed=3, shuffle=shuffle)
    assert samples_of(batches) == epoch_order(num_samples, 3, 0, shuffle).tolist()
    assert all(len(plan.indices) <= batch_size for plans in batches for plan in plans)


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 80), st.integers(1, 6), st.integers(1, 6), worlds, worlds, st.data())
def test_a_run_resumed_at_another_world_size_sees_each_sample_once(
    num_samples: int, batch_1: int, batch_2: int, world_1: int, world_2: int, data: st.DataObject
) -> None:
    options = {"num_samples": num_samples, "seed": 11, "shuffle": True}
    before = epoch_of_plans(world_1, batch_size=batch_1, **options)
    stop = data.draw(st.integers(1, len(before)))
    position = before[stop - 1][0].position
    after = (
        []
        if position.consumed == num_samples
        else epoch_of_plans(world_2, batch_size=batch_2, position=position, **options)
    )
    assert samples_of(before[:stop]) + samples_of(after) == epoch_order(num_samples, 11, 0, True).tolist()


stages = st.lists(
    st.tuples(worlds, st.integers(1, 6), st.integers(0, 8), st.booleans(), st.booleans()), min_size=1, max_size=10
)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=90), stages)
def test_over_any_sequence_of_world_sizes_and_stops_an_epoch_is_seen_exactly_once(
    tokens: list[int], stages: list[tuple[int, int, int, bool, bool]]
) -> None:
    loads = Loads(np.array(tokens), np.square(tokens).astype(np.float64))
    finish = (1, len(tokens), 3, False, False)  # what is left of an epoch, and more
    position, seen = SamplerPosition(), {}
    for world_size, batch_size, steps, balance, by_tokens in [*stages, finish]:
        sharing = Sharing(loads, balance, 90 if by_tokens else None)
        ranks = [
            TrainSampler(len(tokens), batch_size, rank, world_size, 5, True, position, sharing)
            for rank in range(world_size)
        ]
        for plans in islice(zip(*ranks, strict=True), steps):
            (position,) = {plan.position for plan in plans}
            (epoch,) = {plan.epoch for plan in plans}
            seen.setdefault(epoch, []).extend(sorted(int(ordinal) for plan in plans for ordinal in plan.ordinals))
            order = epoch_order(len(tokens), 5, epoch, True)
            assert all((order[plan.ordinals] == plan.indices).all() for plan in plans)
    finished = [epoch for epoch in seen if epoch < position.epoch or position.consumed == len(tokens)]
    assert finished == list(range(len(finished))) and len(finished) >= 2
    assert all(seen[epoch] == list(range(len(tokens))) for epoch in finished)


@given(st.integers(1, 40), st.integers(1, 8), worlds)
def test_the_last_global_batch_is_split_evenly(num_samples: int, batch_size: int, world_size: int) -> None:
    last = epoch_of_plans(world_size, num_samples=num_samples, batch_size=batch_size, seed=0, shuffle=False)[-1]
    counts = [len(plan.indices) for plan in last]
    assert max(counts) - min(counts) <= 1
    assert len({plan.global_start for plan in last}) == 1
    assert len({plan.position for plan in last}) == 1


def test_epochs_differ_and_are_each_repeatable() -> None:
    first, second = epoch_order(100, 5, 0, True), epoch_order(100, 5, 1, True)
    assert (first != second).any() and sorted(first) == sorted(second) == list(range(100))
    assert (epoch_order(100, 5, 0, True) == first).all()
    assert (epoch_order(100, 6, 0, True) != first).any()


def test_without_shuffling_every_epoch_has_file_order() -> None:
    plans = list(islice(TrainSampler(5, 3, rank=0, world_size=1, seed=0, shuffle=False), 4))
    assert [plan.indices.tolist() for plan in plans] == [[0, 1, 2], [3, 4], [0, 1, 2], [3, 4]]
    assert [plan.position for plan in plans] == [
        SamplerPosition(0, 3),
        SamplerPosition(0, 5),
        SamplerPosition(1, 3),
        SamplerPosition(1, 5),
    ]


def test_a_position_at_the_end_of_an_epoch_goes_on_with_the_next() -> None:
    plan = next(iter(TrainSampler(5, 2, 0, 1, seed=0, shuffle=False, position=SamplerPosition(0, 5))))
    assert plan.epoch == 1 and plan.indices.tolist() == [0, 1]


def test_batches_per_epoch_counts_the_smaller_last_batch() -> None:
    assert TrainSampler(17, 2, 0, 4, seed=0, shuffle=False).batches_per_epoch == 3
    assert TrainSampler(16, 2, 0, 4, seed=0, shuffle=False).batches_per_epoch == 2


@given(st.integers(0, 50), st.integers(1, 7), worlds)
def test_evaluation_loses_no_sample_and_has_equally_many_plans_on_each_rank(
    num_samples: int, batch_size: int, world_size: int
) -> None:
    samplers = [EvalSampler(num_samples, batch_size, rank, world_size) for rank in range(world_size)]
    ranks: list[list[BatchPlan]] = [list(sampler) for sampler in samplers]
    assert {len(plans) for plans in ranks} == {len(samplers[0])}
    seen = [index for plans in ranks for plan in plans for index in plan.indices]
    assert sorted(seen) == list(range(num_samples))


def test_fewer_samples_than_ranks_give_some_ranks_an_empty_plan() -> None:
    ranks = [list(EvalSampler(2, 4, rank, world_size=3)) for rank in range(3)]
    assert sorted(len(plans[0].indices) for plans in ranks) == [0, 1, 1]


def test_an_empty_split_and_a_foreign_position_are_refused() -> None:
    with pytest.raises(DataError, match="no samples"):
        TrainSampler(0, 4, 0, 1, seed=0, shuffle=False)
    with pytest.raises(DataError, match="sample 9 of an epoch of 5"):
        TrainSampler(5, 4, 0, 1, seed=0, shuffle=False, position=SamplerPosition(2, 9))


def test_ordinals_are_the_places_of_the_samples_in_the_epoch() -> None:
    for rank in range(2):
        for plan in islice(TrainSampler(23, 4, rank, 2, seed=9, shuffle=True), 7):
            order = epoch_order(23, 9, plan.epoch, True)
            assert np.array_equal(order[plan.ordinals], plan.indices)
