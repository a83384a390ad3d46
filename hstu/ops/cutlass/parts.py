"""Pieces that all kernels share: how arguments become tensors, which blocks a CTA works on, masks, SiLU."""

from dataclasses import dataclass
from typing import Any

import cutlass
from cutlass import Boolean, Float32, Int32, Int64, const_expr, cute
from cutlass.cutlass_dsl import select_

from hstu.ops.cutlass.schedule import ITEM_FIELDS, Rows, visible_columns


@dataclass(frozen=True)
class Shape:
    """What a kernel is compiled for."""

    dtype: type[cutlass.Numeric]
    """cutlass.BFloat16 or cutlass.Float16."""
    head_dim: int
    """32, 64, 128 or 256."""
    rows: Rows
    """What stays in shared memory while the other is streamed."""
    tile: int
    """Columns that are streamed at a time."""
    stages: int
    """Tiles of columns in shared memory."""
    block: int = 128
    """Rows that a CTA works on at a time."""


@cute.jit
def heads_of(
    pointer: cute.Pointer,
    tokens: Int32,
    heads: Int32,
    row_stride: Int64,
    head_stride: Int64,
    head_dim: cutlass.Constexpr,
) -> cute.Tensor:
    """[T, d, H] of what lies at ``pointer`` as [T, H, d] with these strides, multiples of 8 elements."""
    row_stride, head_stride = cute.assume(row_stride, divby=8), cute.assume(head_stride, divby=8)
    return cute.make_tensor(pointer, cute.make_layout((tokens, head_dim, heads), stride=(row_stride, 1, head_stride)))


@cute.jit
def nth_work(turn: Int32) -> Int32:
    """The CTA's next piece of work, on its ``turn``: there and back through the CTAs, as the longest come first."""
    block, blocks = cute.arch.block_idx()[0], cute.arch.grid_dim()[0]
    return turn * blocks + Int32(select_(turn % 2 == 0, block, blocks - 1 - block))


@cute.jit
def row_bounds(row: Int32, item: cute.Tensor, lead: Int32, group: Int32, rows: cutlass.Constexpr) -> tuple:
    """See :func:`hstu.ops.cutlass.schedule.visible_columns`. item: one row of the schedule."""

    def where(condition: Any, yes: Any, no: Any) -> Int32:
        return Int32(select_(condition, Int32(yes), Int32(no)))

    def least(a: Any, b: Any) -> Int32:
        return where(a < b, a, b)

    return visible_columns(row, item[2], item[3], lead, group, rows, where, least)


@cute.jit
def is_visible(column: Int32, bounds: tuple) -> Boolean:
    """Whether the pair counts; ``bounds`` are those of the row."""
    a, b, c = bounds
    return (column < a) | ((b <= column) & (column < c))


@cute.jit
def half_and_tanh(score: Float32, alpha: Float32) -> tuple:
    """h = α score / 2 and tanh h, with which SiLU(2 h) = h + h tanh h: one instruction of the special unit a score.

    The hardware's tanh is off by 2^-11 of its value at most, less than the rounding of a weight to bfloat16.
    """
    half = score * (alpha * 0.5)
    return half, cute.math.tanh(half, fastmath=True)


@cute.jit
def weigh(scores: cute.Tensor, alpha: Float32, column: Int32, bounds: list, masked: cutlass.Constexpr) -> None:
    """Products → SiLU(α product), and where ``masked`` 0 for pairs that do not count.

    scores: accumulators as in :func:`store_rows`; bounds: of the rows ``row`` and ``row + 8``.
    """
    for e in cutlass.range_constexpr(cute.size(scores)):
        half, tanh = half_and_tanh(scores[e], alpha)
        weight = half * tanh + half
        if const_expr(masked):
            weight = _or_zero(is_visible(column + e // 4 * 8 + e % 2, bounds[e // 2 % 2]), weight)
        scores[e] = weight


@cute.jit
def slopes(
    scores: cute.Tensor,
    weights: cute.Tensor,
    alpha: Float32,
    column: Int32,
    bounds: list,
    masked: cutlass.Constexpr,
    with_weights: cutlass.Constexpr,
    dtype: cutlass.Constexpr,
) -> None:
    """Products → SiLU'(α product), else as :func:`weigh`; ``with_weights``: packs SiLU(α product) into ``weights``."""
    values = cute.make_rmem_tensor(cute.size(scores), Float32)
    for e in cutlass.range_constexpr(cute.size(scores)):
        half, tanh = half_and_tanh(scores[e], alpha)
        weight, rising = half * tanh + half, tanh * 0.5 + 0.5
        slope = rising + weight * (1.0 - rising)
        if const_expr(masked):
            counts = is_visible(column + e // 4 * 8 + e % 2, bounds[e // 2 % 2])
            weight, slope = _or_zero(counts, weight), _or_zero(counts, slope)
        values[e], scores[e] = weight, slope
    if const_expr(with_weights):
        pack(values, weights, dtype)


def _or_zero(condition: Boolean, value: Float32) -> Float32:
    return Float32(select_(condition, value, Float32(0.0)))


@cute.jit
def pack(values: cute.Tensor, packed: cute.Tensor, dtype: cutlass.Constexpr) -> None:
    """float32 values, rounded to ``dtype``, two to an int32 of ``packed``.

    As 16-bit numbers they would each take a register of 32 bits from one tile to the next.
    """
    rounded = cute.make_rmem_tensor(cute.size(values), dtype)
    rounded.store(cute.make_tensor(values.iterator, rounded.layout).load().to(dtype))
    pairs = cute.recast_tensor(rounded, Int32)
    for i in cutlass.range_constexpr(cute.size(packed)):
        packed[i] = pairs[i]


@cute.jit
def _pair(low: Float32, high: Float32, dtype: cutlass.Constexpr) -> Int32:
    pair = cute.make_rmem_tensor(2, dtype)
    pair[0], pair[1] = low.to(dtype), high.to(dtype)
    return cute.recast_tensor(pair, Int32)[0]


@cute.jit
def item_of(items: cute.Pointer, index: Int32) -> cute.Tensor:
    """The fields of a block: int32 [8]."""
    return cute.make_tensor(items + index * ITEM_FIELDS, cute.make_layout(ITEM_FIELDS))


@cute.jit
def store_rows(
    sums: cute.Tensor,
    out: cute.Tensor,
    item: cute.Tensor,
    head: Int32,
    row: Int32,
    column: Int32,
    scale: Float32,
    dtype: cutlass.Constexpr,
) -> None:
    """Write ``scale · sums`` as ``dtype`` to those rows of the block that the sequence has.

    sums: float32 accumulators of m64nXk16 or m16n8k16: element ``c + 2 r + 4 n`` belongs to row ``row + 8 r`` of the
    sequence and to column ``column + 8 n + c``. out: [T, d, H].
    """
    for r in cutlass.range_constexpr(2):
        if row + 8 * r < item[2]:
            where = cute.domain_offset((item[0] + row + 8 * r, column, head), out)
            pairs = cute.recast_ptr(where.iterator, dtype=Int32)
            for n in cutlass.range_constexpr(cute.size(sums) // 4):
                e = 2 * r + 4 * n
                (pairs + 4 * n).store(_pair(sums[e] * scale, sums[e + 1] * scale, dtype))
