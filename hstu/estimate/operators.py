"""The operators of a training step on one rank: the cost of each, and the code by which it is timed on a CPU.

A GPU step is estimated from the costs by roofline, a CPU step by running the operators themselves at the shapes of the
run (machine.py does both). Operators that would run for long are timed on fewer rows, and the time is scaled.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hstu.config.args import OptimizerArgs, RankingArgs, RankingTaskArgs
from hstu.data.batch import keyed_jagged
from hstu.data.jagged import sequence_tokens
from hstu.data.roles import FeatureRoles
from hstu.estimate.memory import TableShards, trained_densely
from hstu.estimate.workload import Batch, Workload
from hstu.model.embedding import TableSpec
from hstu.model.gr_model import GRModel
from hstu.model.heads import head_products
from hstu.ops import costs
from hstu.ops.comm import TensorParallelComm
from hstu.ops.costs import FLOAT32, Cost
from hstu.ops.dropout import dropout
from hstu.ops.functional import (
    add_layer_norm,
    hstu_attention,
    norm_mul_dropout,
    pool_softmax_loss,
    sampled_softmax_loss,
)
from hstu.ops.kernels import Backend, GateConfig, RelativeBias
from hstu.ops.layout import NUM_TIME_BUCKETS, build_layout, token_order
from hstu.ops.pytorch.operators import REFERENCE_KERNELS as KERNELS
from hstu.optim.dense import DenseOptimizer
from hstu.parallel.mesh import Mesh
from hstu.parallel.row_optimizer import STATES, RowOptimizer
from hstu.parallel.table_optimizer import TableTraining, is_rowwise
from hstu.parallel.tables import shard

_MOST_FLOPS = 4e9
_MOST_BYTES = 2e8
_MOST_ROWS = 100_000
"""Limits of what is timed: operations and bytes of an operator, rows of a table."""
_CPU = torch.device("cpu")
ATTENTION = "attention"
"""Name of the operator whose efficiency on a GPU is set separately."""

Forward = tuple[Callable[[], Tensor | tuple[Tensor, ...]], list[Tensor]]
"""The forward of an operator, and the tensors whose gradients its backward computes."""


class Timed(NamedTuple):
    """Code that takes as long as an operator, or a part of it."""

    run: Callable[[], object]
    scale: float
    """The operator takes this many times as long as ``run``."""
    first: Callable[[], object] | None = None
    """What the first of a step's equal operators runs, if it has more to do than the others."""


@dataclass(frozen=True)
class Operator:
    """``times`` equal operators of a step, each with forward and backward."""

    name: str
    cost: Cost
    prepare: Callable[[Mesh], Timed]
    """Allocates the inputs, on the CPU. The mesh is that of a single rank."""
    times: int = 1
    extra_forwards: int = 0
    """Forwards that backward runs again, for each operator."""


def operators(workload: Workload, batch: Batch, plan: tuple[TableShards, ...]) -> list[Operator]:
    """The operators of one rank of the group that trains on ``batch``."""
    inputs = _inputs(workload, batch, plan)
    return [*inputs, *_layers(workload, batch), *_task(workload, batch), *_updates(workload)]


def _inputs(workload: Workload, batch: Batch, plan: tuple[TableShards, ...]) -> Iterator[Operator]:
    network, hidden, own = workload.config.network, workload.config.network.hidden_size, workload.ids_per_rank(batch)
    if plan:
        yield _sharded_tables(workload, plan, own)
    for spec in workload.specs:
        if spec.replicated:
            ids = sum(own.get(feature, 0) for feature in spec.features) * workload.tp_size
            yield _replicated_table(workload, spec, ids)
    rows = workload.rows_by_role(batch)
    for role, width in workload.projected_widths.items():
        for inputs in (width, hidden):
            yield _linear("projections", rows[role], inputs, hidden, workload.element_size)
    if network.action_item_product:
        yield _action_item_product(rows["action"], hidden, workload.element_size)
    dropped = network.hidden_dropout if network.input_dropout is None else network.input_dropout
    positions = workload.encoder.inputs.position_table
    yield _token_inputs(workload.tokens(batch), hidden, dropped, 0 if positions is None else len(positions))


