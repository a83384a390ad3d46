"""Hard negatives: what a user was shown and did not take, from the requests of a store."""

from __future__ import annotations

import numpy as np

from hstu.data.batches.jagged import ranges, run_indices
from hstu.data.store.sequence_store import SequenceStore


def shown_not_taken(store: SequenceStore, events: np.ndarray, stops: np.ndarray, num: int) -> np.ndarray:
    """Items of the user's last request before each event that the user did not take: codes, int64 [n, num].

    They are the first ones in the order in which they were shown; -1 fills the rest. An item is taken if the user has
    an event of it before the next request. A user's newest request has no next one yet, and gives none: whether an item
    of it is taken may be what is held out.

    Args:
        events: int64 [n], places in the store's events.
        stops: int64 [n], the end of the events of each event's sample. Later ones are not read.
    """
    found = np.full((len(events), num), -1, dtype=np.int64)
    requests, offsets = store.requests(), store.offsets()
    users = np.searchsorted(offsets, events, side="right") - 1
    rows = np.searchsorted(requests.history_ends, events, side="right") - 1
    following = np.minimum(rows + 1, len(requests) - 1)
    is_answered = (
        (rows >= 0)
        & (following > rows)
        & (requests.users[rows] == users)
        & (requests.users[following] == users)
        & (requests.history_ends[following] <= stops)
    )
    answered, which = np.unique(rows[is_answered], return_inverse=True)
    if not len(answered):
        return found
    item, size = store.item_feature, store.cardinality(store.item_feature)
    shown_by, _ = run_indices(requests.sizes[answered])
    shown = store.candidates(item)[ranges(requests.offsets[answered], requests.sizes[answered])].astype(np.int64)
    begins = requests.history_ends[answered]
    counts = requests.history_ends[answered + 1] - begins
    taken_by, _ = run_indices(counts)
    taken = store.sequence(item)[ranges(begins, counts)].astype(np.int64)
    is_left = ~np.isin(shown_by * size + shown, taken_by * size + taken)
    left_by, left = shown_by[is_left], shown[is_left]
    places = run_indices(np.bincount(left_by, minlength=len(answered)))[1]
    fits = places < num
    of_requests = np.full((len(answered), num), -1, dtype=np.int64)
    of_requests[left_by[fits], places[fits]] = left[fits]
    found[is_answered] = of_requests[which]
    return found
