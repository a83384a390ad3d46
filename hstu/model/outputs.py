"""The output of the model for one batch, the same type for both tasks."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass
class ModelOutput:
    """Loss and predictions of one rank's batch.

    The sum and the count are separate because ranks hold different numbers of labels: the trainer divides the global
    sum by the global count.
    """

    loss_sum: Tensor
    """float32 scalar: loss summed over this batch's labelled tokens (and over tasks)."""
    num_labels: Tensor
    """int64 scalar on the device: labelled tokens of this batch."""
    logits: Tensor | None = None
    """Ranking: float32 [M, last width of the head], in the order of ``batch.labels``. With RankingArgs.tasks: the
    predictions of all tasks, side by side."""
    queries: Tensor | None = None
    """Retrieval evaluation: float32 [B, E], normalised, at each sequence's newest token; zero rows for padding."""
