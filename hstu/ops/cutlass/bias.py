"""The relative bias in kernels: its tables, its addition to the scores of a tile, and its gradients.

Threads hold elements as in :func:`hstu.ops.cutlass.common.store_rows`: element ``c + 2 r + 4 n`` of a tile belongs to
row ``row + 8 r`` and to column ``column + 8 n + c``. Several arguments pass through the kernels as tuples::

    bias  = (row_times, column_times, position_weight, time_weight, thresholds, buckets, totals, center, 1 / alpha)
    pairs = (bias, tables, (start, last, end), row, times, positions, sums)

``bias`` holds tensors of :class:`BiasArguments` and :class:`BiasSums`. ``totals``: position totals, time totals and
scale, or () in kernels that do not sum gradients. ``pairs`` describes the pairs of a block: first token, last row and
first candidate of the sequence; time and position of a thread's two rows; :func:`sums_of`.
"""

import functools
from dataclasses import dataclass
from typing import Any

import cutlass
import torch
from cutlass import Float32, Int32, Int64, Uint32, const_expr, cute
from cutlass.cutlass_dsl import select_
from torch import Tensor

from hstu.ops.cutlass.schedule import Rows
from hstu.ops.kernels import AttentionConfig, RelativeBias
from hstu.ops.layout import NUM_TIME_BUCKETS, JaggedLayout, bucket_thresholds, fixed_point_scale, time_buckets

WARPS = 8
"""Warps that compute, on both compute capabilities."""
ONE = 0x3FF00000
"""The upper 32 bits of 1.0 in float64."""
WINDOW_MARGIN = 16
"""Distances in a warp's tile beyond one per column: the tile has 16 rows."""
CELL_BITS = 2
"""Fraction bits of a time difference that, after its exponent, form its cell. A cell has at most one threshold."""
NUM_CELLS = 64 << CELL_BITS


# -- on the host -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BiasArguments:
    """Bias tensors that the kernels read."""

    query_times: Tensor  # float64 [T], exact up to 2^53 seconds
    token_times: Tensor  # float64 [T]
    position_weight: Tensor  # float32 [2 center + 1], by distance from -center
    time_weight: Tensor  # float32 [NUM_TIME_BUCKETS]
    center: int  # At least the largest distance in the batch

    @classmethod
    def of(cls, bias: RelativeBias, layout: JaggedLayout) -> "BiasArguments":
        """The arguments for a batch. Times are converted once per layout."""
        query, token = layout.query_times, layout.token_times
        assert query is not None and token is not None
        query_times, token_times = layout.cached(("cutlass", "times"), lambda: (query.double(), token.double()))
        position, farthest = bias.position_weight.float(), len(bias.position_weight) // 2
        center = max(farthest, int(layout.seqlens.max(initial=0)))
        if center > farthest:  # distances beyond the table use its outermost weights
            distances = torch.arange(-center, center + 1, device=position.device)
            position = position[distances.clamp_(-farthest, farthest).add_(farthest)]
        time = bias.time_weight.float().contiguous()
        return cls(query_times, token_times, position.contiguous(), time, center)


@dataclass(frozen=True)
class BiasSums:
    """Sums that the kernel of dQ adds to: Σ dL/dscore · N · scale, by distance and by time bucket."""

    position: Tensor  # int64 [2 center + 1]
    time: Tensor  # int64 [NUM_TIME_BUCKETS]
    scale: Tensor  # float32 [1]

    @classmethod
    def zeros(cls, arguments: BiasArguments, grad: Tensor, v: Tensor, layout: JaggedLayout) -> "BiasSums":
        """Zeroed sums, with the fixed-point scale for these output gradients and values."""
        size = len(arguments.position_weight)
        totals = torch.zeros(size + NUM_TIME_BUCKETS, dtype=torch.int64, device=grad.device)
        pairs = grad.shape[1] * int((layout.seqlens**2).sum())
        scale = fixed_point_scale(grad, v, pairs) if pairs else torch.ones(1, device=grad.device)
        return cls(totals[:size], totals[size:], scale)

    def gradients(self, bias: RelativeBias, config: AttentionConfig) -> RelativeBias:
        """Gradients of the weights, in their dtypes."""
        position, farthest = self.position, len(bias.position_weight) // 2
        beyond = len(position) // 2 - farthest
        if beyond > 0:
            outermost = position[: beyond + 1].sum(0, keepdim=True), position[-beyond - 1 :].sum(0, keepdim=True)
            position = torch.cat([outermost[0], position[beyond + 1 : -beyond - 1], outermost[1]])
        factor = 1 / (self.scale.double() * config.scaling_seqlen)
        return RelativeBias(
            (position * factor).to(bias.position_weight.dtype), (self.time * factor).to(bias.time_weight.dtype)
        )


