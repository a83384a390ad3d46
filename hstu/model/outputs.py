"""The model's output for one batch, the same type for both tasks."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass
class ModelOutput:
    """Loss and predictions of one rank's batch. The trainer divides the global loss sum by the global label count."""

    loss_sum: Tensor
    """float32 scalar: loss summed over the labelled tokens of this batch, and over tasks."""
    num_labels: Tensor
    """int64 scalar on the device: labelled tokens of this batch."""
    logits: Tensor | None = None
    """Ranking: float32 [M, last width of the head], in the order of ``batch.labels``; of all tasks side by side."""
    queries: Tensor | None = None
    """Retrieval evaluation: float32 [B, E], normalised, at each sequence's newest token; zeros for padding."""
