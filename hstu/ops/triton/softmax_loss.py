"""Softmax losses of retrieval by Triton kernels, in float32 (tensor cores: three TF32 products per product).

As in :mod:`hstu.ops.pytorch.softmax_loss`, forward also computes the gradients. The logits of a whole pool are not
stored; sampled negatives store one float32 per draw.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hstu.ops.kernels import Negatives
from hstu.ops.pytorch.softmax_loss import SoftmaxLoss, save_gradients, target_losses
from hstu.ops.triton.launch import launcher, precision_for
from hstu.ops.triton.primitives import LOG2_E, Matrix, dot, elements, load_rows, matrix, store_rows
from hstu.ops.triton.rows import sums_by_key

NO_LOGIT = tl.constexpr(float("-inf"))
"""Logit of an entry that is not a negative of the query."""
Tiles = tuple[tuple[int, int, int, int], ...]
"""Configurations: BLOCK_M, BLOCK_N, CHUNK, num_warps. The first that fits the device runs."""
LOG_TOTAL_TILES: Tiles = ((64, 64, 32, 4), (128, 64, 32, 8))
GRADIENT_TILES: tuple[Tiles, Tiles] = (((64, 32, 32, 4), (64, 16, 64, 8)), ((64, 16, 32, 8), (32, 16, 64, 8)))
"""For vectors of at most 128 numbers, and for wider vectors: the largest tiles that spill no registers."""
MASKED_LOG_TOTAL_TILES: Tiles = ((64, 32, 32, 4),)
MASKED_GRADIENT_TILES: tuple[Tiles, Tiles] = (GRADIENT_TILES[0], GRADIENT_TILES[1][1:])
"""Tiles if seen items are masked: their addresses also need registers."""


class PoolSoftmaxLoss(SoftmaxLoss):
    """Softmax against the whole pool, block by block. Vectors are float32."""

    @staticmethod
    def forward(ctx: Any, queries: Tensor, positives: Tensor, pool: Tensor, negatives: Negatives) -> Tensor:
        """See :func:`hstu.ops.functional.softmax_loss`."""
        temperature, seen = negatives.temperature, negatives.seen
        of_queries, of_pool = (queries, negatives.target_ids.contiguous()), (pool, negatives.pool_ids.contiguous())
        shared = dict(
            **_weights(negatives),
            inverse_temperature=1.0 / temperature,
            WIDTH=queries.shape[1],
            precision=precision_for(pool_gradients, queries.dtype),
        )
        positive_logits = (queries * positives).sum(dim=1) / temperature
        log_totals = torch.empty_like(positive_logits)
        log_total_tiles, gradient_tiles = LOG_TOTAL_TILES, GRADIENT_TILES
        if seen is not None:
            log_total_tiles, gradient_tiles = MASKED_LOG_TOTAL_TILES, MASKED_GRADIENT_TILES
        _launch_pairs(pool_log_totals, of_queries, of_pool, log_total_tiles, log_totals=log_totals, **shared)
        losses = target_losses(positive_logits, log_totals)
        if any(ctx.needs_input_grad):
            grad_queries, grad_pool = torch.empty_like(queries), torch.empty_like(pool)
            shared |= dict(log_norms=positive_logits + losses)
            tiles = gradient_tiles[queries.shape[1] > 128]
            for grad, own, other in ((grad_queries, of_queries, of_pool), (grad_pool, of_pool, of_queries)):
                _launch_pairs(pool_gradients, own, other, tiles, grad=matrix(grad), OF_POOL=grad is grad_pool, **shared)
            save_gradients(ctx, (grad_queries, grad_pool), queries, positives, losses, temperature)
        return losses.sum()


class SampledSoftmaxLoss(SoftmaxLoss):
    """Softmax against R negatives per query. Vectors are float32."""

    @staticmethod
    def forward(ctx: Any, queries: Tensor, positives: Tensor, pool: Tensor, negatives: Negatives) -> Tensor:
        """See :func:`hstu.ops.functional.softmax_loss`."""
        draws, temperature = negatives.draws, negatives.temperature
        assert draws is not None
        num_queries, num_draws = draws.shape
        block_d = _padded(queries.shape[1])
        shared = dict(
            pool=matrix(pool),
            draws=matrix(draws),
            num_draws=num_draws,
            inverse_temperature=1.0 / temperature,
            WIDTH=queries.shape[1],
            BLOCK_D=block_d,
        )
        configs = [triton.Config({"BLOCK": 32 if block_d <= 128 else 16}, num_warps=4, num_stages=2)]
        positive_logits = (queries * positives).sum(dim=1) / temperature
        logits = torch.empty(num_queries, num_draws, dtype=torch.float32, device=queries.device)
        log_totals = torch.empty_like(positive_logits)
        if num_queries:
            each_query = lambda meta: (num_queries,)  # noqa: E731
            launcher(draw_logits, each_query, configs)(
                queries=matrix(queries),
                target_ids=negatives.target_ids.contiguous(),
                pool_ids=negatives.pool_ids.contiguous(),
                logits=logits,
                log_totals=log_totals,
                pool_size=len(pool),
                **_weights(negatives),
                **shared,
            )
        losses = target_losses(positive_logits, log_totals)
        if any(ctx.needs_input_grad):
            # Not in place: several warps load each logit, and one of them could store its weight before.
            grad_queries, weights = torch.empty_like(queries), torch.empty_like(logits)
            if num_queries:
                launcher(draw_gradients, each_query, configs)(
                    logits=logits,
                    log_norms=positive_logits + losses,
                    weights=weights,
                    grad=matrix(grad_queries),
                    **shared,
                )
            grad_pool = sums_by_key(queries, draws.flatten().long(), len(pool), weights, max(1, num_draws))
            save_gradients(ctx, (grad_queries, grad_pool), queries, positives, losses, temperature)
        return losses.sum()


def _weights(negatives: Negatives) -> dict[str, Any]:
    """Arguments of the kernels that compute logits: which entries count, and their weights."""
    log_weights, seen = negatives.log_weights, negatives.seen
    argument = (None, None, None) if seen is None else seen
    return dict(log_weights=log_weights, seen=argument, WEIGHTED=log_weights is not None, MASKED=seen is not None)


def _launch_pairs(
    kernel: Any, own: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor], tiles: Tiles, **arguments: Any
) -> None:
    """Run a kernel with one program per block of rows of ``own``. ``own`` and ``other``: vectors and their ids."""
    num_rows, width = own[0].shape
    if num_rows:
        launcher(
            kernel,
            lambda meta: (triton.cdiv(num_rows, meta["BLOCK_M"]),),
            [
                triton.Config(
                    {"BLOCK_M": m, "BLOCK_N": n, "CHUNK": min(chunk, _padded(width))}, num_warps=warps, num_stages=2
                )
                for m, n, chunk, warps in tiles
            ],
        )(
            own=matrix(own[0]),
            other=matrix(other[0]),
            own_ids=own[1],
            other_ids=other[1],
            num_rows=num_rows,
            num_columns=len(other[0]),
            **arguments,
        )


def _padded(width: int) -> int:
    return int(max(16, triton.next_power_of_2(width)))


@triton.jit
def _chunk_of(matrix, first):
    return Matrix(matrix.data + first * matrix.stride_column, matrix.stride_row, matrix.stride_column)


@triton.jit
def _load_chunk(source, rows, limit, first, WIDTH: tl.constexpr, CHUNK: tl.constexpr):
    """[rows, CHUNK] of a matrix from column ``first`` on; zeros beyond WIDTH columns and from row ``limit`` on."""
    part = _chunk_of(source, first)
    columns = tl.arange(0, CHUNK)
    inside = rows[:, None] < limit
    if WIDTH % CHUNK != 0:
        inside = inside & (first + columns[None, :] < WIDTH)
    return tl.load(elements(part, rows[:, None], columns[None, :]), mask=inside, other=0.0)


@triton.jit
def _pool_logits(
    own, other, rows, columns, num_rows, num_columns, own_ids, other_ids, seen, inverse_temperature,
    WIDTH: tl.constexpr, MASKED: tl.constexpr, OF_POOL: tl.constexpr, CHUNK: tl.constexpr, precision: tl.constexpr,
):  # fmt: skip
    """Logits [rows of own, rows of other]; −∞ where an entry is hidden from a query, and from ``num_columns`` on.

    Hidden are entries with the id of the query's target or, if MASKED, entries that ``seen`` hides. OF_POOL: ``own`` is
    the pool and ``other`` the queries, else the reverse. Both are read CHUNK columns at a time, to save registers.
    """
    products = tl.zeros((rows.shape[0], columns.shape[0]), tl.float32)
    for first in tl.range(0, WIDTH, CHUNK):
        a = _load_chunk(own, rows, num_rows, first, WIDTH, CHUNK)
        b = _load_chunk(other, columns, num_columns, first, WIDTH, CHUNK)
        products = dot(a, b.T, products, precision)
    inside = columns < num_columns
    if MASKED:
        if OF_POOL:
            is_negative = _is_unseen(seen, columns[None, :], num_columns, rows[:, None], num_rows)
        else:
            is_negative = _is_unseen(seen, rows[:, None], num_rows, columns[None, :], num_columns)
    else:
        row_ids = tl.load(own_ids + rows, mask=rows < num_rows, other=0)
        column_ids = tl.load(other_ids + columns, mask=inside, other=0)
        is_negative = row_ids[:, None] != column_ids[None, :]
    is_negative = is_negative & inside[None, :]
    return tl.where(is_negative, products * inverse_temperature, NO_LOGIT)


@triton.jit
def _is_unseen(seen, queries, num_queries, entries, pool_size):
    """Whether pool entries are negatives of queries, in the broadcast shape of their indices."""
    exists = queries < num_queries
    sequence = tl.load(seen.sequences + queries, mask=exists, other=0).to(tl.int64)
    position = tl.load(seen.positions + queries, mask=exists, other=0)
    first = tl.load(seen.first + sequence * pool_size + entries, mask=exists & (entries < pool_size), other=0)
    return first > position


@triton.jit(do_not_specialize=["num_rows", "num_columns"], do_not_specialize_on_alignment=["own_ids", "other_ids"])
def pool_log_totals(
    own, other, own_ids, other_ids, log_weights, seen, log_totals, num_rows, num_columns, inverse_temperature,
    WIDTH: tl.constexpr, WEIGHTED: tl.constexpr, MASKED: tl.constexpr, precision: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """log Σ exp(logit) over each query's negatives, or −∞. own: queries; other: pool. Grid: (blocks of queries,)."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    peak = tl.full((BLOCK_M,), -1e30, tl.float32)  # finite, because −∞ − (−∞) is nan
    total = tl.zeros((BLOCK_M,), tl.float32)
    for first in tl.range(0, num_columns, BLOCK_N):
        columns = first + tl.arange(0, BLOCK_N)
        logits = _pool_logits(
            own, other, rows, columns, num_rows, num_columns, own_ids, other_ids, seen, inverse_temperature,
            WIDTH, MASKED, False, CHUNK, precision,
        )  # fmt: skip
        if WEIGHTED:
            logits += tl.load(log_weights + columns, mask=columns < num_columns, other=0.0)[None, :]
        new_peak = tl.maximum(peak, tl.max(logits, axis=1))
        exponentials = tl.exp2((logits - new_peak[:, None]) * LOG2_E)
        total = total * tl.exp2((peak - new_peak) * LOG2_E) + tl.sum(exponentials, axis=1)
        peak = new_peak
    tl.store(log_totals + rows, peak + tl.log(total), mask=rows < num_rows)


