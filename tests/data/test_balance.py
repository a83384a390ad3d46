from __future__ import annotations

from itertools import takewhile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hstu.config.args import RandomDistribution
from hstu.data.balance import Loads, Sharing, balanced_shares, budget_bounds
from hstu.data.sampler import BatchPlan, SamplerPosition, TrainSampler, epoch_order
from hstu.data.synthetic import Distribution

LENGTHS = {
    "lognormal": RandomDistribution(dist_type="lognormal", mean=300, std=1.0),
    "zipf": RandomDistribution(dist_type="zipf", low=1, alpha=1.05),
    "uniform": RandomDistribution(dist_type="uniform", low=1),
}


def make_loads(tokens: np.ndarray, linear: float = 30 * 256, quadratic: float = 7.0) -> Loads:
    """Costs a·L + b·L² of a layer of width D = Hd = 256, over Hd."""
    tokens = np.asarray(tokens, dtype=np.int64)
    return Loads(tokens, linear * tokens + quadratic * tokens.astype(np.float64) ** 2)


def draw_loads(kind: str, size: int, seed: int) -> Loads:
    uniforms = np.random.default_rng(seed).uniform(1e-12, 1, size)
    return make_loads(2 * Distribution(LENGTHS[kind], bound=2049).values(uniforms) + 3)


def epoch_of(world_size: int, sharing: Sharing, position: SamplerPosition | None = None, **options) -> list:
    """All ranks' plans of epoch 0: a list of global batches, each a list over ranks."""
    samplers = [
        TrainSampler(rank=rank, world_size=world_size, position=position, sharing=sharing, **options)
        for rank in range(world_size)
    ]
    ranks = [list(takewhile(lambda plan: plan.epoch == 0, sampler)) for sampler in samplers]
    assert len({len(plans) for plans in ranks}) == 1, "every rank takes equally many steps"
    return list(zip(*ranks, strict=True))


def union(plans: list[BatchPlan]) -> list[int]:
    """Ordinals of a global batch, ascending."""
    return sorted(int(ordinal) for plan in plans for ordinal in plan.ordinals)


def cost_ratio(plans: list[BatchPlan], loads: Loads) -> float:
    costs = [loads.costs[plan.indices].sum() for plan in plans]
    return max(costs) / np.mean(costs)


lengths = st.lists(st.integers(1, 60), min_size=1, max_size=120)
worlds = st.integers(1, 5)


@settings(max_examples=150, deadline=None)
@given(lengths, st.integers(1, 7), worlds, st.booleans())
def test_balancing_moves_samples_between_ranks_and_nothing_else(
    tokens: list[int], batch_size: int, world_size: int, shuffle: bool
) -> None:
    loads = make_loads(tokens)
    options = {"num_samples": len(tokens), "batch_size": batch_size, "seed": 3, "shuffle": shuffle}
    plain = epoch_of(world_size, Sharing(loads), **options)
    balanced = epoch_of(world_size, Sharing(loads, balance=True), **options)
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
@pytest.mark.parametrize("world_size", [2, 4, 16, 64])
def test_costs_of_ranks_are_within_a_tenth_at_32_sequences_a_rank(kind: str, world_size: int) -> None:
    batches = 4
    loads = draw_loads(kind, 32 * world_size * batches, seed=world_size)
    options = {"num_samples": len(loads.tokens), "batch_size": 32, "seed": 5, "shuffle": True}
    plain = epoch_of(world_size, Sharing(loads), **options)
    balanced = epoch_of(world_size, Sharing(loads, balance=True), **options)
    assert len(balanced) == batches
    for plans in balanced:
        assert cost_ratio(plans, loads) <= 1.1
    assert max(cost_ratio(plans, loads) for plans in plain) > 1.1, "there was something to balance"


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from(sorted(LENGTHS)), st.integers(2, 20), st.integers(32, 64))
def test_no_rank_has_more_than_a_tenth_above_the_mean_or_its_one_longest_sequence(
    seed: int, kind: str, world_size: int, batch_size: int
) -> None:
    # Whoever gets a sequence that costs more than the mean rank cannot be helped: sequences are not cut.
    loads = draw_loads(kind, batch_size * world_size, seed)
    ranks = balanced_shares(loads.costs, np.full(world_size, batch_size))
    sums = np.bincount(ranks, weights=loads.costs)
    assert np.bincount(ranks).tolist() == [batch_size] * world_size
    assert sums.max() <= 1.1 * max(sums.mean(), loads.costs.max())


def test_the_plan_of_a_small_batch_is_the_one_made_by_hand() -> None:
    # 8 | 7, then 6 to the second (13) and 5 to the first (13); 2 to the first of equals (15), 1 to the second (14)
    ranks = balanced_shares(np.array([5.0, 8.0, 6.0, 7.0, 1.0, 2.0]), np.array([3, 3]))
    assert ranks.tolist() == [0, 0, 1, 1, 1, 0]


