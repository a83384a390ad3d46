"""Methods without gradients: popularity, item-kNN and EASE. Each learns from the events in one pass.

A ``half_life`` lets an item of a history weigh half as much after that many later ones; None: all weigh the same, as in
the published forms.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import numpy as np

from scripts.quality.leave_one_out import Histories, Score


def popularity(train: Histories, seed: int) -> Iterator[tuple[int, Score]]:
    """Items by their number of training events."""
    counts = np.bincount(train.items, minlength=train.num_items)
    yield 0, lambda histories: np.tile(counts, (len(histories), 1))


def item_knn(
    train: Histories, seed: int, neighbours: int, shrinkage: float, half_life: float | None
) -> Iterator[tuple[int, Score]]:
    """The sum over the history of the similarities to an item, if they are among the item's largest.

    similarity(i, j) = users of both / (√(users of i · users of j) + shrinkage), the shrunk cosine.
    """
    yield 0, _weighted(_nearest_of(train, neighbours, shrinkage), half_life)


def ease(train: Histories, seed: int, l2: float, half_life: float | None) -> Iterator[tuple[int, Score]]:
    """EASE (arXiv 1905.03375): the linear model of a history by itself with the smallest loss and a zero diagonal."""
    yield 0, _weighted(_ease_weights_of(train, l2), half_life)


@lru_cache(maxsize=1)  # the settings of a grid differ in half_life first
def _nearest_of(train: Histories, neighbours: int, shrinkage: float) -> np.ndarray:
    return nearest(similarities(train.co_occurrences, shrinkage), neighbours)


@lru_cache(maxsize=1)
def _ease_weights_of(train: Histories, l2: float) -> np.ndarray:
    return ease_weights(train.co_occurrences, l2)


def similarities(counts: np.ndarray, shrinkage: float) -> np.ndarray:
    """float64 [items, items]: shrunk cosines with a zero diagonal."""
    users = np.sqrt(np.diag(counts))
    divisor = np.outer(users, users) + shrinkage
    result = np.divide(counts, divisor, out=np.zeros_like(counts), where=divisor > 0)
    np.fill_diagonal(result, 0)
    return result


def nearest(similarity: np.ndarray, neighbours: int) -> np.ndarray:
    """Keep the largest ``neighbours`` values of each column, and those equal to the smallest of them; the others: 0."""
    place = max(len(similarity) - neighbours, 0)
    return np.where(similarity >= np.partition(similarity, place, axis=0)[place], similarity, 0)


def ease_weights(counts: np.ndarray, l2: float) -> np.ndarray:
    """The matrix B of least ‖X − X B‖² + l2 ‖B‖² with a zero diagonal, where counts = XᵀX; float64 [items, items]."""
    inverse = np.linalg.inv(counts + l2 * np.eye(len(counts)))
    weights = -inverse / np.diag(inverse)
    np.fill_diagonal(weights, 0)
    return weights


def _weighted(weights: np.ndarray, half_life: float | None) -> Score:
    """history · weights. Row j of ``weights`` is what an item j of the history adds to the score of each item."""
    narrow = weights.astype(np.float32)

    def score(histories: Histories) -> np.ndarray:
        later = histories.places()[1]
        return histories.matrix(1.0 if half_life is None else 0.5 ** (later / half_life)) @ narrow

    return score