def _layers(workload: Workload, batch: Batch) -> Iterator[Operator]:
    network, tp, c = workload.config.network, workload.tp_size, workload.element_size
    hidden, heads, width = network.hidden_size, network.num_attention_heads // tp, network.kv_channels
    inner, tokens = heads * width, workload.tokens(batch)
    own = -(-tokens // tp) if network.sequence_parallel else tokens
    whole = int(network.recompute_layer)
    norm = max(whole, int(network.recompute_input_layernorm))
    silu = max(whole, int(network.recompute_input_silu))
    fused = workload.device_type == "cuda" and network.kernel_backend != Backend.PYTORCH
    repeated = (  # (forwards that backward runs again, operator)
        (norm, _add_layer_norm(own, hidden, c, workload.residual_size)),
        (whole, _linear("W_uvqk", tokens, hidden, 4 * inner, c)),
        (silu, _silu(tokens, 4 * inner, c, fused)),
        (whole, _attention(workload, batch, heads)),
        (whole, _gate(tokens, heads, width, c, network.hidden_dropout, tp)),
        (0, _linear("W_o", tokens, inner, hidden, c)),
    )
    for again, op in repeated:
        yield dataclasses.replace(op, times=network.num_layers, extra_forwards=again)


def _task(workload: Workload, batch: Batch) -> Iterator[Operator]:
    ranking, retrieval, network = workload.config.task_args, workload.config.retrieval, workload.config.network
    hidden, tokens = network.hidden_size, workload.tokens(batch)
    if isinstance(ranking, RankingArgs) and ranking.tasks is not None:
        yield from _task_heads(workload, ranking, ranking.tasks, batch)
    elif isinstance(ranking, RankingArgs):
        widths = [hidden, *ranking.prediction_head_arch]
        for inputs, outputs in pairwise(widths):
            yield _linear("head", batch.labels, inputs, outputs, workload.element_size)
        yield _labelled_rows("loss", batch.labels, widths[-1], hidden, tokens)
    if retrieval is None:
        return
    width = network.item_width
    if width != hidden:
        yield _linear("queries", batch.labels, hidden, width, FLOAT32)
    rows_of_tower = workload.tower_rows(batch, workload.pool(batch))
    for inputs, outputs in pairwise(workload.tower_widths):
        yield _linear("item tower", rows_of_tower, inputs, outputs, FLOAT32)
    for rows in (tokens, batch.items):  # queries and positives are selected and normalised
        yield _labelled_rows("queries", batch.labels, width, width, rows)
    yield _softmax(batch.labels, workload.pool(batch, workload.dp_size), workload.draws_per_label, width)


def _task_heads(
    workload: Workload, args: RankingArgs, tasks: Sequence[RankingTaskArgs], batch: Batch
) -> Iterator[Operator]:
    hidden, widths = workload.config.network.hidden_size, [task.output_width for task in tasks]
    for times, inputs, outputs in head_products(
        hidden, args.prediction_head_arch, widths, args.task_sharing, args.num_experts
    ):
        op = _linear("head", batch.labels, inputs, outputs, workload.element_size)
        yield dataclasses.replace(op, times=times)
    yield _labelled_rows("loss", batch.labels, sum(widths), hidden, workload.tokens(batch))


def _updates(workload: Workload) -> Iterator[Operator]:
    by_optimizer: dict[str, list[int]] = {}
    for optimizer, elements in trained_densely(workload):
        by_optimizer.setdefault(optimizer, []).append(elements)
    for optimizer, counts in by_optimizer.items():
        yield _dense_update(optimizer, sum(counts), len(counts))


def _dtype(element_size: int) -> torch.dtype:
    return torch.float32 if element_size == FLOAT32 else torch.bfloat16


def _rows_to_time(cost: Cost, rows: int) -> int:
    share = _MOST_FLOPS / cost.flops if cost.flops else _MOST_BYTES / max(cost.bytes, 1.0)
    return max(1, min(rows, max(256, int(rows * share))))


def _operator(name: str, cost: Cost, rows: int, build: Callable[[int], Forward]) -> Operator:
    """Timed by the forward and backward of ``build(n)`` for as many of its rows as the limits allow."""

    def prepare(_: Mesh) -> Timed:
        fewer = _rows_to_time(cost, rows)
        forward, leaves = build(fewer)
        out = forward()
        grads = [torch.randn_like(each) for each in ((out,) if isinstance(out, Tensor) else out)]
        return Timed(lambda: torch.autograd.grad(forward(), leaves, grads), rows / fewer)

    return Operator(name, cost, prepare)


def _linear(name: str, rows: int, inputs: int, outputs: int, c: int) -> Operator:
    def build(count: int) -> Forward:
        x = torch.randn(count, inputs, dtype=_dtype(c), requires_grad=True)
        linear = nn.Linear(inputs, outputs)

        def forward() -> Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=c != FLOAT32):
                y: Tensor = linear(x)
                return y

        return forward, [x, *linear.parameters()]

    return _operator(name, costs.linear(rows, inputs, outputs, c), rows, build)


