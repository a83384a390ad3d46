"""Operators as differentiable functions that receive their kernels as arguments.

The losses call :func:`softmax_loss`. The other functions serve the plain layer, tests, self checks and benchmarks; the
fused layer (hstu/ops/layer.py) calls its kernels itself. Source: HSTU, arXiv 2402.17152, sec. 3.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from hstu.ops.kernels import (
    AddLayerNormInputs,
    AddLayerNormKernels,
    AttentionInputs,
    AttentionKernels,
    GateInputs,
    GateKernels,
    Gradient,
    Negatives,
    Preactivation,
    ProjectionKernels,
    RelativeBias,
    SoftmaxLoss,
)


def hstu_attention(inputs: AttentionInputs, kernels: AttentionKernels, shift: Tensor | None = None) -> Tensor:
    """``SiLU(α Q Kᵀ + bias) / N ⊙ mask @ V`` within each sequence: [T, H, d] in the dtype of v.

    With ``shift`` [H, 3, d], v, q and k are SiLU(inputs + shift), differentiated as in the fused layer.
    """
    if shift is not None and not kernels.differentiates_silu:
        parts = zip((inputs.v, inputs.q, inputs.k), shift.unbind(1), strict=True)
        v, q, k = (F.silu(x + own.to(x.dtype)) for x, own in parts)
        inputs, shift = replace(inputs, q=q, k=k, v=v), None

    def given(v: Tensor, q: Tensor, k: Tensor, tables: Sequence[Tensor]) -> AttentionInputs:
        return replace(inputs, q=q, k=k, v=v, bias=RelativeBias(*tables) if tables else None)

    def forward(
        v: Tensor, q: Tensor, k: Tensor, shift: Tensor | None, *tables: Tensor
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        if shift is None:
            return kernels.forward(given(v, q, k, tables)), None, None
        shifted = torch.stack([v, q, k], 2) + shift.to(v.dtype)  # views of one tensor, as in a layer
        activated = F.silu(shifted)
        v, q, k = activated.unbind(2)
        return kernels.forward(given(v, q, k, tables)), shifted, activated

    def backward(grad: Tensor, v: Tensor, q: Tensor, k: Tensor, shift: Tensor | None, *others: Any) -> Any:
        *tables, shifted, activated = others
        grads = q.new_empty(*q.shape[:2], 3, q.shape[2]).unbind(2)  # views with gaps, as in a layer
        if inputs.queries is not None:
            grads = tuple(map(torch.empty_like, (v, q, k)))
        grad_shift: Tensor | None = None
        before: Sequence[Preactivation | None] = [None] * 3
        if shift is not None:
            grad_shift, (v, q, k) = _empty_shift(shift), activated.unbind(2)
            before = [Preactivation(*part) for part in zip(shifted.unbind(2), grad_shift.unbind(1), strict=True)]
        of_v, of_q, of_k = map(Gradient, grads, before)
        grad_bias = kernels.backward(grad, given(v, q, k, tables), (of_q, of_k, of_v))
        return *grads, grad_shift, *(grad_bias or ())

    (out,) = _Differentiable.apply(forward, backward, 1, inputs.v, inputs.q, inputs.k, shift, *(inputs.bias or ()))
    return out


def _empty_shift(shift: Tensor) -> Tensor:
    return torch.empty(shift.shape, dtype=torch.promote_types(shift.dtype, torch.float32), device=shift.device)


def add_layer_norm(inputs: AddLayerNormInputs, kernels: AddLayerNormKernels) -> tuple[Tensor, Tensor]:
    """x + update in the dtype of x (x alone if update is None), and its LayerNorm: [T, D] each."""

    def forward(x: Tensor, update: Tensor | None, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        total, normalized, statistics = kernels.forward(replace(inputs, x=x, update=update, weight=weight, bias=bias))
        return total, normalized, total, statistics

    def backward(grad_total: Tensor, grad: Tensor, _: Tensor, update: Tensor | None, *saved: Tensor) -> Any:
        weight, bias, total, statistics = saved
        given = AddLayerNormInputs(total, None, weight, bias, inputs.eps, inputs.dtype)
        return kernels.backward(grad, grad_total, given, statistics, None if update is None else update.dtype)

    return _Differentiable.apply(forward, backward, 2, inputs.x, inputs.update, inputs.weight, inputs.bias)


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

    (out,) = _Differentiable.apply(forward, backward, 1, x, weight, bias)
    return out


def norm_mul_dropout(inputs: GateInputs, kernels: GateKernels, shift: Tensor | None = None) -> Tensor:
    """``Dropout(LayerNorm(x) ⊙ u)``: [T, H · d]. With ``shift`` [H, d], u is SiLU(inputs.u + shift), as in a layer."""
    if shift is not None and not kernels.differentiates_silu:
        inputs, shift = replace(inputs, u=F.silu(inputs.u + shift.to(inputs.u.dtype))), None

    def forward(x: Tensor, u: Tensor, shift: Tensor | None, weight: Tensor, bias: Tensor) -> Any:
        shifted = None if shift is None else u + shift.to(u.dtype)
        given = GateInputs(x, u if shifted is None else F.silu(shifted), weight, bias, inputs.config)
        gated, statistics, mask = kernels.forward(given)
        return gated, shifted, statistics, mask

    def backward(
        grad: Tensor, x: Tensor, u: Tensor, shift: Tensor | None, weight: Tensor, bias: Tensor, *saved: Any
    ) -> tuple[Tensor | None, ...]:
        shifted, statistics, mask = saved
        grad_shift = None if shift is None else _empty_shift(shift)
        before = None if grad_shift is None else Preactivation(shifted, grad_shift)
        grad_u = grad.new_empty(*u.shape[:2], 2, u.shape[2])[:, :, 0]  # a view with gaps, as in a layer
        given = GateInputs(x, u if before is None else F.silu(shifted), weight, bias, inputs.config)
        _, grad_x, *affine = kernels.backward(grad, given, statistics, mask, Gradient(grad_u, before))
        return grad_x, grad_u, grad_shift, *affine

    (out,) = _Differentiable.apply(forward, backward, 1, inputs.x, inputs.u, shift, inputs.weight, inputs.bias)
    return out


class _Differentiable(torch.autograd.Function):
    """First ``outputs`` results of ``forward(*inputs)``. Gradients: ``backward(*grads, *inputs, *other_results)``."""

    @staticmethod
    def forward(
        ctx: Any, forward: Callable[..., Any], backward: Callable[..., Any], outputs: int, *inputs: Any
    ) -> tuple[Tensor, ...]:
        with torch.autocast(inputs[0].device.type, enabled=False):
            results = forward(*inputs)
        ctx.save_for_backward(*inputs, *results[outputs:])
        ctx.apply_backward = backward
        return tuple(results[:outputs])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        with torch.autocast(grads[0].device.type, enabled=False):
            return None, None, None, *ctx.apply_backward(*grads, *ctx.saved_tensors)


def softmax_loss(queries: Tensor, positives: Tensor, pool: Tensor, negatives: Negatives, kernel: SoftmaxLoss) -> Tensor:
    """Sum over M queries of −log(e^{s⁺/τ} / (e^{s⁺/τ} + Σ w e^{s⁻/τ})), over the negatives of each query.

    The negatives are the whole pool, or pool rows that each query draws with repetition. Forward also computes the
    gradients: memory holds the scores of a block, or of as many queries as pay for it. Not twice
    differentiable. queries and positives (vectors of the targets): [M, D], pool: [S, D], all L2-normalized. kernel:
    ``sampled_softmax_loss`` of :class:`hstu.ops.kernels.Kernels` with draws, else ``pool_softmax_loss``.
    Returns a scalar, float32 (float64 if all vectors are); 0 where M = 0 or no query has a negative.
    Source: HSTU, arXiv 2402.17152, sec. 4.1.1; sampled softmax: arXiv 2306.04039.
    """
    vectors = queries, positives, pool
    # If all vectors are float64, so are scores and sums; otherwise all are float32.
    dtype = torch.float64 if all(v.dtype == torch.float64 for v in vectors) else torch.float32
    if negatives.log_weights is not None:
        negatives = replace(negatives, log_weights=negatives.log_weights.to(dtype))
    with torch.autocast(queries.device.type, enabled=False):
        return _SoftmaxLoss.apply(kernel, negatives, *(vector.to(dtype) for vector in vectors))


class _SoftmaxLoss(torch.autograd.Function):
    """A scalar loss whose forward saves the gradients of queries, positives and pool while scores are available."""

    @staticmethod
    def forward(ctx: Any, kernel: SoftmaxLoss, negatives: Negatives, *vectors: Tensor) -> Tensor:
        loss, gradients = kernel(vectors, negatives, any(ctx.needs_input_grad))
        ctx.save_for_backward(*gradients)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        """Scale the gradients that forward computed, in place unless ``retain_graph`` is set."""
        scale = torch.mul if torch._C._autograd._get_current_graph_task_keep_graph() else Tensor.mul_
        return None, None, *(scale(gradient, grad_loss) for gradient in ctx.saved_tensors)