@triton.jit(do_not_specialize=["num_rows", "num_columns"], do_not_specialize_on_alignment=["own_ids", "other_ids"])
def pool_gradients(
    own, other, own_ids, other_ids, log_weights, seen, log_norms, grad, num_rows, num_columns, inverse_temperature,
    WIDTH: tl.constexpr, WEIGHTED: tl.constexpr, MASKED: tl.constexpr, OF_POOL: tl.constexpr, precision: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Gradient of ``own``: weights @ other, with weights = exp(logit − log_norm of the query) / τ.

    OF_POOL: ``own`` is the pool and ``other`` the queries, else the reverse. Grid: (blocks of rows of ``own``,).
    """
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    sums = ()  # [BLOCK_M, CHUNK] each
    for _ in tl.static_range(0, WIDTH, CHUNK):
        sums = sums + (tl.zeros((BLOCK_M, CHUNK), tl.float32),)  # type: ignore[assignment]  # noqa: RUF005
    for first in tl.range(0, num_columns, BLOCK_N):
        columns = first + tl.arange(0, BLOCK_N)
        logits = _pool_logits(
            own, other, rows, columns, num_rows, num_columns, own_ids, other_ids, seen, inverse_temperature,
            WIDTH, MASKED, OF_POOL, CHUNK, precision,
        )  # fmt: skip
        if OF_POOL:
            log_norm = tl.load(log_norms + columns, mask=columns < num_columns, other=0.0)[None, :]
        else:
            log_norm = tl.load(log_norms + rows, mask=rows < num_rows, other=0.0)[:, None]
        if WEIGHTED:
            if OF_POOL:
                logits += tl.load(log_weights + rows, mask=rows < num_rows, other=0.0)[:, None]
            else:
                logits += tl.load(log_weights + columns, mask=columns < num_columns, other=0.0)[None, :]
        weights = tl.exp2((logits - log_norm) * LOG2_E) * inverse_temperature
        sums = _add_products(sums, weights, other, columns, num_columns, WIDTH, CHUNK, precision)
    for index in tl.static_range(0, len(sums)):
        _store_chunk(grad, rows, num_rows, sums[index], index * CHUNK, WIDTH, CHUNK)


@triton.jit
def _add_products(
    sums, weights, other, columns, num_columns, WIDTH: tl.constexpr, CHUNK: tl.constexpr, precision: tl.constexpr
):
    """sums + weights @ rows of other, as a tuple with one element per CHUNK of the width."""
    added = ()
    for index in tl.static_range(0, len(sums)):
        values = _load_chunk(other, columns, num_columns, index * CHUNK, WIDTH, CHUNK)
        added = added + (dot(weights, values, sums[index], precision),)  # type: ignore[assignment]  # noqa: RUF005
    return added


@triton.jit
def _store_chunk(target, rows, limit, values, FIRST: tl.constexpr, WIDTH: tl.constexpr, CHUNK: tl.constexpr):
    rest: tl.constexpr = WIDTH - FIRST
    part = _chunk_of(target, FIRST)
    store_rows(part, rows, limit, values, rest if rest < CHUNK else CHUNK, CHUNK)


@triton.jit(do_not_specialize=["pool_size"], do_not_specialize_on_alignment=["target_ids", "pool_ids"])
def draw_logits(
    queries, pool, draws, target_ids, pool_ids, log_weights, seen, logits, log_totals, pool_size, num_draws,
    inverse_temperature,
    WIDTH: tl.constexpr, WEIGHTED: tl.constexpr, MASKED: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Logits [M, R] of each query's draws, −∞ if hidden as in ``_pool_logits``, and log Σ exp(logit). Grid: (M,)."""
    row = tl.program_id(0).to(tl.int64)
    width = tl.arange(0, BLOCK_D)
    query = tl.load(elements(queries, row, width), mask=width < WIDTH, other=0.0)
    if MASKED:
        position = tl.load(seen.positions + row)
        first_positions = seen.first + tl.load(seen.sequences + row).to(tl.int64) * pool_size
    else:
        target = tl.load(target_ids + row)
    peak = -1e30
    total = 0.0
    for first in tl.range(0, num_draws, BLOCK):
        index = first + tl.arange(0, BLOCK)
        drawn = tl.load(elements(draws, row, index), mask=index < num_draws, other=0).to(tl.int64)
        p = load_rows(pool, drawn, 0, WIDTH, BLOCK_D, False)
        scores = tl.sum(p * query[None, :], axis=1) * inverse_temperature
        if WEIGHTED:
            scores += tl.load(log_weights + drawn)
        if MASKED:
            is_negative = tl.load(first_positions + drawn) > position
        else:
            is_negative = tl.load(pool_ids + drawn) != target
        is_negative = is_negative & (index < num_draws)
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
        drawn = tl.load(elements(draws, row, index), mask=inside, other=0).to(tl.int64)
        p = load_rows(pool, drawn, 0, WIDTH, BLOCK_D, False)
        scores = tl.load(logits + row * num_draws + index, mask=inside, other=NO_LOGIT)
        weight = tl.exp2((scores - log_norm) * LOG2_E) * inverse_temperature
        tl.store(weights + row * num_draws + index, weight, mask=inside)
        total += tl.sum(p * weight[:, None], axis=0)
    tl.store(grad.data + row * grad.stride_row + width, total, mask=width < WIDTH)