@functools.cache
def cells(device: torch.device) -> tuple[Tensor, Tensor]:
    """Bits of the float64 threshold of each cell, int64 [NUM_CELLS], and the bucket below it, int32 [NUM_CELLS]."""
    index = torch.arange(NUM_CELLS)
    fraction = (index % (1 << CELL_BITS) + (1 << CELL_BITS)) / (1 << CELL_BITS)
    low = torch.ldexp(fraction.double(), (index >> CELL_BITS).double()).ceil().clamp(max=2.0**62).long()
    buckets = time_buckets(low).int()
    thresholds = torch.cat([bucket_thresholds(low.device).double(), torch.tensor([torch.inf], dtype=torch.float64)])
    return thresholds[buckets.long() + 1].view(torch.int64).to(device), buckets.to(device)


# -- in the kernels ----------------------------------------------------------------------------------------------


def storage(tile: int, sums: bool) -> Any:
    """Layout of the tables in shared memory. ``sums`` adds room for the gradients of the weights."""
    num_words, num_distances = (2 * WARPS * NUM_TIME_BUCKETS, WARPS * (tile + WINDOW_MARGIN)) if sums else (0, 0)

    @cute.struct
    class Tables:
        thresholds: cute.struct.MemRange[Int64, NUM_CELLS]
        time_totals: cute.struct.MemRange[Uint32, num_words]
        buckets: cute.struct.MemRange[Int32, NUM_CELLS]
        time_weight: cute.struct.MemRange[Float32, NUM_TIME_BUCKETS]
        windows: cute.struct.MemRange[Float32, num_distances]

    return Tables


