"""Memory, traffic and cost of what a dry run leaves out: tables, DDP and FSDP2."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, cast

import numpy as np
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from hstu.checkpoint.tensors import AVERAGE, TABLES, WEIGHTS
from hstu.config.run_config import RunConfig
from hstu.data.features.roles import FeatureRoles
from hstu.estimate.dry_run import DryRun
from hstu.estimate.workload import Workload
from hstu.model.embedding import TableSpec, build_collections
from hstu.model.stack import ROUNDED_WEIGHTS
from hstu.ops.costs import FLOAT32, Cost
from hstu.ops.pytorch.operators import REFERENCE_KERNELS
from hstu.optim.optimizers import DenseOptimizer
from hstu.parallel.dynamic.memory import logical_name
from hstu.parallel.table_optimizer import TableTraining, is_rowwise, state_shape
from hstu.parallel.tables import UNLIMITED, TableRanks, TableRoom, memory_plans, plan_sharding, prepare_tables
from hstu.train.builder import task_module

INT64 = 8
"""Bytes of an id and of a length."""
DDP_BUCKET_BYTES = 25 << 20
"""torch's default for bucket_cap_mb."""


@dataclass(frozen=True)
class Transfer:
    """All collectives of a step that serve one purpose."""

    name: str
    kind: str
    """all_reduce, all_gather, reduce_scatter or all_to_all."""
    group: str
    """Field of Mesh that has the group."""
    ranks: int
    calls: int
    payload: int
    """Bytes of a rank's inputs, summed over the calls; of the busiest rank if ranks differ."""
    behind: Literal["backward", "pipeline", "operators", "nothing"] = "nothing"
    """What can hide it: the backward pass, preceding steps, or the operators before the first reader of its result."""

    def sent(self, on_host: int) -> tuple[float, float]:
        """Minimum bytes that a rank sends (within its host, to other hosts), with ``on_host`` ranks per host and rings.
        The collective is hierarchical: the ranks of a host split outgoing data evenly and share what arrives."""
        hosts = -(-self.ranks // on_host)
        near, far = on_host - 1, hosts - 1
        match self.kind:
            case "all_reduce":
                factors = 2 * near / on_host, 2 * far / hosts / on_host
            case "all_gather":
                factors = hosts * near, far
            case "reduce_scatter":
                factors = near / on_host, far / hosts / on_host
            case _:  # all_to_all
                factors = near / self.ranks, (self.ranks - on_host) / self.ranks
        return self.payload * factors[0], self.payload * factors[1]


@dataclass(frozen=True)
class TableShards:
    """How the planner shards one table."""

    spec: TableSpec
    sharding: str
    shards: tuple[tuple[int, int, int], ...]
    """(rank, rows, columns) of each shard."""


def plan_tables(workload: Workload, room: TableRoom = UNLIMITED) -> tuple[TableShards, ...]:
    """Shards the model_parallel tables as a run does. Raises TablesDoNotFit if ``room`` is too small."""
    specs = {spec.name: spec for spec in workload.specs if not spec.replicated}
    if not specs:
        return ()
    model, args = nn.Module(), workload.config.optimizer
    memory = memory_plans(workload.specs, args, workload.world_size)
    model.embedding = build_collections(workload.specs)
    prepare_tables(model, workload.specs, args, memory)
    ranks = TableRanks(workload.world_size, workload.ranks_per_host, workload.device_type, room)
    plan = plan_sharding(model, workload.specs, memory, workload.config, ranks)
    found: dict[str, TableShards] = {}
    for part, table in (pair for tables in plan.plan.values() for pair in tables.items()):
        name = part if part in specs else logical_name(part)
        shards = [(s.placement.rank(), *s.shard_sizes) for s in table.sharding_spec.shards]
        if name in found:  # a table in two memories has two parts, sharded alike
            first = found[name].shards
            shards = [(rank, m + n, cols) for (rank, m, cols), (_, n, _) in zip(first, shards, strict=True)]
        found[name] = TableShards(specs[name], table.sharding_type, tuple(shards))
    return tuple(found.values())


def table_bytes(workload: Workload, plan: tuple[TableShards, ...]) -> tuple[int, int]:
    """Bytes of (rows, optimizer states) of the sharded tables on the rank with the largest sum."""
    held = np.zeros((workload.world_size, 2), dtype=np.int64)
    for table in plan:
        training = TableTraining.of(table.spec, workload.config.optimizer)
        for rank, rows, columns in table.shards:
            held[rank] += FLOAT32 * rows * columns, rows * training.bytes_per_row(columns)
    of_rows, with_states = held[held[:, 1].argmax()].tolist()
    return of_rows, with_states - of_rows


def replicated_bytes(workload: Workload, run: DryRun) -> tuple[int, int, int]:
    """Bytes of (rows, gradients, optimizer states and moving average) of the replicated tables.
    Gradients are sparse (only looked-up rows) on a CPU and dense on a GPU."""
    specs = workload.replicated_specs
    rows = sum(spec.rows * spec.dim for spec in specs)
    looked_up = sum(_count(spec, run.group_ids) * spec.dim for spec in specs)
    states = sum(size.numel() for size in table_tensors(workload.config, specs).values()) - rows
    gradients = looked_up if workload.device_type == "cpu" else rows
    of_rows = FLOAT32 * sum(spec.rows * spec.dim for spec in specs)
    return of_rows, FLOAT32 * gradients, FLOAT32 * states


def _count(spec: TableSpec, ids: Mapping[str, int]) -> int:
    return sum(ids.get(feature, 0) for feature in spec.features)


def table_transfers(workload: Workload, run: DryRun, plan: tuple[TableShards, ...]) -> Iterator[Transfer]:
    """TorchRec sends distinct ids to the ranks that hold their rows, rows back, and gradients as ids went.
    There is one exchange per collection (tables of one width) and kind of sharding."""
    ranks = workload.world_size
    size = FLOAT32 if workload.config.precision.table_exchange_dtype == "float32" else 2
    sent_ids = lengths = gradients = 0
    rows = np.zeros(ranks)
    for table in plan:
        count, by_rows = run.distinct_ids[table.spec.name], table.sharding == "row_wise"
        copies = 1 if by_rows else len(table.shards)
        sent_ids += count * copies * (INT64 + (0 if table.spec.dynamic is None else FLOAT32))
        lengths += len(table.spec.features) * (ranks if by_rows else copies) * INT64
        gradients += count * table.spec.stored_dim * size
        for rank, _, columns in table.shards:  # each row goes to the rank that looked it up
            rows[rank] += count * columns * size * (1 if by_rows else ranks)
    calls = len({(table.spec.stored_dim, table.sharding) for table in plan})
    world = partial(Transfer, kind="all_to_all", group="world_group", ranks=ranks)
    yield world("ids to their tables", calls=3 * calls, payload=sent_ids + lengths, behind="pipeline")
    yield world("rows of the tables", calls=calls, payload=int(rows.max()))
    yield world("gradients of the rows", calls=calls, payload=gradients)
    if workload.device_type == "cpu" and (specs := workload.replicated_specs):
        found = [(min(spec.rows, _count(spec, run.group_ids)), spec.dim) for spec in specs]
        payload = sum(count * (dim * FLOAT32 + INT64) for count, dim in found)
        of_group = partial(Transfer, group="dp_cp_group", ranks=workload.dp_cp_size)
        yield of_group("numbers of these rows", "all_reduce", calls=1, payload=INT64 * len(specs))
        yield of_group("rows of replicated tables", "all_gather", calls=2 * len(specs), payload=payload)


def table_costs(workload: Workload, run: DryRun, plan: tuple[TableShards, ...]) -> dict[str, Cost]:
    """Costs of a rank's look-ups and updates: memory traffic of rows, gradients and optimizer states.
    A replicated table on a GPU has a dense gradient and updates all its rows."""
    args, sharded, replicated = workload.config.optimizer, 0.0, 0.0
    for table in plan:
        states = [state for state in TableTraining.of(table.spec, args).states if not is_rowwise(state)]
        ids = _count(table.spec, run.ids)
        looked_up = run.distinct_ids[table.spec.name] if workload.world_size > 1 else ids
        per_element = 2 + 4 + 2 * (1 + len(states))
        repeated = 4 * ids if workload.world_size > 1 else 0  # rows are copied to all occurrences, gradients added
        sharded += FLOAT32 * table.spec.stored_dim * float(looked_up * per_element + repeated)
    for spec in workload.replicated_specs:
        ids = _count(spec, run.group_ids)
        updated = ids if workload.device_type == "cpu" else spec.rows
        states = [state for state in TableTraining.of(spec, args).states if not is_rowwise(state)]
        replicated += FLOAT32 * spec.dim * (5.0 * ids + updated * (1 + 2 * (1 + len(states)) + 1))
    launches = 40 * len({table.spec.stored_dim for table in plan})  # a few for the ids and rows per collection
    found = {
        "sharded tables": Cost(0.0, sharded, launches),
        "replicated tables": Cost(0.0, replicated, 4 * len(workload.replicated_specs)),
    }
    return {name: cost for name, cost in found.items() if cost.bytes}


def dense_tensors(run: RunConfig, roles: FeatureRoles) -> dict[str, torch.Size]:
    """Dense checkpoint tensor (named as in TrainState.tensors) → size. Raises ConfigError for bad part_optimizers."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = nn.ModuleDict({"task": task_module(run, roles, REFERENCE_KERNELS)})
        states = DenseOptimizer(model, run.optimizer).state_tensors()
    sizes = {f"{WEIGHTS}{name}": tensor.size() for name, tensor in model.state_dict().items()}
    return sizes | {f"optimizer.dense.{name}": cast(torch.Tensor, state).size() for name, state in states.items()}


def table_tensors(run: RunConfig, specs: Sequence[TableSpec]) -> dict[str, torch.Size]:
    """Checkpoint tensor of a static table or its optimizer states → size."""
    args, static = run.optimizer, [spec for spec in specs if spec.dynamic is None]
    sizes = {f"{TABLES}{spec.name}": torch.Size((spec.rows, spec.dim)) for spec in static}
    for spec in static:
        averages = (AVERAGE,) if spec.replicated and args.ema_decay > 0 else ()
        for state in (*TableTraining.of(spec, args).states, *averages):
            sizes[f"optimizer.tables.{spec.name}.{state}"] = torch.Size(state_shape(spec, state))
    return sizes


def held_weights(workload: Workload, run: DryRun) -> dict[str, int]:
    """Parameter of the dense part → elements that a rank holds between steps, padding included."""
    ranks = workload.shard_group_size
    return {name: -(-weight.rows // ranks) * (weight.elements // weight.rows) for name, weight in run.weights.items()}


def state_bytes(workload: Workload, run: DryRun) -> int:
    """Bytes of dense optimizer states and the moving average on the first rank, which has the most."""
    owned = [(run.weights[name], count) for name, count in held_weights(workload, run).items()]
    return sum(weight.state_bytes * count // weight.elements + weight.step_bytes for weight, count in owned)


def gathered_and_gradients(workload: Workload, run: DryRun) -> tuple[int, int]:
    """Maximum elements of (gathered weights, gradients) that exist on a rank at the same time.
    FSDP gathers the weights outside the layers, one layer, and the buffers of the exchanges that overlap with it."""
    config = workload.config
    dense = sum(weight.elements for weight in run.weights.values())
    if workload.shard_group_size == 1:
        return 0, dense
    of_layers = sum(weight.elements for weight in run.weights.values() if weight.is_layer)
    layer, rest = of_layers // config.network.num_layers, dense - of_layers
    # Gradients of micro-batches are summed before they are exchanged.
    gradients = dense + layer if config.trainer.gradient_accumulation_steps > 1 else rest + 2 * layer
    has_16_bits = config.network.dtype_str != "float32"  # FSDP's buffers are float32, what is received is not
    return rest + 3 * layer + layer // 2 * has_16_bits, gradients + sum(held_weights(workload, run).values())


def data_parallel_transfers(workload: Workload, run: DryRun) -> Iterator[Transfer]:
    """Collectives of dense weights and gradients, dense gradients of replicated tables included.
    FSDP's units are each layer and the rest. Backward gathers the layers again."""
    config, ranks, held = workload.config, workload.shard_group_size, held_weights(workload, run)
    layers, passes = config.network.num_layers, config.trainer.gradient_accumulation_steps
    size = FLOAT32 if config.precision.fp32_master_grads or config.network.dtype_str == "float32" else 2
    replicated = sum(spec.rows * spec.dim for spec in workload.replicated_specs if workload.device_type != "cpu")
    elements, part = sum(weight.elements for weight in run.weights.values()) + replicated, sum(held.values())
    name, shards = "gradients of the dense part", partial(Transfer, group="dp_cp_group", ranks=ranks)
    if ranks > 1:
        rounded = ROUNDED_WEIGHTS if config.network.dtype_str != "float32" else ()
        of_layers = {weight: n for weight, n in held.items() if run.weights[weight].is_layer}
        layer_bytes = sum(n * (2 if weight.endswith(rounded) else FLOAT32) for weight, n in of_layers.items())
        payload = passes * (layer_bytes + FLOAT32 * (part - sum(of_layers.values())))
        yield shards("dense weights in forward", "all_gather", calls=passes * (layers + 1), payload=payload)
        yield shards("dense weights in backward", "all_gather", calls=passes * layers, payload=passes * layer_bytes)
        payload = ranks * part * size
        yield shards(name, "reduce_scatter", calls=layers + 1, payload=payload, behind="backward")
        elements = replicated
    if elements > 0:
        buckets, group = 1 + elements * FLOAT32 // DDP_BUCKET_BYTES, workload.dp_cp_size
        yield Transfer(name, "all_reduce", "dp_cp_group", group, buckets, elements * size, behind="backward")
