"""What runs on each rank in test_tables.py."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from hstu.model.gr_model import GRModel
from hstu.parallel import mesh as mesh_module
from hstu.parallel.collectives import gather_objects
from hstu.parallel.dense import unwrap_dense
from hstu.parallel.embedding import sharded_weights
from tests.distributed.toy import build, make_batch, make_config, train_step


def full_tables(model: GRModel, mesh: mesh_module.Mesh) -> dict[str, Any]:
    """All tables as nested lists, assembled from the ranks' shards; padding columns cut off."""
    shards = {
        table: [(shard.metadata.shard_offsets, shard.tensor.tolist()) for shard in weight.local_shards()]
        for table, weight in sharded_weights(model).items()
    }
    tables = {}
    by_rank = gather_objects(shards, mesh.world_group)
    for spec in model.specs:
        if spec.replicated:
            tables[spec.name] = unwrap_dense(model).replicated.weight(spec.name).tolist()
            continue
        whole = torch.full((spec.rows, spec.stored_dim), float("nan"))
        for (row, col), values in (part for rank in by_rank for part in rank[spec.name]):
            part = torch.tensor(values).view(len(values), -1)
            whole[row : row + part.shape[0], col : col + part.shape[1]] = part
        assert not whole[:, spec.dim :].any(), "columns that only pad a row must stay zero"
        tables[spec.name] = whole[:, : spec.dim].tolist()
    return tables


def train(steps: int, empty_from: int | None = None, **config_args: Any) -> dict[str, Any]:
    """Train the toy; the final tables, the dense weights, each step's loss."""
    mesh = mesh_module.start(timeout_s=60)
    config = make_config(**config_args)
    model, optimizers = build(config, mesh)
    losses = [
        train_step(model, optimizers, mesh, make_batch(step, mesh.rank, mesh.world_size, empty_from))
        for step in range(steps)
    ]
    tables = full_tables(model, mesh)
    dense = {name: weight.tolist() for name, weight in unwrap_dense(model).task.named_parameters()}
    mesh_module.finish()
    return {"tables": tables, "dense": dense, "losses": losses}