def _action_item_product(rows: int, width: int, c: int) -> Operator:
    def build(count: int) -> Forward:
        items, actions = (torch.randn(count, width, dtype=_dtype(c), requires_grad=True) for _ in range(2))
        gate = nn.Linear(width, width)

        def forward() -> Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=c != FLOAT32):
                return actions + items * gate(actions)

        return forward, [items, actions, *gate.parameters()]

    return _operator("products of actions", costs.action_item_product(rows, width, c), rows, build)


def _add_layer_norm(rows: int, width: int, c: int, residual_size: int) -> Operator:
    def build(count: int) -> Forward:
        x = torch.randn(count, width).to(_dtype(residual_size)).requires_grad_()
        update = torch.randn(count, width).to(_dtype(c)).requires_grad_()
        norm, kernels = nn.LayerNorm(width), KERNELS.add_layer_norm
        return (
            lambda: add_layer_norm(x, update, norm.weight, norm.bias, norm.eps, _dtype(c), kernels),
            [x, update, *norm.parameters()],
        )

    return _operator("residual and norm", costs.add_layer_norm(rows, width, c, residual_size), rows, build)


def _silu(rows: int, width: int, c: int, fused: bool) -> Operator:
    def build(count: int) -> Forward:
        x = torch.randn(count, width, dtype=_dtype(c), requires_grad=True)
        return lambda: F.silu(x), [x]

    return _operator("SiLU", costs.silu(rows, width, c, fused=fused), rows, build)


class _CopyingComm(TensorParallelComm):
    """Several ranks without communication, which traffic.py estimates."""

    def __init__(self, size: int) -> None:
        self.size = size

    def all_gather(self, own: Tensor) -> Tensor:
        """See :class:`TensorParallelComm`."""
        return own.expand(self.size, *own.shape)


def _gate(rows: int, heads: int, width: int, c: int, dropped: float, ranks: int) -> Operator:
    def build(count: int) -> Forward:
        uvqk = torch.randn(count, heads, 4, width, dtype=_dtype(c))
        x, u = torch.randn(count, heads, width).to(_dtype(c)).requires_grad_(), uvqk[:, :, 0].requires_grad_()
        norm = nn.LayerNorm(heads * width)
        config = GateConfig(norm.eps, dropped, _CopyingComm(ranks))
        kernels = KERNELS.norm_mul_dropout
        return lambda: norm_mul_dropout(x, u, norm.weight, norm.bias, config, kernels), [x, u, *norm.parameters()]

    cost = costs.norm_mul_dropout(rows, heads * width, c, dropped)
    return _operator("norm, gate, dropout", cost, rows, build)


