"""The work of a kernel: blocks of rows, the tiles of columns that each block needs, and which tiles need a mask.

Attention and its gradients are sums over pairs of a query and a key. A kernel keeps a block of *rows* in shared memory
and streams tiles of *columns* through it. For O and dQ, rows are queries and columns are keys. For dK and dV, rows are
keys and columns are queries. The schedule is computed with NumPy on the host. :func:`visible_columns` is also compiled
into the kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import numpy as np

from hstu.data.jagged import run_indices, run_starts
from hstu.ops.types import AttentionConfig, JaggedLayout

SEES_ALL = 2**30
"""A number of rows that exceeds the length of every sequence."""
ITEM_FIELDS = 8
"""int32 numbers that describe a block of rows: see :class:`Schedule`."""


class Rows(StrEnum):
    """Which side of attention the rows of a block are; the columns are the other side."""

    QUERIES = "queries"
    KEYS = "keys"


@dataclass(frozen=True)
class Schedule:
    """The blocks of a batch: sequences by falling number of tiles, and within a sequence blocks likewise."""

    items: np.ndarray
    """int32 [blocks, 8]. The fields of a block are:

    0. token of the batch at which the sequence starts
    1. first row of the block, counted in the sequence
    2. length of the sequence
    3. first candidate, counted in the sequence
    4. index of the block's first tile in ``tiles``
    5. number of tiles that need a mask; these come first
    6. number of all its tiles
    7. unused
    """
    tiles: np.ndarray
    """int32 [tiles]: first column of each tile, counted in its sequence."""


def leading_rows(layout: JaggedLayout, config: AttentionConfig) -> int:
    """Number of queries at the start of every sequence that see its whole context and history."""
    if not config.is_causal:
        return SEES_ALL
    return layout.num_contextuals if config.contextual_mask else 0


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
    """(a, b, c): the mask keeps the pair of ``row`` and ``column`` if ``column < a`` or ``b <= column < c``.

    Args:
        row: Row of the sequence. The result is meaningless from ``length`` on.
        length: Tokens of the sequence.
        end: First candidate.
        lead: See :func:`leading_rows`.
        group: Tokens of a target group.
        rows: Whether rows are queries or keys.
        where, least: The functions ``np.where`` and ``np.minimum`` for the type of the integers above.
    """
    is_history = row < end
    group_start = end + (row - end) // group * group  # used only for candidates, for which row ≥ end
    if rows is Rows.QUERIES:
        history = where(row < lead, end, least(row + 1, end))
        return history, where(is_history, row + 1, group_start), row + 1
    return where(is_history, least(lead, length), 0), row, where(is_history, length, least(group_start + group, length))


def make_schedule(layout: JaggedLayout, config: AttentionConfig, rows: Rows, block: int, tile: int) -> Schedule:
    """Cut every sequence into blocks of ``block`` rows, and list the tiles of ``tile`` columns that each needs."""
    lengths, candidates = layout.seqlens, layout.num_candidate_tokens_host
    starts = run_starts(lengths)
    sequence, place = run_indices(-(-lengths // block))
    length = lengths[sequence]
    end = length - candidates[sequence]
    first = place * block
    stop = np.minimum(first + block, length)
    of_block, place = run_indices(-(-length // tile))
    left = place * tile
    bounds = np.stack([first, stop, length, end])[:, of_block]
    is_needed, is_full = _needed_and_full(bounds, left, left + tile, layout, config, rows)
    of_block, left, is_full = of_block[is_needed], left[is_needed], is_full[is_needed]
    order = np.argsort(of_block * 2 + is_full, kind="stable")
    num_tiles = np.bincount(of_block, minlength=len(first))
    num_masked = np.bincount(of_block[~is_full], minlength=len(first))
    fields = (starts[sequence], first, length, end, run_starts(num_tiles), num_masked, num_tiles, np.zeros_like(first))
    cost = np.bincount(sequence, weights=num_tiles, minlength=len(lengths))
    longest_first = np.lexsort((-num_tiles, sequence, -cost[sequence]))
    items = np.stack(fields, axis=1)[longest_first]
    return Schedule(np.ascontiguousarray(items, dtype=np.int32), left[order].astype(np.int32))


def _needed_and_full(
    bounds: np.ndarray, left: np.ndarray, right: np.ndarray, layout: JaggedLayout, config: AttentionConfig, rows: Rows
) -> tuple[np.ndarray, np.ndarray]:
    """Whether the mask keeps any pair of a tile, and whether it keeps all pairs: two bool [tiles].

    bounds: [4, tiles], the first row, the row after the last, the length and the first candidate of each tile's block.
    left, right: [tiles], the first column of each tile and the column after its last.
    """
    first, stop, length, end = bounds
    lead, group = leading_rows(layout, config), max(layout.candidate_group_tokens, 1)

    def columns_of(row: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return visible_columns(row, length, end, lead, group, rows)

    # The bounds grow monotonically with the row within three ranges: the leading rows, the rest of the history, and the
    # candidates. The first and the last row of each range in the block therefore give the extreme bounds.
    edges = [first, stop - 1]
    edges += [np.clip(row, first, stop - 1) for row in (np.full_like(first, lead) - 1, np.full_like(first, lead))]
    edges += [np.clip(row, first, stop - 1) for row in (end - 1, end)]
    a, b, c = (np.stack(of_edges) for of_edges in zip(*map(columns_of, edges), strict=True))
    some = c > b
    reach, group_first = a.max(0), np.where(some, b, SEES_ALL).min(0)
    is_needed = (left < reach) | (some.any(0) & (left < c.max(0)) & (right > group_first))
    is_full = (right <= a.min(0)) | ((left >= b.max(0)) & (right <= c.min(0)) & some.all(0))
    return is_needed, is_full
