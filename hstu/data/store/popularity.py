"""How many events the items of a store have: in all, and by context, which is what contextual features say of users."""

import numpy as np

from hstu.data.batches.jagged import ranges
from hstu.data.store.sequence_store import USER_FEATURE, SequenceStore

_EVENTS_AT_ONCE = 1 << 24
_LEAST_USERS = 5
"""What is popular among fewer users would tell what one of them has done."""


def events_of_items(store: SequenceStore, users: np.ndarray) -> np.ndarray:
    """Events of users (rows, int64) with each item of the data, int64 [items]."""
    offsets, items, count = np.asarray(store.offsets()), store.sequence(store.item_feature), np.zeros(1, dtype=np.int64)
    lengths = np.diff(offsets)[users]
    for some in np.array_split(np.arange(len(users)), 1 + lengths.sum() // _EVENTS_AT_ONCE):
        events = items[ranges(offsets[users[some]], lengths[some])]
        count = count + np.bincount(events, minlength=store.cardinality(store.item_feature))
    return count


def events_by_context(
    store: SequenceStore, features: list[str], most_values: int, most_items: int
) -> tuple[dict[str, int], np.ndarray, np.ndarray]:
    """(context, such as "country=DE" → number of its n rows; codes of its items with the most events, int64 [Σ n]; how
    many events these are). ``features``: contextual ones, but for ids of users; of each the ``most_values`` with the
    most events are counted, if they have 5 users."""
    counts, items, numbers = dict[str, int](), [np.zeros(0, dtype=np.int64)], [np.zeros(0, dtype=np.int64)]
    lengths = np.diff(store.offsets())
    for name in features:
        if name != USER_FEATURE:
            codes = np.asarray(store.context(name))
            largest = np.argsort(-np.bincount(codes, weights=lengths), kind="stable")[:most_values]
            largest = largest[np.bincount(codes)[largest] >= _LEAST_USERS]
            values = store.raw_ids(name)[largest] if store.feature(name).has_vocab else largest
            for code, value in zip(largest, values, strict=True):
                events = events_of_items(store, np.flatnonzero(codes == code))
                best = np.argpartition(-events, min(most_items, len(events)) - 1)[:most_items]
                items.append(np.sort(best[events[best] > 0]))
                numbers.append(events[items[-1]])
                counts[f"{name}={value}"] = len(items[-1])
    return counts, np.concatenate(items), np.concatenate(numbers)
