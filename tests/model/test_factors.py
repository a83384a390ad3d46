"""The factor model inside the network, against Bayes' rule applied one event after another in float64."""

import numpy as np
import pytest
import torch

from hstu.model import factors
from hstu.model.factors import OnlineFactors, Told


def one_by_one(model: OnlineFactors, items: torch.Tensor, actions: list[int], history: int) -> list[list[float]]:
    """(expected value, deviation, surprise) of each event of a sequence."""
    constant, weights = np.split(model.of_items(items).detach().double().numpy(), [1], axis=1)
    noise, keep = 0.6 * model.log_noise.exp().item(), np.exp(-0.003 * model.log_forgotten.exp().item())
    precision, sides, found = np.zeros((3, 3)), np.zeros(3), []
    for event, (c, w, action) in enumerate(zip(constant[:, 0], weights, actions, strict=True)):
        covariance = np.linalg.inv(precision * keep + np.eye(3))
        expected = c + w @ covariance @ sides * keep
        deviation = np.sqrt(w @ covariance @ w + noise)
        value = model.values[action - 1].item()
        found.append([expected, deviation, (value - expected) / deviation * (event < history)])
        if event < history:  # candidates follow the history at once
            precision, sides = keep * precision + np.outer(w, w) / noise, keep * sides + (value - c) * w / noise
    return found


@pytest.mark.parametrize("chunk", [2, 256])
def test_an_event_is_expected_from_the_history_before_it_alone(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(factors, "_CHUNK", chunk)
    torch.manual_seed(0)
    model = OnlineFactors(4, 3, range(1, 6))
    model.of_items.weight.data.mul_(10)
    model.log_forgotten.data.fill_(5.0)
    for layer in (model.before, model.after):
        layer.bias.data.zero_()
        layer.weight.data.copy_(torch.eye(4)[:, : layer.in_features])  # shows what it reads
    lengths, candidates = np.array([5, 0, 1, 4]), np.array([2, 0, 0, 1])
    items, actions = torch.randn(10, 4), torch.randint(1, 6, (10,))
    is_history = torch.tensor([True] * 3 + [False] * 2 + [True] * 4 + [False])
    before, after = model(items, Told.in_batch(actions, is_history, lengths, candidates))
    rows = []
    for own, classes, length, hidden in zip(
        items.split(lengths.tolist()), actions.split(lengths.tolist()), lengths, candidates, strict=True
    ):
        rows += one_by_one(model, own, classes.tolist(), length - hidden)
    torch.testing.assert_close(torch.cat([before[:, :2], after[:, :1]], dim=1), torch.tensor(rows).float())
    nothing = Told.in_batch(actions[:0], is_history[:0], np.array([0, 0]), np.array([0, 0]))
    assert model(items[:0], nothing)[0].shape == (0, 4)
