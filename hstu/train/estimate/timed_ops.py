"""How each operator of a step is timed on a CPU: by the code that a run uses, at the run's own shapes.

What would take long is timed on fewer rows and scaled; so are sequences, by the operations of their attention.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import singledispatch
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from hstu.config.args import OptimizerArgs
from hstu.data.batch import keyed_jagged
from hstu.model.embedding import TableSpec
from hstu.model.gr_model import GRModel
from hstu.ops.attention import hstu_attention
from hstu.ops.dropout import dropout
from hstu.ops.jagged import jagged_concat, token_order
from hstu.ops.layout import JaggedLayout, build_layout
from hstu.ops.norm_mul_dropout import GateRule, norm_mul_dropout
from hstu.ops.positions import add_positions
from hstu.ops.ranks import Ranks
from hstu.ops.relative_bias import NUM_TIME_BUCKETS, RelativeBias
from hstu.ops.softmax_loss import pool_softmax_loss, sampled_softmax_loss
from hstu.optim.dense import DenseOptimizer
from hstu.parallel.embedding import shard
from hstu.parallel.mesh import planned
from hstu.train.estimate.situation import Batch
from hstu.train.estimate.work import (
    Add,
    Attention,
    Classes,
    DenseUpdate,
    Gate,
    Inputs,
    Linear,
    Lookup,
    Norm,
    Op,
    SampledSoftmax,
    ShardedLookup,
    Silu,
)

_MOST_FLOPS = 4e9
_MOST_BYTES = 2e8
_MOST_ROWS = 100_000
"""What is timed at most: operations of an operator, bytes that it moves, rows of a table."""
_SECONDS_AN_HOUR = 3600


class Timed(NamedTuple):
    """How an operator is timed."""

    run: Callable[[], object]
    scale: float
    """How many times as long the whole operator takes."""
    first: Callable[[], object] | None = None
    """Where the first of a step's alike operators has more to do than the others: that one."""


@singledispatch
def prepare(op: Op) -> Timed:
    """What to time for an operator."""
    raise NotImplementedError(f"no way to time {type(op).__name__}")


def _fewer(rows: int, amount: float, most: float) -> tuple[int, float]:
    """So many of ``rows`` that ``amount``, which goes with them, is at most ``most``; and the share left out."""
    fewer = max(1, min(rows, max(256, int(rows * most / max(amount, 1.0)))))
    return fewer, max(rows, 1) / fewer if rows else 0.0


def _dtype(c: int) -> torch.dtype:
    return torch.float32 if c == 4 else torch.bfloat16


def _both_ways(forward: Callable[[], Tensor], leaves: list[Tensor]) -> Callable[[], object]:
    grad = torch.randn_like(forward())
    return lambda: torch.autograd.grad(forward(), leaves, grad)


@prepare.register
def _(op: Linear) -> Timed:
    rows, scale = _fewer(op.rows, op.flops, _MOST_FLOPS)
    x = torch.randn(rows, op.inputs, dtype=_dtype(op.c), requires_grad=True)
    linear = nn.Linear(op.inputs, op.outputs)

    def forward() -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=op.c != 4):
            y: Tensor = linear(x)
            return y

    return Timed(_both_ways(forward, [x, *linear.parameters()]), scale)


@prepare.register
def _(op: Norm) -> Timed:
    rows, scale = _fewer(op.rows, op.moved, _MOST_BYTES)
    x, norm = torch.randn(rows, op.width, requires_grad=True), nn.LayerNorm(op.width)
    return Timed(_both_ways(lambda: norm(x).to(_dtype(op.c)), [x, *norm.parameters()]), scale)


@prepare.register
def _(op: Silu) -> Timed:
    rows, scale = _fewer(op.rows, op.moved, _MOST_BYTES)
    x = torch.randn(rows, op.heads * 4 * op.width, dtype=_dtype(op.c), requires_grad=True)
    grad = torch.randn_like(x)

    def both() -> None:
        torch.autograd.grad(F.silu(x), [x], grad)

    return Timed(both, scale)


class _Alike(Ranks):
    """Ranks that exchange nothing: that is counted as such (traffic.py)."""

    def __init__(self, count: int) -> None:
        self.count = count

    def gather(self, own: Tensor) -> Tensor:
        """See :class:`Ranks`."""
        return own.expand(self.count, *own.shape)


