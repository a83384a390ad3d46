"""The softmax losses of retrieval by Triton kernels, in float32.

As in :mod:`hstu.ops.pytorch.softmax_loss`, forward also computes the gradients. The logits of a whole pool are never
stored. Sampled negatives store one float32 per draw.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hstu.ops.pytorch.softmax_loss import SoftmaxLoss, add_positive_part, target_losses
from hstu.ops.triton.launch import launcher
from hstu.ops.triton.primitives import LOG2_E, Precision, dot, load_rows, matrix, store_rows
from hstu.ops.triton.rows import sums_by_key
from hstu.ops.triton.support import WIDEST_VECTOR

NO_LOGIT = tl.constexpr(float("-inf"))
"""Logit of an entry that is not a negative of the query."""


class PoolSoftmaxLoss(SoftmaxLoss):
    """Softmax against the whole pool, block by block. Vectors are float32 of at most WIDEST_VECTOR numbers."""

    @staticmethod
    def forward(
        ctx: Any,
        queries: Tensor,
        positives: Tensor,
        pool: Tensor,
        target_ids: Tensor,
        pool_ids: Tensor,
        pool_valid: Tensor | None,
        temperature: float,
    ) -> Tensor:
        """See hstu.ops.functional.pool_softmax_loss."""
        shared = _shared(queries, pool, target_ids, pool_ids, temperature) | dict(
            pool_valid=None if pool_valid is None else pool_valid.to(torch.uint8),
            num_queries=len(queries),
            pool_size=len(pool),
            VALIDATED=pool_valid is not None,
            precision=Precision("tf32x3" if queries.shape[1] <= 128 else "ieee"),
        )
        configs = _pool_configs(shared["BLOCK_D"])
        positive_logits = (queries * positives).sum(dim=1) / temperature
        log_totals = torch.empty_like(positive_logits)
        _launch_blocks(pool_log_totals, len(queries), "BLOCK_M", configs, log_totals=log_totals, **shared)
        losses = target_losses(positive_logits, log_totals)
        if any(ctx.needs_input_grad):
            grad_queries, grad_pool = torch.empty_like(queries), torch.empty_like(pool)
            shared |= dict(log_norms=positive_logits + losses)
            for result, tile in ((grad_queries, "BLOCK_M"), (grad_pool, "BLOCK_N")):
                _launch_blocks(
                    pool_gradients, len(result), tile, configs, grad=matrix(result), OF_POOL=tile == "BLOCK_N", **shared
                )
            grad_positives = add_positive_part(grad_queries, queries, positives, losses, temperature)
            ctx.save_for_backward(grad_queries, grad_positives, grad_pool)
        return losses.sum()


class SampledSoftmaxLoss(SoftmaxLoss):
    """Softmax against R negatives per query. Vectors are float32 of at most WIDEST_VECTOR numbers."""

    @staticmethod
    def forward(
        ctx: Any,
        queries: Tensor,
        positives: Tensor,
        pool: Tensor,
        draws: Tensor,
        target_ids: Tensor,
        pool_ids: Tensor,
        temperature: float,
    ) -> Tensor:
        """See hstu.ops.functional.sampled_softmax_loss."""
        num_queries, num_draws = draws.shape
        shared = _shared(queries, pool, target_ids, pool_ids, temperature)
        shared |= dict(draws=matrix(draws), num_draws=num_draws)
        configs = _draw_configs(shared["BLOCK_D"])
        positive_logits = (queries * positives).sum(dim=1) / temperature
        logits = torch.empty(num_queries, num_draws, dtype=torch.float32, device=queries.device)
        log_totals = torch.empty_like(positive_logits)
        if num_queries:
            each_query = lambda meta: (num_queries,)  # noqa: E731
            launcher(draw_logits, each_query, configs)(logits=logits, log_totals=log_totals, **shared)
        losses = target_losses(positive_logits, log_totals)
        if any(ctx.needs_input_grad):
            grad_queries = torch.empty_like(queries)
            if num_queries:
                for name in ("queries", "target_ids", "pool_ids"):
                    del shared[name]
                launcher(draw_gradients, each_query, configs)(
                    logits=logits,
                    log_norms=positive_logits + losses,
                    weights=logits,  # in place
                    grad=matrix(grad_queries),
                    **shared,
                )
            grad_pool = sums_by_key(queries, draws.flatten().long(), len(pool), logits, max(1, num_draws))
            grad_positives = add_positive_part(grad_queries, queries, positives, losses, temperature)
            ctx.save_for_backward(grad_queries, grad_positives, grad_pool)
        return losses.sum()


def _shared(queries: Tensor, pool: Tensor, target_ids: Tensor, pool_ids: Tensor, temperature: float) -> dict[str, Any]:
    """The arguments that the kernels share."""
    width = queries.shape[1]
    if width > WIDEST_VECTOR or queries.dtype != torch.float32:
        raise ValueError(f"vectors of {width} × {queries.dtype}: at most {WIDEST_VECTOR}, in float32")
    return dict(
        queries=matrix(queries),
        pool=matrix(pool),
        target_ids=target_ids.contiguous(),
        pool_ids=pool_ids.contiguous(),
        inverse_temperature=1.0 / temperature,
        WIDTH=width,
        BLOCK_D=max(16, triton.next_power_of_2(width)),
    )


def _launch_blocks(kernel: Any, length: int, tile: str, configs: list[triton.Config], **arguments: Any) -> None:
    """Run a kernel with one program per block of ``length`` rows."""
    if length:
        launcher(kernel, lambda meta: (triton.cdiv(length, meta[tile]),), configs)(**arguments)


def _pool_configs(block_d: int) -> list[triton.Config]:
    tile = 32 if block_d <= 128 else 16
    return [triton.Config({"BLOCK_M": tile, "BLOCK_N": tile}, num_warps=4 if block_d <= 64 else 8, num_stages=1)]


def _draw_configs(block_d: int) -> list[triton.Config]:
    return [triton.Config({"BLOCK": 32 if block_d <= 128 else 16}, num_warps=4, num_stages=2)]


@triton.jit
def _pool_logits(
    queries, pool, target, rows, columns, pool_ids, pool_valid, pool_size, inverse_temperature,
    VALIDATED: tl.constexpr, precision: tl.constexpr,
):  # fmt: skip
    """Logits [rows, columns]; −∞ where the entry of the pool is not a negative of the query."""
    zero = tl.zeros((queries.shape[0], pool.shape[0]), tl.float32)
    logits = dot(queries, pool.T, zero, precision) * inverse_temperature
    inside = columns < pool_size
    ids = tl.load(pool_ids + columns, mask=inside, other=0)
    is_negative = (target[:, None] != ids[None, :]) & inside[None, :]
    if VALIDATED:
        is_negative = is_negative & (tl.load(pool_valid + columns, mask=inside, other=0) != 0)[None, :]
    return tl.where(is_negative, logits, NO_LOGIT)


@triton.jit(do_not_specialize=["num_queries", "pool_size"])
def pool_log_totals(
    queries, pool, target_ids, pool_ids, pool_valid, log_totals, num_queries, pool_size, inverse_temperature,
    WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, VALIDATED: tl.constexpr, precision: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """log Σ exp(logit) over the negatives of each query; −∞ for a query without negatives. Grid: (row blocks,)."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    q = load_rows(queries, rows.to(tl.int64), num_queries, WIDTH, BLOCK_D, True)
    target = tl.load(target_ids + rows, mask=rows < num_queries, other=0)
    peak = tl.full((BLOCK_M,), -1e30, tl.float32)  # finite, because −∞ − (−∞) is nan
    total = tl.zeros((BLOCK_M,), tl.float32)
    for first in tl.range(0, pool_size, BLOCK_N):
        columns = first + tl.arange(0, BLOCK_N)
        p = load_rows(pool, columns.to(tl.int64), pool_size, WIDTH, BLOCK_D, True)
        logits = _pool_logits(
            q, p, target, rows, columns, pool_ids, pool_valid, pool_size, inverse_temperature, VALIDATED, precision
        )
        new_peak = tl.maximum(peak, tl.max(logits, axis=1))
        exponentials = tl.exp2((logits - new_peak[:, None]) * LOG2_E)
        total = total * tl.exp2((peak - new_peak) * LOG2_E) + tl.sum(exponentials, axis=1)
        peak = new_peak
    tl.store(log_totals + rows, peak + tl.log(total), mask=rows < num_queries)


