"""Weights that are updated on the host train what weights train that are updated where they are."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hstu.config.args import OptimizerArgs
from hstu.optim.dense import DenseOptimizer
from hstu.parallel.host_weights import HostWeights, WholeWeights
from hstu.parallel.shards import ShardedView

BATCHES = torch.randn(4, 6, 8, generator=torch.Generator().manual_seed(0))
GOOD, BAD = torch.zeros(()), torch.ones(())
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "adamw": {"weight_decay": 0.1, "ema_decay": 0.9},
    "adagrad": {},
    "sgd": {"momentum": 0.9, "ema_decay": 0.9},
}


def net() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(8, 5), nn.LayerNorm(5), nn.Linear(5, 3))


def optimizers_of(name: str) -> list[tuple[nn.Module, DenseOptimizer]]:
    """Two equal models: one is updated where its weights are, the other on the host."""
    args = OptimizerArgs(optimizer_str=name, learning_rate=0.05, **OPTIMIZERS[name])
    here, there = net(), net()
    return [
        (here, DenseOptimizer(here, args)),
        (there, DenseOptimizer(there, args, shares=HostWeights(WholeWeights(dict(there.named_parameters()))))),
    ]


def step(model: nn.Module, optimizer: DenseOptimizer, batch: Tensor, found_inf: Tensor | None) -> None:
    optimizer.zero_grad()
    model(batch).square().mean().backward()
    optimizer.step(found_inf)


def numbers(model: nn.Module, optimizer: DenseOptimizer) -> dict[str, Tensor]:
    """Weights, states and averages, as a checkpoint has them."""
    states = optimizer.state_tensors()
    assert not any(isinstance(each, ShardedView) for each in states.values())
    found = copy.deepcopy({**model.state_dict(), **states})
    with optimizer.averaged_weights():
        return found | {f"averaged {name}": weight.clone() for name, weight in model.state_dict().items()}


def assert_equal(models: list[tuple[nn.Module, DenseOptimizer]]) -> None:
    here, there = (numbers(*each) for each in models)
    assert here.keys() == there.keys()
    assert [name for name in here if not torch.equal(here[name], there[name])] == []


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_weights_states_and_averages_have_the_same_bits(name: str) -> None:
    models = optimizers_of(name)
    assert_equal(models)
    for batch, found_inf in zip(BATCHES, (None, GOOD, BAD, GOOD), strict=True):
        before = [copy.deepcopy(list(model.parameters())) for model, _ in models]
        for model, optimizer in models:
            step(model, optimizer, batch, found_inf)
        assert_equal(models)
        for weights, (model, _) in zip(before, models, strict=True):
            changed = [not torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=True)]
            assert any(changed) == (found_inf is not BAD)


def test_weights_that_are_loaded_between_two_steps_are_trained_on() -> None:
    models = optimizers_of("adamw")
    for model, optimizer in models:
        step(model, optimizer, BATCHES[0], None)
        with torch.no_grad():
            for weight in model.parameters():
                weight.mul_(2)
        step(model, optimizer, BATCHES[1], None)
    assert_equal(models)


def test_averages_are_lent_and_the_weights_come_back() -> None:
    _, (model, optimizer) = optimizers_of("adamw")
    for batch in BATCHES:
        step(model, optimizer, batch, None)
    trained = copy.deepcopy(model.state_dict())
    for _ in range(2):
        with optimizer.averaged_weights():
            inside = copy.deepcopy(model.state_dict())
        assert not any(torch.equal(inside[name], trained[name]) for name in trained)
        assert all(torch.equal(weight, trained[name]) for name, weight in model.state_dict().items())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU, whose memory has no states")
def test_on_a_gpu_states_are_on_the_host_and_weights_are_close() -> None:
    args = OptimizerArgs(optimizer_str="adamw", learning_rate=0.05, **OPTIMIZERS["adamw"])
    models = [net().cuda(), net().cuda()]
    plain = DenseOptimizer(models[0], args)
    on_host = DenseOptimizer(models[1], args, shares=HostWeights(WholeWeights(dict(models[1].named_parameters()))))
    for batch in BATCHES.cuda():
        for model, optimizer in zip(models, (plain, on_host), strict=True):
            step(model, optimizer, batch, GOOD.cuda())
    assert not any(state.is_cuda for state in on_host.state_tensors().values() if isinstance(state, Tensor))
    for one, other in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
