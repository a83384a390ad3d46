"""The work of a kernel: blocks of rows, the column tiles that each block needs, and which tiles need a mask.

Attention and its gradients are sums over pairs of a query and a key. A kernel keeps a block of *rows* in shared memory
and streams tiles of *columns*. For O and dQ, rows are queries and columns are keys; for dK and dV the reverse.
The host lists the blocks. Functions that take ``where`` are also compiled into the kernels. Needs no CUTLASS.
"""

from collections.abc import Callable
from enum import StrEnum
from typing import Any

import numpy as np

from hstu.data.batches.jagged import run_indices, run_starts
from hstu.ops.kernels import AttentionConfig
from hstu.ops.layout import JaggedLayout

SEES_ALL = 2**30
"""Exceeds the length of every sequence."""
ITEM_FIELDS = 4
"""int32 numbers per block of rows: see :func:`list_blocks`."""
SPARE_CTAS = 5
"""How many numbers of CTAs :func:`num_ctas` compares."""
Where = Callable[[Any, Any, Any], Any]
"""``np.where`` for the type of the other arguments."""


class Rows(StrEnum):
    """Side of attention that the rows of a block are. The columns are the other side."""

    QUERIES = "queries"
    KEYS = "keys"


def leading_rows(layout: JaggedLayout, config: AttentionConfig) -> int:
    """Number of queries at the start of each sequence that see its whole context and history."""
    if not config.is_causal:
        return SEES_ALL
    return layout.num_contextuals if config.contextual_mask else 0


