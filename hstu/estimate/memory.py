"""Bytes on one rank: what stays from step to step, which is exact, and what a step needs in addition.

The formulas of a step follow what autograd saves with the PyTorch kernels; docs/distributed.md explains them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from torch import nn

from hstu.config.args import OptimizerArgs, RankingArgs, RankingTaskArgs
from hstu.config.run_config import RunConfig
from hstu.estimate.plan import plan_workload
from hstu.estimate.workload import Batch, LayerPart, Workload
from hstu.model.embedding import TableSpec, build_collections
from hstu.model.heads import head_products
from hstu.ops.costs import FLOAT32
from hstu.ops.layer import saved_bytes
from hstu.optim.dense import match_part_optimizers
from hstu.parallel.dynamic.memory import logical_name
from hstu.parallel.flat_weights import FlatLayout
from hstu.parallel.mesh import Mesh
from hstu.parallel.table_optimizer import STATES, TableTraining, is_rowwise
from hstu.parallel.table_plan import UNLIMITED, TableRanks, TableRoom
from hstu.parallel.tables import memory_plans, plan_sharding, prepare_tables

INT64 = 8
"""Bytes of an id, a length, a label and a time."""
INT32 = 4
FIRST_LAYER = "task.encoder.stack.layers.0."
"""Prefix of the parameters of the first HSTU layer."""
_BATCHES_IN_FLIGHT = {"none": 1, "native": 3, "prefetch": 4}


@dataclass(frozen=True)
class TableShards:
    """How the planner cuts one table."""

    spec: TableSpec
    sharding: str
    """row_wise, table_wise or column_wise."""
    shards: tuple[tuple[int, int, int], ...]
    """(rank, rows, columns) of each shard."""


def plan_tables(workload: Workload, room: TableRoom = UNLIMITED) -> tuple[TableShards, ...]:
    """The shards of the model_parallel tables, by TorchRec's planner with the constraints of a run.

    Raises TablesDoNotFit where ``room`` is too small.
    """
    specs = {spec.name: spec for spec in workload.specs if not spec.replicated}
    if not specs:
        return ()
    model = nn.Module()
    args = workload.config.optimizer
    memory = memory_plans(workload.specs, args, workload.world_size)
    model.embedding = build_collections(workload.specs)
    training = prepare_tables(model, workload.specs, args, memory)
    ranks = TableRanks(workload.world_size, workload.ranks_per_host, workload.device_type, room)
    plan = plan_sharding(model, workload.specs, training, memory, workload.config, ranks)
    found: dict[str, TableShards] = {}
    for tables in plan.plan.values():
        for part, table in tables.items():
            name = part if part in specs else logical_name(part)
            shards = [(s.placement.rank(), *s.shard_sizes) for s in table.sharding_spec.shards]
            if name in found:  # the second part of a table in two memories is cut like the first
                first = found[name].shards
                shards = [(rank, m + n, cols) for (rank, m, cols), (_, n, _) in zip(first, shards, strict=True)]
            found[name] = TableShards(specs[name], table.sharding_type, tuple(shards))
    return tuple(found.values())


def beside_tables(workload: Workload) -> int:
    """Bytes that a step needs on a rank beside the sharded tables and their optimizer states."""
    return sum(memory(workload, ()).values())


def beside_tables_of_run(config: RunConfig, mesh: Mesh) -> int:
    """``beside_tables`` for the ranks of a run that is starting."""
    return beside_tables(plan_workload(config, mesh.world_size, mesh.local_world_size, mesh.device.type))


def table_bytes(workload: Workload, plan: tuple[TableShards, ...]) -> tuple[int, int]:
    """(rows, optimizer states) of the sharded tables on the rank that holds the most of both."""
    held = table_bytes_by_rank(workload, plan)
    busiest = held[held.sum(axis=1).argmax()]
    return int(busiest[0]), int(busiest[1])


def table_bytes_by_rank(workload: Workload, plan: tuple[TableShards, ...]) -> np.ndarray:
    """Bytes of (rows, optimizer states) of the sharded tables on each rank; int64 [ranks, 2]."""
    held = np.zeros((workload.world_size, 2), dtype=np.int64)
    for table in plan:
        states = STATES[TableTraining.of(table.spec, workload.config.optimizer).optimizer]
        for rank, rows, columns in table.shards:
            of_states = sum(rows * (1 if is_rowwise(state) else columns) for state in states)
            held[rank] += (FLOAT32 * rows * columns, FLOAT32 * of_states)
    return held


def held_weights(workload: Workload) -> dict[str, int]:
    """Elements of each parameter of the dense part that a rank holds from step to step, padding included."""
    counts, rows, ranks = workload.dense_parameters, workload.dense_rows, workload.shard_group_size
    match workload.dense_sharding:
        case "weights":
            return {name: -(-rows[name] // ranks) * (count // rows[name]) for name, count in counts.items()}
        case "optimizer":
            layout = FlatLayout.of(counts, ranks)
            return counts | {"padding": ranks * layout.range_size - sum(counts.values())}
    return counts


def trained_densely(workload: Workload) -> list[tuple[str, int]]:
    """(optimizer, elements) of each parameter of the dense part that a rank updates; the rank with the most states.

    Raises ConfigError as a run would for OptimizerArgs.part_optimizers that match no weight.
    """
    args, counts = workload.config.optimizer, workload.dense_parameters
    settings = match_part_optimizers(dict.fromkeys(counts, True), args)
    shares = [counts]
    if workload.dense_sharding == "optimizer":
        ranks = workload.shard_group_size
        by_rank = map(FlatLayout.of(counts, ranks).owned, range(ranks))
        shares = [{name: len(elements) for name, elements in owned.items()} for owned in by_rank]
    elif workload.dense_sharding == "weights":
        shares = [held_weights(workload)]  # the first rank's, without padding
    trained = [[(settings[name].optimizer, count) for name, count in share.items()] for share in shares]
    return max(trained, key=lambda of_rank: sum(_state_numbers(args, *each) for each in of_rank))


def dense_state_bytes(workload: Workload) -> int:
    """States of the dense optimizers, with a step count per parameter, of replicated tables, and the moving average."""
    args = workload.config.optimizer
    tables = sum(
        spec.rows * spec.dim * (len(TableTraining.of(spec, args).states) + (1 if args.ema_decay > 0 else 0))
        for spec in workload.specs
        if spec.replicated
    )
    return FLOAT32 * (tables + sum(_state_numbers(args, *each) for each in trained_densely(workload)))


def _state_numbers(args: OptimizerArgs, optimizer: str, elements: int) -> int:
    """Numbers that are kept for so many elements of a parameter of the dense part."""
    average = elements if args.ema_decay > 0 else 0
    if optimizer == "sgd":
        return average + (elements if args.momentum > 0 else 0)
    return average + elements * len(STATES[optimizer]) + 1


def replicated_gradients(workload: Workload, batch: Batch) -> int:
    """Numbers in the gradients of the replicated tables: on a CPU those of the rows looked up, else of whole tables."""
    if workload.device_type != "cpu":
        return workload.replicated_elements
    counts = workload.ids_per_rank(batch)
    tables = [spec for spec in workload.specs if spec.replicated]
    return sum(counts.get(name, 0) * workload.group_size * spec.dim for spec in tables for name in spec.features)


def memory(workload: Workload, plan: tuple[TableShards, ...]) -> dict[str, int]:
    """Kind of memory → bytes on the rank that needs the most, for the largest batch."""
    batch = workload.largest
    micro = workload.micro_batch(batch)
    dense, replicated = sum(workload.dense_parameters.values()), workload.replicated_elements
    held = sum(held_weights(workload).values())
    fixed = sum(buffer.numel() for buffer in workload.task.buffers())
    rows, states = table_bytes(workload, plan)
    saved_by_task, working_of_task = task_bytes(workload, micro, workload.pool(batch))
    working_of_task += seen_bytes(workload, micro, workload.pool(batch, workload.dp_size))
    working = max(working_of_task, working_of_layers(workload, micro))
    of_layers = saved_by_layers(workload, micro)
    activations = of_layers + input_bytes(workload, micro) + saved_by_task
    gathered, whole_gradients = _gathered(workload)
    of_dense = held + whole_gradients if gathered else dense
    gradients = (of_dense + replicated_gradients(workload, batch)) * FLOAT32
    if workload.dp_cp_size == 1:  # no buckets of DDP
        per_layer = of_layers // workload.config.network.num_layers
        gradients = _gradients_beyond_activations(workload, per_layer, gradients - activations - working)
    return {
        "dense weights": (held + fixed) * FLOAT32,
        "gathered weights": gathered * FLOAT32,
        "replicated tables": replicated * FLOAT32,
        "gradients of both": gradients,
        "optimizer states of both": dense_state_bytes(workload),
        "sharded tables": rows,
        "optimizer states of sharded tables": states,
        "activations": activations,
        "looked-up rows": looked_up_bytes(workload, batch),
        "working memory": working,
        "batches": batch_bytes(workload, batch),
    }


def _gathered(workload: Workload) -> tuple[int, int]:
    """Elements of gathered weights, and of gradients before their exchange, that FSDP needs at the same time.

    These are all weights but those of the layers, a layer, and the buffers of the exchanges that overlap with it; all
    weights without DataParallelArgs.reshard_after_forward.
    """
    if workload.dense_sharding != "weights":
        return 0, 0
    counts, config = workload.dense_parameters, workload.config
    layer = sum(count for name, count in counts.items() if name.startswith(FIRST_LAYER))
    dense = sum(counts.values())
    beside_layers = dense - config.network.num_layers * layer
    # Micro-batches are summed before they are exchanged.
    gradients = dense + layer if config.trainer.gradient_accumulation_steps > 1 else beside_layers + 2 * layer
    return (beside_layers + 3 * layer if config.data_parallel.reshard_after_forward else dense + layer), gradients


def _gradients_beyond_activations(workload: Workload, saved: int, at_the_end: int) -> int:
    """Bytes that gradients add to the peak of a step. Backward frees the activations of a layer as it adds gradients.

    saved: activations of a layer, on average. at_the_end: bytes of all gradients beyond the peak of activations.
    """
    counts, layers = workload.dense_parameters, workload.config.network.num_layers
    layer = sum(count for name, count in counts.items() if name.startswith(FIRST_LAYER))
    head = sum(count for name, count in counts.items() if name.startswith(("task.head", "task.query")))
    during = (FLOAT32 * (head + (done + 1) * layer) - done * saved for done in range(layers))
    return max(0, at_the_end, *during)


def saved_by_layers(workload: Workload, batch: Batch) -> int:
    """Bytes that all layers save in forward."""
    return sum(len(part.spans) * layer_bytes(workload, part)[0] for part in workload.layer_parts(batch))


def working_of_layers(workload: Workload, batch: Batch) -> int:
    """Bytes beyond ``saved_by_layers`` at the peak of backward, which frees what the later layers have saved."""
    most, freed = 0, 0
    for part in reversed(list(workload.layer_parts(batch))):
        saved, alive = layer_bytes(workload, part)
        most = max(most, alive + backward_bytes(workload, part) - freed - saved)
        freed += len(part.spans) * saved
    return most


def layer_bytes(workload: Workload, part: LayerPart) -> tuple[int, int]:
    """(saved in forward, alive during backward) of one layer. They differ only under recompute_layer."""
    network, tokens = workload.config.network, workload.share(workload.tokens(part.batch))
    shape = tokens, workload.tp_size, workload.element_size, workload.residual_size
    saved = saved_bytes(network, *shape)
    if not network.recompute_layer:
        return saved, saved
    network = replace(network, recompute_layer=False, recompute_input_layernorm=False, recompute_input_silu=False)
    return saved, saved_bytes(network, *shape)


def backward_bytes(workload: Workload, part: LayerPart) -> int:
    """Working memory at the peak of a layer's backward, which is in the attention, beyond the saved activations.

    Alive are float32 copies of q, k, v and of the output's gradient, and the gradients of q, k and v; the gradients of
    the attention's output, of U, V, Q and K and of the residual, with its copy in the compute type; and SiLU of the
    projection, if it is recomputed. The attention's output and the dropout mask are already freed. With context
    parallelism the gradients of q, k and v are there by heads, too, and u is freed.
    """
    network, tokens = workload.config.network, workload.share(workload.tokens(part.batch))
    c = workload.element_size
    residual = workload.residual_size + (c if c != workload.residual_size else 0)
    inner = network.num_attention_heads * network.kv_channels // workload.tp_size
    recomputed = 4 * c * inner if network.recompute_input_silu and not network.recompute_layer else 0
    freed = c * inner + (inner if network.hidden_dropout > 0 else 0)
    by_heads = 2 * c * inner if workload.cp_size > 1 else 0
    per_token = residual * network.hidden_size + 7 * FLOAT32 * inner + 5 * c * inner + recomputed - freed + by_heads
    return tokens * per_token


def input_bytes(workload: Workload, batch: Batch) -> int:
    """Bytes saved for backward where table rows become tokens."""
    network, tokens = workload.config.network, workload.share(workload.tokens(batch))
    rows = {role: workload.share(count) for role, count in workload.rows_by_role(batch).items()}
    saved = 2 * INT64 * tokens  # the permutation and its inverse
    for role, width in workload.projected_widths.items():
        saved += rows[role] * workload.element_size * (width + 2 * network.hidden_size)
    positions = workload.encoder.inputs.position_table
    if positions is not None and positions.requires_grad:
        saved += INT64 * tokens
    dropout = network.hidden_dropout if network.input_dropout is None else network.input_dropout
    return saved + (tokens * network.hidden_size if dropout > 0 else 0)


def task_bytes(workload: Workload, batch: Batch, pool: int) -> tuple[int, int]:
    """(saved for backward, working memory of the loss) of the head, and of the softmax over ``pool`` rows."""
    args = workload.config.task_args
    of_head = _head_bytes(workload, batch, args) if isinstance(args, RankingArgs) else (0, 0)
    of_softmax = _softmax_bytes(workload, batch, pool) if workload.config.retrieval is not None else (0, 0)
    return of_head[0] + of_softmax[0], of_head[1] + of_softmax[1]


def _head_bytes(workload: Workload, batch: Batch, args: RankingArgs) -> tuple[int, int]:
    labels, own = batch.labels, workload.share(batch.labels)  # outputs are gathered for the loss
    if args.tasks is not None:
        return _task_head_bytes(workload, args, args.tasks, batch)
    c, hidden = workload.element_size, workload.config.network.hidden_size
    *widths, last = args.prediction_head_arch
    per_hidden = c if args.prediction_head_act_type == "relu" else 2 * c
    loss = FLOAT32 * (2 * last if args.num_tasks == last else last) + INT64
    of_head = INT64 + c * hidden + per_hidden * sum(widths)
    return own * of_head + labels * loss, FLOAT32 * (labels * last + own * hidden)


def _softmax_bytes(workload: Workload, batch: Batch, pool: int) -> tuple[int, int]:
    labels = workload.share(batch.labels)
    hidden, item_width = workload.config.network.hidden_size, workload.config.network.item_width
    query = FLOAT32 * (2 * item_width if item_width == hidden else hidden + 2 * item_width)
    saved = labels * (query + 2 * FLOAT32 * item_width + 4 * INT64) + pool * 2 * FLOAT32 * item_width
    # The tower keeps the inputs of its two products, and of the activation between them.
    saved += workload.tower_rows(batch, pool) * FLOAT32 * sum(workload.tower_widths)
    working = 4 * labels * FLOAT32 * item_width
    if draws := workload.draws_per_label:  # scores, weights, and the draws sorted by row
        return saved, working + labels * draws * (2 * FLOAT32 + 4 * INT64)
    return saved, working + pool * FLOAT32 * item_width


def seen_bytes(workload: Workload, batch: Batch, pool: int) -> int:
    """With mask_seen, where each sequence first has each row of the pool; twice, while rows that repeat are filled."""
    retrieval = workload.config.retrieval
    return 2 * INT32 * batch.sequences * pool if retrieval is not None and retrieval.mask_seen else 0


def _task_head_bytes(
    workload: Workload, args: RankingArgs, tasks: Sequence[RankingTaskArgs], batch: Batch
) -> tuple[int, int]:
    """See ``task_bytes``: what the products of the head read, their activations, and what the losses keep."""
    c, hidden, widths = workload.element_size, workload.config.network.hidden_size, args.prediction_head_arch
    outputs = [task.output_width for task in tasks]
    products = head_products(hidden, widths, outputs, args.task_sharing, args.num_experts)
    per_hidden = c if args.prediction_head_act_type == "relu" else 2 * c
    activations = sum(times * out * per_hidden for times, _, out in products) - per_hidden * sum(outputs)
    pairs = sum(task.loss_in_force == "pairwise" for task in tasks) * int(batch.num_candidates.max(initial=0))
    of_losses = FLOAT32 * (4 * sum(outputs) + 3 * len(tasks) + 3 * pairs)
    labels, own = batch.labels, workload.share(batch.labels)
    saved = own * (INT64 + c * hidden + activations) + labels * of_losses
    return saved, FLOAT32 * (labels * sum(outputs) + own * hidden)


def looked_up_bytes(workload: Workload, batch: Batch) -> int:
    """Bytes of the table rows for the samples of one rank and, where it has a tp_cp group, for those of the group."""
    group, counts = workload.group_size, workload.ids_per_rank(batch)
    return FLOAT32 * sum(
        counts.get(feature, 0) * spec.dim * (group + (0 if spec.replicated or group == 1 else 1))
        for spec in workload.specs
        for feature in spec.features
    )


def batch_bytes(workload: Workload, batch: Batch) -> int:
    """Bytes of the batches that a pipeline holds on the device at the same time."""
    config, size = workload.config, workload.group_size
    ids, labels = workload.ids_per_rank(batch), -(-batch.labels // size)
    numbers = sum(ids.values()) + labels + config.trainer.sequences_per_iteration * (len(ids) + 3)
    if workload.encoder.inputs.needs_times:
        numbers += ids[workload.roles.item]
    numbers += workload.batch_pool(ids[workload.roles.item])
    one = numbers * INT64 + labels * (workload.draws_per_label + len(workload.roles.labels)) * FLOAT32
    group = size if size > 1 else 0  # the batch of the group
    micro = size if config.trainer.gradient_accumulation_steps > 1 else 0  # and its micro-batches
    return one * (1 + group + micro) * _BATCHES_IN_FLIGHT[config.trainer.pipeline_type]
