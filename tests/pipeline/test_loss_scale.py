"""The scale follows overflows as torch's own does, and a checkpoint has all of it."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hstu.config.args import PrecisionArgs
from hstu.pipeline.finite import HIGHEST_SCALE, LOWEST_SCALE, LossScale


def follow(scale: LossScale, overflows: list[bool]) -> list[float]:
    """The scale after each step."""
    values = []
    for overflow in overflows:
        scale.update(found_inf=overflow)
        values.append(scale.value)
    return values


def of_torch(overflows: list[bool], growth_interval: int) -> list[float]:
    weight = torch.nn.Parameter(torch.zeros(()))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    scaler = torch.amp.GradScaler("cpu", growth_interval=growth_interval)
    scaler.scale(weight)  # makes the scale
    values = []
    for overflow in overflows:
        weight.grad = torch.tensor(float("inf") if overflow else 1.0)
        scaler.step(optimizer)
        scaler.update()
        values.append(scaler.get_scale())
    return values


@settings(max_examples=30, deadline=None)
@given(st.lists(st.booleans(), max_size=15), st.integers(1, 4))
def test_it_moves_as_torchs_gradient_scaler(overflows: list[bool], growth_interval: int) -> None:
    scale = LossScale(PrecisionArgs(growth_interval=growth_interval))
    assert follow(scale, overflows) == of_torch(overflows, growth_interval)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.booleans(), max_size=15), st.lists(st.booleans(), max_size=15))
def test_it_goes_on_from_its_state_as_if_it_had_not_stopped(before: list[bool], after: list[bool]) -> None:
    args = PrecisionArgs(growth_interval=3)
    straight_on, resumed = LossScale(args), LossScale(args)
    follow(straight_on, before)
    resumed.load_state_dict(straight_on.state_dict())
    assert follow(resumed, after) == follow(straight_on, after)
    assert resumed.pop_skipped_steps() == straight_on.pop_skipped_steps() == sum(before) + sum(after)
    assert resumed.pop_skipped_steps() == 0


def test_it_stays_a_number_that_float32_has_and_does_not_fall_below_one() -> None:
    args = PrecisionArgs(growth_interval=1)
    scale = LossScale(args)
    assert follow(scale, [False] * 200)[-1] == HIGHEST_SCALE == float(torch.tensor(HIGHEST_SCALE))
    falling = LossScale(args)
    while falling.can_shrink:
        falling.update(found_inf=True)
    assert falling.value == LOWEST_SCALE


def test_a_fixed_scale_neither_moves_nor_takes_on_that_of_a_checkpoint() -> None:
    scale = LossScale(PrecisionArgs(loss_scale=1000, growth_interval=1))
    assert not scale.can_shrink and follow(scale, [False, False]) == [1000.0, 1000.0]
    scale.load_state_dict(LossScale(PrecisionArgs()).state_dict())
    assert scale.value == 1000.0
