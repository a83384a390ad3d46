"""The sequences of a batch as flat arrays: what a reader of samples gives, before padding and negatives."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from hstu.data.sampling.sampler import BatchPlan


@dataclass(frozen=True)
class Rows:
    """The b real sequences of a batch as flat arrays, before padding; int64 unless stated otherwise."""

    user_ids: np.ndarray
    """[b]"""
    lengths: np.ndarray
    """Items of each sequence, [b]."""
    num_candidates: np.ndarray
    """[b]"""
    num_labels: np.ndarray
    """[b]"""
    items: np.ndarray
    """[Σ lengths]"""
    actions: np.ndarray | None
    """[Σ lengths]"""
    timestamps: np.ndarray | None
    """[Σ lengths], seconds."""
    context: Mapping[str, np.ndarray]
    """Feature → [b]."""
    side: Mapping[str, np.ndarray] = field(default_factory=dict)
    """Feature → [Σ lengths], or [Σ list_lengths[feature]] for a list: the values of one item after another."""
    list_lengths: Mapping[str, np.ndarray] = field(default_factory=dict)
    """List → values of each item, [Σ lengths]."""
    label_values: Mapping[str, np.ndarray] = field(default_factory=dict)
    """The features of FeatureRoles.labels in their order → float32 [Σ num_labels], NaN where missing."""
    numbers: np.ndarray | None = None
    """float32 [Σ lengths, W], see ItemColumns.numbers."""
    hard_negatives: np.ndarray | None = None
    """Codes of items, [labels that follow another item, Negatives.hard], see draw_each."""
    held_out: np.ndarray | None = None
    """Retrieval evaluation: the target items, [b]."""
    request_times: np.ndarray | None = None
    """Retrieval evaluation: the times of the target events, [b], in seconds."""
    seen: np.ndarray | None = None
    """See SeenIds.values, [Σ seen_lengths]."""
    seen_lengths: np.ndarray | None = None
    """[b]"""


class RowReader(Protocol):
    """A source of rows."""

    def read(self, plan: BatchPlan) -> Rows:
        """The rows of ``plan.indices``, in that order."""
        ...
