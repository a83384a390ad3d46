"""What an evaluation finds, one row per prediction. Metrics are computed from all rows, or from some of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Self

import numpy as np

from hstu.data.batches.batch import HSTUBatch
from hstu.data.batches.jagged import ranges, run_indices
from hstu.train.metrics import Gather


@dataclass(frozen=True)
class Observations:
    """N predictions: one per labelled item (ranking), or per held-out item (retrieval)."""

    users: np.ndarray
    """int64 [N]: rows of the users in the evaluated store."""
    items: np.ndarray
    """int64 [N]: what the model gets for the labelled or held-out item."""
    history: np.ndarray
    """int64 [N]: events before the item that the model has read."""
    requests: np.ndarray
    """int64 [N]: any number per sequence, different from those of other sequences."""
    results: np.ndarray
    """Ranking: float32 [N, width], the predictions. Retrieval: float64 [N], the rank of the held-out item."""
    labels: np.ndarray
    """Ranking: int64 [N] actions or, of tasks, float32 [N, L] as HSTUBatch.label_values. Retrieval: ``items``."""

    def __len__(self) -> int:
        """N."""
        return len(self.users)

    def select(self, rows: np.ndarray) -> Self:
        """Some rows: bool [N], or indices, which may repeat."""
        return type(self)(*(getattr(self, field.name)[rows] for field in fields(self)))

    def gathered(self, gather: Gather) -> Self:
        """The rows of all ranks. Collective."""
        return type(self)(*(gather(getattr(self, field.name)) for field in fields(self)))

    @classmethod
    def none(cls, results: np.ndarray, labels: np.ndarray) -> Self:
        """No rows. ``results`` and ``labels``: empty arrays of the dtypes and widths that rows would have."""
        nothing = np.zeros(0, dtype=np.int64)
        return cls(nothing, nothing, nothing, nothing, results, labels)

    @classmethod
    def joined(cls, parts: Sequence[Observations]) -> Self:
        """The rows of one or more parts, one part after another."""
        return cls(*(np.concatenate([getattr(part, field.name) for part in parts]) for field in fields(cls)))


def of_ranking(
    batch: HSTUBatch, item_feature: str, predictions: np.ndarray, labels: np.ndarray, requests: np.ndarray
) -> Observations:
    """The labelled items of a batch on the host. requests: int64 [B], a number per sequence."""
    num_labels = batch.num_labels.numpy()
    sequence, place = run_indices(num_labels)
    first = batch.item_lengths - num_labels
    starts = np.cumsum(batch.item_lengths) - num_labels
    # Candidates do not see each other: each has the history before the first of them.
    history = np.minimum(first[sequence] + place, (batch.item_lengths - batch.num_candidates_host)[sequence])
    return Observations(
        users=batch.user_ids.numpy()[sequence],
        items=batch.features[item_feature].values().numpy()[ranges(starts, num_labels)],
        history=history,
        requests=requests[sequence],
        results=predictions.astype(np.float32),
        labels=labels,
    )