@prepare.register
def _(op: Gate) -> Timed:
    rows, scale = _fewer(op.rows, op.moved, _MOST_BYTES)
    uvqk = torch.randn(rows, op.heads, 4, op.width, dtype=_dtype(op.c))
    x, u = torch.randn(rows, op.heads, op.width).to(_dtype(op.c)).requires_grad_(), uvqk[:, :, 0].requires_grad_()
    norm = nn.LayerNorm(op.heads * op.width)

    rule = GateRule(norm.eps, op.dropout, _Alike(op.ranks))

    def forward() -> Tensor:
        return norm_mul_dropout(x, u, norm.weight, norm.bias, rule)

    return Timed(_both_ways(forward, [x, u, *norm.parameters()]), scale)


@prepare.register
def _(op: Add) -> Timed:
    rows, scale = _fewer(op.rows, op.moved, _MOST_BYTES)
    x = torch.randn(rows, op.width, requires_grad=True)
    y = torch.randn(rows, op.width).to(_dtype(op.c)).requires_grad_()
    return Timed(_both_ways(lambda: x + (x + y), [x, y]), scale)


@prepare.register
def _(op: Attention) -> Timed:
    network, width = op.network, op.network.kv_channels
    layout, kept = _layout(op)
    uvqk = torch.randn(layout.num_tokens, op.heads, 4, width, dtype=_dtype(op.c))
    q, k, v = (uvqk[:, :, place].requires_grad_() for place in (1, 2, 3))
    leaves, bias = [q, k, v], None
    if network.position_encoding == "relative_bias":
        bias = RelativeBias(torch.randn(2 * int(op.seqlens.max()) - 1), torch.randn(NUM_TIME_BUCKETS))
        leaves += [bias.position_weight.requires_grad_(), bias.time_weight.requires_grad_()]

    def forward() -> Tensor:
        return hstu_attention(
            q,
            k,
            v,
            layout,
            alpha=width**-0.5,
            scaling_seqlen=int(op.seqlens.max()),
            is_causal=network.is_causal,
            contextual_mask=not network.disable_contextual_mask,
            bias=bias,
        )

    both = _both_ways(forward, leaves)

    def first() -> None:
        layout.cache.clear()
        both()

    return Timed(both, op.flops / kept.flops, first)


def _layout(op: Attention) -> tuple[JaggedLayout, Attention]:
    """A layout of as many of the op's sequences as are timed, and the op on them."""
    costs = np.cumsum([dataclasses.replace(op, batch=_part(op, i, i + 1)).flops for i in range(op.batch.sequences)])
    stop = max(1, int(np.searchsorted(costs, _MOST_FLOPS, side="right")))
    kept = dataclasses.replace(op, batch=_part(op, 0, stop))
    lengths = kept.batch.item_lengths
    times = torch.arange(int(lengths.sum())) * _SECONDS_AN_HOUR
    layout = build_layout(
        item_lengths=lengths,
        num_sequences=len(lengths),
        num_contextuals=op.num_contextuals,
        num_candidates=kept.batch.num_candidates,
        tokens_per_item=op.tokens_per_item,
        target_group_size=op.network.target_group_size,
        device=torch.device("cpu"),
        item_times=times if op.network.position_encoding == "relative_bias" else None,
    )
    return layout, kept


def _part(op: Attention, start: int, stop: int) -> Batch:
    batch = op.batch
    return dataclasses.replace(
        batch, item_lengths=batch.item_lengths[start:stop], num_candidates=batch.num_candidates[start:stop]
    )


