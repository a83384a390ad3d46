"""A few combinations of many factors in which every pair of levels that may meet does meet."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Any, TypeVar

Row = TypeVar("Row", bound=tuple[Any, ...])
Pair = tuple[tuple[int, Any], tuple[int, Any]]
"""(factor, its level) twice."""


def pairs(row: tuple[Any, ...]) -> set[Pair]:
    """The pairs of levels that meet in a row."""
    return set(combinations(enumerate(row), 2))


def covering(rows: Sequence[Row]) -> list[Row]:
    """Some of ``rows``, which are all that may be, with every pair that is in any of them.

    Greedy: the row with most of the pairs that are missing, of equals the first, until none is missing.
    """
    of_row = {row: pairs(row) for row in rows}
    missing = set().union(*of_row.values())
    chosen = []
    while missing:
        best = max(rows, key=lambda row: len(of_row[row] & missing))
        chosen.append(best)
        missing -= of_row[best]
    return chosen
