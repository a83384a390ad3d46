"""The softmax losses of retrieval by Triton kernels; as in :mod:`hstu.ops.pytorch.softmax_loss` forward makes the
gradients. No score of the pool is ever in memory; of draws one float32 each is.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from hstu.ops.pytorch.softmax_loss import SoftmaxLoss, add_positive_part, target_losses
from hstu.ops.triton.launch import launch
from hstu.ops.triton.rows import sums_by_key
from hstu.ops.triton.softmax_kernels import draw_gradients, draw_logits, pool_gradients, pool_log_totals

MAX_WIDTH = 256
"""Numbers of a vector: what tiles of them leave room for."""


class PoolSoftmaxLoss(SoftmaxLoss):
    """Softmax against the whole pool, block by block. Vectors float32 of at most MAX_WIDTH numbers."""

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
        """See hstu.ops.softmax_loss.pool_softmax_loss."""
        shared = _shared(queries, pool, target_ids, pool_ids, temperature) | dict(
            pool_valid=None if pool_valid is None else pool_valid.to(torch.uint8),
            num_queries=len(queries),
            pool_size=len(pool),
            VALIDATED=pool_valid is not None,
            PRECISION="tf32x3" if queries.shape[1] <= 128 else "ieee",
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
                    pool_gradients,
                    len(result),
                    tile,
                    configs,
                    grad=result,
                    stride_gr=result.stride(0),
                    OF_POOL=tile == "BLOCK_N",
                    **shared,
                )
            grad_positives = add_positive_part(grad_queries, queries, positives, losses, temperature)
            ctx.save_for_backward(grad_queries, grad_positives, grad_pool)
        return losses.sum()


class SampledSoftmaxLoss(SoftmaxLoss):
    """Softmax against R negatives a query. Vectors float32 of at most MAX_WIDTH numbers."""

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
        """See hstu.ops.softmax_loss.sampled_softmax_loss."""
        num_queries, num_draws = draws.shape
        shared = _shared(queries, pool, target_ids, pool_ids, temperature) | dict(
            draws=draws, num_draws=num_draws, stride_dr=draws.stride(0), stride_dc=draws.stride(1)
        )
        configs = _draw_configs(shared["BLOCK_D"])
        positive_logits = (queries * positives).sum(dim=1) / temperature
        logits = torch.empty(num_queries, num_draws, dtype=torch.float32, device=queries.device)
        log_totals = torch.empty_like(positive_logits)
        if num_queries:
            each_query = lambda meta: (num_queries,)  # noqa: E731
            launch(draw_logits, each_query, configs, (), logits=logits, log_totals=log_totals, **shared)
        losses = target_losses(positive_logits, log_totals)
        if any(ctx.needs_input_grad):
            grad_queries = torch.empty_like(queries)
            if num_queries:
                for name in ("queries", "target_ids", "pool_ids", "stride_qr", "stride_qc"):
                    del shared[name]
                launch(
                    draw_gradients,
                    each_query,
                    configs,
                    (),
                    logits=logits,
                    log_norms=positive_logits + losses,
                    weights=logits,  # in place
                    grad=grad_queries,
                    stride_gr=grad_queries.stride(0),
                    **shared,
                )
            grad_pool = sums_by_key(queries, draws.flatten().long(), len(pool), logits, max(1, num_draws))
            grad_positives = add_positive_part(grad_queries, queries, positives, losses, temperature)
            ctx.save_for_backward(grad_queries, grad_positives, grad_pool)
        return losses.sum()


def _shared(queries: Tensor, pool: Tensor, target_ids: Tensor, pool_ids: Tensor, temperature: float) -> dict[str, Any]:
    """The arguments that the kernels share."""
    width = queries.shape[1]
    if width > MAX_WIDTH or queries.dtype != torch.float32:
        raise ValueError(f"vectors of {width} × {queries.dtype}: at most {MAX_WIDTH}, in float32")
    return dict(
        queries=queries,
        pool=pool,
        target_ids=target_ids.contiguous(),
        pool_ids=pool_ids.contiguous(),
        inverse_temperature=1.0 / temperature,
        stride_qr=queries.stride(0),
        stride_qc=queries.stride(1),
        stride_pr=pool.stride(0),
        stride_pc=pool.stride(1),
        WIDTH=width,
        BLOCK_D=max(16, triton.next_power_of_2(width)),
    )


def _launch_blocks(kernel: Any, length: int, tile: str, configs: list[triton.Config], **arguments: Any) -> None:
    """One program for each block of ``length`` rows."""
    if length:
        launch(kernel, lambda meta: (triton.cdiv(length, meta[tile]),), configs, (), **arguments)


def _pool_configs(block_d: int) -> list[triton.Config]:
    tile = 32 if block_d <= 128 else 16
    return [triton.Config({"BLOCK_M": tile, "BLOCK_N": tile}, num_warps=4 if block_d <= 64 else 8, num_stages=1)]


def _draw_configs(block_d: int) -> list[triton.Config]:
    return [triton.Config({"BLOCK": 32 if block_d <= 128 else 16}, num_warps=4, num_stages=2)]
