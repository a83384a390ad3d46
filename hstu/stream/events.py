"""What the events of a part say without a model: their counts, and how popularity scores."""

from functools import partial

import numpy as np

from hstu.base.errors import ConfigError
from hstu.data.sampling.samples import SampleTable
from hstu.data.store.sequence_store import SequenceStore
from hstu.train.metrics import half_widths, retrieval_metrics

METRICS = ("HR@10", "NDCG@10")


def counts_of(store: SequenceStore) -> dict[str, int]:
    """Numbers of events, users and items, and the time of the newest event, seconds since 1970. Raises ConfigError for
    a store without times."""
    if store.timestamp_feature is None:
        raise ConfigError("a stream needs times: give --time COLUMN")
    newest = store.sequence(store.timestamp_feature)[store.offsets()[1:] - 1].max()
    items = store.cardinality(store.item_feature)
    return {"events": store.num_events, "users": store.num_users, "items": items, "newest": int(newest)}


def mean_action(store: SequenceStore) -> float:
    """Mean of the actions of the last part of a store, which has actions."""
    actions, segments = store.sequence(str(store.action_feature)), store.segments()
    of_part = actions if segments is None else actions[np.asarray(segments) == store.num_segments - 1]
    return float(np.mean(of_part))


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
    return {
        "metrics": metrics(ranks),
        "half_widths": half_widths(lambda rows: metrics(ranks[rows]), samples.user),
    }
