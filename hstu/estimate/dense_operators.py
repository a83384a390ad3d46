"""The operators of the dense part of a model, as they are timed: projections, norms, attention, losses."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hstu.data.batches.jagged import sequence_tokens
from hstu.estimate.timing import MOST_FLOPS, Forward, Operator, Timed, timed_operator
from hstu.estimate.workload import Batch, Workload
from hstu.ops import costs, functional
from hstu.ops.comm import LayerComm
from hstu.ops.costs import FLOAT32, Cost
from hstu.ops.dropout import dropout
from hstu.ops.kernels import AddLayerNormInputs, AttentionInputs, GateConfig, GateInputs, Negatives, RelativeBias
from hstu.ops.layout import NUM_TIME_BUCKETS, build_layout, token_order
from hstu.ops.pytorch.operators import REFERENCE_KERNELS as KERNELS
from hstu.parallel.mesh import Mesh

_CPU = torch.device("cpu")
ATTENTION = "attention"
"""Name of the operator whose efficiency on a GPU is set separately."""


def linear(name: str, rows: int, inputs: int, outputs: int, c: int) -> Operator:
    """x Wᵀ + b of [rows, inputs] → [rows, outputs]. ``c``, here and below: bytes of a number in the compute type."""

    def build(count: int) -> Forward:
        x = torch.randn(count, inputs, dtype=_dtype(c), requires_grad=True)
        linear = nn.Linear(inputs, outputs)

        def forward() -> Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=c != FLOAT32):
                y: Tensor = linear(x)
                return y

        return forward, [x, *linear.parameters()]

    return timed_operator(name, costs.linear(rows, inputs, outputs, c), rows, build)


def add_layer_norm(rows: int, width: int, c: int, residual_size: int) -> Operator:
    """One step of the residual stream, [rows, width], and its norm; ``residual_size``: bytes of a number of it."""

    def build(count: int) -> Forward:
        x = torch.randn(count, width).to(_dtype(residual_size)).requires_grad_()
        update = torch.randn(count, width).to(_dtype(c)).requires_grad_()
        norm, kernels = nn.LayerNorm(width), KERNELS.add_layer_norm
        return (
            lambda: functional.add_layer_norm(
                AddLayerNormInputs(x, update, norm.weight, norm.bias, norm.eps, _dtype(c)), kernels
            ),
            [x, update, *norm.parameters()],
        )

    return timed_operator("residual and norm", costs.add_layer_norm(rows, width, c, residual_size), rows, build)


def silu(rows: int, width: int, c: int, fused: bool) -> Operator:
    """SiLU of [rows, width]. ``fused``: a kernel computes it with the projection."""

    def build(count: int) -> Forward:
        x = torch.randn(count, width, dtype=_dtype(c), requires_grad=True)
        return lambda: F.silu(x), [x]

    return timed_operator("SiLU", costs.silu(rows, width, c, fused=fused), rows, build)


class _CopyingComm(LayerComm):
    """Several ranks without communication, which traffic.py estimates."""

    def __init__(self, tp_size: int) -> None:
        self.tp_size = tp_size

    def all_gather(self, own: Tensor) -> Tensor:
        """See :class:`LayerComm`."""
        return own.expand(self.tp_size, *own.shape)


def gate(workload: Workload, rows: int, heads: int, width: int) -> Operator:
    """The gated norm of [rows, heads, width] on one rank."""
    c, dropped = workload.element_size, workload.config.network.hidden_dropout

    def build(count: int) -> Forward:
        uvqk = torch.randn(count, heads, 4, width, dtype=_dtype(c))
        x, u = torch.randn(count, heads, width).to(_dtype(c)).requires_grad_(), uvqk[:, :, 0].requires_grad_()
        norm = nn.LayerNorm(heads * width)
        config = GateConfig(norm.eps, dropped, _CopyingComm(workload.tp_size))
        kernels = workload.cpu_kernels.norm_mul_dropout
        return lambda: functional.norm_mul_dropout(GateInputs(x, u, norm.weight, norm.bias, config), kernels), [
            x,
            u,
            *norm.parameters(),
        ]

    cost = costs.norm_mul_dropout(rows, heads * width, c, dropped)
    return timed_operator("norm, gate, dropout", cost, rows, build)


def attention(workload: Workload, batch: Batch, heads: int, max_span: int | None) -> Operator:
    """Attention of a layer with this span over the sequences of ``batch``, with the heads of one rank."""
    network, per_item = workload.config.network, workload.features.tokens_per_item(workload.config.network)
    width, c, contextuals = network.kv_channels, workload.element_size, len(workload.roles.contextual)
    window = costs.Window(max_span, network.min_full_attention_tokens, contextuals)

    def cost_of(part: Batch) -> Cost:
        tokens = sequence_tokens(part.item_lengths, contextuals, per_item)
        return costs.attention(tokens, part.num_candidates * per_item, heads, width, c, network.is_causal, window)

    def prepare(_: Mesh) -> Timed:
        by_sequence = [cost_of(batch.first(count)).flops for count in range(1, batch.sequences + 1)]
        timed = batch.first(max(1, int(np.searchsorted(by_sequence, MOST_FLOPS, side="right"))))
        layer = workload.layer
        config = replace(layer.attention_config, max_span=max_span)
        has_bias = layer.bias is not None
        layout = build_layout(
            item_lengths=timed.item_lengths,
            num_sequences=timed.sequences,
            num_contextuals=contextuals,
            num_candidates=timed.num_candidates,
            tokens_per_item=per_item,
            target_group_size=network.target_group_size,
            device=_CPU,
            item_times=3600 * torch.arange(timed.items) if has_bias else None,
        )
        longest = int(sequence_tokens(batch.item_lengths, contextuals, per_item).max())
        uvqk = torch.randn(layout.num_tokens, heads, 4, width, dtype=_dtype(c))
        q, k, v = (uvqk[:, :, index].requires_grad_() for index in (1, 2, 3))
        leaves, bias = [q, k, v], None
        if has_bias:
            bias = RelativeBias(torch.randn(2 * longest - 1), torch.randn(NUM_TIME_BUCKETS))
            leaves += [bias.position_weight.requires_grad_(), bias.time_weight.requires_grad_()]
        grad = torch.randn_like(q)

        def both() -> None:
            out = functional.hstu_attention(
                AttentionInputs(q, k, v, layout, config, bias), workload.cpu_kernels.attention
            )
            torch.autograd.grad(out, leaves, grad)

        def first() -> None:
            layout.cache.clear()
            both()

        return Timed(both, by_sequence[-1] / cost_of(timed).flops, first)

    return Operator(ATTENTION, cost_of(batch), prepare)


def token_inputs(rows: int, width: int, dropped: float, positions: int) -> Operator:
    """Inputs as tokens [rows, width]: in order, scaled, positions added from a table of ``positions`` rows, dropout."""

    def build(count: int) -> Forward:
        lengths = np.array([64] * (count // 64) + [count % 64] * (count % 64 > 0))
        layout = build_layout(
            item_lengths=lengths,
            num_sequences=len(lengths),
            num_contextuals=0,
            num_candidates=None,
            tokens_per_item=1,
            target_group_size=1,
            device=_CPU,
        )
        x = torch.randn(count, width, requires_grad=True)
        table = torch.randn(max(positions, 1), width, requires_grad=positions > 0)

        def forward() -> Tensor:
            tokens = KERNELS.jagged_concat([x * width**0.5], token_order(layout))
            if positions:
                tokens = KERNELS.add_positions(tokens, table, layout.positions)
            return dropout(tokens, dropped, True)

        return forward, [x, table] if positions else [x]

    return timed_operator("tokens", costs.token_inputs(rows, width, dropped, positions), rows, build)


def labelled_rows(name: str, labels: int, width: int, hidden: int, tokens: int) -> Operator:
    """Selects the labelled rows of [tokens, hidden], scatters their gradients, and computes a loss of ``width``."""

    def build(count: int) -> Forward:
        x = torch.randn(max(tokens, 1), hidden, requires_grad=True)
        chosen = torch.randint(len(x), (count,))

        def forward() -> Tensor:
            rows = x.index_select(0, chosen)
            return F.normalize(rows) if width == hidden else rows[:, :width].log_softmax(1)

        return forward, [x]

    cost = Cost(0.0, FLOAT32 * (4.0 * labels * hidden + tokens * hidden + 6.0 * labels * width), launches=20)
    return timed_operator(name, cost, labels, build)


def softmax(workload: Workload, queries: int, pool: int, width: int) -> Operator:
    """The softmax loss of retrieval, over the negatives of each query's own, or over the whole pool."""
    draws = workload.draws_per_label

    def build(count: int) -> Forward:
        vectors = [F.normalize(torch.randn(rows, width)).requires_grad_() for rows in (count, count, pool)]
        rows, positives, items = vectors
        targets, ids = torch.randint(pool, (count,)), torch.arange(pool)
        if draws:
            drawn = torch.randint(pool, (count, draws), dtype=torch.int32)
            negatives, kernel = Negatives(targets, ids, 0.05, draws=drawn), workload.cpu_kernels.sampled_softmax_loss
        else:
            negatives, kernel = Negatives(targets, ids, 0.05), workload.cpu_kernels.pool_softmax_loss
        return lambda: functional.softmax_loss(rows, positives, items, negatives, kernel), vectors

    cost = costs.sampled_softmax(queries, draws, width) if draws else costs.pool_softmax(queries, pool, width)
    return timed_operator("loss", cost, queries, build)


def _dtype(element_size: int) -> torch.dtype:
    return torch.float32 if element_size == FLOAT32 else torch.bfloat16