@triton.jit(do_not_specialize=["num_queries", "pool_size"])
def pool_gradients(
    queries, pool, target_ids, pool_ids, pool_valid, log_norms, grad, num_queries, pool_size, inverse_temperature,
    WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, VALIDATED: tl.constexpr, precision: tl.constexpr,
    OF_POOL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Gradients of the queries, weights @ pool, or, if OF_POOL, of the pool, weightsᵀ @ queries.

    weights = exp(logit − log_norm) / τ. Grid: (blocks of rows of the gradient,).
    """
    block = tl.program_id(0)
    total = tl.zeros((BLOCK_N if OF_POOL else BLOCK_M, BLOCK_D), tl.float32)
    rows = (0 if OF_POOL else block * BLOCK_M) + tl.arange(0, BLOCK_M)
    columns = (block * BLOCK_N if OF_POOL else 0) + tl.arange(0, BLOCK_N)
    for first in tl.range(0, num_queries if OF_POOL else pool_size, BLOCK_M if OF_POOL else BLOCK_N):
        i = rows + first if OF_POOL else rows
        j = columns if OF_POOL else columns + first
        q = load_rows(queries, i.to(tl.int64), num_queries, WIDTH, BLOCK_D, True)
        p = load_rows(pool, j.to(tl.int64), pool_size, WIDTH, BLOCK_D, True)
        target = tl.load(target_ids + i, mask=i < num_queries, other=0)
        log_norm = tl.load(log_norms + i, mask=i < num_queries, other=0.0)
        logits = _pool_logits(
            q, p, target, i, j, pool_ids, pool_valid, pool_size, inverse_temperature, VALIDATED, precision
        )
        weights = tl.exp2((logits - log_norm[:, None]) * LOG2_E) * inverse_temperature
        if OF_POOL:
            total = dot(weights.T, q, total, precision)
        else:
            total = dot(weights, p, total, precision)
    if OF_POOL:
        store_rows(grad, columns.to(tl.int64), pool_size, total, WIDTH, BLOCK_D)
    else:
        store_rows(grad, rows.to(tl.int64), num_queries, total, WIDTH, BLOCK_D)


@triton.jit
def _draws_of(draws, row, index):
    return draws.data + row * draws.stride_row + index * draws.stride_column


@triton.jit
def draw_logits(
    queries, pool, draws, target_ids, pool_ids, logits, log_totals, num_draws, inverse_temperature,
    WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Logits [M, R] of the draws of each query, −∞ for its own target, and log Σ exp(logit). Grid: (M,)."""
    row = tl.program_id(0).to(tl.int64)
    width = tl.arange(0, BLOCK_D)
    query = tl.load(
        queries.data + row * queries.stride_row + width * queries.stride_column, mask=width < WIDTH, other=0.0
    )
    target = tl.load(target_ids + row)
    peak = -1e30
    total = 0.0
    for first in tl.range(0, num_draws, BLOCK):
        index = first + tl.arange(0, BLOCK)
        drawn = tl.load(_draws_of(draws, row, index), mask=index < num_draws, other=0).to(tl.int64)
        p = load_rows(pool, drawn, 0, WIDTH, BLOCK_D, False)
        scores = tl.sum(p * query[None, :], axis=1) * inverse_temperature
        is_negative = (tl.load(pool_ids + drawn) != target) & (index < num_draws)
        scores = tl.where(is_negative, scores, NO_LOGIT)
        tl.store(logits + row * num_draws + index, scores, mask=index < num_draws)
        new_peak = tl.maximum(peak, tl.max(scores, axis=0))
        exponentials = tl.sum(tl.exp2((scores - new_peak) * LOG2_E), axis=0)
        total = total * tl.exp2((peak - new_peak) * LOG2_E) + exponentials
        peak = new_peak
    tl.store(log_totals + row, peak + tl.log(total))


@triton.jit
def draw_gradients(
    pool, draws, logits, log_norms, weights, grad, num_draws, inverse_temperature,
    WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """For each query, weights = exp(logit − log_norm) / τ and grad = Σ weight · drawn row. Grid: (M,)."""
    row = tl.program_id(0).to(tl.int64)
    width = tl.arange(0, BLOCK_D)
    log_norm = tl.load(log_norms + row)
    total = tl.zeros((BLOCK_D,), tl.float32)
    for first in tl.range(0, num_draws, BLOCK):
        index = first + tl.arange(0, BLOCK)
        inside = index < num_draws
        drawn = tl.load(_draws_of(draws, row, index), mask=inside, other=0).to(tl.int64)
        p = load_rows(pool, drawn, 0, WIDTH, BLOCK_D, False)
        scores = tl.load(logits + row * num_draws + index, mask=inside, other=NO_LOGIT)
        weight = tl.exp2((scores - log_norm) * LOG2_E) * inverse_temperature
        tl.store(weights + row * num_draws + index, weight, mask=inside)
        total += tl.sum(p * weight[:, None], axis=0)
    tl.store(grad.data + row * grad.stride_row + width, total, mask=width < WIDTH)
