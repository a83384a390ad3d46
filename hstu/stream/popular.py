"""What the most popular items of the last part would have scored: the simplest method that follows time."""

from __future__ import annotations

import numpy as np

from hstu.data.store.sequence_store import SequenceStore
from hstu.train.metrics import retrieval_metrics

METRICS = ("HR@10", "NDCG@10")
_MOST_TARGETS = 20_000
"""Targets that are ranked, evenly chosen: enough for an interval of ± .007."""


def popularity(store: SequenceStore, since: int) -> dict[str, float]:
    """METRICS of ranking all items that a user has not had by their number of events in the last part but one of the
    store. The targets are the events after ``since`` that have one before them, as for a model."""
    items, times = store.sequence(store.item_feature), store.sequence(str(store.timestamp_feature))
    offsets, segments = store.offsets(), store.segments()
    assert segments is not None
    counts = np.bincount(items[segments == store.num_segments - 2], minlength=store.cardinality(store.item_feature))
    ascending = np.sort(counts)
    targets = np.flatnonzero(times > since)
    begins = offsets[np.searchsorted(offsets, targets, side="right") - 1]
    targets, begins = targets[targets > begins], begins[targets > begins]
    chosen = np.linspace(0, len(targets) - 1, min(len(targets), _MOST_TARGETS)).astype(np.int64)
    ranks = np.full(len(chosen), np.inf)
    for place, (begin, target) in enumerate(zip(begins[chosen], targets[chosen], strict=True)):
        seen, own = np.unique(items[begin:target]), counts[items[target]]
        if items[target] not in seen:
            better = len(ascending) - np.searchsorted(ascending, own, side="right") - (counts[seen] > own).sum()
            equal = (ascending == own).sum() - 1 - (counts[seen] == own).sum()
            ranks[place] = 1 + better + equal / 2
    return retrieval_metrics(METRICS, ranks)
