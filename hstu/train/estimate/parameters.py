"""Bytes of what a rank keeps from step to step: weights, gradients, optimizer states, tables. Equal to the byte."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import nn

from hstu.config.args import RankingArgs
from hstu.model.embedding import TableSpec, build_collections
from hstu.ops.relative_bias import NUM_TIME_BUCKETS
from hstu.optim.parts import replicated_settings, settings_of_weights
from hstu.parallel.dynamic.split import in_parts, table_of
from hstu.parallel.embedding import memory_plans, table_planner, table_sharders
from hstu.parallel.table_training import STATES, TableTraining, is_of_rows
from hstu.train.estimate.situation import Situation

NUMBER = 4
"""Parameters, gradients and states are float32, whatever the compute type."""
LAYERS = "task.encoder.stack.layers"
"""Before the number of a layer, in the names of its parameters."""
_INPUTS = "task.encoder.inputs"
STATES_OF_DENSE = {"adam": 2, "adamw": 2, "adagrad": 1, "rowwise_adagrad": 1, "sgd": 0}
"""Numbers that the dense optimizers keep for each of a weight; sgd without momentum."""


def dense_parameters(situation: Situation) -> dict[str, int]:
    """Elements of each parameter of the dense part on a rank, by its name; the replicated tables are not among them.

    Over a tensor-parallel group the two projections and the output norm of a layer are cut, all else is on each rank.
    """
    network, features, tp = situation.config.network, situation.features, situation.tp_size
    hidden, inner = network.hidden_size, network.num_attention_heads * network.kv_channels
    counts: dict[str, int] = {}
    for role, width in projected_roles(situation).items():
        counts |= _mlp(f"{_INPUTS}.projections.{role}", width, [hidden, hidden], bias=True)
    if network.position_encoding == "absolute":
        counts[f"{_INPUTS}.position_table"] = network.num_position_buckets * hidden
    for layer in range(network.num_layers):
        own = {
            "input_norm.weight": hidden,
            "input_norm.bias": hidden,
            "uvqk.weight": hidden * 4 * inner // tp,
            "uvqk.bias": 4 * inner // tp,
            "output_norm.weight": inner // tp,
            "output_norm.bias": inner // tp,
            "out.weight": inner * hidden // tp,
        }
        if network.position_encoding == "relative_bias":
            own |= {
                "bias.position_weight": 2 * features.max_tokens(network) - 1,
                "bias.time_weight": NUM_TIME_BUCKETS,
            }
        counts |= {f"{LAYERS}.{layer}.{name}": count for name, count in own.items()}
    args = situation.config.task_args
    if isinstance(args, RankingArgs):
        counts |= _mlp("task.head", hidden, args.prediction_head_arch, args.prediction_head_bias)
    elif network.item_width != hidden:
        counts |= {"task.query_projection.weight": hidden * network.item_width}
        counts |= {"task.query_projection.bias": network.item_width}
    return counts


def projected_roles(situation: Situation) -> dict[str, int]:
    """The kinds of features whose rows are not hidden_size wide, with that width."""
    network, roles = situation.config.network, situation.roles
    widths = {"item": network.item_width}
    if roles.action is not None:
        widths["action"] = network.item_width
    if roles.contextual:
        widths["contextual"] = network.contextual_width
    return {role: width for role, width in widths.items() if width != network.hidden_size}


def _mlp(name: str, in_width: int, widths: list[int], bias: bool) -> dict[str, int]:
    counts = {}
    for layer, (before, after) in enumerate(zip([in_width, *widths], widths, strict=False)):
        place = 2 * layer  # an activation lies between two layers
        counts[f"{name}.{place}.weight"] = before * after
        if bias:
            counts[f"{name}.{place}.bias"] = after
    return counts


def replicated_elements(situation: Situation) -> int:
    """Elements of the data_parallel tables, all of which every rank has."""
    return sum(spec.rows * spec.dim for spec in situation.specs if spec.replicated)


def trained_densely(situation: Situation) -> list[tuple[str, int]]:
    """(optimizer, elements) of each parameter of the dense part on a rank and of each replicated table.

    Raises ConfigError as a run would for OptimizerArgs.part_optimizers that match no weight.
    """
    args, counts = situation.config.optimizer, dense_parameters(situation)
    settings = settings_of_weights(dict.fromkeys(counts, True), args)
    weights = [(settings[name].optimizer, count) for name, count in counts.items()]
    tables = [spec for spec in situation.specs if spec.replicated]
    return weights + [(replicated_settings(spec, args).optimizer, spec.rows * spec.dim) for spec in tables]


def dense_state_bytes(situation: Situation) -> int:
    """State of the dense optimizer; step counts and average."""
    args = situation.config.optimizer
    average = 1 if args.ema_decay > 0 else 0
    trained = trained_densely(situation)
    return sum(NUMBER * (count * average + _dense_state(count, name, args.momentum)) for name, count in trained)


def _dense_state(elements: int, optimizer: str, momentum: float) -> int:
    """Numbers that the dense optimizer keeps of a parameter."""
    if optimizer == "sgd":
        return elements if momentum > 0 else 0
    return elements * STATES_OF_DENSE[optimizer] + 1


@dataclass(frozen=True)
class TableShards:
    """How the planner cuts one table."""

    spec: TableSpec
    sharding: str
    """row_wise, table_wise or column_wise."""
    shards: tuple[tuple[int, int, int], ...]
    """(rank, rows, columns) of each."""

    def weight_bytes(self, ranks: int) -> np.ndarray:
        """Bytes of the rows on each rank, int64 [ranks]."""
        return self._by_rank(ranks, [(rank, rows * columns) for rank, rows, columns in self.shards])

    def state_bytes(self, ranks: int, optimizer: str) -> np.ndarray:
        """Bytes of the optimizer's state on each rank, int64 [ranks]."""
        elements = [
            (rank, rows * (1 if is_of_rows(state) else columns))
            for state in STATES[optimizer]
            for rank, rows, columns in self.shards
        ]
        return self._by_rank(ranks, elements)

    def _by_rank(self, ranks: int, elements: list[tuple[int, int]]) -> np.ndarray:
        numbers = np.zeros(ranks, dtype=np.int64)
        for rank, count in elements:
            numbers[rank] += count
        return numbers * NUMBER


