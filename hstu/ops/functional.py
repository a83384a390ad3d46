"""Operators as differentiable functions of their tensors, given the kernels to use.

The losses call the softmax losses. The others serve tests, self checks and benchmarks: a layer calls its kernels
itself (hstu/ops/layer.py). Source of all: HSTU, arXiv 2402.17152, sec. 3.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from hstu.ops.kernels import (
    AddLayerNormKernels,
    AttentionConfig,
    AttentionKernels,
    GateConfig,
    GateKernels,
    Preactivation,
    ProjectionKernels,
    RelativeBias,
    SeenItems,
)
from hstu.ops.layout import JaggedLayout


def hstu_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: JaggedLayout,
    config: AttentionConfig,
    bias: RelativeBias | None,
    kernels: AttentionKernels,
) -> Tensor:
    """``SiLU(α Q Kᵀ + bias) / N ⊙ mask @ V`` within each sequence of ``layout``.

    q, k, v: [T, H, d], any float dtype, any strides. Returns [T, H, d] of the same dtype.

    Raises:
        ValueError: a bias, but a layout without times.
    """

    def forward(q: Tensor, k: Tensor, v: Tensor, *tables: Tensor) -> tuple[Tensor]:
        bias = relative_bias(tables[0], tables[1], layout) if tables else None
        return (kernels.forward(q, k, v, layout, config, bias),)

    def backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *tables: Tensor) -> tuple[Tensor, ...]:
        # Views of one tensor, as in a layer.
        grad_q, grad_k, grad_v = q.new_empty(*q.shape[:2], 3, q.shape[2]).unbind(2)
        bias = RelativeBias(*tables) if tables else None
        grad_bias = kernels.backward(grad, q, k, v, layout, config, bias, (grad_q, grad_k, grad_v))
        return grad_q, grad_k, grad_v, *(() if grad_bias is None else vars(grad_bias).values())

    return _differentiable(forward, backward, q, k, v, *(() if bias is None else vars(bias).values()))


def projected_attention(
    projected: Tensor,
    shift: Tensor,
    layout: JaggedLayout,
    config: AttentionConfig,
    bias: RelativeBias | None,
    kernels: AttentionKernels,
) -> Tensor:
    """:func:`hstu_attention` with v, q and k = SiLU(``projected`` + ``shift``), differentiated as in a layer.

    projected: [T, H, 3, d]; shift: [H, 3, d], whose gradient is of float32 at least. ``kernels`` differentiate SiLU.
    """
    biases = () if bias is None else (bias.position_weight, bias.time_weight)

    def forward(projected: Tensor, shift: Tensor, *tables: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        shifted = projected + shift.to(projected.dtype)
        activated = F.silu(shifted)
        v, q, k = activated.unbind(2)
        bias = relative_bias(tables[0], tables[1], layout) if tables else None
        return kernels.forward(q, k, v, layout, config, bias), shifted, activated

    def backward(grad: Tensor, projected: Tensor, shift: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
        *tables, shifted, activated = others
        v, q, k = activated.unbind(2)
        gradient = torch.empty_like(shifted)
        grad_shift = _empty_shift(shift)
        parts = zip(shifted.unbind(2), grad_shift.unbind(1), strict=True)
        of_v, of_q, of_k = (Preactivation(value, sums) for value, sums in parts)
        grad_v, grad_q, grad_k = gradient.unbind(2)
        bias, grads = RelativeBias(*tables) if tables else None, (grad_q, grad_k, grad_v)
        grad_bias = kernels.backward(grad, q, k, v, layout, config, bias, grads, (of_q, of_k, of_v))
        return gradient, grad_shift, *(() if grad_bias is None else vars(grad_bias).values())

    return _differentiable(forward, backward, projected, shift, *biases)


def _empty_shift(shift: Tensor) -> Tensor:
    return torch.empty(shift.shape, dtype=torch.promote_types(shift.dtype, torch.float32), device=shift.device)


def relative_bias(
    position_weight: Tensor | None, time_weight: Tensor | None, layout: JaggedLayout
) -> RelativeBias | None:
    """The bias with these tables, None where there are none. Raises ValueError for a layout without times."""
    if position_weight is None or time_weight is None:
        return None
    if layout.token_times is None:
        raise ValueError("a relative bias needs the times of the layout; build it with item_times")
    return RelativeBias(position_weight, time_weight)


def add_layer_norm(
    x: Tensor,
    update: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    dtype: torch.dtype,
    kernels: AddLayerNormKernels,
) -> tuple[Tensor, Tensor]:
    """x + update in the dtype of x (x where there is no update), and its LayerNorm in ``dtype``.

    x, update: [T, D]; weight, bias: [D].
    """
    with torch.autocast(x.device.type, enabled=False):
        total, normalized = _AddLayerNorm.apply(x, update, weight, bias, eps, dtype, kernels)
    return total, normalized


class _AddLayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        update: Tensor | None,
        weight: Tensor,
        bias: Tensor,
        eps: float,
        dtype: torch.dtype,
        kernels: AddLayerNormKernels,
    ) -> tuple[Tensor, Tensor]:
        total, normalized, statistics = kernels.forward(x, update, weight, bias, eps, dtype)
        ctx.save_for_backward(total, weight, bias, statistics)
        ctx.kernels, ctx.update_dtype = kernels, None if update is None else update.dtype
        return total, normalized

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor, grad: Tensor) -> tuple[Tensor | None, ...]:
        with torch.autocast(grad.device.type, enabled=False):
            grads = ctx.kernels.backward(grad, grad_total, *ctx.saved_tensors, ctx.update_dtype)
        return *grads, None, None, None


def project_uvqk(x: Tensor, weight: Tensor, bias: Tensor, kernels: ProjectionKernels) -> Tensor:
    """SiLU(x Wᵀ + b). x: [T, D], weight: [H · 4 · d, D], bias: [H · 4 · d], of one dtype. Returns [T, H · 4 · d]."""

    def forward(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        projected, activated = kernels.forward(x, weight, bias)
        return activated, projected

    def backward(
        grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, projected: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        grad = torch.ops.aten.silu_backward(grad, projected)
        return grad @ weight, grad.t() @ x, grad.sum(0)

    return _differentiable(forward, backward, x, weight, bias)


def norm_mul_dropout(
    x: Tensor, u: Tensor, weight: Tensor, bias: Tensor, config: GateConfig, kernels: GateKernels
) -> Tensor:
    """``Dropout(LayerNorm(x over all heads) ⊙ u)``. x, u: [T, H, d]; weight, bias: [H · d]. Returns [T, H · d]."""

    def forward(x: Tensor, u: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        return kernels.forward(x, u, weight, bias, config)

    def backward(
        grad: Tensor, x: Tensor, u: Tensor, weight: Tensor, bias: Tensor, statistics: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, ...]:
        grad_u = grad.new_empty(*u.shape[:2], 2, u.shape[2])[:, :, 0]  # a view with gaps, as in a layer
        _, grad_x, *affine = kernels.backward(grad, x, u, weight, bias, config, statistics, mask, grad_u)
        return grad_x, grad_u, *affine

    return _differentiable(forward, backward, x, u, weight, bias)


def projected_gate(
    x: Tensor, projected: Tensor, shift: Tensor, weight: Tensor, bias: Tensor, config: GateConfig, kernels: GateKernels
) -> Tensor:
    """:func:`norm_mul_dropout` with u = SiLU(``projected`` + ``shift``), differentiated as in a layer.

    projected: [T, H, d]; shift: [H, d], whose gradient is of float32 at least. ``kernels`` differentiate SiLU.
    """

    def forward(
        x: Tensor, projected: Tensor, shift: Tensor, weight: Tensor, bias: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        shifted = projected + shift.to(projected.dtype)
        gated, statistics, mask = kernels.forward(x, F.silu(shifted), weight, bias, config)
        return gated, shifted, statistics, mask

    def backward(
        grad: Tensor,
        x: Tensor,
        projected: Tensor,
        shift: Tensor,
        weight: Tensor,
        bias: Tensor,
        shifted: Tensor,
        statistics: Tensor,
        mask: Tensor | None,
    ) -> tuple[Tensor, ...]:
        before = Preactivation(shifted, _empty_shift(shift))
        gradient, u = torch.empty_like(shifted), F.silu(shifted)
        _, grad_x, *affine = kernels.backward(grad, x, u, weight, bias, config, statistics, mask, gradient, before)
        return grad_x, gradient, before.grad_shift, *affine

    return _differentiable(forward, backward, x, projected, shift, weight, bias)


def _differentiable(
    forward: Callable[..., tuple[Tensor | None, ...]],
    backward: Callable[..., tuple[Tensor | None, ...]],
    *inputs: Tensor,
) -> Tensor:
    """The first result of ``forward(*inputs)``, with the gradients ``backward(grad, *inputs, *other_results)``."""
    with torch.autocast(inputs[0].device.type, enabled=False):
        out: Tensor = _Differentiable.apply(forward, backward, *inputs)
    return out


class _Differentiable(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, forward: Callable[..., Any], backward: Callable[..., Any], *inputs: Tensor) -> Tensor:
        out, *others = forward(*inputs)
        ctx.save_for_backward(*inputs, *others)
        ctx.apply_backward = backward
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        with torch.autocast(grad.device.type, enabled=False):
            return None, None, *ctx.apply_backward(grad, *ctx.saved_tensors)


# -- softmax losses of retrieval ---------------------------------------------------------------------------------


def pool_softmax_loss(
    queries: Tensor,
    positives: Tensor,
    pool: Tensor,
    target_ids: Tensor,
    pool_ids: Tensor,
    pool_log_weights: Tensor | None,
    temperature: float,
    kernel: Callable[..., Tensor],
    seen: SeenItems | None = None,
) -> Tensor:
    """Sum over M queries of −log(e^{s⁺/τ} / (e^{s⁺/τ} + Σ w e^{s⁻/τ})), with the whole pool as negatives.

    The gradients are computed together with the loss, so that no score is computed twice and memory holds at most a
    block of scores. Not twice differentiable.
    Source: HSTU, arXiv 2402.17152, sec. 4.1.1; sampled softmax: arXiv 2306.04039.

    Args:
        queries: [M, D], L2-normalized.
        positives: [M, D], L2-normalized vectors of the targets.
        pool: [S, D], L2-normalized vectors of the negatives, shared by all queries.
        target_ids: integer [M]. Pool entries with the id of a query's target are not its negatives.
        pool_ids: integer [S]. An id that occurs k times in the pool counts k times.
        pool_log_weights: float [S], log w of each entry, −∞ for entries that no query uses; None: all w are 1.
        temperature: τ > 0.
        kernel: :attr:`hstu.ops.kernels.Kernels.pool_softmax_loss`.
        seen: hides the items that the users have, the targets among them; ids are not compared. None: only the targets.

    Returns:
        Scalar, float32 (float64 if all vectors are); 0 where M = 0 or no query has a negative.

    Raises:
        ValueError: shapes that do not match.
    """
    _check_shapes(queries, positives, pool, target_ids, pool_ids, pool_log_weights, seen)
    vectors, log_weights = _in_full_precision(queries, positives, pool, pool_log_weights)
    with torch.autocast(queries.device.type, enabled=False):
        return kernel(*vectors, target_ids, pool_ids, log_weights, temperature, seen)


def sampled_softmax_loss(
    queries: Tensor,
    positives: Tensor,
    pool: Tensor,
    draws: Tensor,
    target_ids: Tensor,
    pool_ids: Tensor,
    pool_log_weights: Tensor | None,
    temperature: float,
    kernel: Callable[..., Tensor],
    seen: SeenItems | None = None,
) -> Tensor:
    """As :func:`pool_softmax_loss`, but each query has R negatives, drawn from the pool with repetition.

    Args:
        queries, positives, pool, target_ids, pool_ids, pool_log_weights, temperature, seen: as there.
        draws: integer [M, R], rows of the pool in [0, S).
        kernel: :attr:`hstu.ops.kernels.Kernels.sampled_softmax_loss`.

    Returns:
        Scalar, float32 (float64 if all vectors are).

    Raises:
        ValueError: shapes that do not match.
    """
    _check_shapes(queries, positives, pool, target_ids, pool_ids, pool_log_weights, seen)
    if draws.dim() != 2 or len(draws) != len(queries):
        raise ValueError(f"draws must be [{len(queries)}, R], a row for each query, not {tuple(draws.shape)}")
    vectors, log_weights = _in_full_precision(queries, positives, pool, pool_log_weights)
    with torch.autocast(queries.device.type, enabled=False):
        return kernel(*vectors, draws, target_ids, pool_ids, log_weights, temperature, seen)


def _in_full_precision(
    queries: Tensor, positives: Tensor, pool: Tensor, log_weights: Tensor | None
) -> tuple[tuple[Tensor, ...], Tensor | None]:
    """float64 stays if all vectors are; else all becomes float32, in which scores and sums are kept."""
    vectors = queries, positives, pool
    dtype = torch.float64 if all(v.dtype == torch.float64 for v in vectors) else torch.float32
    return tuple(v.to(dtype) for v in vectors), None if log_weights is None else log_weights.to(dtype)


def _check_shapes(
    queries: Tensor,
    positives: Tensor,
    pool: Tensor,
    target_ids: Tensor,
    pool_ids: Tensor,
    log_weights: Tensor | None,
    seen: SeenItems | None,
) -> None:
    problems = []
    if queries.dim() != 2 or positives.shape != queries.shape:
        problems.append(f"queries {tuple(queries.shape)} and positives {tuple(positives.shape)} must both be [M, D]")
    if pool.dim() != 2 or pool.shape[1:] != queries.shape[1:]:
        problems.append(f"pool {tuple(pool.shape)} must be [S, D], as wide as the queries {tuple(queries.shape)}")
    if target_ids.shape != queries.shape[:1]:
        problems.append(f"target_ids {tuple(target_ids.shape)} must be [M], M = {len(queries)}")
    if pool_ids.shape != pool.shape[:1]:
        problems.append(f"pool_ids {tuple(pool_ids.shape)} must be [S], S = {len(pool)}")
    if log_weights is not None and log_weights.shape != pool.shape[:1]:
        problems.append(f"pool_log_weights {tuple(log_weights.shape)} must be [S], S = {len(pool)}")
    if seen is not None and seen.first.shape[1:] != pool.shape[:1]:
        problems.append(f"first {tuple(seen.first.shape)} of the seen items must be [B, S], S = {len(pool)}")
    if seen is not None and not seen.sequences.shape == seen.places.shape == queries.shape[:1]:
        problems.append(f"sequences and places of the seen items must be [M], M = {len(queries)}")
    if problems:
        raise ValueError("; ".join(problems))
