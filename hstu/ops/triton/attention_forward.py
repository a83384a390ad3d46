"""Forward kernel of HSTU attention: one program a tile of queries, a head and a sequence."""

from __future__ import annotations

import triton
import triton.language as tl

from hstu.ops.triton.attention_tiles import keys_of_rows, scores, visible
from hstu.ops.triton.primitives import dot, load_rows, sigmoid, store_rows


@triton.jit
def _add_tile(
    accumulator,
    q,
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
    """accumulator + SiLU(scores) @ v of one tile of keys. k_rows, v_rows: (pointer, stride of a row, of a column)."""
    keys = first_key + tl.arange(0, BLOCK_N)
    i, j = rows[:, None], keys[None, :]
    k = load_rows(k_rows[0], keys, span[0], k_rows[1], k_rows[2], WIDTH, BLOCK_D, MASKED)
    s = scores(q, k.T, i, j, alpha, span, bias, BIAS, PRECISION, UPCAST)
    weights = s * sigmoid(s, FAST)
    if MASKED:
        weights = tl.where(visible(i, j, span, CAUSAL, CONTEXTUAL, CANDIDATES), weights, 0.0)
    v = load_rows(v_rows[0], keys, span[0], v_rows[1], v_rows[2], WIDTH, BLOCK_D, MASKED)
    return dot(weights.to(v.dtype), v, accumulator, PRECISION, UPCAST)


@triton.jit
def attention_forward(
    q,
    k,
    v,
    out,
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
    stride_ot,
    stride_oh,
    stride_od,
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
    """out = SiLU(α q kᵀ + bias) ⊙ mask @ v / N. Grid: (tiles of the longest sequence, heads, sequences).

    Longest sequences first, in each the last tile first (which under a causal mask has the most keys): programs that
    run together read the same keys, and what remains at the end is short.
    """
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
    q_tile = load_rows(q_base, rows, length, stride_qt, stride_qd, WIDTH, BLOCK_D, True)
    accumulator = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    full, history_tiles, own, own_tiles = keys_of_rows(
        first_row, span, CAUSAL, CONTEXTUAL, CANDIDATES, BLOCK_M, BLOCK_N
    )
    # fmt: off
    for first_key in tl.range(0, full, BLOCK_N):
        accumulator = _add_tile(
            accumulator, q_tile, k_rows, v_rows, rows, first_key, alpha, span, bias, WIDTH, BLOCK_D, BLOCK_N,
            CAUSAL, CONTEXTUAL, CANDIDATES, BIAS, FAST, PRECISION, UPCAST, False,
        )
    for index in tl.range(0, history_tiles + own_tiles):
        first_key = full + index * BLOCK_N
        if CANDIDATES:
            first_key = tl.where(index < history_tiles, first_key, own + (index - history_tiles) * BLOCK_N)
        accumulator = _add_tile(
            accumulator, q_tile, k_rows, v_rows, rows, first_key, alpha, span, bias, WIDTH, BLOCK_D, BLOCK_N,
            CAUSAL, CONTEXTUAL, CANDIDATES, BIAS, FAST, PRECISION, UPCAST, True,
        )
    # fmt: on
    out_base = out + start * stride_ot + head * stride_oh
    store_rows(out_base, rows, length, stride_ot, stride_od, accumulator * inverse_n, WIDTH, BLOCK_D)
