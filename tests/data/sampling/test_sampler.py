from collections.abc import Sequence
from functools import partial
from itertools import islice, takewhile
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hstu.base.errors import DataError
from hstu.config.args import RandomDistribution
from hstu.data.batches.synthetic import Distribution
from hstu.data.sampling.sampler import (
    START,
    BatchPartition,
    BatchPlan,
    EvalSampler,
    Loads,
    SamplerPosition,
    TrainSampler,
    balanced_ranks,
    budget_bounds,
    epoch_order,
)


def epoch_of(
    world_size: int,
    partition: BatchPartition | None = None,
    position: SamplerPosition = START,
    epoch: int = 0,
    **options: Any,
) -> list[tuple[BatchPlan, ...]]:
    """All ranks' plans of one epoch: a list of global batches, each a list over ranks."""
    options |= {"world_size": world_size, "position": position, "partition": partition}
    samplers = [TrainSampler(rank=rank, **options) for rank in range(world_size)]
    ranks = [list(takewhile(lambda plan: plan.epoch == epoch, sampler)) for sampler in samplers]
    assert len({len(plans) for plans in ranks}) == 1, "every rank takes equally many steps"
    return list(zip(*ranks, strict=True))


def samples_of(global_batches: list[tuple[BatchPlan, ...]]) -> list[int]:
    return [int(index) for plans in global_batches for plan in plans for index in plan.indices]


worlds = st.integers(1, 5)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 60), st.integers(1, 7), worlds, st.booleans())
def test_an_epoch_is_its_permutation_and_its_last_batch_is_split_evenly(
    num_samples: int, batch_size: int, world_size: int, shuffle: bool
) -> None:
    batches = epoch_of(world_size, num_samples=num_samples, batch_size=batch_size, seed=3, shuffle=shuffle)
    assert samples_of(batches) == epoch_order(num_samples, 3, 0, shuffle).tolist()
    assert all(len(plan.indices) <= batch_size for plans in batches for plan in plans)
    counts = [len(plan.indices) for plan in batches[-1]]
    assert max(counts) - min(counts) <= 1
    assert len({(plan.global_start, plan.position) for plan in batches[-1]}) == 1


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=90), worlds, st.booleans())
def test_global_batches_are_what_all_ranks_take_together(tokens: list[int], world_size: int, balance: bool) -> None:
    loads = Loads(np.array(tokens), np.array(tokens, dtype=np.float64) ** 2)
    options: dict[str, Any] = {"num_samples": len(tokens), "batch_size": 4, "seed": 5, "shuffle": True}
    partition = BatchPartition(loads, balance, tokens_per_rank=100)
    batches = epoch_of(world_size, partition, **options)
    sampler = TrainSampler(rank=0, world_size=world_size, partition=partition, **options)
    for plans, (samples, ranks) in zip(batches, sampler.global_batches(), strict=False):
        assert [plan.indices.tolist() for plan in plans] == [
            samples[ranks == rank].tolist() for rank in range(world_size)
        ]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=30), worlds, st.booleans(), st.integers(1, 40))
def test_a_position_tells_how_many_batches_were_done(
    tokens: list[int], world_size: int, by_tokens: bool, steps: int
) -> None:
    loads = Loads(np.array(tokens), np.square(tokens).astype(np.float64))
    partition = BatchPartition(loads, tokens_per_rank=90 if by_tokens else None)
    samplers = partial(TrainSampler, len(tokens), 3, 0, world_size, 5, True, partition=partition)
    for done, plan in enumerate(islice(samplers(), steps), 1):
        assert samplers(position=plan.position).batches_done == done


stages = st.lists(
    st.tuples(worlds, st.integers(1, 6), st.integers(0, 8), st.booleans(), st.booleans()), min_size=1, max_size=10
)


