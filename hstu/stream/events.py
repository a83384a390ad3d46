"""What the events of a part say without a model: how they differ from the part before, and how popularity scores."""

from functools import partial
from typing import Any

import numpy as np

from hstu.base.errors import ConfigError
from hstu.data.sampling.samples import SampleTable
from hstu.data.store.sequence_store import SequenceStore
from hstu.train.metrics import entropy, half_widths, retrieval_metrics

METRICS = ("HR@10", "NDCG@10")


def counts_of(store: SequenceStore) -> dict[str, int]:
    """Numbers of events, users and items, and the time of the newest event, seconds since 1970. Raises ConfigError for
    a store without times."""
    if store.timestamp_feature is None:
        raise ConfigError("a stream needs times: give --time COLUMN")
    newest = store.sequence(store.timestamp_feature)[store.offsets()[1:] - 1].max()
    items = store.cardinality(store.item_feature)
    return {"events": store.num_events, "users": store.num_users, "items": items, "newest": int(newest)}


def changes_of(store: SequenceStore) -> dict[str, Any]:
    """How the last part of a store differs from the one before: see the page. Means are of the action, if there is one.

    "gone": users and items without an event in the last part. "drift": of the items, in bits; not of a single part.
    """
    segments, found = store.segments(), dict[str, Any]()
    is_new = np.ones(store.num_events, dtype=bool) if segments is None else segments == store.num_segments - 1
    if store.action_feature is not None:
        found["mean action"] = float(store.sequence(store.action_feature)[is_new].mean())
    if segments is None:
        return found
    both = [np.flatnonzero(is_new), np.flatnonzero(segments == store.num_segments - 2)]
    items, size = store.sequence(store.item_feature), store.cardinality(store.item_feature)
    counts = {"users": [np.diff(np.searchsorted(events, store.offsets())) for events in both]}
    counts["items"] = [np.bincount(items[events], minlength=size) for events in both]
    found["gone"] = {name: int(((now == 0) & (before > 0)).sum()) for name, (now, before) in counts.items()}
    now, before = (count / max(1, count.sum()) for count in counts["items"])
    found["drift"] = float((entropy((now + before) / 2) - (entropy(now) + entropy(before)) / 2).sum() / np.log(2))
    return found


def popularity(store: SequenceStore, samples: SampleTable) -> dict[str, dict[str, float]]:
    """METRICS of ranking all items that a user has not had by their number of events in the last part but one of the
    store, with "half_widths". ``samples``: those of retrieval by which a model is evaluated."""
    items, segments = store.sequence(store.item_feature), store.segments()
    assert segments is not None and samples.target is not None
    counts = np.bincount(items[segments == store.num_segments - 2], minlength=store.cardinality(store.item_feature))
    ascending = np.sort(counts)
    ranks = np.full(len(samples), np.inf)
    for place, (begin, target) in enumerate(zip(samples.history_begin, samples.target, strict=True)):
        seen, own = np.unique(items[begin:target]), counts[items[target]]
        if items[target] not in seen:
            first, after = (np.searchsorted(ascending, own, side=side) for side in ("left", "right"))
            better = len(ascending) - after - (counts[seen] > own).sum()
            equal = after - first - 1 - (counts[seen] == own).sum()
            ranks[place] = 1 + better + equal / 2
    metrics = partial(retrieval_metrics, METRICS)
    return {"metrics": metrics(ranks), "half_widths": half_widths(lambda rows: metrics(ranks[rows]), samples.user)}
