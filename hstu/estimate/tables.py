"""The tables of a run: where their rows lie, what they take, and what a step looks up, exchanges and updates.

TorchRec's sharded tables do not run without data, so this is a model of them, by the plan that a run would have.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from hstu.data.batches.batch import keyed_jagged
from hstu.data.features.roles import FeatureRoles
from hstu.estimate.dry_run import DryRun
from hstu.estimate.transfer import Transfer
from hstu.estimate.workload import Workload
from hstu.model.embedding import TableSpec, build_collections
from hstu.model.gr_model import GRModel
from hstu.ops.costs import FLOAT32, Cost
from hstu.parallel.dynamic.memory import logical_name
from hstu.parallel.mesh import Mesh
from hstu.parallel.table_optimizer import STATES, RowOptimizer, TableTraining, is_rowwise
from hstu.parallel.tables import UNLIMITED, TableRanks, TableRoom, memory_plans, plan_sharding, prepare_tables, shard

INT64 = 8
"""Bytes of an id and of a length."""
SHARDED, REPLICATED = "sharded tables", "replicated tables"
_MOST_ROWS = 100_000
"""Rows of a table that is timed."""


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


def replicated_specs(workload: Workload) -> list[TableSpec]:
    """The data_parallel tables."""
    return [spec for spec in workload.specs if spec.replicated]


def replicated_bytes(workload: Workload, run: DryRun) -> tuple[int, int, int]:
    """(rows, gradients, states with the moving average) of the replicated tables.

    On a CPU gradients are those of the rows looked up, else of whole tables.
    """
    args, specs = workload.config.optimizer, replicated_specs(workload)
    rows = sum(spec.rows * spec.dim for spec in specs)
    looked_up = sum(_count(spec, run.group_ids) * spec.dim for spec in specs)
    averages = rows if args.ema_decay > 0 else 0
    states = averages + sum(spec.rows * spec.dim * len(TableTraining.of(spec, args).states) for spec in specs)
    gradients = looked_up if workload.device_type == "cpu" else rows
    return FLOAT32 * rows, FLOAT32 * gradients, FLOAT32 * states


def _count(spec: TableSpec, ids: Mapping[str, int]) -> int:
    return sum(ids.get(feature, 0) for feature in spec.features)


def table_transfers(workload: Workload, run: DryRun, plan: tuple[TableShards, ...]) -> Iterator[Transfer]:
    """TorchRec sends ids to the ranks with their rows, the rows back, and the gradients the same way as the ids.

    There is one exchange per collection (tables of one width) and kind of sharding.
    """
    ranks, own = workload.world_size, run.ids
    sequences = workload.config.trainer.sequences_per_iteration
    sent_ids = lengths = gradients = 0
    rows = np.zeros(ranks)
    for table in plan:
        count = _count(table.spec, own)
        by_rows = table.sharding == "row_wise"
        copies = 1 if by_rows else len(table.shards)
        sent_ids += count * copies * INT64
        lengths += len(table.spec.features) * sequences * (ranks if by_rows else copies) * INT64
        gradients += count * table.spec.stored_dim * FLOAT32
        for rank, _, columns in table.shards:  # each row goes to the rank that has looked it up
            rows[rank] += count * columns * FLOAT32 * (1 if by_rows else ranks)
    calls = len({(table.spec.stored_dim, table.sharding) for table in plan})
    world = partial(Transfer, kind="all_to_all", group="world", ranks=ranks)
    yield world("ids to their tables", calls=3 * calls, payload=sent_ids + lengths, behind="pipeline")
    yield world("rows of the tables", calls=calls, payload=int(rows.max()))
    yield world("gradients of the rows", calls=calls, payload=gradients)
    if workload.device_type == "cpu" and (specs := replicated_specs(workload)):
        found = [(min(spec.rows, _count(spec, run.group_ids)), spec.dim) for spec in specs]
        payload = sum(count * (dim * FLOAT32 + INT64) for count, dim in found)
        yield Transfer("rows of replicated tables", "all_gather", "data", workload.dp_cp_size, 2 * len(specs), payload)


def table_costs(workload: Workload, run: DryRun, plan: tuple[TableShards, ...]) -> dict[str, Cost]:
    """The look-ups and updates of a rank.

    Rows are read and written, gradients written and read, and the update reads and writes rows and states. A replicated
    table on a GPU has the gradient and the update of the whole table.
    """
    args, sharded, replicated = workload.config.optimizer, 0.0, 0.0
    for table in plan:
        states = TableTraining.of(table.spec, args).states
        elements = _count(table.spec, run.ids) * table.spec.stored_dim
        sharded += FLOAT32 * float(elements) * (2 + 4 + 2 * (1 + sum(not is_rowwise(state) for state in states)))
    for spec in replicated_specs(workload):
        ids = _count(spec, run.group_ids)
        updated = ids if workload.device_type == "cpu" else spec.rows
        states = TableTraining.of(spec, args).states
        replicated += FLOAT32 * spec.dim * (5.0 * ids + updated * (1 + 2 * (1 + len(states)) + 1))
    launches = 40 * len({table.spec.stored_dim for table in plan})  # a few for the ids and rows of each collection
    found = {
        SHARDED: Cost(0.0, sharded, launches),
        REPLICATED: Cost(0.0, replicated, 4 * len(replicated_specs(workload))),
    }
    return {name: cost for name, cost in found.items() if cost.bytes}


def table_steps(
    workload: Workload, run: DryRun, plan: tuple[TableShards, ...], mesh: Mesh
) -> dict[str, Callable[[], object]]:
    """What takes as long on this CPU as the tables in a step; the mesh is that of a single rank."""
    steps: dict[str, Callable[[], object]] = {}
    if plan:
        steps[SHARDED] = _sharded_step(workload, plan, run.ids, mesh)
    if specs := replicated_specs(workload):
        of_each = [_replicated_step(workload, spec, _count(spec, run.group_ids)) for spec in specs]
        steps[REPLICATED] = lambda: [step() for step in of_each]
    return steps


def _replicated_step(workload: Workload, spec: TableSpec, ids: int) -> Callable[[], object]:
    args = workload.config.optimizer
    table = nn.Parameter(torch.randn(spec.rows, spec.dim))
    optimizer = RowOptimizer({spec.name: table}, {spec.name: TableTraining.of(spec, args)}, args)
    optimizer.lr_multiplier = 1e-9
    indices = torch.randint(spec.rows, (ids,))

    def step() -> None:
        table.grad = None
        rows = F.embedding(indices, table, sparse=True)
        rows.backward(rows.detach())
        optimizer.step()

    return step


def _sharded_step(
    workload: Workload, plan: tuple[TableShards, ...], ids: Mapping[str, int], mesh: Mesh
) -> Callable[[], object]:
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

    return step


def _busiest_rank(
    world_size: int, plan: tuple[TableShards, ...], ids: Mapping[str, int]
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
