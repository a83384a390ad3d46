"""Parts of the dense weights that have an optimizer, a learning rate or a weight decay of their own."""

import copy
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from hstu.base.errors import ConfigError
from hstu.config.args import LRScheduleArgs, OptimizerArgs, PartOptimizerArgs
from hstu.optim.optimizers import DenseOptimizer, OptimizerSettings, lr_multiplier, match_part_optimizers

WEIGHTS = (
    "task.layers.0.uvqk.weight",
    "task.layers.0.uvqk.bias",
    "task.layers.1.uvqk.weight",
    "task.layers.1.input_norm.weight",
    "task.head.0.weight",
)


def args(*parts: dict[str, Any], **options: Any) -> OptimizerArgs:
    common: dict[str, Any] = {"optimizer_str": "adam", "learning_rate": 0.1, "weight_decay": 0.01, "adam_eps": 1e-4}
    return OptimizerArgs(**common | options, part_optimizers=[PartOptimizerArgs(**part) for part in parts])


def test_a_part_has_its_own_settings_and_the_common_ones_where_it_gives_none() -> None:
    settings = match_part_optimizers(
        WEIGHTS, args({"regex": "head", "optimizer_str": "sgd"}, {"regex": r"layers\.1\.", "weight_decay": 0.0})
    )
    assert settings["task.head.0.weight"] == OptimizerSettings("sgd", 0.1, 0.01)
    assert settings["task.layers.1.uvqk.weight"] == OptimizerSettings("adam", 0.1, 0.0)
    assert settings["task.layers.0.uvqk.bias"] == OptimizerSettings("adam", 0.1, 0.01)
    assert (*settings,) == WEIGHTS


def test_of_parts_that_overlap_the_first_has_a_weight() -> None:
    parts = {"regex": r"layers\.0", "learning_rate": 0.2}, {"regex": r"uvqk", "learning_rate": 0.3}
    rates = {name: each.learning_rate for name, each in match_part_optimizers(WEIGHTS, args(*parts)).items()}
    assert rates == dict(zip(WEIGHTS, (0.2, 0.2, 0.3, 0.1, 0.1), strict=True))


@pytest.mark.parametrize(
    ("parts", "told"),
    [
        (
            [{"regex": "^uvqk"}],
            ["regex = '^uvqk': matches no dense weight", "There are task.layers.N.uvqk.weight, task"],
        ),
        ([{"regex": ""}], ["must not be empty"]),
        ([{"regex": "."}, {"regex": "head"}], ["regex = 'head': matches no dense weight that the entries before it"]),
        ([{"regex": "x1"}, {"regex": "x2"}], ["regex = 'x1'", "regex = 'x2'"]),
    ],
)
def test_a_part_that_nothing_comes_of_is_an_error(parts: list[dict[str, Any]], told: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        match_part_optimizers(WEIGHTS, args(*parts))
    for text in told:
        assert text in str(error.value)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.norm(self.first(x))).square().mean()


def train(model: nn.Module, optimizer: DenseOptimizer, steps: range) -> None:
    for step in steps:
        optimizer.set_lr_multiplier(1 / (1 + step))
        optimizer.zero_grad()
        x = torch.randn((5, 4), generator=torch.Generator().manual_seed(step))
        model(x.to(next(model.parameters()))).backward()
        optimizer.step()


PARTS = (
    {"regex": "last", "optimizer_str": "sgd", "learning_rate": 0.3, "weight_decay": 0.2},
    {"regex": "norm", "optimizer_str": "adagrad", "learning_rate": 0.05},
)


def reference(model: nn.Module, momentum: float, decay: float, steps: int) -> list[torch.Tensor]:
    """``Net`` trained by formulas in float64, with the parts ``PARTS`` beside Adam."""
    weights = dict(model.named_parameters())
    kept: dict[str, list[torch.Tensor]] = {name: [torch.zeros_like(w) for _ in range(2)] for name, w in weights.items()}
    for step in range(steps):
        model.zero_grad()
        model(torch.randn((5, 4), generator=torch.Generator().manual_seed(step)).double()).backward()
        with torch.no_grad():
            for name, w in weights.items():
                g, (a, b), scale = w.grad, kept[name], 1 / (1 + step)
                assert g is not None
                if name.startswith("last"):
                    if name == "last.weight":
                        w.sub_(0.3 * scale * 0.2 * w)
                    a.mul_(momentum).add_(g)
                    w.sub_(0.3 * scale * a)
                elif name.startswith("norm"):
                    a += g**2
                    w.sub_(0.05 * scale * g / (a.sqrt() + 1e-4))
                else:
                    if name == "first.weight":
                        w.sub_(0.1 * scale * decay * w)
                    a.mul_(0.9).add_(0.1 * g)
                    b.mul_(0.999).add_(0.001 * g**2)
                    first, second = a / (1 - 0.9 ** (step + 1)), b / (1 - 0.999 ** (step + 1))
                    w.sub_(0.1 * scale * first / (second.sqrt() + 1e-4))
    return list(model.parameters())


