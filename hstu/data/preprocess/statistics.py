"""What is counted of a store: statistics for meta.json, repeated events and equal times for the report."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from hstu.data.store.sequence_store import SequenceStore

_CHUNK = 1 << 22


def statistics_of(lengths: np.ndarray, num_items: int, published: Mapping[str, float]) -> dict[str, Any]:
    """Counts, lengths per user and sparsity in [0, 1]; ``published`` are the figures of the complete data."""
    events = int(lengths.sum())
    return {
        "users": len(lengths),
        "items": num_items,
        "events": events,
        "length_max": int(lengths.max()),
        "length_min": int(lengths.min()),
        "length_mean": events / len(lengths),
        "length_median": float(np.median(lengths)),
        "sparsity": 1 - events / (len(lengths) * num_items),
        "published": dict(published),
    }


def differences(statistics: Mapping[str, Any]) -> dict[str, tuple[float, float]]:
    """Statistic → (found, published) where they differ by more than the rounding to an integer."""
    return {
        name: (statistics[name], published)
        for name, published in statistics["published"].items()
        if abs(statistics[name] - published) >= 1
    }


def repeated_events(store: SequenceStore) -> int:
    """How many events equal an earlier one of their user in time, item and action; 0 without times."""
    if store.timestamp_feature is None:
        return 0
    features = [store.timestamp_feature, store.item_feature]
    features += [store.action_feature] if store.action_feature else []
    return sum(_repeated_in(store, features, begin, end) for begin, end in _whole_users(store))


def equal_times(store: SequenceStore) -> tuple[int, int]:
    """(events at the same second as their user's event before, users whose last event is one of them)."""
    assert store.timestamp_feature is not None
    events = users = 0
    for begin, end in _whole_users(store):
        is_of_same_user = np.diff(_users_of(store, begin, end)) == 0
        tied = is_of_same_user & (np.diff(store.sequence(store.timestamp_feature)[begin:end]) == 0)
        is_last = np.append(~is_of_same_user[1:], True)
        events, users = events + int(tied.sum()), users + int(tied[is_last[: len(tied)]].sum())
    return events, users


def event_counts(store: SequenceStore, feature: str) -> np.ndarray:
    """Events of each value of an item, action or event feature, int64 [cardinality]."""
    counts = np.zeros(store.cardinality(feature), dtype=np.int64)
    for begin, end in chunks(store.num_events):
        np.add.at(counts, store.sequence(feature)[begin:end], 1)
    return counts


def chunks(events: int) -> Iterable[tuple[int, int]]:
    """Ranges that together are all events, so that memory is bounded."""
    return ((begin, min(begin + _CHUNK, events)) for begin in range(0, events, _CHUNK))


def _whole_users(store: SequenceStore) -> Iterable[tuple[int, int]]:
    """Ranges of about _CHUNK events that do not divide a user."""
    offsets = store.offsets()
    begin = 0
    while begin < store.num_events:
        end = int(offsets[min(int(np.searchsorted(offsets, begin + _CHUNK)), store.num_users)])
        yield begin, end
        begin = end


def _repeated_in(store: SequenceStore, features: Sequence[str], begin: int, end: int) -> int:
    keys = [_users_of(store, begin, end), *(store.sequence(name)[begin:end] for name in features)]
    tied = (np.diff(keys[0]) == 0) & (np.diff(keys[1]) == 0)  # few events, so that the rest is fast
    among = np.append(tied, False) | np.append(False, tied)
    return int(pd.DataFrame({index: key[among] for index, key in enumerate(keys)}).duplicated().sum())


def _users_of(store: SequenceStore, begin: int, end: int) -> np.ndarray:
    """int64 [end - begin]: the user of each of these events, counted from 1."""
    return np.searchsorted(store.offsets(), np.arange(begin, end), side="right")