@prepare.register
def _(op: Inputs) -> Timed:
    rows, scale = _fewer(op.rows, op.moved, _MOST_BYTES)
    layout = build_layout(
        item_lengths=np.full(max(1, rows // 64), 64),
        num_sequences=max(1, rows // 64),
        num_contextuals=0,
        num_candidates=None,
        tokens_per_item=1,
        target_group_size=1,
        device=torch.device("cpu"),
    )
    x = torch.randn(layout.num_tokens, op.width, requires_grad=True)
    table = torch.randn(max(op.positions, 1), op.width, requires_grad=op.positions > 0)

    def forward() -> Tensor:
        tokens = jagged_concat([x * op.width**0.5], token_order(layout))
        if op.positions:
            tokens = add_positions(tokens, table, layout.positions)
        return dropout(tokens, op.dropout, True)

    leaves = [x, table] if op.positions else [x]
    return Timed(_both_ways(forward, leaves), scale * rows / layout.num_tokens)


@prepare.register
def _(op: Lookup) -> Timed:
    ids, scale = _fewer(op.ids, op.moved, _MOST_BYTES)
    table = torch.randn(op.rows, op.width, requires_grad=True)
    places = torch.randint(op.rows, (ids,))
    return Timed(_both_ways(lambda: F.embedding(places, table), [table]), scale)


@prepare.register
def _(op: Classes) -> Timed:
    x = torch.randn(max(op.tokens, 1), op.hidden, requires_grad=True)
    chosen = torch.randint(len(x), (op.rows,))

    def forward() -> Tensor:
        rows = x.index_select(0, chosen)
        logits = F.normalize(rows) if op.width == op.hidden else rows[:, : op.width].log_softmax(1)
        return logits

    return Timed(_both_ways(forward, [x]), 1.0)


@prepare.register
def _(op: SampledSoftmax) -> Timed:
    amount = 6.0 * op.queries * (op.draws or op.pool) * op.width
    queries, scale = _fewer(op.queries, amount, _MOST_FLOPS)
    vectors = [F.normalize(torch.randn(rows, op.width)).requires_grad_() for rows in (queries, queries, op.pool)]
    rows, positives, pool = vectors
    ids, targets = torch.arange(op.pool), torch.randint(op.pool, (queries,))
    draws = torch.randint(op.pool, (queries, op.draws), dtype=torch.int32)

    def loss() -> Tensor:
        if op.draws:
            return sampled_softmax_loss(rows, positives, pool, draws, targets, ids, 0.05)
        return pool_softmax_loss(rows, positives, pool, targets, ids, None, 0.05)

    return Timed(lambda: torch.autograd.grad(loss(), vectors), scale)


@prepare.register
def _(op: DenseUpdate) -> Timed:
    elements, scale = _fewer(op.elements, op.moved, _MOST_BYTES)
    tensors = max(1, min(op.tensors, elements))
    module = nn.ParameterList(torch.randn(max(1, elements // tensors)) for _ in range(tensors))
    optimizer = DenseOptimizer(module, OptimizerArgs(optimizer_str=op.optimizer, learning_rate=1e-9))

    def update() -> None:
        for parameter in module:
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()

    return Timed(update, scale)


@prepare.register
def _(op: ShardedLookup) -> Timed:
    specs, counts = _served(op)
    keys = list(counts)
    with _world_of_one() as group:
        mesh = dataclasses.replace(planned(1, 1, 1, "cpu"), world_group=group)
        model = GRModel(specs, nn.Identity(), keys, keys[0], seed=0)
        model, optimizer = shard(model, op.situation.config, mesh)
    rows_of = {feature: spec.rows for spec in specs for feature in spec.features}
    rng = np.random.default_rng(0)
    ids = keyed_jagged(
        {name: rng.integers(rows_of[name], size=count) for name, count in counts.items()},
        {name: np.array([count]) for name, count in counts.items()},
    )

    def step() -> None:
        optimizer.zero_grad()
        rows = [row.values() for collection in model.embedding for row in collection(ids).values()]
        torch.autograd.backward([r for r in rows if r.requires_grad], [r.detach() for r in rows if r.requires_grad])
        optimizer.step()

    return Timed(step, 1.0)


def _served(op: ShardedLookup) -> tuple[list[TableSpec], dict[str, int]]:
    """The tables of the rank that serves the most rows, cut to what is timed; ids of each feature that it serves."""
    world = op.situation.world_size
    by_rank: dict[int, list[tuple[TableSpec, dict[str, int], int]]] = {}
    for table in op.plan:
        asked = 1 if table.sharding == "row_wise" else world
        counts = {feature: op.ids.get(feature, 0) * asked for feature in table.spec.features}
        for place, (rank, rows, columns) in enumerate(table.shards):
            spec = dataclasses.replace(
                table.spec,
                name=f"{table.spec.name}_{place}",
                rows=min(rows, _MOST_ROWS),
                dim=columns,
                features=tuple(f"{feature}_{place}" for feature in counts),
                sharding="table_wise",
                dynamic=None,  # its lookup costs what a static table's does; finding its rows is left out
            )
            served = {f"{feature}_{place}": count for feature, count in counts.items()}
            by_rank.setdefault(rank, []).append((spec, served, sum(counts.values()) * columns))
    busiest = max(by_rank.values(), key=lambda tables: sum(weight for _, _, weight in tables))
    return [spec for spec, _, _ in busiest], {name: n for _, served, _ in busiest for name, n in served.items()}


@contextmanager
def _world_of_one() -> Iterator[dist.ProcessGroup]:
    """A process group of this process alone; the one there is, if there is one."""
    if dist.is_initialized():
        assert dist.get_world_size() == 1, "a CPU is measured by one process"
    else:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    assert dist.group.WORLD is not None
    yield dist.group.WORLD