def _attention(workload: Workload, batch: Batch, heads: int) -> Operator:
    network, per_item = workload.config.network, workload.features.tokens_per_item(workload.config.network)
    width, c, contextuals = network.kv_channels, workload.element_size, len(workload.roles.contextual)

    def cost_of(part: Batch) -> Cost:
        tokens = sequence_tokens(part.item_lengths, contextuals, per_item)
        return costs.attention(tokens, part.num_candidates * per_item, heads, width, c, network.is_causal)

    def prepare(_: Mesh) -> Timed:
        by_sequence = [cost_of(batch.first(count)).flops for count in range(1, batch.sequences + 1)]
        timed = batch.first(max(1, int(np.searchsorted(by_sequence, _MOST_FLOPS, side="right"))))
        layer = workload.layer
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
            out = hstu_attention(q, k, v, layout, layer.attention_config, bias, KERNELS.attention)
            torch.autograd.grad(out, leaves, grad)

        def first() -> None:
            layout.cache.clear()
            both()

        return Timed(both, by_sequence[-1] / cost_of(timed).flops, first)

    return Operator(ATTENTION, cost_of(batch), prepare)


def _token_inputs(rows: int, width: int, dropped: float, positions: int) -> Operator:
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

    return _operator("tokens", costs.token_inputs(rows, width, dropped, positions), rows, build)


def _labelled_rows(name: str, labels: int, width: int, hidden: int, tokens: int) -> Operator:
    """Selects the labelled rows of [tokens, hidden], scatters their gradients, and computes a loss of ``width``."""

    def build(count: int) -> Forward:
        x = torch.randn(max(tokens, 1), hidden, requires_grad=True)
        chosen = torch.randint(len(x), (count,))

        def forward() -> Tensor:
            rows = x.index_select(0, chosen)
            return F.normalize(rows) if width == hidden else rows[:, :width].log_softmax(1)

        return forward, [x]

    cost = Cost(0.0, FLOAT32 * (4.0 * labels * hidden + tokens * hidden + 6.0 * labels * width), launches=20)
    return _operator(name, cost, labels, build)


def _softmax(queries: int, pool: int, draws: int, width: int) -> Operator:
    """``draws``: negatives of each query's own; 0: the whole pool."""

    def build(count: int) -> Forward:
        vectors = [F.normalize(torch.randn(rows, width)).requires_grad_() for rows in (count, count, pool)]
        rows, positives, items = vectors
        targets, ids = torch.randint(pool, (count,)), torch.arange(pool)
        if draws:
            drawn = torch.randint(pool, (count, draws), dtype=torch.int32)
            kernel = KERNELS.sampled_softmax_loss
            return lambda: sampled_softmax_loss(
                rows, positives, items, drawn, targets, ids, None, 0.05, kernel
            ), vectors
        pool_kernel = KERNELS.pool_softmax_loss
        return lambda: pool_softmax_loss(rows, positives, items, targets, ids, None, 0.05, pool_kernel), vectors

    cost = costs.sampled_softmax(queries, draws, width) if draws else costs.pool_softmax(queries, pool, width)
    return _operator("loss", cost, queries, build)


def _replicated_table(workload: Workload, spec: TableSpec, ids: int) -> Operator:
    """Rows are read and written, their gradients written and summed, then read by the update of rows and states.

    On a GPU the gradient and the update are those of the whole table.
    """
    args = workload.config.optimizer
    training = TableTraining.of(spec, args)
    updated = ids if workload.device_type == "cpu" else spec.rows
    moved = 5.0 * ids + updated * (1 + 2 * (1 + len(training.states)) + 1)

    def prepare(_: Mesh) -> Timed:
        table = nn.Parameter(torch.randn(spec.rows, spec.dim))
        group = {"params": [table], "lr": 1e-9, "optimizer": training.optimizer}
        optimizer = RowOptimizer([group], (args.adam_beta1, args.adam_beta2), args.adam_eps)
        indices = torch.randint(spec.rows, (ids,))

        def step() -> None:
            table.grad = None
            rows = F.embedding(indices, table, sparse=True)
            rows.backward(rows.detach())
            optimizer.step()

        return Timed(step, 1.0)

    return Operator("replicated tables", Cost(0.0, FLOAT32 * spec.dim * moved), prepare)


