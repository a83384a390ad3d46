"""Ids and their codes. The code of an id is its place in an ascending array; an unknown id has the code -1."""

from __future__ import annotations

import numpy as np


def codes_of(ids: np.ndarray, known: np.ndarray) -> np.ndarray:
    """The code of each of ``ids``, int64 [n]: its index in ``known``, or -1.

    Args:
        ids: integers or str objects, in any order.
        known: of the same kind, ascending and distinct.
    """
    if not len(known):
        return np.full(len(ids), -1, dtype=np.int64)
    places = np.minimum(np.searchsorted(known, ids), len(known) - 1)
    return np.where(known[places] == ids, places, -1).astype(np.int64, copy=False)
