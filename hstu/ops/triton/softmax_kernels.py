"""Kernels of the softmax losses; vectors are float32. See :mod:`hstu.ops.softmax_loss`."""

from __future__ import annotations

import triton
import triton.language as tl

from hstu.ops.triton.primitives import LOG2_E, dot, load_rows, store_rows

NEVER = tl.constexpr(float("-inf"))


@triton.jit
def _pool_logits(
    queries, pool, target, rows, columns, pool_ids, pool_valid, pool_size, inverse_temperature,
    VALIDATED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """[rows, columns] logits, −∞ where the entry is no negative of the query."""
    zero = tl.zeros((queries.shape[0], pool.shape[0]), tl.float32)
    logits = dot(queries, pool.T, zero, PRECISION, False) * inverse_temperature
    inside = columns < pool_size
    ids = tl.load(pool_ids + columns, mask=inside, other=0)
    is_negative = (target[:, None] != ids[None, :]) & inside[None, :]
    if VALIDATED:
        is_negative = is_negative & (tl.load(pool_valid + columns, mask=inside, other=0) != 0)[None, :]
    return tl.where(is_negative, logits, NEVER)


@triton.jit(do_not_specialize=["num_queries", "pool_size"])
def pool_log_totals(
    queries, pool, target_ids, pool_ids, pool_valid, log_totals, num_queries, pool_size, inverse_temperature,
    stride_qr, stride_qc, stride_pr, stride_pc,
    WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, VALIDATED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Logarithm of Σ exp(logit) over the negatives of each query; −∞ where it has none. Grid: (row blocks,)."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    q = load_rows(queries, rows.to(tl.int64), num_queries, stride_qr, stride_qc, WIDTH, BLOCK_D, True)
    target = tl.load(target_ids + rows, mask=rows < num_queries, other=0)
    peak = tl.full((BLOCK_M,), -1e30, tl.float32)  # finite: −∞ − −∞ is no number
    total = tl.zeros((BLOCK_M,), tl.float32)
    for first in tl.range(0, pool_size, BLOCK_N):
        columns = first + tl.arange(0, BLOCK_N)
        p = load_rows(pool, columns.to(tl.int64), pool_size, stride_pr, stride_pc, WIDTH, BLOCK_D, True)
        logits = _pool_logits(
            q, p, target, rows, columns, pool_ids, pool_valid, pool_size, inverse_temperature, VALIDATED, PRECISION
        )
        new_peak = tl.maximum(peak, tl.max(logits, axis=1))
        exponentials = tl.exp2((logits - new_peak[:, None]) * LOG2_E)
        total = total * tl.exp2((peak - new_peak) * LOG2_E) + tl.sum(exponentials, axis=1)
        peak = new_peak
    tl.store(log_totals + rows, peak + tl.log(total), mask=rows < num_queries)


@triton.jit(do_not_specialize=["num_queries", "pool_size"])
def pool_gradients(
    queries, pool, target_ids, pool_ids, pool_valid, log_norms, grad, num_queries, pool_size, inverse_temperature,
    stride_qr, stride_qc, stride_pr, stride_pc, stride_gr,
    WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, VALIDATED: tl.constexpr, PRECISION: tl.constexpr,
    OF_POOL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """grad = weights @ pool, for each query, or OF_POOL weightsᵀ @ queries, for each row of the pool.

    weights = exp(logit − log_norm) / τ. Grid: (blocks of rows of the result,).
    """
    block = tl.program_id(0)
    total = tl.zeros((BLOCK_N if OF_POOL else BLOCK_M, BLOCK_D), tl.float32)
    rows = (0 if OF_POOL else block * BLOCK_M) + tl.arange(0, BLOCK_M)
    columns = (block * BLOCK_N if OF_POOL else 0) + tl.arange(0, BLOCK_N)
    for first in tl.range(0, num_queries if OF_POOL else pool_size, BLOCK_M if OF_POOL else BLOCK_N):
        i = rows + first if OF_POOL else rows
        j = columns if OF_POOL else columns + first
        q = load_rows(queries, i.to(tl.int64), num_queries, stride_qr, stride_qc, WIDTH, BLOCK_D, True)
        p = load_rows(pool, j.to(tl.int64), pool_size, stride_pr, stride_pc, WIDTH, BLOCK_D, True)
        target = tl.load(target_ids + i, mask=i < num_queries, other=0)
        log_norm = tl.load(log_norms + i, mask=i < num_queries, other=0.0)
        logits = _pool_logits(
            q, p, target, i, j, pool_ids, pool_valid, pool_size, inverse_temperature, VALIDATED, PRECISION
        )
        weights = tl.exp2((logits - log_norm[:, None]) * LOG2_E) * inverse_temperature
        if OF_POOL:
            total = dot(weights.T, q, total, PRECISION, False)
        else:
            total = dot(weights, p, total, PRECISION, False)
    if OF_POOL:
        store_rows(grad, columns.to(tl.int64), pool_size, stride_gr, 1, total, WIDTH, BLOCK_D)
    else:
        store_rows(grad, rows.to(tl.int64), num_queries, stride_gr, 1, total, WIDTH, BLOCK_D)


@triton.jit
def draw_logits(
    queries, pool, draws, target_ids, pool_ids, logits, log_totals, num_draws, inverse_temperature,
    stride_qr, stride_qc, stride_pr, stride_pc, stride_dr, stride_dc,
    WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Logits [M, R] of each query's draws, −∞ for its own target, and the logarithm of their sum. Grid: (M,)."""
    row = tl.program_id(0).to(tl.int64)
    width = tl.arange(0, BLOCK_D)
    query = tl.load(queries + row * stride_qr + width * stride_qc, mask=width < WIDTH, other=0.0)
    target = tl.load(target_ids + row)
    peak = -1e30
    total = 0.0
    for first in tl.range(0, num_draws, BLOCK):
        places = first + tl.arange(0, BLOCK)
        drawn = tl.load(draws + row * stride_dr + places * stride_dc, mask=places < num_draws, other=0).to(tl.int64)
        p = load_rows(pool, drawn, 0, stride_pr, stride_pc, WIDTH, BLOCK_D, False)
        scores = tl.sum(p * query[None, :], axis=1) * inverse_temperature
        is_negative = (tl.load(pool_ids + drawn) != target) & (places < num_draws)
        scores = tl.where(is_negative, scores, NEVER)
        tl.store(logits + row * num_draws + places, scores, mask=places < num_draws)
        new_peak = tl.maximum(peak, tl.max(scores, axis=0))
        exponentials = tl.sum(tl.exp2((scores - new_peak) * LOG2_E), axis=0)
        total = total * tl.exp2((peak - new_peak) * LOG2_E) + exponentials
        peak = new_peak
    tl.store(log_totals + row, peak + tl.log(total))


@triton.jit
def draw_gradients(
    pool, draws, logits, log_norms, weights, grad, num_draws, inverse_temperature,
    stride_pr, stride_pc, stride_dr, stride_dc, stride_gr,
    WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """weights = exp(logit − log_norm) / τ and grad = Σ weight · drawn row, for each query. Grid: (M,)."""
    row = tl.program_id(0).to(tl.int64)
    width = tl.arange(0, BLOCK_D)
    log_norm = tl.load(log_norms + row)
    total = tl.zeros((BLOCK_D,), tl.float32)
    for first in tl.range(0, num_draws, BLOCK):
        places = first + tl.arange(0, BLOCK)
        inside = places < num_draws
        drawn = tl.load(draws + row * stride_dr + places * stride_dc, mask=inside, other=0).to(tl.int64)
        p = load_rows(pool, drawn, 0, stride_pr, stride_pc, WIDTH, BLOCK_D, False)
        scores = tl.load(logits + row * num_draws + places, mask=inside, other=NEVER)
        weight = tl.exp2((scores - log_norm) * LOG2_E) * inverse_temperature
        tl.store(weights + row * num_draws + places, weight, mask=inside)
        total += tl.sum(p * weight[:, None], axis=0)
    tl.store(grad + row * stride_gr + width, total, mask=width < WIDTH)
