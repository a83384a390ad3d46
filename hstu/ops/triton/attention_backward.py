"""Backward kernels of HSTU attention: dK and dV by tiles of keys, dQ by tiles of queries.

Scores are computed again in both. That costs seven products in place of five, and buys that no two programs write
the same element: no atomics, the same bits in every run.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hstu.ops.triton.attention_tiles import keys_of_rows, rows_of_keys, scores, visible
from hstu.ops.triton.primitives import dot, load_rows, sigmoid, silu_derivative, store_rows


@triton.jit
def _add_rows(
    grad_k,
    grad_v,
    k,
    v,
    q_rows,
    grad_rows,
    keys,
    first_row,
    stop,
    alpha,
    span,
    bias,
    WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    CAUSAL: tl.constexpr,
    CONTEXTUAL: tl.constexpr,
    CANDIDATES: tl.constexpr,
    BIAS: tl.constexpr,
    FAST: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Add the share of the rows [first_row, stop), at most BLOCK_M, to the gradients of a tile of keys.

    All is transposed, so that the weights, which are in registers, are the left operand of the products. Rows from
    ``stop`` on read as zeros and so add nothing.
    """
    rows = first_row + tl.arange(0, BLOCK_M)
    i, j = rows[None, :], keys[:, None]
    q = load_rows(q_rows[0], rows, stop, q_rows[1], q_rows[2], WIDTH, BLOCK_D, True)
    s = scores(k, q.T, i, j, alpha, span, bias, BIAS, PRECISION, UPCAST)
    gate = sigmoid(s, FAST)
    weights = s * gate
    slope = silu_derivative(s, gate)
    if MASKED:
        sees = visible(i, j, span, CAUSAL, CONTEXTUAL, CANDIDATES)
        weights = tl.where(sees, weights, 0.0)
        slope = tl.where(sees, slope, 0.0)
    grad = load_rows(grad_rows[0], rows, stop, grad_rows[1], grad_rows[2], WIDTH, BLOCK_D, True)
    grad_v = dot(weights.to(grad.dtype), grad, grad_v, PRECISION, UPCAST)
    zero = tl.zeros((k.shape[0], BLOCK_M), tl.float32)
    grad_scores = dot(v, grad.T, zero, PRECISION, UPCAST) * slope
    grad_k = dot(grad_scores.to(q.dtype), q, grad_k, PRECISION, UPCAST)
    return grad_k, grad_v