@cute.jit
def load_tables(
    smem: Any, bias: tuple, tile: cutlass.Constexpr, sums: cutlass.Constexpr, threads: cutlass.Constexpr
) -> tuple:
    """Copy the tables to shared memory and zero the sums, in all threads. The caller synchronizes them.

    Returns pointers to thresholds, buckets, time weights and, with ``sums``, to this warp's totals and window.
    """
    thread = cute.arch.thread_idx()[0]
    tables: tuple = (smem.thresholds.data_ptr(), smem.buckets.data_ptr(), smem.time_weight.data_ptr())
    for i in cutlass.range_constexpr(-(-NUM_CELLS // threads)):
        cell = thread + i * threads
        if cell < NUM_CELLS:
            (tables[0] + cell).store((bias[4] + cell).load())
            (tables[1] + cell).store((bias[5] + cell).load())
    if thread < NUM_TIME_BUCKETS:
        (tables[2] + thread).store((bias[3] + thread).load())
    if const_expr(sums):
        totals, windows = smem.time_totals.data_ptr(), smem.windows.data_ptr()
        for i in cutlass.range_constexpr(-(-2 * WARPS * NUM_TIME_BUCKETS // threads)):
            index = thread + i * threads
            if index < 2 * WARPS * NUM_TIME_BUCKETS:
                (totals + index).store(Uint32(0))
        for i in cutlass.range_constexpr(-(-WARPS * (tile + WINDOW_MARGIN) // threads)):
            index = thread + i * threads
            if index < WARPS * (tile + WINDOW_MARGIN):
                (windows + index).store(Float32(0.0))
        warp = thread // 32 % WARPS
        tables = (*tables, totals + 2 * NUM_TIME_BUCKETS * warp, windows + (tile + WINDOW_MARGIN) * warp)
    return tables


def sums_of(shape: Any, bias: tuple) -> tuple:
    """Registers: buckets of a tile, four per int32; per row the bucket and sum of the current run. Last, the scale."""
    num_pairs = shape.block * shape.tile // (32 * WARPS)
    return (
        cute.make_rmem_tensor(num_pairs // 4, Int32),
        cute.make_rmem_tensor(2, Int32),
        cute.make_rmem_tensor(2, Float32),
        bias[6][2].load(),
    )


@cute.jit
def pairs_of(bias: tuple, tables: tuple, item: cute.Tensor, row: Int32, state: tuple) -> tuple:
    """``pairs`` of a block: see the module docstring. state: :func:`sums_of`, or ()."""
    start, last, end = item[0], item[2] - 1, item[3]
    rows = tuple(cutlass.min(row + 8 * r, last) for r in (0, 1))
    times = tuple((bias[0] + (start + each)).load() for each in rows)
    positions = tuple(cutlass.min(each, end) for each in rows)
    return bias, tables, (start, last, end), row, times, positions, state


@cute.jit
def add(
    scores: cute.Tensor, column: Int32, pairs: tuple, rows: cutlass.Constexpr, keeps_buckets: cutlass.Constexpr
) -> None:
    """Add bias / α to the products of a tile. ``keeps_buckets`` also stores the time buckets in ``pairs``."""
    bias, tables, (start, last, end), _, times, positions, registers = pairs
    _, column_times, position_weight, _, _, _, _, center, factor = bias
    if const_expr(keeps_buckets):
        registers[0].fill(0)
    for pair in cutlass.range_constexpr(cute.size(scores) // 2):
        n, c = pair // 2, pair % 2
        index = cutlass.min(column + 8 * n + c, last)
        time, position = (column_times + (start + index)).load(), cutlass.min(index, end)
        for r in cutlass.range_constexpr(2):
            e = c + 2 * r + 4 * n
            bucket = bucket_of(times[r], time, tables)
            distance = positions[r] - position
            if const_expr(rows is Rows.KEYS):
                distance = position - positions[r]
            added = (position_weight + (center + distance)).load() + (tables[2] + bucket).load()
            scores[e] = scores[e] + added * factor
            if const_expr(keeps_buckets):
                registers[0][e // 4] = registers[0][e // 4] | (bucket << (8 * (e % 4)))


@cute.jit
def bucket_of(time: cutlass.Float64, other: cutlass.Float64, tables: tuple) -> Int32:
    """Bucket of the difference of two times, as in :func:`hstu.ops.layout.time_buckets`; see :func:`cells`."""
    bits = (time - other).bitcast(Int64) & Int64(0x7FFFFFFFFFFFFFFF)
    cell = cutlass.max(Int32(bits >> 32) - ONE, Int32(0)) >> (20 - CELL_BITS)
    reached = Int32(select_(bits >= (tables[0] + cell).load(), Int32(1), Int32(0)))
    return (tables[1] + cell).load() + reached


# -- gradients of the weights ------------------------------------------------------------------------------------


@cute.jit
def begin_sums(pairs: tuple) -> None:
    """Reset the runs of equal buckets for a new block."""
    _, run_buckets, run_sums, _ = pairs[6]
    run_buckets.fill(0)
    run_sums.fill(0.0)


@cute.jit
def sum_tile(gradients: cute.Tensor, column: Int32, pairs: tuple) -> None:
    """Add a tile's score gradients, without the factor 1 / N, to the totals of their buckets and distances."""
    _sum_by_bucket(gradients, pairs)
    _sum_by_distance(gradients, column, pairs)


@cute.jit
def end_sums(pairs: tuple) -> None:
    """Add the last runs of a block to the totals."""
    for r in cutlass.range_constexpr(2):
        _end_run(r, pairs)


@cute.jit
def store_sums(bias: tuple, tables: tuple) -> None:
    """Add this warp's time-bucket totals to the device totals."""
    _, time_totals, _ = bias[6]
    lane = cute.arch.lane_idx()
    cute.arch.sync_warp()
    for i in cutlass.range_constexpr(NUM_TIME_BUCKETS // 32):
        bucket = lane + 32 * i
        words = tables[3] + 2 * bucket
        low, high = words.load().to(Int64) & Int64(0xFFFFFFFF), (words + 1).load().to(Int64)
        total = high << 32 | low
        if total != 0:
            _add_exactly(time_totals + bucket, total)


@cute.jit
def _sum_by_bucket(gradients: cute.Tensor, pairs: tuple) -> None:
    """Sum each run of equal buckets in a register: along a row, equal buckets are neighbors."""
    buckets, run_buckets, run_sums, _ = pairs[6]
    for e in cutlass.range_constexpr(cute.size(gradients)):
        r = e // 2 % 2
        bucket = (buckets[e // 4] >> (8 * (e % 4))) & 255
        if bucket != run_buckets[r]:
            _end_run(r, pairs)
            run_buckets[r] = bucket
            run_sums[r] = Float32(0.0)
        run_sums[r] = run_sums[r] + gradients[e]


@cute.jit
def _end_run(r: cutlass.Constexpr, pairs: tuple) -> None:
    _, tables, (_, last, _), row, _, _, (_, run_buckets, run_sums, scale) = pairs
    if row + 8 * r <= last:
        fixed = (run_sums[r] * scale).to(Int64)
        low, high = fixed.to(Uint32), (fixed >> 32).to(Uint32)
        # Two 32-bit atomics: a 64-bit atomic addition in shared memory compiles to a loop.
        words = tables[3] + 2 * run_buckets[r]
        before = cute.arch.atomic_add(words, low, sem="relaxed", scope="cta")
        carry = Uint32(select_(before + low < low, Uint32(1), Uint32(0)))
        cute.arch.red(words + 1, high + carry, op="add", dtype="u32", sem="relaxed", scope="cta")


@cute.jit
def _sum_by_distance(gradients: cute.Tensor, column: Int32, pairs: tuple) -> None:
    """Sum along a warp tile's diagonals in a fixed order. :func:`_sum_candidates` adds rows that share a position."""
    _, tables, (_, last, end), row, _, _, _ = pairs
    lane = cute.arch.lane_idx()
    width = cute.size(gradients) * 2
    window = tables[4]
    a, b = lane // 4, lane % 4
    before = tuple(row + 8 * r <= cutlass.min(last, end) for r in (0, 1))
    for k in cutlass.range_constexpr(width // 8 + 1):
        for c in cutlass.range_constexpr(2):
            total = Float32(0.0)
            if const_expr(k > 0):
                total = total + or_zero(before[0], gradients[c + 4 * (k - 1)])
            if const_expr(8 * k < width):
                total = total + or_zero(before[1], gradients[c + 2 + 4 * k])
            # Lanes 9 apart (two rows and two columns) have the same distance.
            total = total + or_zero((a < 6) & (b < 3), cute.arch.shuffle_sync_down(total, 9))
            total = total + or_zero((a < 4) & (b < 2), cute.arch.shuffle_sync_down(total, 18))
            cute.arch.sync_warp()
            if (a < 2) | (b == 0):
                total_of_distance = window + (a - 2 * b - 8 * (k - 1) - c + width - 1)
                total_of_distance.store(total_of_distance.load() + total)
    cute.arch.sync_warp()
    first_distance = (row - a) - (column - 2 * b) - (width - 1)
    for i in cutlass.range_constexpr(-(-(width + WINDOW_MARGIN) // 32)):
        index = lane + 32 * i
        if index < width + WINDOW_MARGIN:
            _add_to_distance((window + index).load(), first_distance + index, pairs)
            (window + index).store(Float32(0.0))
    if row - a + 15 > end:
        _sum_candidates(gradients, column, pairs)


@cute.jit
def _sum_candidates(gradients: cute.Tensor, column: Int32, pairs: tuple) -> None:
    """Add the gradients of candidate rows, all of which have the first candidate's position."""
    _, _, (_, last, end), row, _, _, _ = pairs
    lane = cute.arch.lane_idx()
    beyond = tuple((row + 8 * r > end) & (row + 8 * r <= last) for r in (0, 1))
    for pair in cutlass.range_constexpr(cute.size(gradients) // 2):
        n, c = pair // 2, pair % 2
        total = or_zero(beyond[0], gradients[c + 4 * n]) + or_zero(beyond[1], gradients[c + 2 + 4 * n])
        for step in cutlass.range_constexpr(3):
            total = total + cute.arch.shuffle_sync_bfly(total, 4 << step)
        if lane < 4:
            _add_to_distance(total, end - cutlass.min(column + 8 * n + c, end), pairs)


@cute.jit
def _add_to_distance(total: Float32, distance: Int32, pairs: tuple) -> None:
    bias, (_, _, _, scale) = pairs[0], pairs[6]
    if total != 0.0:
        _add_exactly(bias[6][0] + (bias[7] + distance), (total * scale).to(Int64))


def _add_exactly(where: cute.Pointer, number: Int64) -> None:
    """Add an integer atomically. Integer sums are independent of order, so every run gives the same bits."""
    cute.arch.red(where, number, op="add", dtype="u64", sem="relaxed", scope="gpu")


def or_zero(condition: Any, value: Float32) -> Float32:
    """``value`` where the condition holds, else 0."""
    return Float32(select_(condition, value, Float32(0.0)))
