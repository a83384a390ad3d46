"""Kernels of HSTU attention: forward, and the gradients of k and v, of q, and of the relative bias.

Each backward kernel recomputes the scores. This costs seven products instead of five, but no two programs write the
same element: there are no floating-point atomics, and every run gives the same bits.
"""

import triton
import triton.language as tl

from hstu.ops.triton.attention_tiles import (
    bias_at,
    distance_index,
    keys_of_rows,
    masked_keys_at,
    masked_rows_at,
    num_masked_keys,
    product,
    rows_of_keys,
    scores,
    sequence_at,
    slot_of,
    start_of_queries,
    tiles_on_diagonal,
    time_buckets,
    visible,
    zeros,
)
from hstu.ops.triton.primitives import load_rows, rows_of_head, sigmoid, silu_derivative, store_rows


@triton.jit
def _store_gradient(
    target, values, before, sums, start, head, first_row, length, slot, mode: tl.constexpr
):  # fmt: skip
    """Write the gradient of the tile of q, k or v that begins at ``first_row``.

    If ``mode.silu``, multiply it by SiLU' of ``before`` and write its sum over rows to ``sums`` [slots, H, d].
    Each tile has its own slot, so that no sum needs an atomic.
    """
    # Row indices start at the tile: offsets shared with the loads before the loop would occupy registers in the loop.
    rows, left = tl.arange(0, values.shape[0]), length - first_row
    start = start + first_row
    rounded = values.to(target.data.dtype.element_ty)  # half the registers; otherwise the tiles of SiLU would spill
    if mode.silu:
        value = load_rows(rows_of_head(before, start, head), rows, left, mode.width, mode.block_d, True)
        value = value.to(tl.float32)
        slope = silu_derivative(value, sigmoid(value, mode.precision.fast_sigmoid))
        rounded = (rounded.to(tl.float32) * slope).to(target.data.dtype.element_ty)
    store_rows(rows_of_head(target, start, head), rows, left, rounded, mode.width, mode.block_d)
    if mode.silu:
        total = tl.sum(tl.where(rows[:, None] < left, rounded.to(tl.float32), 0.0), axis=0)
        columns = tl.arange(0, mode.block_d)
        own = sums + (slot * tl.num_programs(1) + head) * mode.width
        tl.store(own + columns, total, mask=columns < mode.width)


