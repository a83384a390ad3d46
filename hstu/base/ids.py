"""Ids and their codes. A code is the id's index in an ascending array; unknown ids have the code -1."""

import numpy as np


def codes_of(ids: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Index of each id in ``known`` (ascending, distinct), else -1; int64 [n]. Both hold integers or str objects."""
    if not len(known):
        return np.full(len(ids), -1, dtype=np.int64)
    indices = np.minimum(np.searchsorted(known, ids), len(known) - 1)
    return np.where(known[indices] == ids, indices, -1).astype(np.int64, copy=False)
