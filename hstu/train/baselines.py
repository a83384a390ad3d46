"""Ranking by popularity: a baseline without a model, to compare a run's metrics with."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hstu.data.batches.jagged import ranges
from hstu.data.sampling.samples import SampleTable
from hstu.data.store.sequence_store import SequenceStore
from hstu.train.metrics import retrieval_metrics


def popularity_baseline(
    store: SequenceStore, train: SampleTable, test: SampleTable, metric_names: Sequence[str]
) -> dict[str, float]:
    """Retrieval metrics of ranking the corpus by the number of training events, seen items removed. Ties get midranks.

    ``train`` and ``test`` are samples of a leave-one-out split. Events that truncation hides from the model also count.
    """
    items = np.asarray(store.sequence(store.item_feature))
    counts = np.bincount(
        items[ranges(train.history_begin, train.stop - train.history_begin)],
        minlength=store.cardinality(store.item_feature),
    )
    return retrieval_metrics(metric_names, _popularity_ranks(counts, items, test))


def _popularity_ranks(counts: np.ndarray, items: np.ndarray, test: SampleTable) -> np.ndarray:
    """float64 [S]: rank of each held-out item by ``counts`` [corpus] among the items unseen by the user."""
    if test.target is None:
        raise ValueError("the samples have no held-out items; they must be an evaluation split of leave_one_out")
    own_items = items[test.target]
    own = counts[own_items]
    ascending = np.sort(counts)
    higher = len(counts) - np.searchsorted(ascending, own, side="right")
    equal = len(counts) - np.searchsorted(ascending, own, side="left") - higher - 1  # excludes the target

    seen_lengths = test.target - test.history_begin
    seen_rows = np.repeat(np.arange(len(test)), seen_lengths)
    seen_items = items[ranges(test.history_begin, seen_lengths)].astype(np.int64)
    seen_rows, seen_items = np.divmod(np.unique(seen_rows * len(counts) + seen_items), len(counts))
    rivals = seen_items != own_items[seen_rows]
    seen_rows, seen_counts = seen_rows[rivals], counts[seen_items[rivals]]
    higher = higher - np.bincount(seen_rows[seen_counts > own[seen_rows]], minlength=len(test))
    equal = equal - np.bincount(seen_rows[seen_counts == own[seen_rows]], minlength=len(test))
    return np.asarray(1 + higher + equal / 2)
