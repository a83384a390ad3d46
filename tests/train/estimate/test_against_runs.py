"""Memory and traffic of the estimate against what real runs hold, keep and exchange."""

from __future__ import annotations

from collections import Counter
from functools import cache
from typing import Any

import pytest

from hstu.train.estimate import activations, parameters, traffic
from hstu.train.estimate.situation import Situation, look_at
from tests.distributed.launch import run_ranks
from tests.train.estimate.runs import CASES, ONE, TWO_BY_TENSOR, run_config

LAUNCHED = [
    # Starting ranks takes most of the time: by default one rank, and two that form a tensor-parallel group.
    pytest.param(name, *launch, marks=[] if launch in (ONE, TWO_BY_TENSOR) else [pytest.mark.slow])
    for name, case in CASES.items()
    for launch in case["launches"]
]


@cache
def counted(world_size: int, tp: int) -> list[dict[str, Any]]:
    """Of each rank: case → counts. One launch serves all cases."""
    return run_ranks("tests.train.estimate.cases:count_all", world_size, timeout_s=200, tp=tp)


def case(name: str, world_size: int, tp: int) -> tuple[Situation, list[dict[str, Any]]]:
    config = run_config(**CASES[name]["run"], tp=tp)
    return look_at(config, world_size, world_size, "cpu"), [rank[name] for rank in counted(world_size, tp)]


@pytest.mark.parametrize(("name", "world_size", "tp"), LAUNCHED)
def test_what_stays_is_known_to_the_byte(name: str, world_size: int, tp: int) -> None:
    situation, ranks = case(name, world_size, tp)
    dense = sum(parameters.dense_parameters(situation).values()) + parameters.replicated_elements(situation)
    rows, states = parameters.table_bytes(situation, parameters.plan_tables(situation))
    for rank in ranks:
        assert rank["weights"] == rank["gradients"] == 4 * dense
        assert rank["states"] == parameters.dense_state_bytes(situation)
    assert max((rank["tables"], rank["table states"]) for rank in ranks) == (rows, states)


@pytest.mark.parametrize(("name", "world_size", "tp"), LAUNCHED)
def test_what_backward_needs_is_known_within_a_tenth(name: str, world_size: int, tp: int) -> None:
    situation, ranks = case(name, world_size, tp)
    batch = situation.steps[0][0]
    layers, tokens = situation.config.network.num_layers, situation.tokens(batch)
    expected = (
        layers * activations.layer_bytes(situation, tokens)[0]
        + activations.input_bytes(situation, batch, tokens)
        + activations.task_bytes(situation, batch, situation.pool(batch))[0]
    )
    assert ranks[0]["activations"] == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize(("name", "world_size", "tp"), [one for one in LAUNCHED if one.values[1] > 1])
def test_what_is_exchanged_is_known_within_a_fifth(name: str, world_size: int, tp: int) -> None:
    situation, ranks = case(name, world_size, tp)
    expected: Counter[str] = Counter()
    for transfer in traffic.transfers(situation, situation.steps[2][0], parameters.plan_tables(situation)):
        # gloo sums whole tensors where a part would do
        expected[transfer.kind.replace("reduce_scatter", "all_reduce")] += transfer.payload
    busiest = {kind: max(rank["exchanged"].get(kind, 0) for rank in ranks) for kind in expected}
    assert busiest == pytest.approx(dict(expected), rel=0.2)
    assert expected.keys() >= ranks[0]["exchanged"].keys()