@given(lengths, st.integers(1, 6), worlds, st.booleans(), st.booleans())
def test_a_plan_is_a_function_of_its_arguments(
    tokens: list[int], batch_size: int, world_size: int, balance: bool, by_tokens: bool
) -> None:
    def plans() -> list[list[int]]:
        sharing = Sharing(make_loads(tokens), balance, 80 if by_tokens else None)
        options = {"num_samples": len(tokens), "batch_size": batch_size, "seed": 1, "shuffle": True}
        return [plan.ordinals.tolist() for batch in epoch_of(world_size, sharing, **options) for plan in batch]

    assert plans() == plans()


@settings(max_examples=200, deadline=None)
@given(lengths, st.integers(1, 8), worlds, st.integers(60, 200), st.booleans())
def test_by_tokens_no_rank_exceeds_its_budget_or_goes_without_and_no_sample_is_lost(
    tokens: list[int], batch_size: int, world_size: int, budget: int, balance: bool
) -> None:
    loads = make_loads(tokens)
    options = {"num_samples": len(tokens), "batch_size": batch_size, "seed": 2, "shuffle": True}
    batches = epoch_of(world_size, Sharing(loads, balance, budget), **options)
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
    sampler = TrainSampler(rank=0, world_size=world_size, sharing=Sharing(loads, balance, budget), **options)
    assert sampler.batches_per_epoch == len(batches)


@settings(max_examples=100, deadline=None)
@given(lengths, st.integers(1, 8), worlds, st.integers(60, 200))
def test_by_tokens_balancing_keeps_the_global_batch_and_never_costs_more(
    tokens: list[int], batch_size: int, world_size: int, budget: int
) -> None:
    loads = make_loads(tokens)
    options = {"num_samples": len(tokens), "batch_size": batch_size, "seed": 2, "shuffle": True}
    plain = epoch_of(world_size, Sharing(loads, False, budget), **options)
    balanced = epoch_of(world_size, Sharing(loads, True, budget), **options)
    for before, after in zip(plain, balanced, strict=True):
        assert union(before) == union(after)
        assert cost_ratio(after, loads) <= cost_ratio(before, loads) * (1 + 1e-12)


def test_by_tokens_a_rank_is_filled_as_far_as_whole_sequences_allow() -> None:
    loads = draw_loads("lognormal", 20_000, seed=8)
    budget = 32 * 1024
    options = {"num_samples": 20_000, "batch_size": 512, "seed": 2, "shuffle": True}
    for balance in (False, True):
        batches = epoch_of(4, Sharing(loads, balance, budget), **options)[:-1]
        held = np.array([[loads.tokens[plan.indices].sum() for plan in plans] for plans in batches])
        assert held.max() <= budget
        assert held.mean() > 0.95 * budget
    assert np.mean([cost_ratio(plans, loads) for plans in batches]) < 1.04


@settings(max_examples=150, deadline=None)
@given(lengths, worlds, worlds, st.integers(1, 6), st.integers(1, 6), st.booleans(), st.booleans(), st.data())
def test_a_run_resumed_at_another_world_size_sees_each_sample_once(
    tokens: list[int],
    world_1: int,
    world_2: int,
    batch_1: int,
    batch_2: int,
    balance: bool,
    by_tokens: bool,
    data: st.DataObject,
) -> None:
    sharing = Sharing(make_loads(tokens), balance, 90 if by_tokens else None)
    options = {"num_samples": len(tokens), "seed": 11, "shuffle": True}
    before = epoch_of(world_1, sharing, batch_size=batch_1, **options)
    stop = data.draw(st.integers(1, len(before)))
    position = before[stop - 1][0].position
    unfinished = position.consumed < len(tokens)
    after = epoch_of(world_2, sharing, position, batch_size=batch_2, **options) if unfinished else []
    seen = [ordinal for plans in before[:stop] + after for ordinal in union(plans)]
    assert seen == list(range(len(tokens)))


@pytest.mark.parametrize("balance", [False, True])
def test_a_sequence_longer_than_the_budget_is_a_rank_of_its_own(balance: bool) -> None:
    loads = make_loads(np.array([3, 50, 4, 4, 4, 3, 3, 3, 3, 3]))
    plans = epoch_of(3, Sharing(loads, balance, 12), num_samples=10, batch_size=8, seed=0, shuffle=False)[0]
    assert [plan.indices.tolist() for plan in plans] == [[0], [1], [2, 3, 4]]


def test_the_end_of_an_epoch_leaves_every_rank_a_sample() -> None:
    tokens_until = np.concatenate([[0], np.cumsum([5] * 9)])
    # Four ranks would take 8 and leave one: the first batch gives way, and its largest share is halved.
    assert budget_bounds(tokens_until, 0, 4, tokens_per_rank=10, most_samples=8).tolist() == [0, 1, 2, 4, 5]
    assert budget_bounds(tokens_until, 5, 4, tokens_per_rank=10, most_samples=8).tolist() == [5, 6, 7, 8, 9]


def test_too_few_samples_for_all_ranks_leave_some_empty() -> None:
    bounds = budget_bounds(np.array([0, 9, 18, 27]), 0, num_ranks=2, tokens_per_rank=10, most_samples=8)
    assert bounds.tolist() == [0, 1, 2]
    assert budget_bounds(np.array([0, 9, 18, 27]), 2, 2, 10, 8).tolist() == [2, 3, 3]
