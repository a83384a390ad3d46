"""The parts of the attention kernels that work on one tile: which keys, the mask, the bias, the scores.

Rows i are queries, columns j keys, both counted from the start of their sequence; ``end`` is the first candidate
token (the length where there is none). All functions broadcast, so that they serve transposed tiles, too.
Values that travel together are tuples:

    span  (length, end, num_contextuals, group_tokens) of a sequence
    bias  (query_times, token_times, thresholds, position_weight, time_weight, farthest), times from its start on
"""

from __future__ import annotations

import triton
import triton.language as tl

from hstu.ops.triton.primitives import dot

BUCKETS_PER_LOG2 = tl.constexpr(0.6931471805599453 / 0.301)
"""ln 2 / TIME_BUCKET_WIDTH. Only an estimate comes from it; the thresholds decide."""
LAST_BUCKET = tl.constexpr(127)


@triton.jit
def visible(i, j, span, CAUSAL: tl.constexpr, CONTEXTUAL: tl.constexpr, CANDIDATES: tl.constexpr):
    """Whether token i may look at token j. CONTEXTUAL: the first tokens see all context and history."""
    _, end, num_contextuals, group_tokens = span
    if CAUSAL:
        sees = j <= i
        if CONTEXTUAL:
            sees = sees | (i < num_contextuals)
        sees = sees & (j < end)
    else:
        sees = (j < end) & (i >= 0)
    if CANDIDATES:
        # Where both hold, i and j are candidates, so that truncating division is the floor.
        same_group = (i - end) // group_tokens == (j - end) // group_tokens
        sees = sees | ((j >= end) & (j <= i) & same_group)
    return sees


@triton.jit
def keys_of_rows(
    first_row,
    span,
    CAUSAL: tl.constexpr,
    CONTEXTUAL: tl.constexpr,
    CANDIDATES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Tiles of keys that rows [first_row, first_row + BLOCK_M) see.

    Returns (full, history_tiles, own, own_tiles): keys [0, full) are seen by all of the rows; the next history_tiles
    tiles and own_tiles tiles from key ``own`` (the rows' own target groups) need the mask.
    """
    length, end, num_contextuals, group_tokens = span
    stop_row = tl.minimum(first_row + BLOCK_M, length)
    full = end
    seen = end
    if CAUSAL:
        full = tl.minimum(end, first_row + 1)
        seen = tl.minimum(end, stop_row)
        if CONTEXTUAL:
            seen = tl.where(first_row < num_contextuals, end, seen)
    full = full // BLOCK_N * BLOCK_N
    history_tiles = tl.cdiv(seen - full, BLOCK_N)
    own = full + history_tiles * BLOCK_N
    own_tiles = 0
    if CANDIDATES:  # noqa: SIM102  # decided by the compiler, the other by the program
        if stop_row > end:
            oldest = tl.maximum(first_row, end)
            group_start = oldest - (oldest - end) % group_tokens
            own = tl.maximum(own, group_start // BLOCK_N * BLOCK_N)
            own_tiles = tl.maximum(tl.cdiv(stop_row - own, BLOCK_N), 0)
    return full, history_tiles, own, own_tiles


@triton.jit
def rows_of_keys(
    first_key,
    span,
    CAUSAL: tl.constexpr,
    CONTEXTUAL: tl.constexpr,
    CANDIDATES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Tiles of rows that see keys [first_key, first_key + BLOCK_N).

    Returns (context_tiles, first, masked_tiles, full, stop): tiles from row 0 on with the contextual rows before
    ``first``; masked_tiles tiles from row ``first`` on, which need the mask; rows [full, stop), which see all keys.
    """
    length, end, num_contextuals, group_tokens = span
    stop_key = tl.minimum(first_key + BLOCK_N, length)
    first = first_key
    stop = length
    context_tiles = 0
    if CAUSAL:
        masked_stop = tl.where(stop_key <= end, stop_key - 1, length)
        if CONTEXTUAL:
            rows = tl.minimum(num_contextuals, first)
            context_tiles = tl.where(first_key < end, tl.cdiv(rows, BLOCK_M), 0)
    else:
        first = tl.where(first_key < end, 0, first_key)
        masked_stop = tl.where(stop_key <= end, 0, length)
    if CANDIDATES:  # noqa: SIM102
        if first_key >= end:
            last_group = (stop_key - 1 - end) // group_tokens
            stop = tl.minimum(length, end + (last_group + 1) * group_tokens)
            masked_stop = stop
    masked_tiles = tl.cdiv(tl.maximum(masked_stop - first, 0), BLOCK_M)
    return context_tiles, first, masked_tiles, first + masked_tiles * BLOCK_M, stop


@triton.jit
def time_buckets(query_time, token_time, thresholds):
    """Bucket of each time difference, exactly as hstu.ops.relative_bias.time_buckets.

    thresholds: int64 [128], the least difference of each bucket. float32 gives the boundary nearest to the
    difference; comparing integers decides on which side of it the difference lies.
    """
    delta = tl.maximum(tl.abs(query_time - token_time), 1)
    estimate = tl.log2(delta.to(tl.float32)) * BUCKETS_PER_LOG2
    boundary = tl.minimum((estimate + 0.5).to(tl.int32), LAST_BUCKET)
    return boundary - (delta < tl.load(thresholds + boundary)).to(tl.int32)


@triton.jit
def distance_index(i, j, end, farthest):
    """Row of the position weights of each pair; all candidates share the position of the first."""
    distance = tl.minimum(i, end) - tl.minimum(j, end)
    return tl.minimum(tl.maximum(distance, -farthest), farthest) + farthest


@triton.jit
def scores(a, b, i, j, alpha, span, bias, BIAS: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    """α a @ b + bias, float32; a @ b is q @ kᵀ or its transpose."""
    zero = tl.zeros((a.shape[0], b.shape[1]), tl.float32)
    result = dot(a, b, zero, PRECISION, UPCAST) * alpha
    if BIAS:
        query_times, token_times, thresholds, position_weight, time_weight, farthest = bias
        query_time = tl.load(query_times + i, mask=i < span[0], other=0)
        token_time = tl.load(token_times + j, mask=j < span[0], other=0)
        buckets = time_buckets(query_time, token_time, thresholds)
        by_position = tl.load(position_weight + distance_index(i, j, span[1], farthest))
        result += by_position + tl.load(time_weight + buckets)
    return result