def test_each_part_is_trained_by_its_formula_and_one_schedule_drives_all() -> None:
    model = Net().double()  # Adam divides the rounding of float32 by gradients that may be small
    exact = copy.deepcopy(model)
    before = [weight.detach().clone() for weight in model.parameters()]
    train(model, DenseOptimizer(model, args(*PARTS, momentum=0.8)), range(4))
    for ours, theirs, initial in zip(model.parameters(), reference(exact, 0.8, 0.01, 4), before, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
        assert (ours - initial).abs().max() > 1e-3


def test_parts_that_give_nothing_new_change_no_bit() -> None:
    plain = Net()
    with_parts = copy.deepcopy(plain)
    train(plain, DenseOptimizer(plain, args()), range(3))
    parts = args({"regex": "last"}, {"regex": "norm", "learning_rate": 0.1})
    train(with_parts, DenseOptimizer(with_parts, parts), range(3))
    assert all(map(torch.equal, plain.parameters(), with_parts.parameters()))


def test_averages_are_of_all_parts_and_states_of_any_part_can_be_restored() -> None:
    options = args(*PARTS, momentum=0.8, ema_decay=0.5)
    first, second = Net(), Net()
    one, other = DenseOptimizer(first, options), DenseOptimizer(second, options)
    train(first, one, range(3))
    states = one.state_tensors()
    assert {f"{name}.average" for name, _ in first.named_parameters()} < states.keys()
    assert {"last.weight.momentum_buffer", "norm.bias.sum", "first.bias.exp_avg"} < states.keys()
    second.load_state_dict(first.state_dict())
    assert other.state_tensors().keys() == states.keys()
    for name, tensor in other.state_tensors().items():
        kept = states[name]
        assert isinstance(tensor, torch.Tensor) and isinstance(kept, torch.Tensor)
        tensor.copy_(kept)
    other.steps = one.steps
    train(first, one, range(3, 5))
    train(second, other, range(3, 5))
    assert all(map(torch.equal, first.parameters(), second.parameters()))
    torch.testing.assert_close(other.state_tensors(), one.state_tensors(), rtol=0, atol=0)


def orthogonalized(matrix: torch.Tensor) -> torch.Tensor:
    """Five steps of the Newton–Schulz iteration of Muon, in the type of ``matrix``."""
    if matrix.shape[0] > matrix.shape[1]:
        return orthogonalized(matrix.T).T
    x = matrix / matrix.norm()
    for _ in range(5):
        square = x @ x.T
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return x


def test_muon_trains_the_matrices_of_layers_by_its_formula_and_all_other_weights_by_adam() -> None:
    torch.manual_seed(1)
    model = Net().double()
    optimizer = DenseOptimizer(model, args(optimizer_str="muon"))
    exact = copy.deepcopy(model)
    momenta = {name: torch.zeros_like(exact.get_parameter(name)) for name in ("first.weight", "last.weight")}
    adam = torch.optim.Adam([weight for name, weight in exact.named_parameters() if name not in momenta], eps=1e-4)
    for step in range(20):
        before = copy.deepcopy(model)
        exact.load_state_dict(model.state_dict())  # the next step from the same weights
        train(model, optimizer, range(step, step + 1))
        rate = adam.param_groups[0]["lr"] = 0.1 / (1 + step)
        exact.zero_grad()
        exact(torch.randn((5, 4), generator=torch.Generator().manual_seed(step)).double()).backward()
        adam.step()
        for name, momentum in momenta.items():
            weight = exact.get_parameter(name)
            assert weight.grad is not None
            momentum.lerp_(weight.grad, 0.05)
            moved = orthogonalized(0.05 * weight.grad + 0.95 * momentum)
            weight.data = (1 - rate * 0.01) * weight.data - rate * 0.2 * max(weight.shape) ** 0.5 * moved
        for (name, ours), theirs in zip(model.named_parameters(), exact.parameters(), strict=True):
            # torch iterates in bfloat16, which makes 0.04 here; with another momentum or 4 iterations it is above 0.2.
            error = 0.1 if name in momenta else 1e-6
            assert (ours - theirs).norm() < error * (theirs - before.get_parameter(name)).norm()


@pytest.mark.parametrize("name", ["adam", "muon"])
def test_a_step_whose_gradients_overflowed_changes_nothing_but_the_count(name: str) -> None:
    net = Net()
    optimizer = DenseOptimizer(net, args(optimizer_str=name, ema_decay=0.5))
    train(net, optimizer, range(3))
    for weight in net.parameters():
        weight.grad = torch.full_like(weight, torch.inf)
    before = copy.deepcopy((optimizer.state_tensors(), net.state_dict()))
    optimizer.step(found_inf=torch.tensor(1.0))
    assert optimizer.steps == 4
    torch.testing.assert_close((optimizer.state_tensors(), net.state_dict()), before, rtol=0, atol=0)


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
