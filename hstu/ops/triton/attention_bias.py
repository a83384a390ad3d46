"""Gradients of the relative bias: Σ over heads and pairs of dL/dscore, by distance and by time bucket.

A program walks down one diagonal of tiles, on which a pair's distance depends on its place in the tile alone: it sums
over tiles, sequences and heads in registers and scatters once. Times are scattered a tile, but only where the bucket
changes along a row. Sums are in fixed point (int64), so that the order of atomics does not matter: the same bits in
every run.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hstu.ops.triton.attention_tiles import distance_index, scores, time_buckets, visible
from hstu.ops.triton.primitives import dot, load_rows, sigmoid, silu_derivative


@triton.jit
def _scatter_times(totals, per_pair, rows, keys, span, bias, scale, BLOCK: tl.constexpr):
    """Add a tile to the totals of its buckets, a run of equal buckets at a time: the difference of its row's sums."""
    query_times, token_times, thresholds, _, _, _ = bias
    query_time = tl.load(query_times + rows, mask=rows < span[0], other=0)[:, None]
    token_time = tl.load(token_times + keys, mask=keys < span[0], other=0)[None, :]
    next_time = tl.load(token_times + keys + 1, mask=keys + 1 < span[0], other=0)[None, :]
    bucket = time_buckets(query_time, token_time, thresholds)
    next_bucket = time_buckets(query_time, next_time, thresholds)
    sums = (tl.cumsum(per_pair, axis=1) * scale).to(tl.int64)
    is_last = (keys - keys // BLOCK * BLOCK == BLOCK - 1)[None, :] & (rows >= 0)[:, None]
    changes = bucket != next_bucket
    tl.atomic_add(totals + bucket, sums, mask=is_last | changes, sem="relaxed")
    tl.atomic_add(totals + next_bucket, -sums, mask=changes & ~is_last, sem="relaxed")


@triton.jit(do_not_specialize=["num_sequences", "first_diagonal"])
def attention_backward_bias(
    q,
    k,
    v,
    grad,
    position_totals,
    time_totals,
    scale,
    offsets,
    candidates,
    query_times,
    token_times,
    thresholds,
    position_weight,
    time_weight,
    stride_qt,
    stride_qh,
    stride_qd,
    stride_kt,
    stride_kh,
    stride_kd,
    stride_vt,
    stride_vh,
    stride_vd,
    stride_gt,
    stride_gh,
    stride_gd,
    stride_slot,
    num_slots,
    num_sequences,
    num_heads,
    first_diagonal,
    alpha,
    farthest,
    num_contextuals,
    group_tokens,
    WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CAUSAL: tl.constexpr,
    CONTEXTUAL: tl.constexpr,
    CANDIDATES: tl.constexpr,
    FAST: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid: (diagonals of tiles, shares of the sequences). Tile of rows − tile of keys = diagonal.

    position_totals: int64 [2 P - 1], time_totals: int64 [num_slots, 128], zeros: sums times ``scale``, a float32 [1].
    """
    diagonal = first_diagonal + tl.program_id(0)
    place = tl.arange(0, BLOCK)
    factor = tl.load(scale)
    slot = (tl.program_id(0) + tl.program_id(1) * tl.num_programs(0)) % num_slots
    slot_totals = time_totals + slot * stride_slot
    along_diagonal = tl.zeros((BLOCK, BLOCK), tl.float32)
    for sequence in tl.range(tl.program_id(1), num_sequences, tl.num_programs(1)):
        start = tl.load(offsets + sequence)
        length = (tl.load(offsets + sequence + 1) - start).to(tl.int32)
        end = length
        if CANDIDATES:
            end = length - tl.load(candidates + sequence).to(tl.int32)
        span = (length, end, num_contextuals, group_tokens)
        bias = (query_times + start, token_times + start, thresholds, position_weight, time_weight, farthest)
        tiles = tl.cdiv(length, BLOCK)
        last_tile = tl.minimum(tiles, tiles + diagonal)
        if CAUSAL:  # noqa: SIM102  # decided by the compiler, the other by the program
            if diagonal < 0:  # only contextual rows look ahead
                last_tile = tl.minimum(last_tile, tl.cdiv(num_contextuals, BLOCK))
        for tile in tl.range(tl.maximum(diagonal, 0), last_tile):
            rows = tile * BLOCK + place
            keys = (tile - diagonal) * BLOCK + place
            i, j = rows[:, None], keys[None, :]
            sees = visible(i, j, span, CAUSAL, CONTEXTUAL, CANDIDATES) & (i < length)
            per_pair = tl.zeros((BLOCK, BLOCK), tl.float32)
            for head in tl.range(0, num_heads):
                q_base = q + start * stride_qt + head * stride_qh
                k_base = k + start * stride_kt + head * stride_kh
                v_base = v + start * stride_vt + head * stride_vh
                grad_base = grad + start * stride_gt + head * stride_gh
                q_tile = load_rows(q_base, rows, length, stride_qt, stride_qd, WIDTH, BLOCK_D, True)
                k_tile = load_rows(k_base, keys, length, stride_kt, stride_kd, WIDTH, BLOCK_D, True)
                s = scores(q_tile, k_tile.T, i, j, alpha, span, bias, True, PRECISION, UPCAST)
                slope = silu_derivative(s, sigmoid(s, FAST))
                grad_tile = load_rows(grad_base, rows, length, stride_gt, stride_gd, WIDTH, BLOCK_D, True)
                v_tile = load_rows(v_base, keys, length, stride_vt, stride_vd, WIDTH, BLOCK_D, True)
                zero = tl.zeros((BLOCK, BLOCK), tl.float32)
                per_pair += dot(grad_tile, v_tile.T, zero, PRECISION, UPCAST) * slope
            per_pair = tl.where(sees, per_pair, 0.0)
            _scatter_times(slot_totals, per_pair, rows, keys, span, bias, factor, BLOCK)
            if CANDIDATES:
                # All candidates share a position, so that the distance is not i − j: scattered at once.
                shared = (i > end) | (j > end)
                if (tile + 1) * BLOCK > end:
                    index = distance_index(i, j, end, farthest)
                    fixed = (per_pair * factor).to(tl.int64)
                    tl.atomic_add(position_totals + index, fixed, mask=shared & sees, sem="relaxed")
                per_pair = tl.where(shared, 0.0, per_pair)
            along_diagonal += per_pair
    distance = diagonal * BLOCK + place[:, None] - place[None, :]
    index = tl.minimum(tl.maximum(distance, -farthest), farthest) + farthest
    fixed = (along_diagonal * factor).to(tl.int64)
    tl.atomic_add(position_totals + index, fixed, mask=fixed != 0, sem="relaxed")
