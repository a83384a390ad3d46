"""The operators of a training step on one rank, as a run configures them."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import pairwise

from hstu.config.args import RankingArgs, RankingTaskArgs
from hstu.estimate import dense_operators as dense
from hstu.estimate import table_operators as tables
from hstu.estimate.memory import TableShards, trained_densely
from hstu.estimate.timing import Operator
from hstu.estimate.workload import Batch, LayerPart, Workload
from hstu.model.heads import head_products
from hstu.ops.costs import FLOAT32
from hstu.ops.kernels import Backend


def operators(workload: Workload, batch: Batch, plan: tuple[TableShards, ...]) -> list[Operator]:
    """The operators of one rank of the group that trains on ``batch``."""
    inputs = _inputs(workload, batch, plan)
    return [*inputs, *_layers(workload, batch), *_task(workload, batch), *_updates(workload)]


def _inputs(workload: Workload, batch: Batch, plan: tuple[TableShards, ...]) -> Iterator[Operator]:
    network, hidden, own = workload.config.network, workload.config.network.hidden_size, workload.ids_per_rank(batch)
    if plan:
        yield tables.sharded_tables(workload, plan, own)
    for spec in workload.specs:
        if spec.replicated:
            ids = sum(own.get(feature, 0) for feature in spec.features) * workload.group_size
            yield tables.replicated_table(workload, spec, ids)
    rows = {role: workload.share(count) for role, count in workload.rows_by_role(batch).items()}
    for role, width in workload.projected_widths.items():
        for inputs in (width, hidden):
            yield dense.linear("projections", rows[role], inputs, hidden, workload.element_size)
    dropped = network.hidden_dropout if network.input_dropout is None else network.input_dropout
    positions = workload.encoder.inputs.position_table
    tokens = workload.share(workload.tokens(batch))
    yield dense.token_inputs(tokens, hidden, dropped, 0 if positions is None else len(positions))


def _layers(workload: Workload, batch: Batch) -> Iterator[Operator]:
    for part in workload.layer_parts(batch):
        yield from _equal_layers(workload, part)


def _equal_layers(workload: Workload, part: LayerPart) -> Iterator[Operator]:
    network, spans, batch = workload.config.network, part.spans, part.batch
    tp, c = workload.tp_size, workload.element_size
    hidden, heads, width = network.hidden_size, network.num_attention_heads // tp, network.kv_channels
    inner, tokens = heads * width, workload.share(workload.tokens(batch))
    own = -(-tokens // tp) if network.sequence_parallel else tokens
    whole = int(network.recompute_layer)
    norm = max(whole, int(network.recompute_input_layernorm))
    silu = max(whole, int(network.recompute_input_silu))
    fused = workload.device_type == "cuda" and network.kernel_backend != Backend.PYTORCH
    repeated = (  # (forwards that backward runs again, operator)
        (norm, dense.add_layer_norm(own, hidden, c, workload.residual_size)),
        (whole, dense.linear("W_uvqk", tokens, hidden, 4 * inner, c)),
        (silu, dense.silu(tokens, 4 * inner, c, fused)),
        (whole, dense.gate(workload, tokens, heads, width)),
        (0, dense.linear("W_o", tokens, inner, hidden, c)),
    )
    for again, op in repeated:
        yield dataclasses.replace(op, times=len(spans), extra_forwards=again)
    for span, layers in Counter(spans).items():
        op = dense.attention(workload, batch, heads // workload.cp_size, span)
        yield dataclasses.replace(op, times=layers, extra_forwards=whole)


def _task(workload: Workload, batch: Batch) -> Iterator[Operator]:
    ranking, retrieval, network = workload.config.task_args, workload.config.retrieval, workload.config.network
    hidden, tokens, labels = network.hidden_size, workload.share(workload.tokens(batch)), workload.share(batch.labels)
    if isinstance(ranking, RankingArgs) and ranking.tasks is not None:
        yield from _task_heads(workload, ranking, ranking.tasks, batch)
    elif isinstance(ranking, RankingArgs):
        widths = [hidden, *ranking.prediction_head_arch]
        for inputs, outputs in pairwise(widths):
            yield dense.linear("head", labels, inputs, outputs, workload.element_size)
        yield dense.labelled_rows("loss", labels, widths[-1], hidden, tokens)
    if retrieval is None:
        return
    width = network.item_width
    if width != hidden:
        yield dense.linear("queries", labels, hidden, width, FLOAT32)
    rows_of_tower = workload.tower_rows(batch, workload.pool(batch))
    for inputs, outputs in pairwise(workload.tower_widths):
        yield dense.linear("item tower", rows_of_tower, inputs, outputs, FLOAT32)
    for rows in (tokens, batch.items):  # queries and positives are selected and normalised
        yield dense.labelled_rows("queries", labels, width, width, rows)
    yield dense.softmax(workload, labels, workload.pool(batch, workload.dp_size), width)


def _task_heads(
    workload: Workload, args: RankingArgs, tasks: Sequence[RankingTaskArgs], batch: Batch
) -> Iterator[Operator]:
    hidden, widths = workload.config.network.hidden_size, [task.output_width for task in tasks]
    labels = workload.share(batch.labels)
    for times, inputs, outputs in head_products(
        hidden, args.prediction_head_arch, widths, args.task_sharing, args.num_experts
    ):
        op = dense.linear("head", labels, inputs, outputs, workload.element_size)
        yield dataclasses.replace(op, times=times)
    yield dense.labelled_rows("loss", labels, sum(widths), hidden, workload.share(workload.tokens(batch)))


def _updates(workload: Workload) -> Iterator[Operator]:
    """The dense optimizers, wherever they compute."""
    by_optimizer: dict[str, list[int]] = {}
    for optimizer, elements in trained_densely(workload):
        if elements > 0:
            by_optimizer.setdefault(optimizer, []).append(elements)
    for optimizer, counts in by_optimizer.items():
        yield tables.dense_update(optimizer, sum(counts), len(counts))
