"""Kernels that compute nothing: they allocate what real ones allocate, and report what these cost.

A step with them, on tensors without data (torch's FakeTensorMode), shows what a run needs. What is not here runs as
PyTorch's own operators, whose cost their shapes tell.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from hstu.ops import costs
from hstu.ops.costs import Cost, TwoPasses
from hstu.ops.kernels import (
    AddLayerNormInputs,
    AddLayerNormKernels,
    AttentionInputs,
    AttentionKernels,
    Backend,
    GateInputs,
    GateKernels,
    Gradient,
    Kernels,
    Negatives,
    ProjectionKernels,
    RelativeBias,
)
from hstu.ops.pytorch import softmax_loss
from hstu.ops.pytorch.operators import REFERENCE_KERNELS

Report = Callable[..., None]
"""Called with the name of an operator, the cost of one of its passes, and the tensors that it reads."""


def fake_kernels(backend: Backend, report: Report) -> Kernels:
    """Fakes of what ``backend`` has kernels of its own for. CPU stands for the C++ kernels, PYTORCH for plain PyTorch.

    ``report`` is called once for each pass of an operator.
    """
    fused = backend in (Backend.TRITON, Backend.CUTLASS)
    attention = _FakeAttention(report, backend is Backend.PYTORCH)

    def loss(queries: Tensor, positives: Tensor, pool: Tensor, negatives: Negatives) -> Tensor:
        result: Tensor = _FakeSoftmax.apply(queries, positives, pool, negatives, report)
        return result

    found = replace(
        REFERENCE_KERNELS,
        attention=AttentionKernels(attention.forward, attention.backward, backend is not Backend.CPU),
        sampled_softmax_loss=loss,
        pool_softmax_loss=loss,
    )
    if backend is not Backend.PYTORCH:
        gate = _FakeGate(report, saves_seed=fused)
        found = replace(found, norm_mul_dropout=GateKernels(gate.forward, gate.backward, fused))
    if fused:
        norm, projection = _FakeAddLayerNorm(report), _FakeProjection(report)
        found = replace(
            found,
            add_layer_norm=AddLayerNormKernels(norm.forward, norm.backward),
            project_uvqk=ProjectionKernels(projection.forward, projection.activate),
        )
    return found


class _FakeAttention:
    """Attention; ``copies``: in plain PyTorch, which copies all tensors, to float32 at least."""

    def __init__(self, report: Report, copies: bool) -> None:
        self.report, self.copies = report, copies

    def forward(self, inputs: AttentionInputs) -> Tensor:
        """See AttentionForward."""
        self.report("attention", self._cost(inputs).forward, inputs.q, inputs.k, inputs.v)
        copies = self._copies(inputs.q, 4)
        del copies[:3]
        return torch.empty(inputs.v.shape, dtype=inputs.v.dtype, device=inputs.v.device)

    def backward(
        self, grad: Tensor, inputs: AttentionInputs, grads: tuple[Gradient, Gradient, Gradient]
    ) -> RelativeBias | None:
        """See AttentionBackward."""
        self.report("attention", self._cost(inputs).backward, grad, inputs.q, inputs.k, inputs.v)
        copies = self._copies(inputs.q, 7)  # of q, k, v and the gradient, and the three gradients
        del copies
        bias = inputs.bias
        return bias and RelativeBias(torch.empty_like(bias.position_weight), torch.empty_like(bias.time_weight))

    def _copies(self, q: Tensor, count: int) -> list[Tensor]:
        wide = torch.promote_types(q.dtype, torch.float32)
        return [torch.empty(q.shape, dtype=wide, device=q.device) for _ in range(count if self.copies else 0)]

    @staticmethod
    def _cost(inputs: AttentionInputs) -> TwoPasses:
        q, config, layout = inputs.q, inputs.config, inputs.layout
        window = costs.Window(config.max_span, config.full_tokens, layout.num_contextuals)
        lengths, candidates = layout.seqlens, layout.num_candidate_tokens_host
        _, heads, width = q.shape
        return costs.attention(lengths, candidates, heads, width, q.element_size(), config.is_causal, window)


class _FakeGate:
    """The gated norm. Triton's saves a seed for the dropout mask, C++'s the mask."""

    def __init__(self, report: Report, saves_seed: bool) -> None:
        self.report, self.saves_seed = report, saves_seed

    def forward(self, inputs: GateInputs) -> tuple[Tensor, Tensor, Tensor | None]:
        """See GateForward."""
        x, config, shape = inputs.x, inputs.config, inputs.x.flatten(1).shape
        self.report("norm, gate, dropout", self._cost(x).forward, x, inputs.u)
        statistics, mask = x.new_empty((2, len(x)), dtype=torch.float32), None
        if config.comm.tp_size > 1:
            config.comm.all_gather(statistics)
        if config.dropout > 0:
            dtype = torch.int64 if self.saves_seed else torch.bool
            mask = x.new_empty(() if self.saves_seed else shape, dtype=dtype)
        return x.new_empty(shape), statistics, mask

    def backward(
        self, grad: Tensor, inputs: GateInputs, statistics: Tensor, dropout_mask: Tensor | None, grad_u: Gradient
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """See GateBackward."""
        x, comm = inputs.x, inputs.config.comm
        self.report("norm, gate, dropout", self._cost(x).backward, grad, x, inputs.u)
        if comm.tp_size > 1:
            comm.all_gather(torch.empty_like(statistics))
        affine = torch.empty_like(inputs.weight), torch.empty_like(inputs.bias)
        return x.new_empty(x.flatten(1).shape), torch.empty_like(x), *affine

    @staticmethod
    def _cost(x: Tensor) -> TwoPasses:
        return costs.norm_mul_dropout(len(x), x.shape[1] * x.shape[2], x.element_size())


class _FakeAddLayerNorm:
    """The residual stream and its norm in one kernel each way."""

    def __init__(self, report: Report) -> None:
        self.report = report

    def forward(self, inputs: AddLayerNormInputs) -> tuple[Tensor, Tensor, Tensor]:
        """See AddLayerNormForward."""
        x, others = inputs.x, () if inputs.update is None else (inputs.update,)
        cost = costs.add_layer_norm(len(x), x.shape[1], inputs.dtype.itemsize, x.element_size())
        self.report("residual and norm", cost.forward, x, *others)
        total = torch.empty_like(x) if others else x
        return total, x.new_empty(x.shape, dtype=inputs.dtype), x.new_empty((2, len(x)), dtype=torch.float32)

    def backward(
        self,
        grad: Tensor,
        grad_total: Tensor,
        inputs: AddLayerNormInputs,
        statistics: Tensor,
        update_dtype: torch.dtype | None,
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        """See AddLayerNormBackward."""
        total = inputs.x
        cost = costs.add_layer_norm(len(total), total.shape[1], grad.element_size(), total.element_size())
        self.report("residual and norm", cost.backward, grad, grad_total, total)
        grad_x = grad_update = torch.empty_like(total)
        if update_dtype is not None and update_dtype != total.dtype:
            grad_update = torch.empty_like(total, dtype=update_dtype)
        affine = torch.empty_like(inputs.weight), torch.empty_like(inputs.bias)
        return grad_x, None if update_dtype is None else grad_update, *affine


class _FakeProjection:
    """The projection to u, v, q and k, which writes its SiLU, too."""

    def __init__(self, report: Report) -> None:
        self.report = report

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """See ProjectionKernels."""
        rows, outputs = len(x), len(weight)
        moved = x.element_size() * (rows * (x.shape[1] + 2 * outputs) + weight.numel())
        self.report("matrix products", Cost(2.0 * rows * outputs * x.shape[1], float(moved)), x, weight)
        projected = x.new_empty((rows, outputs))
        return projected, torch.empty_like(projected)

    def activate(self, projected: Tensor) -> Tensor:
        """See ProjectionKernels."""
        self.report("other operators", Cost(0.0, 2.0 * projected.nbytes), projected)
        return torch.empty_like(projected)


class _FakeSoftmax(softmax_loss.SoftmaxLoss):
    """The softmax losses, whose forward saves the gradients.

    With negatives of each query's own there are scores, their weights, and the draws sorted by row; with a whole pool
    there is a block of scores at a time.
    """

    @staticmethod
    def forward(
        ctx: Any, queries: Tensor, positives: Tensor, pool: Tensor, negatives: Negatives, report: Report
    ) -> Tensor:
        """See hstu.ops.functional.softmax_loss."""
        draws, width = negatives.draws, pool.shape[1]
        if draws is None:
            report("loss", costs.pool_softmax(len(queries), len(pool), width), queries, positives, pool)
            blocks = [pool.new_empty(min(len(queries) * len(pool), 1 << 20))]
        else:
            report("loss", costs.sampled_softmax(len(draws), draws.shape[1], width), queries, positives, pool)
            blocks = [queries.new_empty(draws.shape) for _ in range(2)]
            blocks += [draws.new_empty(draws.shape, dtype=torch.int64) for _ in range(4)]
        del blocks
        ctx.save_for_backward(*map(torch.empty_like, (queries, positives, pool)))
        return queries.new_empty(())
