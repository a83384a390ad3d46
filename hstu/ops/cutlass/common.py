"""What all kernels share: tensors from arguments, the work order of a CTA, masks, SiLU and the output."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import cutlass
from cutlass import Boolean, Float32, Int32, const_expr, cute
from cutlass.cutlass_dsl import select_

from hstu.ops.cutlass.schedule import ITEM_FIELDS, Rows, masked_tile_at, tile_at, tile_ranges, visible_columns

ROWS_OF_WARP = 16
"""Rows of a block whose sums one warp holds in registers."""


@dataclass(frozen=True)
class Shape:
    """Tile sizes and dtype that a kernel is compiled for."""

    dtype: type[cutlass.Numeric]  # cutlass.BFloat16 or cutlass.Float16
    head_dim: int  # 32, 64, 128 or 256
    rows: Rows  # A block of these rows stays in shared memory while tiles of columns are streamed
    tile: int  # Columns per tile
    stages: int  # Number of column tiles in shared memory
    block: int = 128  # Rows per block, the unit of work of a CTA


class PairwiseKernel:
    """A sum over pairs of a row and a column. Subclasses load and multiply tiles.

    Inputs are the ``num_resident`` tensors of which a block stays in shared memory, then the two streamed tensors.
    The DSL compiles functions that call an instance. They pass these tuples::

        batch = (items, sizes, factors)      see hstu.ops.cutlass.attention._examples
        masking = (alpha, column, bounds)    see masked_silu_and_slope
    """

    num_resident: int

    def __init__(self, shape: Shape, num_outputs: int = 1, through_silu: bool = False) -> None:
        """``through_silu``: the outputs are gradients of pre-activations: see :meth:`store`."""
        self.shape, self.num_outputs, self.through_silu = shape, num_outputs, through_silu
        self.outputs: Sequence[int] = range(num_outputs)  # outputs whose sums the threads hold

    def registers(self, scores_mma: Any, sums_mma: Any) -> tuple:
        """Registers for the output sums and for a tile. ``scores_mma``, ``sums_mma``: the two products."""
        scores, packed, sums = self._accumulators(scores_mma, sums_mma)
        if self.num_resident == 1:
            return (sums,), scores, packed
        products, gradients, weight_sums = self._accumulators(scores_mma, sums_mma)
        return (sums, weight_sums), scores, products, packed, gradients

    def _accumulators(self, scores_mma: Any, sums_mma: Any) -> tuple[cute.Tensor, cute.Tensor, cute.Tensor]:
        """Registers for the products of a tile, for these packed to 16 bits, and for the sums of a block."""
        shape = self.shape
        products = cute.make_rmem_tensor(scores_mma.partition_shape_C((shape.block, shape.tile)), Float32)
        sums = cute.make_rmem_tensor(sums_mma.partition_shape_C((shape.block, shape.head_dim)), Float32)
        return products, cute.make_rmem_tensor(cute.size(products) // 2, Int32), sums

    @cute.jit
    def store(self, sums: tuple, outs: tuple, index: Int32, start: tuple, factors: tuple) -> None:
        """Write the sums of the ``index``-th block. factors: α and 1 / N; start: see store_rows.

        outs: one tensor per output. With ``through_silu``, also one tensor of pre-activations per output, and one
        float32 [8 · blocks, d, H] per output for its sums over the 16 rows of each warp.
        """
        (alpha, inverse_n), (item, head, row, column) = factors, start
        scales = (inverse_n,) if const_expr(self.num_resident == 1) else (alpha * inverse_n, inverse_n)
        for i in cutlass.range_constexpr(len(self.outputs)):
            output = self.outputs[i]
            if const_expr(self.through_silu):
                multiply_slopes(sums[i], outs[self.num_outputs + output], start, self.shape.dtype)
            store_rows(sums[i], outs[output], start, scales[output], self.shape.dtype)
            if const_expr(self.through_silu):
                warp = index * (self.shape.block // ROWS_OF_WARP) + (row - item[1]) // ROWS_OF_WARP
                store_totals(sums[i], outs[2 * self.num_outputs + output], warp, head, column, scales[output])


@cute.jit
def heads_of(pointer: cute.Pointer, sizes: tuple, strides: tuple, head_dim: cutlass.Constexpr) -> cute.Tensor:
    """[T, H, d] at ``pointer`` as [T, d, H]. sizes: T, H, …; strides: of tokens and heads, multiples of 8 elements."""
    row_stride, head_stride = cute.assume(strides[0], divby=8), cute.assume(strides[1], divby=8)
    return cute.make_tensor(
        pointer, cute.make_layout((sizes[0], head_dim, sizes[1]), stride=(row_stride, 1, head_stride))
    )


@cute.jit
def work_index(turn: Int32) -> Int32:
    """Index of the pair of block and head that this CTA computes in its ``turn``-th turn.

    Work is sorted by descending length; every second turn counts CTAs down, so that each gets long and short blocks.
    """
    block, blocks = cute.arch.block_idx()[0], cute.arch.grid_dim()[0]
    return turn * blocks + Int32(select_(turn % 2 == 0, block, blocks - 1 - block))


@cute.jit
def row_bounds(row: Int32, item: cute.Tensor, lead: Int32, group: Int32, rows: cutlass.Constexpr) -> tuple:
    """:func:`hstu.ops.cutlass.schedule.visible_columns` of a row. item: see :func:`item_of`."""
    return visible_columns(row, item[2], item[3], lead, group, rows, _where)


@cute.jit
def ranges_of(item: cute.Tensor, sizes: tuple, shape: cutlass.Constexpr) -> tuple:
    """The tiles that a block needs: :func:`hstu.ops.cutlass.schedule.tile_ranges`. sizes: from ``batch``."""
    return tile_ranges(item[1], item[2], item[3], sizes[3], sizes[4], shape.rows, shape.block, shape.tile, _where)


@cute.jit
def first_column(index: Int32, ranges: tuple, shape: cutlass.Constexpr) -> Int32:
    """First column of a tile of a block: :func:`hstu.ops.cutlass.schedule.tile_at`."""
    return tile_at(index, ranges, _where) * shape.tile


@cute.jit
def first_masked_column(index: Int32, ranges: tuple, shape: cutlass.Constexpr) -> Int32:
    """First column of a masked tile of a block: :func:`hstu.ops.cutlass.schedule.masked_tile_at`."""
    return masked_tile_at(index, ranges, _where) * shape.tile


def _where(condition: Any, yes: Any, no: Any) -> Int32:
    return Int32(select_(condition, Int32(yes), Int32(no)))


def or_zero(condition: Any, value: Float32) -> Float32:
    """``value`` where the condition holds, else 0."""
    return Float32(select_(condition, value, Float32(0.0)))


@cute.jit
def is_visible(column: Int32, bounds: tuple) -> Boolean:
    """Whether the row with these ``bounds`` sees the column."""
    a, b, c = bounds
    return (column < a) | ((b <= column) & (column < c))


@cute.jit
def silu_and_slope(score: Float32, alpha: Float32) -> tuple:
    """SiLU and SiLU' of 2 h = α score. SiLU(2 h) = h + h tanh h needs one special-function instruction per score.

    The hardware's tanh has a relative error of at most 2^-11, less than the rounding of a weight to bfloat16.
    """
    half = score * (alpha * 0.5)
    tanh = cute.math.tanh(half, fastmath=True)
    weight, rising = half * tanh + half, tanh * 0.5 + 0.5
    return weight, rising + weight * (1.0 - rising)


@cute.jit
def masked_silu_and_slope(score: Float32, e: cutlass.Constexpr, masking: tuple, masked: cutlass.Constexpr) -> tuple:
    """SiLU and SiLU' of α times the ``e``-th product; if ``masked``, 0 where the row does not see the column.

    masking: α, column of the first accumulator, and bounds (:func:`row_bounds`) of the rows ``row`` and ``row + 8``.
    Accumulators are as in :func:`store_rows`.
    """
    alpha, column, bounds = masking
    weight, slope = silu_and_slope(score, alpha)
    if const_expr(masked):
        counts = is_visible(column + e // 4 * 8 + e % 2, bounds[e // 2 % 2])
        weight, slope = or_zero(counts, weight), or_zero(counts, slope)
    return weight, slope


@cute.jit
def silu(scores: cute.Tensor, masking: tuple, masked: cutlass.Constexpr) -> None:
    """Replace each product by SiLU(α product), as :func:`masked_silu_and_slope` does."""
    for e in cutlass.range_constexpr(cute.size(scores)):
        scores[e], _ = masked_silu_and_slope(scores[e], e, masking, masked)


@cute.jit
def silu_derivative(
    scores: cute.Tensor, weights: cute.Tensor, masking: tuple, masked: cutlass.Constexpr,
    with_weights: cutlass.Constexpr, dtype: cutlass.Constexpr,
) -> None:  # fmt: skip
    """Replace each product by SiLU'(α product), as :func:`silu` does; ``with_weights``: pack SiLU into ``weights``."""
    values = cute.make_rmem_tensor(cute.size(scores), Float32)
    for e in cutlass.range_constexpr(cute.size(scores)):
        values[e], scores[e] = masked_silu_and_slope(scores[e], e, masking, masked)
    if const_expr(with_weights):
        pack(values, weights, dtype)