def _dense_update(optimizer: str, elements: int, tensors: int) -> Operator:
    """Weights and states are read and written, gradients written and read."""
    cost = Cost(0.0, FLOAT32 * float(elements) * (2 + 2 * len(STATES[optimizer]) + 2))

    def prepare(_: Mesh) -> Timed:
        fewer = _rows_to_time(cost, elements)
        count = max(1, min(tensors, fewer))
        module = nn.ParameterList(torch.randn(max(1, fewer // count)) for _ in range(count))
        dense = DenseOptimizer(module, OptimizerArgs(optimizer_str=optimizer, learning_rate=1e-9))

        def update() -> None:
            for parameter in module:
                parameter.grad = torch.ones_like(parameter)
            dense.step()

        return Timed(update, elements / fewer)

    return Operator("dense optimizer", cost, prepare)


def _sharded_tables(workload: Workload, plan: tuple[TableShards, ...], ids: dict[str, int]) -> Operator:
    """The rows that one rank serves, and their update. ``ids``: of each feature, looked up by one rank.

    Rows are read and written, gradients written and read, and the update reads and writes rows and states.
    """
    moved = 0.0
    for table in plan:
        states = TableTraining.of(table.spec, workload.config.optimizer).states
        elements = sum(ids.get(feature, 0) for feature in table.spec.features) * table.spec.stored_dim
        moved += FLOAT32 * float(elements) * (2 + 4 + 2 * (1 + sum(not is_rowwise(state) for state in states)))
    launches = 40 * len({table.spec.stored_dim for table in plan})  # a few for the ids and rows of each collection

    def prepare(mesh: Mesh) -> Timed:
        specs, counts = _busiest_rank(workload.world_size, plan, ids)
        keys = list(counts)
        model, optimizer = shard(
            GRModel(specs, nn.Identity(), keys, FeatureRoles(keys[0], None, ()), seed=0), workload.config, mesh
        )
        rows_of = {feature: spec.rows for spec in specs for feature in spec.features}
        rng = np.random.default_rng(0)
        features = keyed_jagged(
            {name: rng.integers(rows_of[name], size=count) for name, count in counts.items()},
            {name: np.array([count]) for name, count in counts.items()},
        )

        def step() -> None:
            optimizer.zero_grad()
            rows = [row.values() for collection in model.embedding for row in collection(features).values()]
            trained = [row for row in rows if row.requires_grad]
            torch.autograd.backward(trained, [row.detach() for row in trained])
            optimizer.step()

        return Timed(step, 1.0)

    return Operator("sharded tables", Cost(0.0, moved, launches), prepare)


def _busiest_rank(
    world_size: int, plan: tuple[TableShards, ...], ids: dict[str, int]
) -> tuple[list[TableSpec], dict[str, int]]:
    """The shards of the rank that serves the most numbers, as tables of at most _MOST_ROWS, and the ids per feature."""
    by_rank: dict[int, list[tuple[TableSpec, dict[str, int]]]] = {}
    for table in plan:
        senders = 1 if table.sharding == "row_wise" else world_size
        for index, (rank, rows, columns) in enumerate(table.shards):
            counts = {f"{name}_{index}": ids.get(name, 0) * senders for name in table.spec.features}
            spec = dataclasses.replace(
                table.spec,
                name=f"{table.spec.name}_{index}",
                rows=min(rows, _MOST_ROWS),
                dim=columns,
                features=tuple(counts),
                sharding="table_wise",
                dynamic=None,  # looking up rows costs as much as in a static table; finding them is not timed
            )
            by_rank.setdefault(rank, []).append((spec, counts))
    busiest = max(by_rank.values(), key=lambda tables: sum(sum(counts.values()) * spec.dim for spec, counts in tables))
    return [spec for spec, _ in busiest], {name: count for _, counts in busiest for name, count in counts.items()}