@settings(max_examples=80, deadline=None)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=90), stages)
def test_over_any_sequence_of_world_sizes_and_stops_an_epoch_is_seen_exactly_once(
    tokens: list[int], stages: list[tuple[int, int, int, bool, bool]]
) -> None:
    loads = Loads(np.array(tokens), np.square(tokens).astype(np.float64))
    finish = (1, len(tokens), 3, False, False)  # what is left of an epoch, and more
    position = SamplerPosition()
    seen: dict[int, list[int]] = {}
    for world_size, batch_size, steps, balance, by_tokens in [*stages, finish]:
        partition = BatchPartition(loads, balance, 90 if by_tokens else None)
        ranks = [
            TrainSampler(len(tokens), batch_size, rank, world_size, 5, True, position, partition)
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


@given(st.integers(0, 50), st.integers(1, 7), worlds)
def test_evaluation_loses_no_sample_and_has_equally_many_plans_on_each_rank(
    num_samples: int, batch_size: int, world_size: int
) -> None:
    samplers = [EvalSampler(num_samples, batch_size, rank, world_size) for rank in range(world_size)]
    ranks: list[list[BatchPlan]] = [list(sampler) for sampler in samplers]
    assert {len(plans) for plans in ranks} == {len(samplers[0])}
    seen = [index for plans in ranks for plan in plans for index in plan.indices]
    assert sorted(seen) == list(range(num_samples))


def test_an_empty_split_and_a_foreign_position_are_refused() -> None:
    with pytest.raises(DataError, match="no samples"):
        TrainSampler(0, 4, 0, 1, seed=0, shuffle=False)
    with pytest.raises(DataError, match="sample 9 of an epoch of 5"):
        TrainSampler(5, 4, 0, 1, seed=0, shuffle=False, position=SamplerPosition(2, 9))


LENGTHS = {
    "lognormal": RandomDistribution(dist_type="lognormal", mean=300, std=1.0),
    "zipf": RandomDistribution(dist_type="zipf", low=1, alpha=1.05),
    "uniform": RandomDistribution(dist_type="uniform", low=1),
}


def make_loads(lengths: Sequence[int] | np.ndarray, linear: float = 30 * 256, quadratic: float = 7.0) -> Loads:
    """Costs a·L + b·L² of a layer of width D = Hd = 256, over Hd."""
    tokens = np.asarray(lengths, dtype=np.int64)
    return Loads(tokens, linear * tokens + quadratic * tokens.astype(np.float64) ** 2)


def draw_loads(kind: str, size: int, seed: int) -> Loads:
    uniforms = np.random.default_rng(seed).uniform(1e-12, 1, size)
    return make_loads(2 * Distribution(LENGTHS[kind], bound=2049).values(uniforms) + 3)


def union(plans: Sequence[BatchPlan]) -> list[int]:
    """Ordinals of a global batch, ascending."""
    return sorted(int(ordinal) for plan in plans for ordinal in plan.ordinals)


def cost_ratio(plans: Sequence[BatchPlan], loads: Loads) -> float:
    costs = [loads.costs[plan.indices].sum() for plan in plans]
    return max(costs) / np.mean(costs)


lengths = st.lists(st.integers(1, 60), min_size=1, max_size=120)


@settings(max_examples=60, deadline=None)
@given(lengths, st.integers(1, 7), worlds, st.booleans())
def test_balancing_moves_samples_between_ranks_and_nothing_else(
    tokens: list[int], batch_size: int, world_size: int, shuffle: bool
) -> None:
    loads = make_loads(tokens)
    options: dict[str, Any] = {"num_samples": len(tokens), "batch_size": batch_size, "seed": 3, "shuffle": shuffle}
    plain = epoch_of(world_size, BatchPartition(loads), **options)
    balanced = epoch_of(world_size, BatchPartition(loads, balance=True), **options)
    order = epoch_order(len(tokens), 3, 0, shuffle)
    assert len(balanced) == len(plain)
    for before, after in zip(plain, balanced, strict=True):
        assert union(before) == union(after)
        for one, other in zip(before, after, strict=True):
            assert len(one.indices) == len(other.indices) <= batch_size
            assert (one.global_start, one.position) == (other.global_start, other.position)
            assert order[other.ordinals].tolist() == other.indices.tolist()
            assert (np.diff(other.ordinals) > 0).all()
        assert cost_ratio(after, loads) <= cost_ratio(before, loads) * (1 + 1e-12)


@pytest.mark.parametrize("kind", LENGTHS)
@pytest.mark.parametrize("world_size", [4, 64])
def test_costs_of_ranks_are_within_a_tenth_at_32_sequences_a_rank(kind: str, world_size: int) -> None:
    batches = 4
    loads = draw_loads(kind, 32 * world_size * batches, seed=world_size)
    options: dict[str, Any] = {"num_samples": len(loads.tokens), "batch_size": 32, "seed": 5, "shuffle": True}
    plain = epoch_of(world_size, BatchPartition(loads), **options)
    balanced = epoch_of(world_size, BatchPartition(loads, balance=True), **options)
    assert len(balanced) == batches
    for plans in balanced:
        assert cost_ratio(plans, loads) <= 1.1
    assert max(cost_ratio(plans, loads) for plans in plain) > 1.1, "there was something to balance"


def test_the_plan_of_a_small_batch_is_the_one_made_by_hand() -> None:
    # 8 | 7, then 6 to the second (13) and 5 to the first (13); 2 to the first of equals (15), 1 to the second (14)
    ranks = balanced_ranks(np.array([5.0, 8.0, 6.0, 7.0, 1.0, 2.0]), np.array([3, 3]))
    assert ranks is not None and ranks.tolist() == [0, 0, 1, 1, 1, 0]


@settings(max_examples=80, deadline=None)
@given(lengths, st.integers(1, 8), worlds, st.integers(60, 200), st.booleans())
def test_by_tokens_no_rank_exceeds_its_budget_or_goes_without_and_no_sample_is_lost(
    tokens: list[int], batch_size: int, world_size: int, budget: int, balance: bool
) -> None:
    loads = make_loads(tokens)
    options: dict[str, Any] = {"num_samples": len(tokens), "batch_size": batch_size, "seed": 2, "shuffle": True}
    batches = epoch_of(world_size, BatchPartition(loads, balance, budget), **options)
    for plans in batches:
        for plan in plans:
            assert loads.tokens[plan.indices].sum() <= budget
            assert len(plan.indices) <= batch_size
        if sum(len(plan.indices) for plan in plans) >= world_size:
            assert all(len(plan.indices) for plan in plans)
        assert union(plans) == list(range(plans[0].global_start, plans[0].position.consumed))
        assert len({plan.position for plan in plans}) == 1
    ends = [plans[0].position.consumed for plans in batches]
    assert [0, *ends[:-1]] == [plans[0].global_start for plans in batches] and ends[-1] == len(tokens)
    sampler = TrainSampler(rank=0, world_size=world_size, partition=BatchPartition(loads, balance, budget), **options)
    assert sampler.batches_per_epoch == len(batches)


def test_by_tokens_a_rank_is_filled_as_far_as_whole_sequences_allow() -> None:
    loads = draw_loads("lognormal", 20_000, seed=8)
    budget = 32 * 1024
    options: dict[str, Any] = {"num_samples": 20_000, "batch_size": 512, "seed": 2, "shuffle": True}
    for balance in (False, True):
        batches = epoch_of(4, BatchPartition(loads, balance, budget), **options)[:-1]
        held = np.array([[loads.tokens[plan.indices].sum() for plan in plans] for plans in batches])
        assert held.max() <= budget
        assert held.mean() > 0.95 * budget
    assert np.mean([cost_ratio(plans, loads) for plans in batches]) < 1.04


@pytest.mark.parametrize("balance", [False, True])
def test_a_sequence_longer_than_the_budget_is_a_rank_of_its_own(balance: bool) -> None:
    loads = make_loads(np.array([3, 50, 4, 4, 4, 3, 3, 3, 3, 3]))
    plans = epoch_of(3, BatchPartition(loads, balance, 12), num_samples=10, batch_size=8, seed=0, shuffle=False)[0]
    assert [plan.indices.tolist() for plan in plans] == [[0], [1], [2, 3, 4]]


def test_too_few_samples_for_all_ranks_leave_some_empty() -> None:
    bounds = budget_bounds(np.array([0, 9, 18, 27]), 0, num_ranks=2, tokens_per_rank=10, max_samples=8)
    assert bounds.tolist() == [0, 1, 2]
    assert budget_bounds(np.array([0, 9, 18, 27]), 2, 2, 10, 8).tolist() == [2, 3, 3]
