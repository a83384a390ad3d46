"""Small batches and networks for the model's tests: everything about a batch is written down per user."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hstu.config.args import NetworkArgs
from hstu.data.batches.batch import HSTUBatch, ItemColumns, keyed_jagged
from hstu.model.inputs import SequenceFeatures

ROWS = 40


@dataclass(frozen=True)
class Sample:
    """One user: ids of its features, item by item; the newest ``candidates`` items are candidates."""

    items: tuple[int, ...]
    actions: tuple[int, ...]
    context: tuple[int, ...] = ()
    candidates: int = 0
    labels: int = 0
    times: tuple[int, ...] = ()


def random_samples(lengths: list[int], *, contextuals: int, candidates: int = 0, seed: int = 0) -> list[Sample]:
    """Users with so many items each; all items are labelled, or the candidates where there are some."""
    rng = np.random.default_rng(seed)

    def ids(count: int, high: int = ROWS) -> tuple[int, ...]:
        return tuple(int(x) for x in rng.integers(0, high, count))

    samples = []
    for length in lengths:
        own = min(candidates, length)
        times = tuple(int(t) for t in np.cumsum(rng.integers(0, 10**5, length)))
        samples.append(Sample(ids(length), ids(length, 8), ids(contextuals), own, own if candidates else length, times))
    return samples


def make_features(contextuals: int, action: bool = True, max_items: int = 20) -> SequenceFeatures:
    return SequenceFeatures(
        "item", "action" if action else None, tuple(f"c{i}" for i in range(contextuals)), max_items=max_items
    )


def make_batch(samples: list[Sample], features: SequenceFeatures, padding: int = 0) -> HSTUBatch:
    """An HSTUBatch of these users, then ``padding`` empty sequences."""
    lengths = np.array([len(s.items) for s in samples] + [0] * padding, dtype=np.int64)
    is_real = np.array([1] * len(samples) + [0] * padding, dtype=np.int64)
    candidates = np.array([s.candidates for s in samples] + [0] * padding, dtype=np.int64)
    num_labels = np.array([s.labels for s in samples] + [0] * padding, dtype=np.int64)
    flat: dict[str, list[int]] = {name: [s.context[i] for s in samples] for i, name in enumerate(features.contextual)}
    flat["item"] = [item for s in samples for item in s.items]
    flat["action"] = [action for s in samples for action in s.actions]
    labels = [action for s in samples for action in s.actions[len(s.actions) - s.labels :]]
    return HSTUBatch(
        features=keyed_jagged(
            {name: np.array(values, dtype=np.int64) for name, values in flat.items()},
            {name: is_real if name in features.contextual else lengths for name in flat},
        ),
        num_candidates=torch.from_numpy(candidates),
        num_labels=torch.from_numpy(num_labels),
        labels=torch.tensor(labels, dtype=torch.int64),
        user_ids=torch.arange(len(lengths)),
        items=ItemColumns(timestamps=torch.tensor([t for s in samples for t in s.times], dtype=torch.int64)),
        real_batch_size=len(samples),
        item_lengths=lengths,
        num_candidates_host=candidates,
        num_labels_host=num_labels,
    )


@dataclass
class Tables:
    """One table a feature, looked up like the library's replicated ones."""

    features: SequenceFeatures
    item_dim: int
    contextual_dim: int
    weights: dict[str, nn.Parameter] = field(default_factory=dict)

    def __post_init__(self) -> None:
        names = [*self.features.contextual, "item", *([self.features.action] if self.features.action else [])]
        for name in names:
            dim = self.contextual_dim if name in self.features.contextual else self.item_dim
            self.weights[name] = nn.Parameter(torch.randn(ROWS, dim))

    def __call__(self, batch: HSTUBatch) -> dict[str, Tensor]:
        ids = batch.features.to_dict()
        return {name: nn.functional.embedding(ids[name].values(), weight) for name, weight in self.weights.items()}


def make_network(**changes: Any) -> NetworkArgs:
    """A tiny network without dropout, in float32."""
    settings: dict[str, Any] = dict(
        num_layers=2,
        hidden_size=8,
        num_attention_heads=2,
        kv_channels=4,
        hidden_dropout=0.0,
        dtype_str="float32",
        kernel_backend="pytorch",
        num_position_buckets=64,
    )
    return NetworkArgs(**(settings | changes))


def gradients(module: nn.Module) -> dict[str, Tensor]:
    """Gradient of every parameter; fails where one has none."""
    found = {}
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, f"{name} got no gradient"
        found[name] = parameter.grad
    return found
