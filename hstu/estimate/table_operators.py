"""The look-ups and updates of tables, and the update of the dense part, as they are timed."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from hstu.config.args import OptimizerArgs
from hstu.data.batches.batch import keyed_jagged
from hstu.data.features.roles import FeatureRoles
from hstu.estimate.memory import TableShards
from hstu.estimate.timing import Operator, Timed, rows_to_time
from hstu.estimate.workload import Workload
from hstu.model.embedding import TableSpec
from hstu.model.gr_model import GRModel
from hstu.ops.costs import FLOAT32, Cost
from hstu.optim.dense import DenseOptimizer
from hstu.parallel.mesh import Mesh
from hstu.parallel.table_optimizer import STATES, RowOptimizer, TableTraining, is_rowwise
from hstu.parallel.tables import shard

_MOST_ROWS = 100_000
"""Rows of a table that is timed."""


def replicated_table(workload: Workload, spec: TableSpec, ids: int) -> Operator:
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
        optimizer = RowOptimizer(
            [group], (args.adam_beta1, args.adam_beta2), args.adam_eps, workload.cpu_kernels.update_rows
        )
        indices = torch.randint(spec.rows, (ids,))

        def step() -> None:
            table.grad = None
            rows = F.embedding(indices, table, sparse=True)
            rows.backward(rows.detach())
            optimizer.step()

        return Timed(step, 1.0)

    return Operator("replicated tables", Cost(0.0, FLOAT32 * spec.dim * moved), prepare)


def dense_update(optimizer: str, elements: int, tensors: int) -> Operator:
    """Weights and states are read and written, gradients written and read."""
    cost = Cost(0.0, FLOAT32 * float(elements) * (2 + 2 * len(STATES[optimizer]) + 2))

    def prepare(_: Mesh) -> Timed:
        fewer = rows_to_time(cost, elements)
        count = max(1, min(tensors, fewer))
        module = nn.ParameterList(torch.randn(max(1, fewer // count)) for _ in range(count))
        dense = DenseOptimizer(module, OptimizerArgs(optimizer_str=optimizer, learning_rate=1e-9))

        def update() -> None:
            for parameter in module:
                parameter.grad = torch.ones_like(parameter)
            dense.step()

        return Timed(update, elements / fewer)

    return Operator("dense optimizer", cost, prepare)


def sharded_tables(workload: Workload, plan: tuple[TableShards, ...], ids: dict[str, int]) -> Operator:
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
