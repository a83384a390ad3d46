"""What a kernel works on: blocks of rows, the tiles of columns each of them needs, and which of these need a mask.

Attention and its gradients are sums over pairs of a query and a key. A kernel keeps a block of *rows* in shared
memory and streams tiles of *columns* past it: to compute O and dQ rows are queries and columns are keys, to compute dK
and dV the other way round. Pure NumPy and plain arithmetic; the same function of a row's visible columns is traced
into the kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import numpy as np

from hstu.ops.attention import AttentionRule
from hstu.ops.layout import JaggedLayout, offsets_of, places

SEES_ALL = 2**30
"""A number of leading rows that exceeds every length."""
ITEM_FIELDS = 8
"""int32 numbers that describe a block of rows: see :class:`Schedule`."""


class Rows(StrEnum):
    """What the rows of a block are; the columns are the other."""

    QUERIES = "queries"
    KEYS = "keys"


@dataclass(frozen=True)
class Schedule:
    """The blocks of a batch, longest sequence first and within a sequence the block with most tiles first."""

    items: np.ndarray
    """int32 [blocks, 8]: first token of the sequence, first row of the block in it, length, first candidate, index of
    the first tile in ``tiles``, tiles that need a mask (they come first), tiles, 0."""
    tiles: np.ndarray
    """int32 [tiles]: first column of each tile, in its sequence."""


def leading_rows(layout: JaggedLayout, rule: AttentionRule) -> int:
    """Queries at the front of every sequence that see all of its context and history."""
    if not rule.is_causal:
        return SEES_ALL
    return layout.num_contextuals if rule.contextual_mask else 0


def visible_columns(
    row: Any,
    length: Any,
    end: Any,
    lead: Any,
    group: Any,
    rows: Rows,
    where: Callable[[Any, Any, Any], Any] = np.where,
    least: Callable[[Any, Any], Any] = np.minimum,
) -> tuple[Any, Any, Any]:
    """(a, b, c): the pair of ``row`` and ``column`` counts where ``column < a`` or ``b <= column < c``.

    row, length, end (first candidate), lead (see :func:`leading_rows`), group (tokens of a target group): integers of
    any kind that ``where`` and ``least`` take. Rows from ``length`` on get what nobody may use.
    """
    is_history = row < end
    group_start = end + (row - end) // group * group  # used for candidates alone, where nothing is negative
    if rows is Rows.QUERIES:
        history = where(row < lead, end, least(row + 1, end))
        return history, where(is_history, row + 1, group_start), row + 1
    return where(is_history, least(lead, length), 0), row, where(is_history, length, least(group_start + group, length))


def make_schedule(layout: JaggedLayout, rule: AttentionRule, rows: Rows, block: int, tile: int) -> Schedule:
    """Cut every sequence into blocks of ``block`` rows; list the tiles of ``tile`` columns that each needs."""
    lengths, candidates = layout.seqlens, layout.num_candidate_tokens_host
    starts = offsets_of(lengths)
    sequence, place = places(-(-lengths // block))
    length = lengths[sequence]
    end = length - candidates[sequence]
    first = place * block
    stop = np.minimum(first + block, length)
    of_block, place = places(-(-length // tile))
    left = place * tile
    bounds = np.stack([first, stop, length, end])[:, of_block]
    is_needed, is_full = _needed_and_full(bounds, left, left + tile, layout, rule, rows)
    of_block, left, is_full = of_block[is_needed], left[is_needed], is_full[is_needed]
    order = np.argsort(of_block * 2 + is_full, kind="stable")
    num_tiles = np.bincount(of_block, minlength=len(first))
    num_masked = np.bincount(of_block[~is_full], minlength=len(first))
    fields = (starts[sequence], first, length, end, offsets_of(num_tiles), num_masked, num_tiles, np.zeros_like(first))
    cost = np.bincount(sequence, weights=num_tiles, minlength=len(lengths))
    longest_first = np.lexsort((-num_tiles, sequence, -cost[sequence]))
    items = np.stack(fields, axis=1)[longest_first]
    return Schedule(np.ascontiguousarray(items, dtype=np.int32), left[order].astype(np.int32))


def _needed_and_full(
    bounds: np.ndarray, left: np.ndarray, right: np.ndarray, layout: JaggedLayout, rule: AttentionRule, rows: Rows
) -> tuple[np.ndarray, np.ndarray]:
    """Whether any, and whether every pair of a block's rows and columns [left, right) counts: bool, one a tile.

    bounds: [4, tiles]: first row, row behind the last, length and first candidate of each tile's block.
    """
    first, stop, length, end = bounds
    lead, group = leading_rows(layout, rule), max(layout.candidate_group_tokens, 1)

    def columns_of(row: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return visible_columns(row, length, end, lead, group, rows)

    # Both bounds of history and of a group only grow with the row, apart from the leading rows and from the last row
    # of history to the first candidate: so it is enough to look at the first and the last row of each such part.
    edges = [first, stop - 1]
    edges += [np.clip(row, first, stop - 1) for row in (np.full_like(first, lead) - 1, np.full_like(first, lead))]
    edges += [np.clip(row, first, stop - 1) for row in (end - 1, end)]
    a, b, c = (np.stack(of_edges) for of_edges in zip(*map(columns_of, edges), strict=True))
    some = c > b
    reach, group_first = a.max(0), np.where(some, b, SEES_ALL).min(0)
    is_needed = (left < reach) | (some.any(0) & (left < c.max(0)) & (right > group_first))
    is_full = (right <= a.min(0)) | ((left >= b.max(0)) & (right <= c.min(0)) & some.all(0))
    return is_needed, is_full
