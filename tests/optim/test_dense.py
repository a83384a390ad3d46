import copy
from typing import Any

import pytest
import torch
from torch import nn

from hstu.config.args import OptimizerArgs
from hstu.optim.optimizers import DenseOptimizer, decayed_parameters

NAMES = ["sgd", "adagrad", "adam", "adamw", "rowwise_adagrad", "muon"]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 4)
        self.norm = nn.LayerNorm((2, 4))  # a norm with a two-dimensional weight
        self.linear = nn.Linear(8, 3)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.linear(self.norm(self.embedding(ids)).flatten(1)).square().mean()


IDS = torch.tensor([[0, 1], [3, 4]])


def train(model: nn.Module, optimizer: Any, steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        model(IDS).backward()
        optimizer.step()


def weights(model: nn.Module) -> list[torch.Tensor]:
    return [weight.detach().clone() for weight in model.parameters()]


def test_weight_decay_is_for_matrices_that_are_no_embedding_norm_or_bias() -> None:
    model = Net()
    assert [id(weight) for weight in decayed_parameters(model)] == [id(model.linear.weight)]


@pytest.mark.parametrize("name", NAMES)
def test_decay_shrinks_a_weight_by_its_learning_rate_whichever_the_optimizer(name: str) -> None:
    torch.manual_seed(0)
    plain = Net()
    decayed = copy.deepcopy(plain)
    args: dict[str, Any] = {"optimizer_str": name, "learning_rate": 0.1}
    before = plain.linear.weight.detach().clone()
    train(plain, DenseOptimizer(plain, OptimizerArgs(**args)), 1)
    train(decayed, DenseOptimizer(decayed, OptimizerArgs(**args, weight_decay=0.5)), 1)
    torch.testing.assert_close(plain.linear.weight - decayed.linear.weight, 0.1 * 0.5 * before)
    for key in ("embedding.weight", "norm.weight", "linear.bias"):
        torch.testing.assert_close(decayed.get_parameter(key), plain.get_parameter(key), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("name", "options", "reference"),
    [
        ("sgd", {"momentum": 0.9}, lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9)),
        ("adam", {}, lambda p: torch.optim.Adam(p, lr=0.1, eps=1e-5)),
        ("adagrad", {}, lambda p: torch.optim.Adagrad(p, lr=0.1, eps=1e-5)),
        ("rowwise_adagrad", {}, lambda p: torch.optim.Adagrad(p, lr=0.1, eps=1e-5)),
    ],
)
def test_creating_the_state_early_changes_nothing(name: str, options: dict[str, Any], reference: Any) -> None:
    torch.manual_seed(0)
    ours = Net()
    theirs = copy.deepcopy(ours)
    optimizer = DenseOptimizer(ours, OptimizerArgs(optimizer_str=name, learning_rate=0.1, adam_eps=1e-5, **options))
    torch.testing.assert_close(weights(ours), weights(theirs), rtol=0, atol=0)
    train(ours, optimizer, 4)
    train(theirs, reference(theirs.parameters()), 4)
    torch.testing.assert_close(weights(ours), weights(theirs), rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_the_state_is_named_by_parameter_and_there_before_the_first_step(name: str) -> None:
    args = OptimizerArgs(optimizer_str=name, learning_rate=0.1, momentum=0.9)
    model = Net()
    optimizer = DenseOptimizer(model, args)
    names_before = set(optimizer.state_tensors())
    train(model, optimizer, 1)
    assert set(optimizer.state_tensors()) == names_before
    assert any(key.startswith("linear.weight.") for key in names_before)


def test_the_average_follows_the_weights_from_the_start_and_is_lent_to_evaluations() -> None:
    torch.manual_seed(0)
    model = Net()
    optimizer = DenseOptimizer(model, OptimizerArgs(optimizer_str="sgd", learning_rate=0.5, ema_decay=0.4))
    expected = [weight.double() for weight in weights(model)]
    for decay in (1 / 10, 2 / 11, 3 / 12, 4 / 13, 5 / 14, 0.4, 0.4):
        train(model, optimizer, 1)
        expected = [decay * average + (1 - decay) * w for average, w in zip(expected, weights(model), strict=True)]
    trained = weights(model)
    with optimizer.averaged_weights():
        torch.testing.assert_close(weights(model), [average.float() for average in expected])
        assert not torch.equal(model.linear.weight, trained[3])
    torch.testing.assert_close(weights(model), trained, rtol=0, atol=0)
    states = optimizer.state_tensors()
    averages = [states[f"{name}.average"] for name, _ in model.named_parameters()]
    torch.testing.assert_close(averages, expected, rtol=1e-5, atol=1e-6, check_dtype=False)


def test_the_average_changes_nothing_about_training_and_costs_nothing_where_there_is_none() -> None:
    torch.manual_seed(0)
    plain = Net()
    averaged = copy.deepcopy(plain)
    args: dict[str, Any] = {"optimizer_str": "adam", "learning_rate": 0.1}
    optimizers = (
        DenseOptimizer(plain, OptimizerArgs(**args)),
        DenseOptimizer(averaged, OptimizerArgs(**args, ema_decay=0.5)),
    )
    for model, optimizer in zip((plain, averaged), optimizers, strict=True):
        train(model, optimizer, 2)
        with optimizer.averaged_weights():
            pass
        train(model, optimizer, 2)
    torch.testing.assert_close(weights(averaged), weights(plain), rtol=0, atol=0)
    assert not [name for name in optimizers[0].state_tensors() if name.endswith(".average")]
