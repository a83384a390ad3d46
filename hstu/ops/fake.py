"""Fake kernels: they allocate what real kernels allocate, report the costs, and compute nothing.

On tensors without data (torch's FakeTensorMode) they show what a step needs. Other operators run as PyTorch's own.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hstu.data.batches.jagged import run_starts
from hstu.ops import costs, kernels
from hstu.ops.costs import Cost, TwoPasses
from hstu.ops.kernels import AttentionInputs, Backend, Gradient, Loss, Negatives
from hstu.ops.pytorch import softmax_loss
from hstu.ops.pytorch.attention import ROWS_PER_BLOCK, groups
from hstu.ops.pytorch.operators import REFERENCE_KERNELS

Report = Callable[..., None]
"""Called with the name of an operator, the cost of one of its passes, and the tensors that it reads."""


def fake_kernels(backend: Backend, device_type: str, report: Report) -> kernels.Kernels:
    """Fakes of the kernels that ``backend`` uses on a device. ``report`` is called once per pass of an operator."""
    fused = backend in (Backend.TRITON, Backend.CUTLASS)
    copies, is_cpp = backend is Backend.PYTORCH, backend is Backend.CPU
    loss = partial(_softmax_loss, report, softmax_loss.BLOCK_ELEMENTS[device_type], is_cpp)
    found = replace(
        REFERENCE_KERNELS,
        attention=kernels.AttentionKernels(
            partial(_attention, report, copies),
            partial(_attention_backward, report, copies),
            differentiates_silu=not is_cpp,
            serves_ranges=backend is not Backend.CUTLASS,
        ),
        sampled_softmax_loss=loss,
        pool_softmax_loss=loss,
    )
    if backend is not Backend.PYTORCH:
        gate = kernels.GateKernels(partial(_gate, report, fused), partial(_gate_backward, report), fused)
        found = replace(found, norm_mul_dropout=gate)
    if is_cpp:
        found = replace(found, l2_normalize=lambda vectors, eps: _FakeUnit.apply(vectors.float(), report))
    if fused:
        norm = kernels.AddLayerNormKernels(partial(_add_layer_norm, report), partial(_add_layer_norm_backward, report))
        projection = kernels.ProjectionKernels(partial(_project, report), partial(_activate, report))
        found = replace(found, add_layer_norm=norm, project_uvqk=projection)
    return found


def _attention(report: Report, copies: bool, inputs: AttentionInputs) -> Tensor:
    """``copies``: whether attention is plain PyTorch, whose copies of its inputs and outputs count."""
    report("attention", _attention_cost(inputs).forward, inputs.q, inputs.k, inputs.v)
    if copies:
        _copies(inputs, rows=4, padded=4, blocks=1)
    return torch.empty(inputs.q.shape, dtype=inputs.v.dtype, device=inputs.v.device)


def _attention_backward(
    report: Report, copies: bool, grad: Tensor, inputs: AttentionInputs, grads: tuple[Gradient, Gradient, Gradient]
) -> kernels.RelativeBias | None:
    report("attention", _attention_cost(inputs).backward, grad, inputs.q, inputs.k, inputs.v)
    if copies:
        _copies(inputs, rows=7, padded=7, blocks=3)
    return inputs.bias and kernels.RelativeBias(*map(torch.empty_like, inputs.bias))


def _copies(inputs: AttentionInputs, rows: int, padded: int, blocks: int) -> list[Tensor]:
    """Temporaries of hstu/ops/pytorch/attention.py: ``rows`` copies of all tokens, ``padded`` copies of a group of
    padded sequences and one more, or five of the next group, and ``blocks`` of scores."""
    (_, heads, width), q = inputs.q.shape, inputs.q
    shapes = [each.tokens.shape for each in islice(groups(inputs.layout, inputs.config, heads), 2)]
    first, second = [*shapes, torch.Size((0, 0)), torch.Size((0, 0))][:2]  # the first has the longest sequences
    copy, more = (heads * width * shape.numel() for shape in (first, second))
    scores = heads * first.numel() * min(ROWS_PER_BLOCK[q.device.type], first[1])
    sizes = [*[max(q.numel(), inputs.k.numel())] * rows, *[copy] * padded, max(copy, 5 * more), *[scores] * blocks]
    return [q.new_empty(size, dtype=torch.promote_types(q.dtype, torch.float32)) for size in sizes]


def _attention_cost(inputs: AttentionInputs) -> TwoPasses:
    q, config, layout = inputs.q, inputs.config, inputs.layout
    window = costs.Window(config.max_span, config.full_tokens, layout.num_contextuals)
    lengths, candidates = layout.seqlens, layout.num_candidate_tokens_host
    _, heads, width = q.shape
    flops = float(costs.attention_flops(lengths, candidates, heads, width, config.is_causal, window).sum())
    if inputs.queries is not None:
        starts = run_starts(lengths)
        first, stop = (np.clip(bound - starts, 0, lengths) for bound in (inputs.queries.start, inputs.queries.stop))
        pairs = stop**2 - first**2 if config.is_causal else (stop - first) * lengths
        flops *= float(pairs.sum() / max(1, (lengths**2).sum()))
    return costs.attention(flops, layout.num_tokens, heads * width, q.element_size())


def _gate(report: Report, saves_seed: bool, inputs: kernels.GateInputs) -> tuple[Tensor, Tensor, Tensor | None]:
    """``saves_seed``: Triton saves a seed for the dropout mask; C++ saves the mask."""
    x, config, shape = inputs.x, inputs.config, inputs.x.flatten(1).shape
    report("norm, gate, dropout", _gate_cost(x).forward, x, inputs.u)
    statistics, mask = x.new_empty((2, len(x)), dtype=torch.float32), None
    if config.comm.tp_size > 1:
        config.comm.all_gather(statistics)
    if config.dropout > 0:
        mask = x.new_empty((), dtype=torch.int64) if saves_seed else x.new_empty(shape, dtype=torch.bool)
    return x.new_empty(shape), statistics, mask


def _gate_backward(
    report: Report, grad: Tensor, inputs: kernels.GateInputs, statistics: Tensor, mask: Tensor | None, grad_u: Gradient
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, comm, shape = inputs.x, inputs.config.comm, inputs.x.flatten(1).shape
    report("norm, gate, dropout", _gate_cost(x).backward, grad, x, inputs.u)
    if comm.tp_size > 1:
        comm.all_gather(torch.empty_like(statistics))
    return x.new_empty(shape), torch.empty_like(x), torch.empty_like(inputs.weight), torch.empty_like(inputs.bias)


def _gate_cost(x: Tensor) -> TwoPasses:
    return costs.norm_mul_dropout(len(x), x.shape[1] * x.shape[2], x.element_size())


def _add_layer_norm(report: Report, inputs: kernels.AddLayerNormInputs) -> tuple[Tensor, Tensor, Tensor]:
    x, others = inputs.x, () if inputs.update is None else (inputs.update,)
    cost = costs.add_layer_norm(len(x), x.shape[1], inputs.dtype.itemsize, x.element_size())
    report("residual and norm", cost.forward, x, *others)
    total = torch.empty_like(x) if others else x
    return total, x.new_empty(x.shape, dtype=inputs.dtype), x.new_empty((2, len(x)), dtype=torch.float32)


def _add_layer_norm_backward(
    report: Report,
    grad: Tensor,
    grad_total: Tensor,
    inputs: kernels.AddLayerNormInputs,
    statistics: Tensor,
    update_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    total = inputs.x
    cost = costs.add_layer_norm(len(total), total.shape[1], grad.element_size(), total.element_size())
    report("residual and norm", cost.backward, grad, grad_total, total)
    grad_x = grad_update = torch.empty_like(total)
    if update_dtype is not None and update_dtype != total.dtype:
        grad_update = torch.empty_like(total, dtype=update_dtype)
    affine = torch.empty_like(inputs.weight), torch.empty_like(inputs.bias)
    return grad_x, None if update_dtype is None else grad_update, *affine


def _project(report: Report, x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    (rows, width), outputs = x.shape, len(weight)
    moved = x.element_size() * (rows * (width + 2 * outputs) + weight.numel())
    report("matrix products", Cost(2.0 * rows * outputs * width, float(moved)), x, weight)
    return x.new_empty((rows, outputs)), x.new_empty((rows, outputs))


def _activate(report: Report, projected: Tensor) -> Tensor:
    report("other operators", Cost(0.0, 2.0 * projected.nbytes), projected)
    return torch.empty_like(projected)


class _FakeUnit(torch.autograd.Function):
    """L2 normalization that saves its output and the norms."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, report: Report) -> Tensor:
        report("other operators", Cost(0.0, 2.0 * x.nbytes), x)
        out, ctx.report = torch.empty_like(x), report
        ctx.save_for_backward(out, x.new_empty(len(x)))
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        ctx.report("other operators", Cost(0.0, 3.0 * grad.nbytes), grad)
        return torch.empty_like(ctx.saved_tensors[0]), None


