"""Arithmetic of jagged NumPy arrays: n runs of different ``lengths`` that lie one after another, without padding."""

import numpy as np
from numpy.typing import ArrayLike

from hstu.data.store.parts import Values


def run_starts(lengths: np.ndarray) -> np.ndarray:
    """Index of the first element of each run, int64 [n]."""
    return np.cumsum(lengths, dtype=np.int64) - lengths


def run_offsets(lengths: ArrayLike) -> np.ndarray:
    """int64 [n + 1]: run i has the elements [offsets[i], offsets[i + 1])."""
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])


def run_indices(lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(index of its run, index within the run) of each element; both int64 [Σ lengths]."""
    run = np.repeat(np.arange(len(lengths)), lengths)
    return run, np.arange(len(run)) - np.repeat(run_starts(lengths), lengths)


def ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """The integers of [starts[i], starts[i] + lengths[i]) for each i, one range after another; int64 [Σ lengths]."""
    return np.arange(lengths.sum(), dtype=np.int64) + np.repeat(starts - run_starts(lengths), lengths)


def first_from(times: Values, begin: np.ndarray, end: np.ndarray, at: np.ndarray) -> np.ndarray:
    """First index in [begin[i], end[i]) with times >= at[i], else end[i]; int64 [n]. ``times`` ascend in each range."""
    low, high = begin.astype(np.int64), end.astype(np.int64)
    while (open_ := low < high).any():
        middle = (low + high) // 2
        is_before = open_ & (times[np.minimum(middle, len(times) - 1)] < at)
        low, high = np.where(is_before, middle + 1, low), np.where(open_ & ~is_before, middle, high)
    return low


def sequence_tokens(
    item_lengths: np.ndarray, num_contextuals: int, tokens_per_item: int, has_context: np.ndarray | None = None
) -> np.ndarray:
    """Tokens per sequence, int64 [B]: one per contextual feature, and ``tokens_per_item`` (see NetworkArgs) per item.
    item_lengths: integers [B], candidates included. has_context: bool [B], the sequences with context tokens; None
    means the sequences with items."""
    items = np.asarray(item_lengths, dtype=np.int64)
    return items * tokens_per_item + num_contextuals * (items > 0 if has_context is None else has_context)