@cute.jit
def pack(values: cute.Tensor, packed: cute.Tensor, dtype: cutlass.Constexpr) -> None:
    """Round float32 values to ``dtype``, two per int32 of ``packed``: half the registers from one tile to the next."""
    rounded = cute.make_rmem_tensor(cute.size(values), dtype)
    rounded.store(cute.make_tensor(values.iterator, rounded.layout).load().to(dtype))
    pairs = cute.recast_tensor(rounded, Int32)
    for i in cutlass.range_constexpr(cute.size(packed)):
        packed[i] = pairs[i]


def left_operand(packed: cute.Tensor, dtype: Any) -> cute.Tensor:
    """Values packed by :func:`pack`, as the left operand of a product."""
    pairs = cute.recast_tensor(packed, dtype)
    return cute.make_tensor(pairs.iterator, cute.make_layout(((2, 2, 2), 1, cute.size(pairs) // 8)))


@cute.jit
def _pair(low: Float32, high: Float32, dtype: cutlass.Constexpr) -> Int32:
    pair = cute.make_rmem_tensor(2, dtype)
    pair[0], pair[1] = low.to(dtype), high.to(dtype)
    return cute.recast_tensor(pair, Int32)[0]


@cute.jit
def item_of(items: cute.Pointer, index: Int32) -> cute.Tensor:
    """The fields of a block: int32 [4], see :func:`hstu.ops.cutlass.schedule.list_blocks`."""
    return cute.make_tensor(items + index * ITEM_FIELDS, cute.make_layout(ITEM_FIELDS))


@cute.jit
def store_rows(sums: cute.Tensor, out: cute.Tensor, start: tuple, scale: Float32, dtype: cutlass.Constexpr) -> None:
    """Write ``scale · sums`` as ``dtype`` to those rows of the block that exist in the sequence.

    sums: float32 accumulators of m64nXk16. Element ``c + 2 r + 4 n`` belongs to row ``row + 8 r`` of the
    sequence and to column ``column + 8 n + c``. out: [T, d, H]. start: ``item``, ``head``, ``row``, ``column``.
    The four lanes of a row exchange columns, so that each writes eight neighbors at once instead of two.
    """
    item, head, row, column = start
    for r in cutlass.range_constexpr(2):
        stored = _pairs_at(out, item[0] + row + 8 * r, head, column, sums)
        for group in cutlass.range_constexpr(cute.size(stored, mode=[1])):
            pairs = cute.make_rmem_tensor(cute.size(stored, mode=[0]), Int32)
            for n in cutlass.range_constexpr(cute.size(pairs)):
                e = 2 * r + 4 * (cute.size(pairs) * group + n)
                pairs[n] = _pair(sums[e] * scale, sums[e + 1] * scale, dtype)
            _transpose_quad(pairs)
            if row + 8 * r < item[2]:
                cute.autovec_copy(pairs, stored[None, group])


@cute.jit
def _pairs_at(tensor: cute.Tensor, token: Int32, head: Int32, column: Int32, sums: cute.Tensor) -> cute.Tensor:
    """A thread's pairs of numbers in a row of ``tensor``: [pairs per group, groups]. Arguments as in store_rows."""
    first = cute.assume(column * 4, divby=8)
    pairs = cute.recast_ptr(cute.domain_offset((token, first, head), tensor).iterator, dtype=Int32)
    return cute.make_tensor(pairs, cute.make_layout((4, cute.size(sums) // 16), stride=(1, 16)))


@cute.jit
def _transpose_quad(pairs: cute.Tensor) -> None:
    """Transpose four elements of four lanes: element j of lane i becomes element i of lane j."""
    lane = cute.arch.lane_idx()
    for stage in cutlass.range_constexpr(2):
        other = 1 << stage
        is_upper = (lane & other) != 0
        for i in cutlass.range_constexpr(2):
            low = 2 * i if stage == 0 else i
            kept_low, kept_high = pairs[low], pairs[low + other]
            given = Int32(select_(is_upper, kept_low, kept_high))
            taken = cute.arch.shuffle_sync_bfly(given, offset=other)
            pairs[low] = Int32(select_(is_upper, taken, kept_low))
            pairs[low + other] = Int32(select_(is_upper, kept_high, taken))


@cute.jit
def multiply_slopes(sums: cute.Tensor, before: cute.Tensor, start: tuple, dtype: cutlass.Constexpr) -> None:
    """Multiply the sums by SiLU' of ``before`` [T, d, H]; 0 for rows beyond the end. Arguments as in store_rows."""
    item, head, row, column = start
    for r in cutlass.range_constexpr(2):
        exists = row + 8 * r < item[2]
        token = item[0] + cutlass.min(row + 8 * r, item[2] - 1)
        stored = _pairs_at(before, token, head, column, sums)
        for group in cutlass.range_constexpr(cute.size(stored, mode=[1])):
            pairs = cute.make_rmem_tensor(cute.size(stored, mode=[0]), Int32)
            cute.autovec_copy(stored[None, group], pairs)
            _transpose_quad(pairs)
            values = cute.recast_tensor(pairs, dtype)
            for i in cutlass.range_constexpr(cute.size(values)):
                e = (cute.size(pairs) * group + i // 2) * 4 + 2 * r + i % 2
                _, slope = silu_and_slope(values[i].to(Float32), Float32(1.0))
                sums[e] = or_zero(exists, sums[e] * slope)


@cute.jit
def store_totals(sums: cute.Tensor, out: cute.Tensor, warp: Int32, head: Int32, column: Int32, scale: Float32) -> None:
    """Write ``scale`` times the sums over the rows of a warp. out: float32 [warps, d, H]; sums as in store_rows.

    Eight lanes hold the rows of a column. In each of three exchanges, a lane gives half of its columns to another lane
    and adds that lane's rows to the columns that it keeps.
    """
    count = cute.size(sums) // 2
    totals = cute.make_rmem_tensor(count, Float32)
    for i in cutlass.range_constexpr(count):
        e = i // 2 * 4 + i % 2
        totals[i] = sums[e] + sums[e + 2]
    lane, first = cute.arch.lane_idx(), Int32(0)
    for stage in cutlass.range_constexpr(3):
        other, half = 16 >> stage, count >> (stage + 1)
        keeps_upper = (lane & other) != 0
        for i in cutlass.range_constexpr(half):
            kept = Float32(select_(keeps_upper, totals[half + i], totals[i]))
            given = Float32(select_(keeps_upper, totals[i], totals[half + i]))
            totals[i] = kept + cute.arch.shuffle_sync_bfly(given, offset=other)
        first += Int32(select_(keeps_upper, Int32(half), Int32(0)))
    for i in cutlass.range_constexpr(count // 8):
        at = first + i
        target = cute.domain_offset((warp, column + at // 2 * 8 + at % 2, head), out)
        target.iterator.store(totals[i] * scale)
