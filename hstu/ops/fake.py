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
    AddLayerNormKernels,
    AttentionConfig,
    AttentionKernels,
    Backend,
    GateConfig,
    GateKernels,
    Kernels,
    Preactivation,
    ProjectionKernels,
    RelativeBias,
)
from hstu.ops.layout import JaggedLayout
from hstu.ops.pytorch.operators import REFERENCE_KERNELS
from hstu.ops.pytorch.softmax_loss import SoftmaxLoss

Report = Callable[..., None]
"""Called with the name of an operator, the cost of one of its passes, and the tensors that it reads."""


def fake_kernels(backend: Backend, report: Report) -> Kernels:
    """Fakes of what ``backend`` has kernels of its own for. CPU stands for the C++ kernels, PYTORCH for plain PyTorch.

    ``report`` is called once for each pass of an operator.
    """
    fused = backend in (Backend.TRITON, Backend.CUTLASS)
    attention = _FakeAttention(report, backend is Backend.PYTORCH)
    found = replace(
        REFERENCE_KERNELS,
        attention=AttentionKernels(attention.forward, attention.backward, backend is not Backend.CPU),
        sampled_softmax_loss=_FakeSampledSoftmax.reporting(report),
        pool_softmax_loss=_FakePoolSoftmax.reporting(report),
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

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, layout: JaggedLayout, config: AttentionConfig, bias: RelativeBias | None
    ) -> Tensor:
        """See AttentionForward."""
        self.report("attention", self._cost(q, layout, config).forward, q, k, v)
        copies = self._copies(q, 4)
        del copies[:3]
        return torch.empty(v.shape, dtype=v.dtype, device=v.device)

    def backward(
        self,
        grad: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        layout: JaggedLayout,
        config: AttentionConfig,
        bias: RelativeBias | None,
        grads: tuple[Tensor, Tensor, Tensor],
        before_silu: tuple[Preactivation, Preactivation, Preactivation] | None = None,
    ) -> RelativeBias | None:
        """See AttentionBackward."""
        self.report("attention", self._cost(q, layout, config).backward, grad, q, k, v)
        copies = self._copies(q, 7)  # of q, k, v and the gradient, and the three gradients
        del copies
        if bias is None:
            return None
        return RelativeBias(torch.empty_like(bias.position_weight), torch.empty_like(bias.time_weight))

    def _copies(self, q: Tensor, count: int) -> list[Tensor]:
        wide = torch.promote_types(q.dtype, torch.float32)
        return [torch.empty(q.shape, dtype=wide, device=q.device) for _ in range(count if self.copies else 0)]

    @staticmethod
    def _cost(q: Tensor, layout: JaggedLayout, config: AttentionConfig) -> TwoPasses:
        window = costs.Window(config.max_span, config.full_tokens, layout.num_contextuals)
        lengths, candidates = layout.seqlens, layout.num_candidate_tokens_host
        _, heads, width = q.shape
        return costs.attention(lengths, candidates, heads, width, q.element_size(), config.is_causal, window)


