"""The softmax loss over sampled negatives by Triton kernels, in float32. They store one float32 per draw.

As in :mod:`hstu.ops.pytorch.softmax_loss`, forward also computes the gradients.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hstu.ops.kernels import Loss, Negatives
from hstu.ops.pytorch.softmax_loss import target_losses, with_gradients
from hstu.ops.triton.launch import launcher
from hstu.ops.triton.primitives import LOG2_E, elements, load_rows, matrix
from hstu.ops.triton.rows import sums_by_key

NO_LOGIT = tl.constexpr(float("-inf"))
"""Logit of an entry that is not a negative of the query."""


def sampled_softmax_loss(vectors: Sequence[Tensor], negatives: Negatives, wants_gradients: bool) -> Loss:
    """Softmax against R negatives per query. Vectors are float32."""
    queries, positives, pool = vectors
    draws, temperature = negatives.draws, negatives.temperature
    assert draws is not None
    num_queries, num_draws = draws.shape
    block_d = max(16, triton.next_power_of_2(queries.shape[1]))
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
    if not wants_gradients:
        return losses.sum(), ()
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
    return with_gradients((grad_queries, grad_pool), queries, positives, losses, temperature)


def _weights(negatives: Negatives) -> dict[str, Any]:
    """Arguments of the kernels that compute logits: which entries count, and their weights."""
    log_weights, seen = negatives.log_weights, negatives.seen
    argument = (None, None, None) if seen is None else seen
    return dict(log_weights=log_weights, seen=argument, WEIGHTED=log_weights is not None, MASKED=seen is not None)


@triton.jit(do_not_specialize=["pool_size"], do_not_specialize_on_alignment=["target_ids", "pool_ids"])
def draw_logits(
    queries, pool, draws, target_ids, pool_ids, log_weights, seen, logits, log_totals, pool_size, num_draws,
    inverse_temperature,
    WIDTH: tl.constexpr, WEIGHTED: tl.constexpr, MASKED: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Logits [M, R] of each query's draws, −∞ where hidden, and log Σ exp(logit). Grid: (M,).

    Hidden are entries with the id of the query's target or, if MASKED, entries that ``seen`` hides.
    """
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
