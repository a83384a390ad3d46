"""Negatives of retrieval: the in-batch pool over ranks, and draws from it.

Nothing here asks the device for a size: shapes depend on shapes only, what is invalid is masked.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

GatherPool = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""(rows [S, E], ids [S]) of this rank → the same of all data-parallel ranks, one after another. Differentiable in
the rows; padding has id -1. Collective."""

DRAW_BITS = 31
"""Raw draws are random integers in [0, 2^31)."""


def own_pool(rows: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """The gather of a single process."""
    return rows, ids


def sorted_distinct(ids: Tensor) -> tuple[Tensor, Tensor]:
    """Where each distinct id that is not negative first occurs, by ascending id.

    ids: integer [S]. Returns (positions int64 [S], count int64 scalar); only the first ``count`` positions mean
    anything. A gathered pool of any number of ranks gives the ids that the union of their batches would give.
    """
    ordered, order = torch.sort(ids, stable=True)
    is_new = _starts_run(ordered)
    places = torch.where(is_new, is_new.cumsum(0) - 1, len(ids))  # repetitions go to a place beyond the end
    positions = torch.zeros(len(ids) + 1, dtype=torch.int64, device=ids.device).scatter_(0, places, order)
    return positions[:-1], is_new.sum()


def first_occurrences(ids: Tensor) -> Tensor:
    """bool [S]: True where an id (integer [S]) that is not negative stands for the first time."""
    ordered, order = torch.sort(ids, stable=True)
    return torch.empty_like(ids, dtype=torch.bool).scatter_(0, order, _starts_run(ordered))


def _starts_run(ordered: Tensor) -> Tensor:
    """bool [S]: the first of each run of equal ids; none of negative ids."""
    starts = ordered >= 0
    starts[1:] &= ordered[1:] != ordered[:-1]
    return starts


def choose_from_pool(draws: Tensor, ids: Tensor) -> Tensor:
    """Rows of the pool that raw draws mean: int64 [M, R] in [0, S).

    draws: integer [M, R] in [0, 2^31). ids: [S], the pool's. A draw picks the ⌊draw · n / 2^31⌋-th of the n distinct
    ids in ascending order, hence the same item however the pool is spread over ranks.
    """
    positions, count = sorted_distinct(ids)
    return positions[(draws.long() * count) >> DRAW_BITS]