def plan_tables(situation: Situation) -> tuple[TableShards, ...]:
    """What TorchRec's planner will do with the sharded tables: it is asked, with the constraints of a run."""
    specs = {spec.name: spec for spec in situation.specs if not spec.replicated}
    if not specs:
        return ()
    model = nn.Module()
    args = situation.config.optimizer
    memory = memory_plans(situation.specs, args, situation.world_size)
    model.embedding = in_parts(build_collections(situation.specs), memory)
    planner = table_planner(
        situation.specs,
        situation.world_size,
        situation.ranks_per_host,
        situation.device_type,
        memory,
        situation.config.trainer.pipeline_type == "prefetch",
    )
    plan = planner.plan(model, table_sharders(args, situation.device_type, situation.specs))
    found: dict[str, TableShards] = {}
    for tables in plan.plan.values():
        for part, table in tables.items():
            name = part if part in specs else table_of(part)
            shards = [(s.placement.rank(), *s.shard_sizes) for s in table.sharding_spec.shards]
            if name in found:  # the second part of a table in two memories, cut as the first
                before = found[name].shards
                shards = [(rank, m + n, cols) for (rank, m, cols), (_, n, _) in zip(before, shards, strict=True)]
            found[name] = TableShards(specs[name], table.sharding_type, tuple(shards))
    return tuple(found.values())


def table_bytes(situation: Situation, plan: tuple[TableShards, ...]) -> tuple[int, int]:
    """(rows, optimizer states) of the sharded tables on the rank that has most of both."""
    ranks, args = situation.world_size, situation.config.optimizer
    weights, states = np.zeros(ranks, dtype=np.int64), np.zeros(ranks, dtype=np.int64)
    for table in plan:
        weights += table.weight_bytes(ranks)
        states += table.state_bytes(ranks, TableTraining.of(table.spec, args).optimizer)
    busiest = int((weights + states).argmax())
    return int(weights[busiest]), int(states[busiest])