class _FakeGate:
    """The gated norm. Triton's saves a seed for the dropout mask, C++'s the mask."""

    def __init__(self, report: Report, saves_seed: bool) -> None:
        self.report, self.saves_seed = report, saves_seed

    def forward(
        self, x: Tensor, u: Tensor, weight: Tensor, bias: Tensor, config: GateConfig
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """See GateForward."""
        self.report("norm, gate, dropout", self._cost(x).forward, x, u)
        statistics, mask = x.new_empty((2, len(x)), dtype=torch.float32), None
        if config.comm.tp_size > 1:
            config.comm.all_gather(statistics)
        if config.dropout > 0:
            mask = x.new_empty(() if self.saves_seed else x.flatten(1).shape, dtype=_mask_type(self.saves_seed))
        return x.new_empty(x.flatten(1).shape), statistics, mask

    def backward(
        self,
        grad: Tensor,
        x: Tensor,
        u: Tensor,
        weight: Tensor,
        bias: Tensor,
        config: GateConfig,
        statistics: Tensor,
        dropout_mask: Tensor | None,
        grad_u: Tensor,
        before_silu: Preactivation | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """See GateBackward."""
        self.report("norm, gate, dropout", self._cost(x).backward, grad, x, u)
        if config.comm.tp_size > 1:
            config.comm.all_gather(torch.empty_like(statistics))
        return x.new_empty(x.flatten(1).shape), torch.empty_like(x), torch.empty_like(weight), torch.empty_like(bias)

    @staticmethod
    def _cost(x: Tensor) -> TwoPasses:
        return costs.norm_mul_dropout(len(x), x.shape[1] * x.shape[2], x.element_size())


def _mask_type(saves_seed: bool) -> torch.dtype:
    return torch.int64 if saves_seed else torch.bool


class _FakeAddLayerNorm:
    """The residual stream and its norm in one kernel each way."""

    def __init__(self, report: Report) -> None:
        self.report = report

    def forward(
        self, x: Tensor, update: Tensor | None, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See AddLayerNormForward."""
        cost, others = (
            costs.add_layer_norm(len(x), x.shape[1], dtype.itemsize, x.element_size()),
            () if update is None else (update,),
        )
        self.report("residual and norm", cost.forward, x, *others)
        total = x if update is None else torch.empty_like(x)
        return total, x.new_empty(x.shape, dtype=dtype), x.new_empty((2, len(x)), dtype=torch.float32)

    def backward(
        self,
        grad: Tensor,
        grad_total: Tensor,
        total: Tensor,
        weight: Tensor,
        bias: Tensor,
        statistics: Tensor,
        update_dtype: torch.dtype | None,
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        """See AddLayerNormBackward."""
        cost = costs.add_layer_norm(len(total), total.shape[1], grad.element_size(), total.element_size())
        self.report("residual and norm", cost.backward, grad, grad_total, total)
        grad_x = torch.empty_like(total)
        grad_update = grad_x
        if update_dtype is not None and update_dtype != total.dtype:
            grad_update = torch.empty_like(total, dtype=update_dtype)
        affine = torch.empty_like(weight), torch.empty_like(bias)
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


class _FakeSoftmax(SoftmaxLoss):
    """What the softmax losses share: gradients that are saved in forward."""

    @classmethod
    def reporting(cls, report: Report) -> Callable[..., Tensor]:
        """The differentiable loss, which calls ``report`` in forward."""

        def loss(*args: Any) -> Tensor:
            result: Tensor = cls.apply(report, *args)
            return result

        return loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        """Scale the gradients."""
        return None, *SoftmaxLoss.backward(ctx, grad_loss)[: len(ctx.needs_input_grad) - 1]


class _FakeSampledSoftmax(_FakeSoftmax):
    """Softmax of each query over negatives of its own: scores, their weights, and the draws sorted by row."""

    @staticmethod
    def forward(
        ctx: Any, report: Report, queries: Tensor, positives: Tensor, pool: Tensor, draws: Tensor, *others: Any
    ) -> Tensor:
        """See hstu.ops.functional.sampled_softmax_loss."""
        report("loss", costs.sampled_softmax(len(draws), draws.shape[1], pool.shape[1]), queries, positives, pool)
        scores = [queries.new_empty(draws.shape) for _ in range(2)]
        in_order = [draws.new_empty(draws.shape, dtype=torch.int64) for _ in range(4)]
        del scores, in_order
        ctx.save_for_backward(*map(torch.empty_like, (queries, positives, pool)))
        return queries.new_empty(())


class _FakePoolSoftmax(_FakeSoftmax):
    """Softmax of each query over a whole pool, of which a block of scores exists at a time."""

    @staticmethod
    def forward(ctx: Any, report: Report, queries: Tensor, positives: Tensor, pool: Tensor, *others: Any) -> Tensor:
        """See hstu.ops.functional.pool_softmax_loss."""
        report("loss", costs.pool_softmax(len(queries), len(pool), pool.shape[1]), queries, positives, pool)
        block = pool.new_empty(min(len(queries) * len(pool), 1 << 20))
        del block
        ctx.save_for_backward(*map(torch.empty_like, (queries, positives, pool)))
        return queries.new_empty(())