@triton.jit
def _add_tile(
    accumulator, q, k, v, rows, first_key, alpha, span, bias,
    mode: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """accumulator + SiLU(scores) @ v for one tile of keys."""
    keys = first_key + tl.arange(0, BLOCK_N)
    i, j = rows[:, None], keys[None, :]
    k_tile = load_rows(k, keys, span.length, mode.width, mode.block_d, MASKED)
    s = scores(q, k_tile.T, i, j, alpha, span, bias, mode)
    weights = s * sigmoid(s, mode.precision.fast_sigmoid)
    if MASKED:
        weights = tl.where(visible(i, j, span, mode), weights, 0.0)
    v_tile = load_rows(v, keys, span.length, mode.width, mode.block_d, MASKED)
    return product(weights.to(v_tile.dtype), v_tile, accumulator, mode)


@triton.jit
def attention_forward(
    q, k, v, out, batch, bias, alpha, inverse_n,
    mode: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """out = SiLU(α q kᵀ + bias) ⊙ mask @ v / N. Grid: (tiles of the longest sequence, heads, sequences).

    The longest sequences run first, and in each of them the last tile, which has the most keys under a causal mask.
    Concurrent programs therefore read the same keys, and the programs that run last are short.
    """
    head = tl.program_id(1)
    start, span = sequence_at(batch, tl.load(batch.order + tl.program_id(2)), mode)
    tile = tl.cdiv(span.stop_row - span.first_row, BLOCK_M) - 1 - tl.program_id(0)
    if tile < 0:
        return
    if mode.bias:
        bias = bias_at(bias, start)
    k_head, v_head = rows_of_head(k, start, head), rows_of_head(v, start, head)
    q_start = start_of_queries(batch, start, mode)
    first_row = span.first_row + tile * BLOCK_M
    rows = first_row + tl.arange(0, BLOCK_M)
    q_tile = load_rows(rows_of_head(q, q_start, head), rows, span.stop_row, mode.width, mode.block_d, True)
    total = zeros(BLOCK_M, mode.block_d)
    tiles = keys_of_rows(first_row, span, mode, BLOCK_M, BLOCK_N)
    for first_key in tl.range(tiles.first_full, tiles.full, BLOCK_N):
        total = _add_tile(total, q_tile, k_head, v_head, rows, first_key, alpha, span, bias, mode, BLOCK_N, False)
    for index in tl.range(0, num_masked_keys(tiles)):
        first_key = masked_keys_at(index, tiles, mode, BLOCK_N)
        total = _add_tile(total, q_tile, k_head, v_head, rows, first_key, alpha, span, bias, mode, BLOCK_N, True)
    store_rows(rows_of_head(out, q_start, head), rows, span.stop_row, total * inverse_n, mode.width, mode.block_d)


@triton.jit
def _add_rows(
    grad_k, grad_v, k, v, q, grad, keys, first_row, stop, alpha, span, bias,
    mode: tl.constexpr, BLOCK_M: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Add the contribution of rows [first_row, stop), at most BLOCK_M, to the gradients of a tile of keys.

    All tiles are transposed, so that the weights, which are in registers, are the left operand of the products.
    """
    rows = first_row + tl.arange(0, BLOCK_M)
    i, j = rows[None, :], keys[:, None]
    q_tile = load_rows(q, rows, stop, mode.width, mode.block_d, True)
    grad_tile = load_rows(grad, rows, stop, mode.width, mode.block_d, True)
    s = scores(k, q_tile.T, i, j, alpha, span, bias, mode)
    gate = sigmoid(s, mode.precision.fast_sigmoid)
    weights = s * gate
    slope = silu_derivative(s, gate)
    if MASKED:
        sees = visible(i, j, span, mode)
        weights = tl.where(sees, weights, 0.0)
        slope = tl.where(sees, slope, 0.0)
    grad_v = product(weights.to(grad_tile.dtype), grad_tile, grad_v, mode)
    zero = tl.zeros((k.shape[0], BLOCK_M), tl.float32)
    grad_scores = product(v, grad_tile.T, zero, mode) * slope
    grad_k = product(grad_scores.to(q_tile.dtype), q_tile, grad_k, mode)
    return grad_k, grad_v


@triton.jit
def attention_backward_keys(
    q, k, v, grad, grad_k, grad_v, before_k, before_v, sums_k, sums_v, batch, bias, alpha, inverse_n,
    mode: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Gradients of k and v (see _store_gradient). Grid: (tiles of the longest sequence, heads, sequences).

    The longest sequences run first, and in each the first tile of keys, which most rows see under a causal mask.
    """
    head = tl.program_id(1)
    sequence = tl.load(batch.order + tl.program_id(2))
    start, span = sequence_at(batch, sequence, mode)
    first_key = tl.program_id(0) * BLOCK_N
    if first_key >= span.length:
        return
    if mode.bias:
        bias = bias_at(bias, start)
    q_start = start_of_queries(batch, start, mode)
    q_head, grad_head = rows_of_head(q, q_start, head), rows_of_head(grad, q_start, head)
    keys = first_key + tl.arange(0, BLOCK_N)
    k_tile = load_rows(rows_of_head(k, start, head), keys, span.length, mode.width, mode.block_d, True)
    v_tile = load_rows(rows_of_head(v, start, head), keys, span.length, mode.width, mode.block_d, True)
    sum_k = zeros(BLOCK_N, mode.block_d)
    sum_v = zeros(BLOCK_N, mode.block_d)
    tiles = rows_of_keys(first_key, span, mode, BLOCK_M, BLOCK_N)
    for index in tl.range(0, tiles.context_tiles + tiles.masked_tiles + tiles.late_tiles + tiles.newest_tiles):
        first_row, stop_row = masked_rows_at(index, tiles, span, mode, BLOCK_M)
        sum_k, sum_v = _add_rows(
            sum_k, sum_v, k_tile, v_tile, q_head, grad_head, keys, first_row, stop_row, alpha, span, bias,
            mode, BLOCK_M, True,
        )  # fmt: skip
    for first_row in tl.range(tiles.full, tiles.stop_full, BLOCK_M):
        sum_k, sum_v = _add_rows(
            sum_k, sum_v, k_tile, v_tile, q_head, grad_head, keys, first_row, tiles.stop_full, alpha, span, bias,
            mode, BLOCK_M, False,
        )  # fmt: skip
    slot = slot_of(sequence, start, first_key, BLOCK_N)
    sum_k = (sum_k * (alpha * inverse_n)).to(grad_k.data.dtype.element_ty)
    sum_v = (sum_v * inverse_n).to(grad_v.data.dtype.element_ty)
    _store_gradient(grad_k, sum_k, before_k, sums_k, start, head, first_key, span.length, slot, mode)
    _store_gradient(grad_v, sum_v, before_v, sums_v, start, head, first_key, span.length, slot, mode)


@triton.jit
def _add_keys(
    grad_q, q, grad, k, v, rows, first_key, alpha, span, bias,
    mode: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Add the contribution of one tile of keys to the gradient of a tile of queries."""
    keys = first_key + tl.arange(0, BLOCK_N)
    i, j = rows[:, None], keys[None, :]
    k_tile = load_rows(k, keys, span.length, mode.width, mode.block_d, MASKED)
    s = scores(q, k_tile.T, i, j, alpha, span, bias, mode)
    slope = silu_derivative(s, sigmoid(s, mode.precision.fast_sigmoid))
    if MASKED:
        slope = tl.where(visible(i, j, span, mode), slope, 0.0)
    v_tile = load_rows(v, keys, span.length, mode.width, mode.block_d, MASKED)
    zero = tl.zeros((q.shape[0], BLOCK_N), tl.float32)
    grad_scores = product(grad, v_tile.T, zero, mode) * slope
    return product(grad_scores.to(k_tile.dtype), k_tile, grad_q, mode)


@triton.jit
def attention_backward_queries(
    q, k, v, grad, grad_q, before_q, sums_q, batch, bias, alpha, inverse_n,
    mode: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Gradient of q. Grid and order are as in attention_forward. before_q, sums_q: see _store_gradient."""
    head = tl.program_id(1)
    sequence = tl.load(batch.order + tl.program_id(2))
    start, span = sequence_at(batch, sequence, mode)
    tile = tl.cdiv(span.stop_row - span.first_row, BLOCK_M) - 1 - tl.program_id(0)
    if tile < 0:
        return
    if mode.bias:
        bias = bias_at(bias, start)
    k_head, v_head = rows_of_head(k, start, head), rows_of_head(v, start, head)
    q_start = start_of_queries(batch, start, mode)
    first_row = span.first_row + tile * BLOCK_M
    rows = first_row + tl.arange(0, BLOCK_M)
    q_tile = load_rows(rows_of_head(q, q_start, head), rows, span.stop_row, mode.width, mode.block_d, True)
    grad_tile = load_rows(rows_of_head(grad, q_start, head), rows, span.stop_row, mode.width, mode.block_d, True)
    total = zeros(BLOCK_M, mode.block_d)
    tiles = keys_of_rows(first_row, span, mode, BLOCK_M, BLOCK_N)
    for first_key in tl.range(tiles.first_full, tiles.full, BLOCK_N):
        total = _add_keys(
            total, q_tile, grad_tile, k_head, v_head, rows, first_key, alpha, span, bias, mode, BLOCK_N, False
        )
    for index in tl.range(0, num_masked_keys(tiles)):
        first_key = masked_keys_at(index, tiles, mode, BLOCK_N)
        total = _add_keys(
            total, q_tile, grad_tile, k_head, v_head, rows, first_key, alpha, span, bias, mode, BLOCK_N, True
        )
    slot = slot_of(sequence, start, first_row, BLOCK_M)
    _store_gradient(
        grad_q, total * (alpha * inverse_n), before_q, sums_q, q_start, head, first_row, span.stop_row, slot, mode
    )


@triton.jit
def _add_to_buckets(totals, per_pair, rows, keys, span, bias, scale, BLOCK: tl.constexpr):
    """Add the score gradients of a tile to the totals of their time buckets, each run by two prefix sums."""
    query_time = tl.load(bias.query_times + rows, mask=rows < span.length, other=0)[:, None]
    token_time = tl.load(bias.token_times + keys, mask=keys < span.length, other=0)[None, :]
    next_time = tl.load(bias.token_times + keys + 1, mask=keys + 1 < span.length, other=0)[None, :]
    bucket = time_buckets(query_time, token_time, bias.thresholds)
    next_bucket = time_buckets(query_time, next_time, bias.thresholds)
    sums = (tl.cumsum(per_pair, axis=1) * scale).to(tl.int64)
    is_last = (keys - keys // BLOCK * BLOCK == BLOCK - 1)[None, :] & (rows >= 0)[:, None]
    changes = bucket != next_bucket
    tl.atomic_add(totals + bucket, sums, mask=is_last | changes, sem="relaxed")
    tl.atomic_add(totals + next_bucket, -sums, mask=changes & ~is_last, sem="relaxed")


@triton.jit(do_not_specialize=["num_sequences", "first_diagonal"])
def attention_backward_bias(
    q, k, v, grad, position_totals, time_totals, scale, batch, bias, alpha,
    num_slots, num_sequences, num_heads, first_diagonal,
    mode: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradients of the relative bias: sums of dL/dscore over heads and pairs, by distance and by time bucket.

    Grid: (diagonals of tiles, groups of sequences). On a diagonal (tile of rows − tile of keys = constant), a pair's
    distance depends only on its position in the tile. A program sums over the tiles of one diagonal, the sequences and
    the heads in registers, and adds to memory once. Sums are int64 (fixed-point): the order of atomics changes no bits.

    The sums times ``scale``, float32 [1], are added to position_totals, int64 [2 P - 1], and time_totals,
    int64 [num_slots, 128], which must be zero before. The slots are copies that reduce collisions of atomics.
    """
    diagonal = first_diagonal + tl.program_id(0)
    index_in_tile = tl.arange(0, BLOCK)
    factor = tl.load(scale)
    slot = (tl.program_id(0) + tl.program_id(1).to(tl.int64) * tl.num_programs(0)) % num_slots
    slot_totals = time_totals.data + slot * time_totals.stride_row
    along_diagonal = tl.zeros((BLOCK, BLOCK), tl.float32)
    for sequence in tl.range(tl.program_id(1), num_sequences, tl.num_programs(1)):
        start, span = sequence_at(batch, sequence, mode)
        own_bias = bias_at(bias, start)
        q_start = start_of_queries(batch, start, mode)
        first, count, late, late_count = tiles_on_diagonal(diagonal, span, mode, BLOCK)
        for index in tl.range(0, count + late_count):
            tile = first + index
            if mode.window:
                tile = tl.where(index < count, tile, late + index - count)
            rows = tile * BLOCK + index_in_tile
            keys = (tile - diagonal) * BLOCK + index_in_tile
            i, j = rows[:, None], keys[None, :]
            sees = visible(i, j, span, mode) & (i < span.stop_row)
            queries = rows
            if mode.ranges:
                sees = sees & (i >= span.first_row)
                queries = tl.where(rows < span.first_row, span.stop_row, rows)
            per_pair = tl.zeros((BLOCK, BLOCK), tl.float32)
            for head in tl.range(0, num_heads):
                q_head = rows_of_head(q, q_start, head)
                q_tile = load_rows(q_head, queries, span.stop_row, mode.width, mode.block_d, True)
                k_tile = load_rows(rows_of_head(k, start, head), keys, span.length, mode.width, mode.block_d, True)
                s = scores(q_tile, k_tile.T, i, j, alpha, span, own_bias, mode)
                slope = silu_derivative(s, sigmoid(s, mode.precision.fast_sigmoid))
                grad_head, v_head = rows_of_head(grad, q_start, head), rows_of_head(v, start, head)
                grad_tile = load_rows(grad_head, queries, span.stop_row, mode.width, mode.block_d, True)
                v_tile = load_rows(v_head, keys, span.length, mode.width, mode.block_d, True)
                zero = tl.zeros((BLOCK, BLOCK), tl.float32)
                per_pair += product(grad_tile, v_tile.T, zero, mode) * slope
            per_pair = tl.where(sees, per_pair, 0.0)
            _add_to_buckets(slot_totals, per_pair, rows, keys, span, own_bias, factor, BLOCK)
            if mode.candidates:
                # All candidates share a position, so their distance is not i − j: add these pairs at once.
                shared = (i > span.end) | (j > span.end)
                if (tile + 1) * BLOCK > span.end:
                    weight = distance_index(i, j, span.end, own_bias.farthest)
                    fixed = (per_pair * factor).to(tl.int64)
                    tl.atomic_add(position_totals + weight, fixed, mask=shared & sees, sem="relaxed")
                per_pair = tl.where(shared, 0.0, per_pair)
            along_diagonal += per_pair
    distance = diagonal * BLOCK + index_in_tile[:, None] - index_in_tile[None, :]
    index = tl.minimum(tl.maximum(distance, -bias.farthest), bias.farthest) + bias.farthest
    fixed = (along_diagonal * factor).to(tl.int64)
    tl.atomic_add(position_totals + index, fixed, mask=fixed != 0, sem="relaxed")
