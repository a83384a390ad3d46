"""What the most popular items of the last part would have scored: the simplest method that follows time."""

from __future__ import annotations

import numpy as np

from hstu.data.sampling.samples import SampleTable
from hstu.data.store.sequence_store import SequenceStore
from hstu.train.metrics import retrieval_metrics

METRICS = ("HR@10", "NDCG@10")


def popularity(store: SequenceStore, samples: SampleTable) -> dict[str, float]:
    """METRICS of ranking all items that a user has not had by their number of events in the last part but one of the
    store. ``samples``: those of retrieval by which a model is evaluated."""
    items, segments = store.sequence(store.item_feature), store.segments()
    assert segments is not None and samples.target is not None
    counts = np.bincount(items[segments == store.num_segments - 2], minlength=store.cardinality(store.item_feature))
    ascending = np.sort(counts)
    ranks = np.full(len(samples), np.inf)
    for place, (begin, target) in enumerate(zip(samples.history_begin, samples.target, strict=True)):
        seen, own = np.unique(items[begin:target]), counts[items[target]]
        if items[target] not in seen:
            better = len(ascending) - np.searchsorted(ascending, own, side="right") - (counts[seen] > own).sum()
            equal = (ascending == own).sum() - 1 - (counts[seen] == own).sum()
            ranks[place] = 1 + better + equal / 2
    return retrieval_metrics(METRICS, ranks)