@triton.jit
def attention_backward_keys(
    q,
    k,
    v,
    grad,
    grad_k,
    grad_v,
    offsets,
    candidates,
    order,
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
    stride_gkt,
    stride_gkh,
    stride_gkd,
    stride_gvt,
    stride_gvh,
    stride_gvd,
    alpha,
    inverse_n,
    farthest,
    num_contextuals,
    group_tokens,
    WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CAUSAL: tl.constexpr,
    CONTEXTUAL: tl.constexpr,
    CANDIDATES: tl.constexpr,
    BIAS: tl.constexpr,
    FAST: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Gradients of k and v. Grid: (tiles of the longest sequence, heads, sequences), longest first.

    Under a causal mask the first tile of keys is seen by the most rows.
    """
    sequence = tl.load(order + tl.program_id(2))
    head = tl.program_id(1)
    start = tl.load(offsets + sequence)
    length = (tl.load(offsets + sequence + 1) - start).to(tl.int32)
    first_key = tl.program_id(0) * BLOCK_N
    if first_key >= length:
        return
    end = length
    if CANDIDATES:
        end = length - tl.load(candidates + sequence).to(tl.int32)
    if BIAS:
        query_times += start
        token_times += start
    span = (length, end, num_contextuals, group_tokens)
    bias = (query_times, token_times, thresholds, position_weight, time_weight, farthest)
    q_rows = (q + start * stride_qt + head * stride_qh, stride_qt, stride_qd)
    grad_rows = (grad + start * stride_gt + head * stride_gh, stride_gt, stride_gd)

    keys = first_key + tl.arange(0, BLOCK_N)
    k_base = k + start * stride_kt + head * stride_kh
    v_base = v + start * stride_vt + head * stride_vh
    k_tile = load_rows(k_base, keys, length, stride_kt, stride_kd, WIDTH, BLOCK_D, True)
    v_tile = load_rows(v_base, keys, length, stride_vt, stride_vd, WIDTH, BLOCK_D, True)
    sum_k = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    sum_v = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    context_tiles, first, masked_tiles, full, stop = rows_of_keys(
        first_key, span, CAUSAL, CONTEXTUAL, CANDIDATES, BLOCK_M, BLOCK_N
    )
    # fmt: off
    for index in tl.range(0, context_tiles + masked_tiles):
        first_row = first + (index - context_tiles) * BLOCK_M
        stop_row = stop
        if CONTEXTUAL:
            first_row = tl.where(index < context_tiles, index * BLOCK_M, first_row)
            stop_row = tl.where(index < context_tiles, first, stop)
        sum_k, sum_v = _add_rows(
            sum_k, sum_v, k_tile, v_tile, q_rows, grad_rows, keys, first_row, stop_row, alpha, span, bias, WIDTH,
            BLOCK_D, BLOCK_M, CAUSAL, CONTEXTUAL, CANDIDATES, BIAS, FAST, PRECISION, UPCAST, True,
        )
    for first_row in tl.range(full, stop, BLOCK_M):
        sum_k, sum_v = _add_rows(
            sum_k, sum_v, k_tile, v_tile, q_rows, grad_rows, keys, first_row, stop, alpha, span, bias, WIDTH,
            BLOCK_D, BLOCK_M, CAUSAL, CONTEXTUAL, CANDIDATES, BIAS, FAST, PRECISION, UPCAST, False,
        )
    # fmt: on
    grad_k_base = grad_k + start * stride_gkt + head * stride_gkh
    grad_v_base = grad_v + start * stride_gvt + head * stride_gvh
    store_rows(grad_k_base, keys, length, stride_gkt, stride_gkd, sum_k * (alpha * inverse_n), WIDTH, BLOCK_D)
    store_rows(grad_v_base, keys, length, stride_gvt, stride_gvd, sum_v * inverse_n, WIDTH, BLOCK_D)


@triton.jit
def _add_keys(
    grad_q,
    q,
    grad,
    k_rows,
    v_rows,
    rows,
    first_key,
    alpha,
    span,
    bias,
    WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr,
    CONTEXTUAL: tl.constexpr,
    CANDIDATES: tl.constexpr,
    BIAS: tl.constexpr,
    FAST: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Add the share of one tile of keys to the gradient of a tile of queries."""
    keys = first_key + tl.arange(0, BLOCK_N)
    i, j = rows[:, None], keys[None, :]
    k = load_rows(k_rows[0], keys, span[0], k_rows[1], k_rows[2], WIDTH, BLOCK_D, MASKED)
    s = scores(q, k.T, i, j, alpha, span, bias, BIAS, PRECISION, UPCAST)
    slope = silu_derivative(s, sigmoid(s, FAST))
    if MASKED:
        slope = tl.where(visible(i, j, span, CAUSAL, CONTEXTUAL, CANDIDATES), slope, 0.0)
    v = load_rows(v_rows[0], keys, span[0], v_rows[1], v_rows[2], WIDTH, BLOCK_D, MASKED)
    zero = tl.zeros((q.shape[0], BLOCK_N), tl.float32)
    grad_scores = dot(grad, v.T, zero, PRECISION, UPCAST) * slope
    return dot(grad_scores.to(k.dtype), k, grad_q, PRECISION, UPCAST)


@triton.jit
def attention_backward_queries(
    q,
    k,
    v,
    grad,
    grad_q,
    offsets,
    candidates,
    order,
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
    stride_gqt,
    stride_gqh,
    stride_gqd,
    alpha,
    inverse_n,
    farthest,
    num_contextuals,
    group_tokens,
    WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CAUSAL: tl.constexpr,
    CONTEXTUAL: tl.constexpr,
    CANDIDATES: tl.constexpr,
    BIAS: tl.constexpr,
    FAST: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Gradient of q. Grid and order as in attention_forward."""
    sequence = tl.load(order + tl.program_id(2))
    head = tl.program_id(1)
    start = tl.load(offsets + sequence)
    length = (tl.load(offsets + sequence + 1) - start).to(tl.int32)
    tile = tl.cdiv(length, BLOCK_M) - 1 - tl.program_id(0)
    if tile < 0:
        return
    end = length
    if CANDIDATES:
        end = length - tl.load(candidates + sequence).to(tl.int32)
    if BIAS:
        query_times += start
        token_times += start
    span = (length, end, num_contextuals, group_tokens)
    bias = (query_times, token_times, thresholds, position_weight, time_weight, farthest)
    k_rows = (k + start * stride_kt + head * stride_kh, stride_kt, stride_kd)
    v_rows = (v + start * stride_vt + head * stride_vh, stride_vt, stride_vd)

    first_row = tile * BLOCK_M
    rows = first_row + tl.arange(0, BLOCK_M)
    q_base = q + start * stride_qt + head * stride_qh
    grad_base = grad + start * stride_gt + head * stride_gh
    q_tile = load_rows(q_base, rows, length, stride_qt, stride_qd, WIDTH, BLOCK_D, True)
    grad_tile = load_rows(grad_base, rows, length, stride_gt, stride_gd, WIDTH, BLOCK_D, True)
    total = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    full, history_tiles, own, own_tiles = keys_of_rows(
        first_row, span, CAUSAL, CONTEXTUAL, CANDIDATES, BLOCK_M, BLOCK_N
    )
    # fmt: off
    for first_key in tl.range(0, full, BLOCK_N):
        total = _add_keys(
            total, q_tile, grad_tile, k_rows, v_rows, rows, first_key, alpha, span, bias, WIDTH, BLOCK_D, BLOCK_N,
            CAUSAL, CONTEXTUAL, CANDIDATES, BIAS, FAST, PRECISION, UPCAST, False,
        )
    for index in tl.range(0, history_tiles + own_tiles):
        first_key = full + index * BLOCK_N
        if CANDIDATES:
            first_key = tl.where(index < history_tiles, first_key, own + (index - history_tiles) * BLOCK_N)
        total = _add_keys(
            total, q_tile, grad_tile, k_rows, v_rows, rows, first_key, alpha, span, bias, WIDTH, BLOCK_D, BLOCK_N,
            CAUSAL, CONTEXTUAL, CANDIDATES, BIAS, FAST, PRECISION, UPCAST, True,
        )
    # fmt: on
    grad_q_base = grad_q + start * stride_gqt + head * stride_gqh
    store_rows(grad_q_base, rows, length, stride_gqt, stride_gqd, total * (alpha * inverse_n), WIDTH, BLOCK_D)
