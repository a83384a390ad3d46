import tracemalloc
from collections.abc import Callable, Sequence
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
    MOST_LISTED,
    START,
    BatchPartition,
    BatchPlan,
    EvalSampler,
    Loads,
    SamplerPosition,
    ShardWindows,
    TrainSampler,
    balanced_ranks,
    epoch_order,
    feistel_rows,
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


def order_of(num_samples: int, seed: int, epoch: int, shuffle: bool = True) -> np.ndarray:
    """All rows, int64 [num_samples], in the order of an epoch."""
    return epoch_order(num_samples, seed, epoch, shuffle)(np.arange(num_samples))


def of_rows(loads: Loads) -> Callable[[np.ndarray], Loads]:
    return lambda rows: Loads(loads.tokens[rows], loads.costs[rows])


def samples_of(global_batches: list[tuple[BatchPlan, ...]]) -> list[int]:
    return [int(index) for plans in global_batches for plan in plans for index in plan.indices]


worlds = st.integers(1, 5)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 60), st.integers(1, 7), worlds, st.booleans())
def test_an_epoch_is_its_permutation_and_its_last_batch_is_split_evenly(
    num_samples: int, batch_size: int, world_size: int, shuffle: bool
) -> None:
    batches = epoch_of(world_size, num_samples=num_samples, batch_size=batch_size, seed=3, shuffle=shuffle)
    assert samples_of(batches) == order_of(num_samples, 3, 0, shuffle).tolist()
    assert all(len(plan.indices) <= batch_size for plans in batches for plan in plans)
    counts = [len(plan.indices) for plan in batches[-1]]
    assert max(counts) - min(counts) <= 1
    assert len({(plan.global_start, plan.position) for plan in batches[-1]}) == 1


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=90), worlds, st.booleans())
def test_global_batches_are_what_all_ranks_take_together(tokens: list[int], world_size: int, balance: bool) -> None:
    loads = Loads(np.array(tokens), np.array(tokens, dtype=np.float64) ** 2)
    options: dict[str, Any] = {"num_samples": len(tokens), "batch_size": 4, "seed": 5, "shuffle": True}
    partition = BatchPartition(of_rows(loads), balance, tokens_per_rank=100)
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
    partition = BatchPartition(of_rows(loads), tokens_per_rank=90 if by_tokens else None)
    samplers = partial(TrainSampler, len(tokens), 3, 0, world_size, 5, True, partition=partition)
    for done, plan in enumerate(islice(samplers(), steps), 1):
        assert samplers(position=plan.position).batches_since(0) == done


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 12), min_size=1, max_size=12).filter(any), st.integers(1, 5), worlds, st.data())
def test_windows_of_shards_are_read_one_after_another_and_resume_anywhere(
    sizes: list[int], shards: int, world_size: int, data: st.DataObject
) -> None:
    bounds, size = np.cumsum([0, *sizes]), sum(sizes)
    windows = ShardWindows(bounds, shards)
    options: dict[str, Any] = {"num_samples": size, "batch_size": 3, "seed": 5, "shuffle": True, "windows": windows}
    rows = samples_of(epoch_of(world_size, **options))
    assert sorted(rows) == list(range(size)) and rows == samples_of(epoch_of(1, **options))
    drawn, later = (np.random.default_rng([5, epoch]).permutation(len(sizes)).tolist() for epoch in (0, 1))
    for first in range(0, len(sizes), shards):
        window = [row for shard in drawn[first : first + shards] for row in range(*bounds[shard : shard + 2])]
        assert sorted(rows[: len(window)]) == sorted(window)
        following = [*drawn[first : first + shards], *[*drawn[first + shards :], *later][:shards]]
        for ordinal in range(size - len(rows), size - len(rows) + len(window)):
            assert windows.next_shards(5, 0, ordinal) == tuple(following)
        rows = rows[len(window) :]
    at = SamplerPosition(0, data.draw(st.integers(0, size - 1)))
    left = samples_of(epoch_of(data.draw(worlds), position=at, **options))
    assert left == windows.order(5, 0)(np.arange(at.consumed, size)).tolist()


