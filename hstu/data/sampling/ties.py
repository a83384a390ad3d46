"""The order of a user's events of one second, which training may draw anew in each epoch."""

from __future__ import annotations

import numpy as np

from hstu.base.hashing import random_bits
from hstu.data.batches.jagged import ranges, run_starts

_STREAM = 0x5449_4553
"""Separates these draws from others of the same seed."""


def shuffled_ties(
    times: np.ndarray, bounds: tuple[np.ndarray, np.ndarray], first: np.ndarray, lengths: np.ndarray, *key: int
) -> np.ndarray:
    """int64 [Σ lengths]: the events at places [first, first + length) of histories whose equal times are shuffled.

    The draw depends only on the event and on ``key``: seed and epoch. All windows of a history see one order: where
    a window cuts a run of equal times, each event of the run is on one side of the cut, on any ranks and workers.

    times: int64 [E], ascending within a history. bounds: (begin, stop) of the histories; events outside of them, such
    as held-out ones, are not moved. first, lengths: at least one event of the history is at ``first`` or later. All
    int64 [b].
    """
    begin, stop = bounds
    ends = first + lengths
    # Runs of equal times that the places cut are sorted as a whole.
    whole = _first_at(times, begin, first, times[first])
    sizes = _first_at(times, ends, stop, times[np.maximum(ends - 1, first)] + 1) - whole
    events, starts = ranges(whole, sizes), run_starts(sizes)
    begins_run = np.diff(times[events], prepend=0) != 0
    begins_run[starts] = True
    runs, drawn, half = np.cumsum(begins_run, dtype=np.uint64), random_bits(_STREAM, *key, events), np.uint64(32)
    order = np.argsort(runs << half | drawn >> half, kind="stable")  # 20 times as fast as a lexsort
    return events[order[ranges(starts + first - whole, lengths)]]


def _first_at(times: np.ndarray, low: np.ndarray, high: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """int64 [b]: the first index in [low, high) with a time of at least ``wanted``, or ``high``: a binary search."""
    while (low < high).any():
        middle = (low + high) // 2
        is_earlier = (low < high) & (times[np.minimum(middle, len(times) - 1)] < wanted)
        low, high = np.where(is_earlier, middle + 1, low), np.where(is_earlier, high, middle)
    return high
