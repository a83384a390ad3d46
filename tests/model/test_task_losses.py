"""The losses of ranking tasks against their formulas in float64, item by item, with gradients."""

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from hstu.config.args import RankingTaskArgs
from hstu.data.features.values import PLAIN, LabelCodes
from hstu.model import tasks
from hstu.model.tasks import RankingTask

ITEMS = 24
EXTREME = (-60.0, 60.0, 0.0)
"""Outputs at the begin of each case: no loss or gradient overflows there."""


def likelihood(logit: Tensor, is_positive: bool) -> Tensor:
    return 1 / (1 + (-logit if is_positive else logit).exp())


def bce(outputs: Tensor, label: float) -> Tensor:
    return -likelihood(outputs[0], label == 1).log()


def focal(outputs: Tensor, label: float) -> Tensor:
    probability = likelihood(outputs[0], label == 1)
    return -((1 - probability) ** 2) * probability.log()


def cross_entropy(outputs: Tensor, label: float) -> Tensor:
    return -(outputs[int(label)].exp() / outputs.exp().sum()).log()


def mse(outputs: Tensor, label: float) -> Tensor:
    return (outputs[0] - label) ** 2


def huber(outputs: Tensor, label: float) -> Tensor:
    error = (outputs[0] - label).abs()
    return 0.5 * error**2 if error <= 1 else error - 0.5


CASES: dict[str, tuple[Callable[[Tensor, float], Tensor], int, int]] = {
    "bce": (bce, 1, 2),
    "focal": (focal, 1, 2),
    "cross_entropy": (cross_entropy, 4, 4),
    "mse": (mse, 1, 0),
    "huber": (huber, 1, 0),
}
"""Loss → its formula, width of the outputs, number of classes (0: any number)."""


def outputs_of(width: int) -> Tensor:
    outputs = torch.randn(ITEMS, width, generator=torch.Generator().manual_seed(0)) * 3
    outputs[: len(EXTREME)] = torch.tensor(EXTREME)[:, None]
    return outputs.requires_grad_()


def labels_of(classes: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    if classes:
        return torch.randint(classes, (ITEMS,), generator=generator).float()
    return 2 * torch.randn(ITEMS, generator=generator)


@pytest.mark.parametrize("name", CASES)
def test_losses_are_their_formulas(name: str) -> None:
    formula, width, classes = CASES[name]
    outputs, labels = outputs_of(width), labels_of(classes)
    losses = getattr(tasks, name)(outputs, labels)
    exact = outputs.detach().double().requires_grad_()
    expected = torch.stack([formula(row, label) for row, label in zip(exact, labels.tolist(), strict=True)])
    compare(losses, outputs, expected, exact)


def compare(losses: Tensor, outputs: Tensor, expected: Tensor, exact: Tensor) -> None:
    """Values and gradients, each item with another weight."""
    weights = torch.linspace(0.5, 2, losses.numel()).view_as(losses)
    (gradient,) = torch.autograd.grad((losses * weights).sum(), outputs)
    (exact_gradient,) = torch.autograd.grad((expected * weights).sum(), exact)
    torch.testing.assert_close(losses.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradient.double(), exact_gradient, rtol=1e-4, atol=1e-5)
    assert gradient.abs().max() > 0


def test_pairs_are_those_of_one_request() -> None:
    num_labels = torch.tensor([5, 1, 0, 6, 3, 9])
    outputs, labels = outputs_of(1), labels_of(2)
    labels[-3:] = 0
    weights = torch.rand(ITEMS, generator=torch.Generator().manual_seed(2)) * (torch.arange(ITEMS) % 4 > 0)
    exact = outputs.detach().double().requires_grad_()
    expected, start = torch.zeros((), dtype=torch.float64), 0
    for size in num_labels.tolist():
        items, start = range(start, start + size), start + size
        pairs = [(i, j) for i in items for j in items if labels[i] == 1 and labels[j] == 0]
        of_pairs = [weights[i].double() * weights[j].double() for i, j in pairs]
        if sum(of_pairs) > 0:
            losses = [(1 + (exact[j, 0] - exact[i, 0]).exp()).log() for i, j in pairs]
            total = sum(weight * loss for weight, loss in zip(of_pairs, losses, strict=True))
            expected = expected + size * total / sum(of_pairs)
    compare(tasks.pairwise_sum(outputs, labels, weights, num_labels, 9), outputs, expected, exact)


def values(*columns: list[float]) -> Tensor:
    return torch.tensor(columns)


def task(codes: LabelCodes = PLAIN, **args: object) -> RankingTask:
    made = RankingTaskArgs(label="a", **args)  # type: ignore[arg-type]
    return RankingTask(made, ("a", "b"), codes)


def test_labels_of_binary_tasks_are_positive_by_threshold_or_bit_or_text() -> None:
    labels = values([0, 1, 2, 3, 6, torch.nan], [0.0] * 6)
    assert task().labels(labels)[:5].tolist() == [0, 1, 1, 1, 1]
    assert task(positive_values=[">= 2.5"]).labels(labels)[:5].tolist() == [0, 0, 0, 1, 1]
    assert task(positive_values=["& 4"]).labels(labels)[:5].tolist() == [0, 0, 0, 0, 1]
    assert task(positive_values=["&3"]).labels(labels)[:5].tolist() == [0, 1, 1, 1, 1]
    of_texts = task(LabelCodes(positive=(0, 3)), positive_values=["cart", "purchase"])
    assert of_texts.labels(labels)[:5].tolist() == [1, 0, 0, 1, 0]
    assert task(positive_values=["&3"]).labels(labels)[5].isnan() and of_texts.labels(labels)[5].isnan()


def test_items_without_a_label_do_not_count() -> None:
    batch: Any = SimpleNamespace(label_values=values([0, 1, torch.nan, 1], [0.0] * 4))
    assert float(task().loss_sum(torch.zeros(4, 1), batch)) == pytest.approx(3 * math.log(2))
