"""Softmax losses of retrieval by Triton kernels, in float32 (tensor cores: three TF32 products per product).

As in :mod:`hstu.ops.pytorch.softmax_loss`, forward also computes the gradients. The logits of a whole pool are not
stored; sampled negatives store one float32 per draw.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from hstu.ops.kernels import Negatives
from hstu.ops.pytorch.softmax_loss import SoftmaxLoss, add_positive_part, target_losses
from hstu.ops.triton import softmax_loss_kernels as kernels
from hstu.ops.triton.launch import launcher, precision_for
from hstu.ops.triton.primitives import matrix
from hstu.ops.triton.rows import sums_by_key
from hstu.ops.triton.support import WIDEST_VECTOR

Tiles = tuple[tuple[int, int, int, int], ...]
"""Configurations: BLOCK_M, BLOCK_N, CHUNK, num_warps. The first that fits the device runs."""
LOG_TOTAL_TILES: Tiles = ((64, 64, 32, 4), (128, 64, 32, 8))
GRADIENT_TILES: tuple[Tiles, Tiles] = (((64, 32, 32, 4), (64, 16, 64, 8)), ((64, 16, 32, 8), (32, 16, 64, 8)))
"""For vectors of at most 128 numbers, and for wider vectors: the largest tiles that spill no registers."""
MASKED_LOG_TOTAL_TILES: Tiles = ((64, 32, 32, 4),)
MASKED_GRADIENT_TILES: tuple[Tiles, Tiles] = (GRADIENT_TILES[0], GRADIENT_TILES[1][1:])
"""Tiles if seen items are masked: their addresses also need registers."""


class PoolSoftmaxLoss(SoftmaxLoss):
    """Softmax against the whole pool, block by block. Vectors are float32 of at most WIDEST_VECTOR numbers."""

    @staticmethod
    def forward(ctx: Any, queries: Tensor, positives: Tensor, pool: Tensor, negatives: Negatives) -> Tensor:
        """See :func:`hstu.ops.functional.softmax_loss`."""
        _require_supported(queries)
        temperature, seen = negatives.temperature, negatives.seen
        of_queries, of_pool = (queries, negatives.target_ids.contiguous()), (pool, negatives.pool_ids.contiguous())
        shared = dict(
            **_weights(negatives),
            inverse_temperature=1.0 / temperature,
            WIDTH=queries.shape[1],
            precision=precision_for(kernels.pool_gradients, queries.dtype),
        )
        positive_logits = (queries * positives).sum(dim=1) / temperature
        log_totals = torch.empty_like(positive_logits)
        log_total_tiles, gradient_tiles = LOG_TOTAL_TILES, GRADIENT_TILES
        if seen is not None:
            log_total_tiles, gradient_tiles = MASKED_LOG_TOTAL_TILES, MASKED_GRADIENT_TILES
        _launch_pairs(kernels.pool_log_totals, of_queries, of_pool, log_total_tiles, log_totals=log_totals, **shared)
        losses = target_losses(positive_logits, log_totals)
        if any(ctx.needs_input_grad):
            grad_queries, grad_pool = torch.empty_like(queries), torch.empty_like(pool)
            shared |= dict(log_norms=positive_logits + losses)
            tiles = gradient_tiles[queries.shape[1] > 128]
            for grad, own, other in ((grad_queries, of_queries, of_pool), (grad_pool, of_pool, of_queries)):
                _launch_pairs(
                    kernels.pool_gradients, own, other, tiles, grad=matrix(grad), OF_POOL=grad is grad_pool, **shared
                )
            grad_positives = add_positive_part(grad_queries, queries, positives, losses, temperature)
            ctx.save_for_backward(grad_queries, grad_positives, grad_pool)
        return losses.sum()


class SampledSoftmaxLoss(SoftmaxLoss):
    """Softmax against R negatives per query. Vectors are float32 of at most WIDEST_VECTOR numbers."""

    @staticmethod
    def forward(ctx: Any, queries: Tensor, positives: Tensor, pool: Tensor, negatives: Negatives) -> Tensor:
        """See :func:`hstu.ops.functional.softmax_loss`."""
        draws, temperature = negatives.draws, negatives.temperature
        assert draws is not None
        _require_supported(queries)
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
            launcher(kernels.draw_logits, each_query, configs)(
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
            grad_queries = torch.empty_like(queries)
            if num_queries:
                launcher(kernels.draw_gradients, each_query, configs)(
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


class Seen(NamedTuple):
    """SeenItems as a kernel argument."""

    first: Any
    sequences: Any
    places: Any


def _weights(negatives: Negatives) -> dict[str, Any]:
    """Arguments of the kernels that compute logits: which entries count, and their weights."""
    log_weights, seen = negatives.log_weights, negatives.seen
    argument = Seen(None, None, None) if seen is None else Seen(seen.first, seen.sequences, seen.places)
    return dict(log_weights=log_weights, seen=argument, WEIGHTED=log_weights is not None, MASKED=seen is not None)


def _require_supported(vectors: Tensor) -> None:
    width = vectors.shape[1]
    if width > WIDEST_VECTOR or vectors.dtype != torch.float32:
        raise ValueError(f"vectors of {width} × {vectors.dtype}: at most {WIDEST_VECTOR}, in float32")


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
