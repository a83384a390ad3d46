"""What runs on each rank in test_tables.py."""

from __future__ import annotations

from typing import Any

import torch
from torchrec import KeyedJaggedTensor
from torchrec.distributed.train_pipeline.pipeline_context import TrainPipelineContext
from torchrec.distributed.train_pipeline.utils import _rewrite_model

from hstu.model.gr_model import GRModel
from hstu.parallel import mesh as mesh_module
from hstu.parallel.collectives import gather_objects
from hstu.parallel.dense import unwrap_dense
from hstu.parallel.embedding import sharded_weights
from tests.distributed.launch import call_each
from tests.distributed.toy import FEATURES, ITEMS, build, make_batch, make_config, train_step


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
            if values:  # a small table leaves some ranks without rows
                part = torch.tensor(values)
                whole[row : row + part.shape[0], col : col + part.shape[1]] = part
        assert not whole[:, spec.dim :].any(), "columns that only pad a row must stay zero"
        tables[spec.name] = whole[:, : spec.dim].tolist()
    return tables


def run_cases(cases: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Run many cases in one launch: name → the function of this module to ``call`` and its other arguments."""
    mesh = mesh_module.start(timeout_s=60)
    functions = {
        function.__name__: function
        for function in (
            train,
            look_up_items,
            pipelined_modules,
            lr_multipliers,
            copy_optimizer_state,
            out_of_range_id,
            sparse_gradients,
            swapped_features,
        )
    }
    results = call_each(functions, cases, mesh)
    mesh_module.finish()
    return results


def train(mesh: mesh_module.Mesh, steps: int = 3, empty_from: int | None = None, **config_args: Any) -> dict[str, Any]:
    """Train the toy; the initial and final tables, the dense weights, each step's loss."""
    model, optimizers = build(make_config(**config_args), mesh)
    initial = full_tables(model, mesh)
    losses = [
        train_step(model, optimizers, mesh, make_batch(step, mesh.rank, mesh.world_size, empty_from))
        for step in range(steps)
    ]
    dense = {name: weight.tolist() for name, weight in unwrap_dense(model).task.named_parameters()}
    return {"initial": initial, "tables": full_tables(model, mesh), "dense": dense, "losses": losses}


def look_up_items(mesh: mesh_module.Mesh, counts: list[int], **config_args: Any) -> dict[str, Any]:
    """embed_items on ``counts[rank]`` ids a rank, before and after a training step, and what it must equal."""
    model, optimizers = build(make_config(**config_args), mesh)
    generator = torch.Generator().manual_seed(mesh.rank)
    ids = torch.randint(0, ITEMS, (counts[mesh.rank],), generator=generator)
    results: dict[str, Any] = {"matches": [], "rng_kept": []}
    for step in range(2):
        noise = torch.get_rng_state()
        rows = model.embed_items(ids)
        results["rng_kept"].append(torch.equal(noise, torch.get_rng_state()))
        table = torch.tensor(full_tables(model, mesh)["item_table"])
        results["matches"].append(torch.equal(rows, table[ids]))
        results["requires_grad"] = rows.requires_grad
        train_step(model, optimizers, mesh, make_batch(step, mesh.rank, mesh.world_size))
    results["tables"] = full_tables(model, mesh)
    return results


def pipelined_modules(mesh: mesh_module.Mesh, **config_args: Any) -> dict[str, Any]:
    """The modules that TorchRec's pipelines find by tracing, and a few steps of the real pipeline."""
    model, _ = build(make_config(**config_args), mesh)
    found = _rewrite_model(model, TrainPipelineContext(), dist_stream=None)
    results = {"pipelined": len(found[0]), "not_pipelined": found[4], "collections": len(model.embedding)}
    return results


def lr_multipliers(mesh: mesh_module.Mesh) -> dict[str, Any]:
    """How far SGD moves dense weights and fused and replicated tables at multipliers 1, 0.5 and 0."""
    moves: dict[str, list[float]] = {"item_table": [], "action_table": [], "dense": []}
    for multiplier in (1.0, 0.5, 0.0):
        model, optimizers = build(make_config(optimizer="sgd", replicated=("action",)), mesh)
        before, weight = full_tables(model, mesh), unwrap_dense(model).task.head.weight
        head = weight.detach().clone()
        optimizers.set_lr_multiplier(multiplier)
        train_step(model, optimizers, mesh, make_batch(0, mesh.rank, mesh.world_size))
        after = full_tables(model, mesh)
        for table in ("item_table", "action_table"):
            moves[table].append(float((torch.tensor(after[table]) - torch.tensor(before[table])).norm()))
        moves["dense"].append(float((weight - head).norm()))
    return moves


def copy_optimizer_state(mesh: mesh_module.Mesh, optimizers: list[str]) -> dict[str, bool]:
    """Whether a copy that got model and optimizer state through state_dict trains on exactly like the original."""
    same = {}
    for optimizer in optimizers:
        first, second = (build(make_config(optimizer=optimizer), mesh) for _ in range(2))
        for step in range(2):
            train_step(*first, mesh, make_batch(step, mesh.rank, mesh.world_size))
        second[0].load_state_dict(first[0].state_dict())
        second[1].load_state_dict(first[1].state_dict())
        for model, optimizers_of in (first, second):
            train_step(model, optimizers_of, mesh, make_batch(2, mesh.rank, mesh.world_size))
        same[optimizer] = full_tables(first[0], mesh) == full_tables(second[0], mesh)
    return same


def out_of_range_id(mesh: mesh_module.Mesh, optimizer: str) -> str:
    """What looking up an id beyond the table raises."""
    model, _ = build(make_config(optimizer=optimizer), mesh)
    try:
        model.embed_items(torch.tensor([ITEMS + 5]))
    except (RuntimeError, IndexError) as error:
        return type(error).__name__
    return "no error"


def sparse_gradients(mesh: mesh_module.Mesh) -> dict[str, Any]:
    """Layout of the gradients of sharded tables under Adam on the CPU."""
    model, _ = build(make_config(optimizer="adam"), mesh)
    batch = make_batch(0, mesh.rank, mesh.world_size)
    model(batch).loss_sum.backward()
    weights = {name: parameter for collection in model.embedding for name, parameter in collection.named_parameters()}
    results = {name: [weight.grad.is_sparse, weight.grad._nnz()] for name, weight in weights.items()}
    return results


def swapped_features(mesh: mesh_module.Mesh) -> str:
    """What a batch raises whose features stand in another order, all ids of which happen to be in range."""
    model, _ = build(make_config(optimizer="sgd"), mesh)
    batch = make_batch(0, mesh.rank, mesh.world_size)
    model(batch)
    jagged = batch.features.to_dict()
    user, item, action, negatives = FEATURES
    batch.features = KeyedJaggedTensor.from_jt_dict({key: jagged[key] for key in (user, negatives, action, item)})
    try:
        model(batch)
    except ValueError as error:
        return str(error)
    return "no error"
