import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hstu.config.args import LRScheduleArgs
from hstu.optim.optimizers import lr_multiplier

TOTAL, PER_EPOCH = 100, 10


def multipliers(**args: Any) -> list[float]:
    schedule = LRScheduleArgs(**args)
    epochs = [(step, step // PER_EPOCH) for step in range(TOTAL + 1)]
    return [lr_multiplier(schedule, step, TOTAL, epoch, epoch * PER_EPOCH) for step, epoch in epochs]


@pytest.mark.parametrize("warmup", [{"warmup_iters": 20}, {"warmup_ratio": 0.2}])
def test_warmup_rises_linearly_from_its_start_to_one(warmup: dict[str, Any]) -> None:
    values = multipliers(warmup_start=0.5, **warmup)
    assert values[:21] == pytest.approx([0.5 + 0.5 * iteration / 20 for iteration in range(21)])
    assert values[20:] == [1.0] * 81


SHAPES: list[tuple[dict[str, Any], dict[int, float]]] = [
    ({"schedule": "linear", "warmup_iters": 20, "min_ratio": 0.2}, {20: 1.0, 60: 0.6, 100: 0.2}),
    ({"schedule": "cosine", "min_ratio": 0.2}, {25: 0.2 + 0.8 * (1 + math.cos(math.pi / 4)) / 2, 50: 0.6, 100: 0.2}),
    ({"schedule": "cosine_restarts", "decay_iters": 40}, {0: 1.0, 20: 0.5, 40: 1.0, 60: 0.5, 80: 1.0}),
    ({"schedule": "cosine_restarts", "decay_iters": 40}, {39: 0.5 * (1 + math.cos(math.pi * 39 / 40))}),
    ({"schedule": "exponential", "decay_factor": 0.01}, {50: 0.1, 100: 0.01}),
    ({"schedule": "exponential", "decay_factor": 0.01, "min_ratio": 0.3}, {100: 0.3}),
    (
        {"schedule": "warmup_stable_decay", "warmup_ratio": 0.1, "decay_ratio": 0.2, "min_ratio": 0.5},
        {5: 0.5, 10: 1.0, 80: 1.0, 90: 0.75, 100: 0.5},
    ),
    ({"schedule": "warmup_stable_decay", "warmup_iters": 60, "decay_iters": 90}, {30: 0.5, 60: 1.0, 80: 0.5, 100: 0}),
    ({"schedule": "warmup_stable_decay", "decay_iters": 25, "by_epoch": True}, {79: 1.0, 89: 0.8, 90: 0.4, 99: 0.4}),
    ({"schedule": "step", "milestones": [30, 60], "decay_factor": 0.5}, {29: 1.0, 30: 0.5, 59: 0.5, 60: 0.25}),
]
"""Options, and multipliers by iteration."""


@pytest.mark.parametrize(("args", "expected"), SHAPES)
def test_each_schedule_has_its_shape(args: dict[str, Any], expected: dict[int, float]) -> None:
    values = multipliers(**args)
    assert {iteration: values[iteration] for iteration in expected} == pytest.approx(expected)


@pytest.mark.parametrize("decay", [{"decay_iters": 50}, {"decay_ratio": 0.5}])
def test_a_decay_shorter_than_the_run_stays_at_the_floor(decay: dict[str, Any]) -> None:
    values = multipliers(schedule="linear", min_ratio=0.1, **decay)
    assert values[25] == pytest.approx(0.55)
    assert values[50:] == pytest.approx([0.1] * 51)


def test_by_epoch_moves_at_epoch_ends_and_counts_milestones_in_epochs() -> None:
    values = multipliers(schedule="step", milestones=[3], decay_factor=0.5, by_epoch=True)
    assert (values[29], values[30]) == (1.0, 0.5)
    linear = multipliers(schedule="linear", by_epoch=True)
    assert all(linear[iteration] == linear[iteration // 10 * 10] for iteration in range(TOTAL))
    assert linear[50] == pytest.approx(0.5)


def test_by_epoch_warms_up_at_epoch_ends() -> None:
    values = multipliers(warmup_iters=25, warmup_start=0.5, by_epoch=True)
    assert values[:40] == pytest.approx([0.5] * 10 + [0.7] * 10 + [0.9] * 10 + [1.0] * 10)


def test_by_epoch_follows_the_epochs_of_the_data_not_their_usual_length() -> None:
    schedule = LRScheduleArgs(schedule="linear", by_epoch=True)
    assert lr_multiplier(schedule, 11, TOTAL, 0, 0) == 1.0  # an epoch of 12 steps
    assert lr_multiplier(schedule, 12, TOTAL, 1, PER_EPOCH) == pytest.approx(0.9)


@given(
    shape=st.sampled_from(
        ["constant", "linear", "cosine", "cosine_restarts", "exponential", "step", "warmup_stable_decay"]
    ),
    warmup=st.integers(0, 150), total=st.integers(1, 120), per_epoch=st.integers(1, 50),
    iteration=st.integers(0, 200), floor=st.floats(0, 1), by_epoch=st.booleans(),
)  # fmt: skip
def test_a_multiplier_is_always_between_zero_and_one(
    shape: str, warmup: int, total: int, per_epoch: int, iteration: int, floor: float, by_epoch: bool
) -> None:
    args = LRScheduleArgs(schedule=shape, warmup_iters=warmup, min_ratio=floor, milestones=[5, 9], by_epoch=by_epoch)
    epoch = iteration // per_epoch
    assert 0.0 <= lr_multiplier(args, iteration, total, epoch, epoch * per_epoch) <= 1.0 + 1e-12