def list_blocks(layout: JaggedLayout, config: AttentionConfig, rows: Rows, block: int) -> np.ndarray:
    """Cut every sequence into blocks of ``block`` rows: int32 [blocks, 4], long sequences first.

    Within a sequence, blocks that need the most tiles come first: leading queries, then late queries; early keys.
    Fields: first token of the sequence in the batch; first row, length and first candidate, counted in the sequence.
    """
    lengths = layout.seqlens
    ends = lengths - layout.num_candidate_tokens_host
    sequences = np.stack([run_starts(lengths), np.zeros_like(lengths), lengths, ends], axis=1).astype(np.int32)
    num_blocks = -(-lengths[layout.longest_first] // block)
    items = np.repeat(sequences[layout.longest_first], num_blocks, axis=0)
    sequence, index = run_indices(num_blocks)
    if rows is Rows.QUERIES:
        num_leading = -(-leading_rows(layout, config) // block)
        last_to_first = num_blocks[sequence] - 1 + num_leading - index
        index = np.where(index < num_leading, index, last_to_first)
    items[:, 1] = index * block
    return items


def visible_columns(
    row: Any, length: Any, end: Any, lead: Any, group: Any, rows: Rows, where: Where = np.where
) -> tuple[Any, Any, Any]:
    """(a, b, c): the mask keeps the pair of ``row`` and ``column`` if ``column < a`` or ``b <= column < c``.

    The result is meaningless for rows from ``length`` on, the tokens of the sequence. end: first candidate;
    lead: :func:`leading_rows`; group: tokens per target group.
    """
    is_history = row < end
    group_start = _group_start(row, end, group)  # used only for candidates, for which row ≥ end
    if rows is Rows.QUERIES:
        history = where(row < lead, end, _least(row + 1, end, where))
        return history, where(is_history, row + 1, group_start), row + 1
    group_stop = _least(group_start + group, length, where)
    return where(is_history, _least(lead, length, where), 0), row, where(is_history, length, group_stop)


def tile_ranges(
    first: Any,
    length: Any,
    end: Any,
    lead: Any,
    group: Any,
    rows: Rows,
    block: int,
    tile: int,
    where: Where = np.where,
) -> tuple[Any, Any, Any, Any, Any, Any]:
    """Column tiles that the block of rows from ``first`` needs: six ascending tile indices.

    The mask keeps all pairs of tiles in [0, 1st) and [4th, 5th), some pairs in [1st, 2nd), [3rd, 4th) and [5th, 6th),
    and no other pairs. For the other arguments see :func:`visible_columns`.
    """
    stop = _least(first + block, length, where)
    start_of_oldest_group = _group_start(_greatest(first, end, where), end, group)
    start_of_newest_group = _group_start(stop - 1, end, group)
    # All rows see columns [0, all_reach), and some rows see [0, reach). After these,
    # some rows see columns [own, own_stop), and all rows see [own_full, own_full_stop).
    if rows is Rows.QUERIES:
        all_reach = where(stop <= lead, end, _least(_greatest(first, lead, where) + 1, end, where))
        reach = where(first < lead, end, _least(stop, end, where))
        own, own_full = start_of_oldest_group, start_of_newest_group
        own_full_stop, own_stop = where(first < end, 0, first + 1), where(stop <= end, 0, stop)
    else:
        context = _least(lead, length, where)
        all_reach, reach = where(stop <= end, context, 0), where(first < end, context, 0)
        own, own_full = first, stop - 1
        own_full_stop = where(stop <= end, length, _least(start_of_oldest_group + group, length, where))
        own_stop = where(first < end, length, _least(start_of_newest_group + group, length, where))
    second = (reach + tile - 1) // tile
    third = _greatest(own // tile, second, where)
    sixth = _greatest((own_stop + tile - 1) // tile, third, where)
    fourth = _least(_greatest((own_full + tile - 1) // tile, third, where), sixth, where)
    fifth = _least(_greatest(own_full_stop // tile, fourth, where), sixth, where)
    return all_reach // tile, second, third, fourth, fifth, sixth


def count_tiles(ranges: tuple) -> tuple[Any, Any]:
    """Number of a block's tiles that need a mask, and of all its tiles. ranges: :func:`tile_ranges`."""
    first, second, third, fourth, fifth, sixth = ranges
    return second - first + fourth - third + sixth - fifth, second + sixth - third


def tile_at(index: Any, ranges: tuple, where: Where = np.where) -> Any:
    """The ``index``-th tile of a block; tiles that need a mask come first. ranges: :func:`tile_ranges`."""
    first, _, _, fourth, _, _ = ranges
    num_masked, _ = count_tiles(ranges)
    full = index - num_masked
    return where(
        index < num_masked, masked_tile_at(index, ranges, where), full + where(full < first, 0, fourth - first)
    )


def masked_tile_at(index: Any, ranges: tuple, where: Where = np.where) -> Any:
    """The ``index``-th tile that needs a mask. ranges: :func:`tile_ranges`."""
    first, second, third, fourth, fifth, _ = ranges
    tile = first + index
    tile = tile + where(tile < second, 0, third - second)
    return tile + where(tile < fourth, 0, fifth - fourth)


def work_of(
    blocks: np.ndarray, layout: JaggedLayout, config: AttentionConfig, rows: Rows, block: int, tile: int
) -> np.ndarray:
    """Work per block of :func:`list_blocks`, in tiles. Starting and ending a block takes as long as one tile."""
    _, first, lengths, ends = blocks.T
    lead, group = leading_rows(layout, config), max(layout.candidate_group_tokens, 1)
    return 1 + count_tiles(tile_ranges(first, lengths, ends, lead, group, rows, block, tile))[1]


def most_work(work: np.ndarray, ctas: int) -> Any:
    """Work of the slowest CTA, with turns as in ``work_index``. work: of pairs of block and head, in kernel order."""
    turns = np.pad(work, (0, -len(work) % ctas)).reshape(-1, ctas)
    return (turns[::2].sum(0) + turns[1::2].sum(0)[::-1]).max()


def num_ctas(work: np.ndarray, processors: int) -> int:
    """The number of CTAs, at most one per processor, whose slowest CTA has the least work.

    If the pairs of a sequence take nearly two turns, the same CTAs get the long blocks of every sequence. With 65
    blocks of four heads and 132 CTAs, the slowest has 1.5 times the mean work; with 130 CTAs all have the same work.
    """
    most = min(processors, len(work))
    return min(range(most, max(most - SPARE_CTAS, 0), -1), key=lambda ctas: most_work(work, ctas))


def _group_start(row: Any, end: Any, group: Any) -> Any:
    return end + (row - end) // group * group


def _least(a: Any, b: Any, where: Where) -> Any:
    return where(a < b, a, b)


def _greatest(a: Any, b: Any, where: Where) -> Any:
    return where(a < b, b, a)