def _softmax_loss(
    report: Report, most_scores: int, is_cpp: bool, vectors: Sequence[Tensor], negatives: Negatives, _: bool
) -> Loss:
    """``most_scores``: of the block of a whole pool."""
    (queries, _positives, pool), draws, width = vectors, negatives.draws, vectors[0].shape[1]
    if draws is None:
        report("loss", costs.pool_softmax(len(queries), len(pool), width, is_cpp), *vectors)
        scores = pool.new_empty(min(len(queries) * len(pool), most_scores))
        blocks = [scores, *map(torch.empty_like, (queries, queries, pool))]  # scaled queries, two gradients
        if not is_cpp:  # which scores are hidden, and the first positions that say so
            kinds = [torch.bool] if negatives.seen is None else [torch.bool, torch.int32]
            blocks += [torch.empty_like(scores, dtype=kind) for kind in kinds]
    else:
        report("loss", costs.sampled_softmax(len(draws), draws.shape[1], width), *vectors)
        blocks = [queries.new_empty(draws.shape) for _ in range(2)]  # scores and their weights
        blocks += [draws.new_empty(draws.shape, dtype=torch.int64) for _ in range(4)]  # draws sorted by row
    del blocks
    return queries.new_empty(()), [*map(torch.empty_like, vectors)]
