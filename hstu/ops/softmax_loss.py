"""Sampled and full softmax losses of retrieval: −log softmax of a target item against a pool of negatives.

Both functions take vectors that are already L2-normalised. The gradient is computed together with the loss, so that
no score is computed twice and nothing larger than a block of scores is ever in memory; they are not twice
differentiable. Source: HSTU, arXiv 2402.17152, sec. 4.1.1, and its sampled-softmax setting, arXiv 2306.04039.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hstu.ops.backends import Backend
from hstu.ops.cpu.coverage import sampled_softmax_gap
from hstu.ops.pytorch.softmax_loss import PoolSoftmaxLoss, SampledSoftmaxLoss
from hstu.ops.triton import coverage as triton_coverage


def pool_softmax_loss(
    queries: Tensor,
    positives: Tensor,
    pool: Tensor,
    target_ids: Tensor,
    pool_ids: Tensor,
    pool_valid: Tensor | None,
    temperature: float,
    backend: Backend = Backend.PYTORCH,
) -> Tensor:
    """Sum over M queries of −log(e^{s⁺/τ} / (e^{s⁺/τ} + Σ e^{s⁻/τ})), the negatives being the whole pool.

    Args:
        queries: [M, D], normalised.
        positives: [M, D], normalised vectors of the targets.
        pool: [S, D], normalised vectors of the negatives, shared by all queries.
        target_ids: integer [M]. Pool entries of the same id as a query's target are not its negatives.
        pool_ids: integer [S]. An id that stands in the pool k times counts k times.
        pool_valid: bool [S], False for entries that are nobody's negatives; None: all are valid.
        temperature: τ > 0.

    Returns:
        Scalar, float32 (float64 if all vectors are); 0 where M = 0 or no query has a negative.

    Raises:
        ValueError: shapes that do not fit.
    """
    _check_shapes(queries, positives, pool, target_ids, pool_ids)
    if pool_valid is not None and pool_valid.shape != pool_ids.shape:
        raise ValueError(f"pool_valid is {tuple(pool_valid.shape)}, but pool_ids is {tuple(pool_ids.shape)}")
    with torch.autocast(queries.device.type, enabled=False):
        vectors = _in_full_precision(queries, positives, pool)
        if backend.uses_triton and triton_coverage.softmax_gap(queries.shape[1], vectors[0].dtype) is None:
            from hstu.ops.triton.softmax_loss import PoolSoftmaxLoss as Triton

            return Triton.apply(*vectors, target_ids, pool_ids, pool_valid, temperature)
        return PoolSoftmaxLoss.apply(*vectors, target_ids, pool_ids, pool_valid, temperature)


def sampled_softmax_loss(
    queries: Tensor,
    positives: Tensor,
    pool: Tensor,
    draws: Tensor,
    target_ids: Tensor,
    pool_ids: Tensor,
    temperature: float,
    backend: Backend = Backend.PYTORCH,
) -> Tensor:
    """As :func:`pool_softmax_loss`, but each query has its own R negatives, drawn from the pool with repetition.

    Args:
        queries, positives, pool, target_ids, pool_ids, temperature: as there.
        draws: integer [M, R], rows of the pool in [0, S).

    Returns:
        Scalar, float32 (float64 if all vectors are).

    Raises:
        ValueError: shapes that do not fit.
    """
    _check_shapes(queries, positives, pool, target_ids, pool_ids)
    if draws.dim() != 2 or len(draws) != len(queries):
        raise ValueError(f"draws must be [{len(queries)}, R], a row for each query, not {tuple(draws.shape)}")
    with torch.autocast(queries.device.type, enabled=False):
        vectors = _in_full_precision(queries, positives, pool)
        if backend is Backend.CPU and sampled_softmax_gap(queries.shape[1], vectors[0].dtype) is None:
            from hstu.ops.cpu.softmax_loss import SampledSoftmaxLoss as Cpu

            return Cpu.apply(*vectors, draws, target_ids, pool_ids, temperature)
        if backend.uses_triton and triton_coverage.softmax_gap(queries.shape[1], vectors[0].dtype) is None:
            from hstu.ops.triton.softmax_loss import SampledSoftmaxLoss as Triton

            return Triton.apply(*vectors, draws, target_ids, pool_ids, temperature)
        return SampledSoftmaxLoss.apply(*vectors, draws, target_ids, pool_ids, temperature)


def _in_full_precision(*vectors: Tensor) -> tuple[Tensor, ...]:
    """float64 stays if all are; anything else becomes float32, in which scores and sums are kept."""
    dtype = torch.float64 if all(v.dtype == torch.float64 for v in vectors) else torch.float32
    return tuple(v.to(dtype) for v in vectors)


def _check_shapes(queries: Tensor, positives: Tensor, pool: Tensor, target_ids: Tensor, pool_ids: Tensor) -> None:
    problems = []
    if queries.dim() != 2 or positives.shape != queries.shape:
        problems.append(f"queries {tuple(queries.shape)} and positives {tuple(positives.shape)} must both be [M, D]")
    if pool.dim() != 2 or pool.shape[1:] != queries.shape[1:]:
        problems.append(f"pool {tuple(pool.shape)} must be [S, D], as wide as the queries {tuple(queries.shape)}")
    if target_ids.shape != queries.shape[:1]:
        problems.append(f"target_ids {tuple(target_ids.shape)} must be [M], M = {len(queries)}")
    if pool_ids.shape != pool.shape[:1]:
        problems.append(f"pool_ids {tuple(pool_ids.shape)} must be [S], S = {len(pool)}")
    if problems:
        raise ValueError("; ".join(problems))
