"""The toy trained in float64 by plain torch on one process, each table by its formula."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torchrec import JaggedTensor

from hstu.parallel.mesh import seed_initial_weights
from tests.distributed.toy import FEATURES, ToyTask, make_batch

EPS, BETAS = 1e-8, (0.9, 0.999)
TABLE_OF = {"user": "user_table", "item": "item_table", "action": "action_table", FEATURES[3]: "item_table"}
DENSE = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}


@dataclass(frozen=True)
class Training:
    """How one table is trained. ``lazily``: only rows that are looked up move, as those of sharded tables do."""

    optimizer: str
    learning_rate: float
    lazily: bool = True
    max_gradient: float | None = None


def reference(
    dense: dict[str, tuple[str, float]], tables: dict[str, Training], initial: dict[str, Any], steps: int
) -> tuple[dict[str, Any], list[float], list[float]]:
    """Final tables and dense weights, each step's loss, and how far each step's clamp cut gradients (0: it did not).

    ``dense``: beginning of a weight's name → (optimizer, learning rate) of it; "" is that of all others.
    """
    seed_initial_weights(7)
    task = ToyTask(8, 8, dropout=0.0).double()
    rows_of = {name: torch.tensor(rows, dtype=torch.float64, requires_grad=True) for name, rows in initial.items()}
    optimizers = [
        _dense(name, rate, [w for key, w in task.named_parameters() if _part(key, dense) == part])
        for part, (name, rate) in dense.items()
    ]
    states: dict[str, dict[str, torch.Tensor]] = {name: {} for name in tables}
    losses, cuts = [], []
    for step in range(1, steps + 1):
        batch = make_batch(step - 1, 0, 1)
        embeddings, touched = {}, {name: [] for name in rows_of}
        for feature, ids in batch.features.to_dict().items():
            table = TABLE_OF[feature]
            embeddings[feature] = JaggedTensor(rows_of[table][ids.values()], lengths=ids.lengths())
            touched[table].append(ids.values())
        output = task(embeddings, batch)
        loss = output.loss_sum / output.num_labels
        losses.append(loss.item())
        for weight in [*task.parameters(), *rows_of.values()]:
            weight.grad = None
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        with torch.no_grad():
            cut = 0.0
            for name, training in tables.items():
                weight = rows_of[name]
                rows = torch.cat(touched[name]).unique() if training.lazily else torch.arange(len(weight))
                cut = max(cut, _clamp(weight.grad, training.max_gradient))
                update_rows(training, weight, rows, states[name], step)
            cuts.append(cut)
    trained = {name: table.detach().numpy() for name, table in rows_of.items()}
    return {"tables": trained, "dense": {k: w.detach().numpy() for k, w in task.named_parameters()}}, losses, cuts


def _part(name: str, parts: dict[str, tuple[str, float]]) -> str:
    return max((part for part in parts if name.startswith(part)), key=len)


def _dense(name: str, rate: float, weights: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    extra: dict[str, Any] = {} if name == "sgd" else {"eps": EPS}
    return DENSE.get(name, torch.optim.Adagrad)(weights, lr=rate, **extra)


def _clamp(gradient: torch.Tensor | None, limit: float | None) -> float:
    """How much of the largest entry was cut off."""
    assert gradient is not None
    if limit is None:
        return 0.0
    largest = float(gradient.abs().max())
    gradient.clamp_(-limit, limit)
    return max(0.0, largest - limit)


def update_rows(
    training: Training, table: torch.Tensor, rows: torch.Tensor, state: dict[str, torch.Tensor], t: int
) -> None:
    assert table.grad is not None
    optimizer, rate, gradient = training.optimizer, training.learning_rate, table.grad[rows]
    if optimizer == "sgd":
        table[rows] -= rate * gradient
    elif optimizer == "adam":
        first, second = (state.setdefault(key, torch.zeros_like(table)) for key in ("m", "v"))
        first[rows] = BETAS[0] * first[rows] + (1 - BETAS[0]) * gradient
        second[rows] = BETAS[1] * second[rows] + (1 - BETAS[1]) * gradient**2
        corrected = first[rows] / (1 - BETAS[0] ** t), second[rows] / (1 - BETAS[1] ** t)
        table[rows] -= rate * corrected[0] / (corrected[1].sqrt() + EPS)
    else:
        squares = gradient**2 if optimizer == "adagrad" else (gradient**2).mean(dim=1, keepdim=True)
        total = state.setdefault("sum", torch.zeros_like(table[:, : squares.shape[1]]))
        total[rows] += squares
        table[rows] -= rate * gradient / (total[rows].sqrt() + EPS)