def test_windows_of_shards_draw_shards_and_samples_uniformly() -> None:
    """10 shards of 20 samples in windows of 2: a sample stands at any of the 200 places, and beside any of its window.
    Over 500 epochs each of 200 x 10 cells has 50 +- 7."""
    windows = ShardWindows(np.arange(0, 201, 20), 2)
    orders = np.array([windows.order(3, epoch)(np.arange(200)) for epoch in range(500)])
    cells = np.array([np.bincount(column // 20, minlength=10) for column in orders.T])
    assert abs(((cells - 50) ** 2 / 50).sum() / (200 * 9) - 1) < 0.15
    same = (orders[:, :-1] // 20 == orders[:, 1:] // 20).mean()
    assert same == pytest.approx(19 / 39 * 195 / 199, abs=0.01), "neighbours of a window are of one shard in 19 of 39"


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
        partition = BatchPartition(of_rows(loads), balance, 90 if by_tokens else None)
        ranks = [
            TrainSampler(len(tokens), batch_size, rank, world_size, 5, True, position, partition)
            for rank in range(world_size)
        ]
        for plans in islice(zip(*ranks, strict=True), steps):
            (position,) = {plan.position for plan in plans}
            (epoch,) = {plan.epoch for plan in plans}
            seen.setdefault(epoch, []).extend(sorted(int(ordinal) for plan in plans for ordinal in plan.ordinals))
            order = order_of(len(tokens), 5, epoch, True)
            assert all((order[plan.ordinals] == plan.indices).all() for plan in plans)
    finished = [epoch for epoch in seen if epoch < position.epoch or position.consumed == len(tokens)]
    assert finished == list(range(len(finished))) and len(finished) >= 2
    assert all(seen[epoch] == list(range(len(tokens))) for epoch in finished)


def test_without_shuffling_every_epoch_has_file_order() -> None:
    plans = list(islice(TrainSampler(5, 3, rank=0, world_size=1, seed=0, shuffle=False), 4))
    assert [plan.indices.tolist() for plan in plans] == [[0, 1, 2], [3, 4], [0, 1, 2], [3, 4]]
    assert [(plan.position.epoch, plan.position.consumed) for plan in plans] == [(0, 3), (0, 5), (1, 3), (1, 5)]


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
    plain = epoch_of(world_size, BatchPartition(of_rows(loads)), **options)
    balanced = epoch_of(world_size, BatchPartition(of_rows(loads), balance=True), **options)
    order = order_of(len(tokens), 3, 0, shuffle)
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
    plain = epoch_of(world_size, BatchPartition(of_rows(loads)), **options)
    balanced = epoch_of(world_size, BatchPartition(of_rows(loads), balance=True), **options)
    assert len(balanced) == batches
    for plans in balanced:
        assert cost_ratio(plans, loads) <= 1.1
    assert max(cost_ratio(plans, loads) for plans in plain) > 1.1, "there was something to balance"


@settings(max_examples=80, deadline=None)
@given(lengths, st.integers(1, 8), worlds, st.integers(60, 200), st.booleans())
def test_by_tokens_no_rank_exceeds_its_budget_or_goes_without_and_no_sample_is_lost(
    tokens: list[int], batch_size: int, world_size: int, budget: int, balance: bool
) -> None:
    loads = make_loads(tokens)
    options: dict[str, Any] = {"num_samples": len(tokens), "batch_size": batch_size, "seed": 2, "shuffle": True}
    partition = BatchPartition(of_rows(loads), balance, budget)
    batches = epoch_of(world_size, partition, **options)
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
    sampler = TrainSampler(rank=0, world_size=world_size, partition=partition, **options)
    assert sampler.batches_per_epoch == len(batches)


def test_by_tokens_a_rank_is_filled_as_far_as_whole_sequences_allow() -> None:
    loads = draw_loads("lognormal", 20_000, seed=8)
    budget = 32 * 1024
    options: dict[str, Any] = {"num_samples": 20_000, "batch_size": 512, "seed": 2, "shuffle": True}
    for balance in (False, True):
        batches = epoch_of(4, BatchPartition(of_rows(loads), balance, budget), **options)[:-1]
        held = np.array([[loads.tokens[plan.indices].sum() for plan in plans] for plans in batches])
        assert held.max() <= budget
        assert held.mean() > 0.95 * budget
    assert np.mean([cost_ratio(plans, loads) for plans in batches]) < 1.04


@pytest.mark.parametrize("balance", [False, True])
def test_a_sequence_longer_than_the_budget_is_a_rank_of_its_own(balance: bool) -> None:
    loads = make_loads(np.array([3, 50, 4, 4, 4, 3, 3, 3, 3, 3]))
    plans = epoch_of(
        3, BatchPartition(of_rows(loads), balance, 12), num_samples=10, batch_size=8, seed=0, shuffle=False
    )[0]
    assert [plan.indices.tolist() for plan in plans] == [[0], [1], [2, 3, 4]]


def test_too_few_samples_for_all_ranks_leave_some_empty() -> None:
    partition = BatchPartition(of_rows(make_loads([9, 9, 9])), tokens_per_rank=10)
    batches = epoch_of(2, partition, num_samples=3, batch_size=8, seed=0, shuffle=False)
    assert [[plan.indices.tolist() for plan in plans] for plans in batches] == [[[0], [1]], [[2], []]]


def one_by_one(costs: np.ndarray, counts: np.ndarray, tokens: np.ndarray, budget: int) -> np.ndarray | None:
    """balanced_ranks by its definition: samples in descending cost, each to the rank of least cost that has room."""
    ranks, room, left = np.empty(len(costs), dtype=np.int64), counts.copy(), np.full(len(counts), budget)
    loads = np.zeros(len(counts))
    for sample in np.argsort(-costs, kind="stable"):
        fitting = np.flatnonzero((room > 0) & (left >= tokens[sample]))
        if not len(fitting):
            return None
        ranks[sample] = rank = fitting[loads[fitting].argmin()]
        loads[rank] += costs[sample]
        room[rank] -= 1
        left[rank] -= tokens[sample]
    return ranks


@pytest.mark.parametrize("kind", [*LENGTHS, "equal", "unrelated"])
@pytest.mark.parametrize("num_ranks", [3, 150])
def test_plans_are_those_of_the_definition_of_balancing(kind: str, num_ranks: int) -> None:
    size = 12 * num_ranks - 5
    loads = draw_loads(kind if kind in LENGTHS else "lognormal", size, seed=num_ranks)
    if kind == "equal":
        loads = make_loads(np.full(size, 9))
    elif kind == "unrelated":  # costs that do not grow with tokens
        loads = Loads(loads.tokens, np.random.default_rng(1).lognormal(0, 2, size))
    unlimited, counts = np.zeros(size, dtype=np.int64), np.full(num_ranks, 12)
    assert (balanced_ranks(loads.costs, counts) == one_by_one(loads.costs, counts, unlimited, 0)).all()  # type: ignore
    for budget in (int(loads.tokens.mean() * 13), int(loads.tokens.max() * 1.2)):
        found, expected = (plan(loads.costs, counts, loads.tokens, budget) for plan in (balanced_ranks, one_by_one))
        assert (found is None) == (expected is None)
        assert found is None or (found == expected).all()


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64, 1000, 4096, 10_007])
def test_the_order_without_a_list_has_each_row_once(size: int) -> None:
    rows = feistel_rows(size, 5, 1, np.arange(size))
    assert rows.dtype == np.int64 and sorted(rows.tolist()) == list(range(size))
    assert feistel_rows(size, 5, 1, np.array([size // 2])) == rows[size // 2]


def test_the_order_without_a_list_is_uniform() -> None:
    """Chi-square of 10 x 10 cells over 400 epochs: of (place, row), and of neighbours' rows. 99 degrees of freedom give
    99 +- 14; one place's 10 cells over the epochs have 9 +- 4.2."""
    size, epochs = 1003, 400
    orders = np.array([feistel_rows(size, 3, epoch, np.arange(size)) for epoch in range(epochs)])
    cells = orders * 10 // size
    widths = np.bincount(np.arange(size) * 10 // size) / size

    def chi_square(found: np.ndarray, expected: np.ndarray) -> float:
        return float(((found - expected) ** 2 / expected).sum())

    expected = np.outer(widths, widths) * size * epochs
    neighbours = np.bincount((cells[:, :-1] * 10 + cells[:, 1:]).reshape(-1), minlength=100).reshape(10, 10)
    assert chi_square(neighbours, expected * (size - 1) / size) < 99 + 5 * 14
    of_places = [chi_square(np.bincount(column, minlength=10), widths * epochs) for column in cells.T]
    assert abs(np.mean(of_places) - 9) < 0.7 and max(of_places) < 45
    steps = np.bincount((np.diff(orders) % size).reshape(-1), minlength=size)[1:]  # differences of neighbours, never 0
    assert abs(chi_square(steps, np.full(size - 1, steps.mean())) / (size - 2) - 1) < 0.25
    assert abs(np.corrcoef(orders[:-1].reshape(-1), orders[1:].reshape(-1))[0, 1]) < 0.01


def test_the_list_gives_the_order_that_earlier_checkpoints_expect_and_larger_data_needs_none() -> None:
    assert order_of(12, 1234, 3).tolist() == [4, 11, 10, 6, 1, 8, 5, 7, 3, 9, 2, 0]
    assert (order_of(1000, 7, 2) == np.random.default_rng([7, 2]).permutation(1000)).all()
    size = MOST_LISTED + 1
    sampler = TrainSampler(size, 4, rank=1, world_size=2, seed=1, shuffle=True, position=SamplerPosition(0, size - 9))
    tracemalloc.start()
    plan = next(iter(sampler))
    assert tracemalloc.get_traced_memory()[1] < 1e6
    tracemalloc.stop()
    assert plan.ordinals.tolist() == [size - 5, size - 4, size - 3, size - 2]
    assert (plan.indices == feistel_rows(size, 1, 0, plan.ordinals)).all()
