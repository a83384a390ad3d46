"""What runs on each rank in test_dynamic_tables.py."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hstu.checkpoint.load import load
from hstu.checkpoint.save import save
from hstu.checkpoint.state import TrainState
from hstu.data.batch import NEGATIVES, HSTUBatch, keyed_jagged
from hstu.model.gr_model import GRModel
from hstu.optim.optimizers import Optimizers
from hstu.parallel import mesh as mesh_module
from hstu.parallel.collectives import gather_objects
from hstu.parallel.dynamic.content import owners
from hstu.parallel.dynamic.hashing import mix
from hstu.parallel.dynamic.initial_rows import initial_rows, table_key
from hstu.parallel.embedding import dynamic_tables, sharded_weights
from hstu.train.builder import PIPELINES
from tests.distributed.launch import call_each
from tests.distributed.toy import FEATURES, GLOBAL_BATCH, ITEMS, USERS, build, global_sequences, make_config, train_step

SIZES = {"user": USERS, "item": ITEMS}
STEPS = 5


def run_cases(cases: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Run many cases in one launch: name → the function of this module to ``call`` and its other arguments."""
    mesh = mesh_module.start(timeout_s=60)
    functions = {function.__name__: function for function in (beside_static, in_pipeline, looked_at)}
    results = call_each(functions, cases, mesh)
    mesh_module.finish()
    return results


def id_of(codes: np.ndarray) -> np.ndarray:
    """Ids that no vocabulary would have: any int64, negative ones and the outermost included."""
    ids = mix(torch.from_numpy(codes)).numpy()
    ids[codes == 0], ids[codes == 1] = np.iinfo(np.int64).min, -1
    return ids


def batch_of(step: int, rank: int, world_size: int, *, as_ids: bool) -> HSTUBatch:
    """A rank's share of the toy's global batch; the negatives are items of the batch."""
    share = GLOBAL_BATCH // world_size
    mine = global_sequences(step)[rank * share : (rank + 1) * share]
    for sequence in mine:
        sequence[NEGATIVES] = sequence["item"][: len(sequence[NEGATIVES])]
    values = {key: np.concatenate([sequence[key] for sequence in mine]).astype(np.int64) for key in FEATURES}
    lengths = {key: np.array([len(sequence[key]) for sequence in mine], np.int64) for key in FEATURES}
    labels = torch.from_numpy(values["item"] % 2)
    if as_ids:
        values = {key: part if key == "action" else id_of(part) for key, part in values.items()}
    return HSTUBatch(
        features=keyed_jagged(values, lengths),
        num_candidates=torch.zeros(share, dtype=torch.int64),
        num_labels=torch.from_numpy(lengths["item"]),
        labels=labels,
        user_ids=torch.arange(share),
        real_batch_size=share,
        item_lengths=lengths["item"],
        num_candidates_host=np.zeros(share, np.int64),
        num_labels_total=len(labels),
    )


def rows_by_id(model: GRModel, mesh: mesh_module.Mesh) -> dict[str, dict[int, list[float]]]:
    """table → id → row, of all ranks; an id that two ranks hold, or one that is not its owner, would be an error."""
    for table in dynamic_tables(model).values():
        args, ids = table.spec.dynamic, table.slots.content()[0]
        assert args is not None and (owners(ids, args, table.slots.capacity, mesh.world_size) == mesh.rank).all()
    own = {
        name: dict(zip(ids.tolist(), table.rows.first(len(ids))[0].tolist(), strict=True))
        for name, table in dynamic_tables(model).items()
        for ids in [table.slots.content()[0]]
    }
    merged: dict[str, dict[int, list[float]]] = {name: {} for name in own}
    for of_rank in gather_objects(own, mesh.world_group):
        for name, rows in of_rank.items():
            assert not merged[name].keys() & rows.keys()
            merged[name].update(rows)
    return merged


def start_as_dynamic(model: GRModel, seed: int) -> None:
    """Write into static tables the rows that dynamic ones would begin with."""
    for name, weight in sharded_weights(model).items():
        feature = name.removesuffix("_table")
        if feature in SIZES:
            spec = next(spec for spec in model.specs if spec.name == name)
            ids = torch.from_numpy(id_of(np.arange(SIZES[feature])))
            rows = initial_rows(ids, spec.dim, spec.init_std, table_key(seed, name))
            for shard in weight.local_shards():
                first, count = shard.metadata.shard_offsets[0], shard.metadata.shard_sizes[0]
                shard.tensor[:, : spec.dim] = rows[first : first + count]


def beside_static(mesh: mesh_module.Mesh, dist_type: str = "roundrobin", **config_args: Any) -> dict[str, Any]:
    """Losses and rows of a run on static tables and of one on dynamic tables with room for all ids."""
    config = make_config(**config_args)
    static, static_optimizers = build(config, mesh)
    start_as_dynamic(static, config.trainer.seed)
    options = {"item_vocab_size_or_capacity": 4 * ITEMS, "dist_type": dist_type}
    dynamic, dynamic_optimizers = build(make_config(dynamic={name: options for name in SIZES}, **config_args), mesh)
    losses: list[list[float]] = [[], []]
    for step in range(STEPS):
        for place, (model, optimizers) in enumerate([(static, static_optimizers), (dynamic, dynamic_optimizers)]):
            batch = batch_of(step, mesh.rank, mesh.world_size, as_ids=place == 1)
            losses[place].append(train_step(model, optimizers, mesh, batch))
    rows, same = rows_by_id(dynamic, mesh), {}
    static.eval()
    for feature, size in SIZES.items():
        codes = np.arange(size)
        seen = {id_: code for code, id_ in zip(codes.tolist(), id_of(codes).tolist(), strict=True)}
        expected = look_up(static, feature, torch.from_numpy(codes))
        found = rows[f"{feature}_table"]
        same[feature] = [id_ in seen and row == expected[seen[id_]].tolist() for id_, row in found.items()]
    return {"losses": losses, "same": same}


def look_up(model: GRModel, feature: str, ids: torch.Tensor) -> torch.Tensor:
    """Rows of ids of one feature's table. Collective."""
    spec = next(spec for spec in model.specs if feature in spec.features)
    lengths = {key: np.array([len(ids) if key == feature else 0]) for key in FEATURES}
    values = {key: ids.numpy() if key == feature else np.zeros(0, np.int64) for key in FEATURES}
    rows: torch.Tensor = model._collection_of(spec)(keyed_jagged(values, lengths))[feature].values()
    return rows[:, : spec.dim]


def in_pipeline(mesh: mesh_module.Mesh, pipeline: str, optimizer: str, **options: Any) -> dict[str, Any]:
    """Losses, rows and counters of a run whose tables are too small, with an evaluation in the middle."""
    dynamic = {
        "item": {"item_vocab_size_or_capacity": 12, **options},
        "user": {"item_vocab_size_or_capacity": 8, "evict_strategy": "lfu"},
    }
    model, optimizers = build(make_config(optimizer=optimizer, dynamic=dynamic), mesh)
    stages = PIPELINES[pipeline](model, optimizers, mesh, 0.0)

    def batches() -> Iterator[HSTUBatch]:
        yield from (batch_of(step, mesh.rank, mesh.world_size, as_ids=True) for step in range(STEPS))

    iterator, losses = batches(), []
    for step in range(STEPS):
        losses.append(float(stages.progress(iterator).loss))
        if step == 2:
            with stages.evaluation():
                evaluate(model, mesh.device)
    counters = {name: vars(table.counters) for name, table in dynamic_tables(model).items()}
    rows = {name: {str(id_): row for id_, row in rows.items()} for name, rows in rows_by_id(model, mesh).items()}
    parts = [len(table.rows.parts) for table in dynamic_tables(model).values()]
    fresh = fresh_slots(model, optimizers)
    return {"losses": losses, "rows": rows, "counters": counters, "fresh": fresh, "parts": parts}


def evaluate(model: GRModel, device: torch.device) -> torch.Tensor:
    """Look up all items without training."""
    model.eval()
    with torch.no_grad():
        rows = model.embed_items(torch.from_numpy(id_of(np.arange(ITEMS))).to(device))
    model.train()
    return rows


def fresh_slots(model: GRModel, optimizers: Optimizers) -> list[bool]:
    """Whether ids that come in now get their initial rows and no optimizer state, in slots that others had."""
    results = []
    for name, table in dynamic_tables(model).items():
        ids = torch.arange(1000, 1003, device=table.rows.device)
        slots = table.train(ids.repeat(100))[: len(ids)]  # often enough for lfu
        expected = initial_rows(ids, table.spec.dim, table.spec.init_std, table_key(7, name))
        rows, states = table.rows.first(len(table.rows))
        slots = slots.to(rows.device)  # a table in two parts comes together in host memory
        expected = expected.to(rows.device)
        results.append(bool((slots != table.default_slot).all()) and torch.equal(rows[slots], expected))
        assert len(states) == len(optimizers.tables.training[name].states)
        results += [bool(state.any()) and not bool(state[slots].any()) for state in states.values()]
    return results


def looked_at(mesh: mesh_module.Mesh, optimizer: str) -> dict[str, Any]:
    """What looking up known and unknown ids gives after training, and whether it has left everything as it was."""
    dynamic = {"item": {"item_vocab_size_or_capacity": 4 * ITEMS}}
    model, optimizers = build(make_config(optimizer=optimizer, dynamic=dynamic), mesh)
    steps_of(TrainState(model, optimizers), mesh, 0, 2)
    known = rows_by_id(model, mesh)["item_table"]
    ids = id_of(np.arange(ITEMS + 5))
    found = {}
    model.eval()
    with torch.no_grad():
        for id_, row in zip(ids.tolist(), model.embed_items(torch.from_numpy(ids)).tolist(), strict=True):
            found[id_] = row
    zeros = [0.0] * 8
    return {
        "known": len(known),
        "rows_are_found": all(found[id_] == row for id_, row in known.items()),
        "others_are_zero": all(row == zeros for id_, row in found.items() if id_ not in known),
        "unchanged": rows_by_id(model, mesh)["item_table"] == known,
    }


CHECKPOINTED: dict[str, dict[str, Any]] = {
    "adam lru": {
        "optimizer": "sgd",
        "item": {"admission_threshold": 2},
        "trained": {"item": {"optimizer_str": "adam"}},
    },
    "rowwise lfu": {"optimizer": "rowwise_adagrad", "item": {"evict_strategy": "lfu", "dist_type": "continuous"}},
    "sgd hashed": {"optimizer": "sgd", "dim": 6, "item": {"dist_type": "hash_roundrobin"}},
}


def new_state(
    mesh: mesh_module.Mesh, case: dict[str, Any], capacity: int, in_gpu_memory: float | None = None
) -> TrainState:
    options = dict(case)
    size = {"item_vocab_size_or_capacity": capacity, "item_vocab_gpu_capacity": in_gpu_memory}
    dynamic = {"item": options.pop("item") | size}
    model, optimizers = build(make_config(dynamic=dynamic, **options), mesh)
    return TrainState(model, optimizers)


def steps_of(state: TrainState, mesh: mesh_module.Mesh, first: int, stop: int) -> list[float]:
    """Losses of the steps [first, stop) of a model whose items alone are dynamic."""
    losses = []
    for step in range(first, stop):
        batch, codes = (batch_of(step, mesh.rank, mesh.world_size, as_ids=as_ids) for as_ids in (True, False))
        jagged = batch.features.to_dict() | {"user": codes.features.to_dict()["user"]}
        lengths = {key: jagged[key].lengths().numpy() for key in FEATURES}
        values = {key: jagged[key].values().numpy() for key in FEATURES}
        batch = replace(batch, features=keyed_jagged(values, lengths))
        losses.append(train_step(state.model, state.optimizers, mesh, batch))
    return losses


def save_and_go_on(directory: str) -> dict[str, Any]:
    """Three steps, a checkpoint and three more, for each case."""
    mesh = mesh_module.start(timeout_s=60)
    results = {}
    for name, case in CHECKPOINTED.items():
        state = new_state(mesh, case, 4 * ITEMS)
        steps_of(state, mesh, 0, 3)
        save(Path(directory) / name, state, mesh)
        held = {str(id_): row for id_, row in rows_by_id(state.model, mesh)["item_table"].items()}
        results[name] = {"held": held, "losses": steps_of(state, mesh, 3, 6)}
    mesh_module.finish()
    return results


def load_and_go_on(
    directory: str, save_to: str | None = None, capacity: int = 4 * ITEMS, in_gpu_memory: float | None = None
) -> dict[str, Any]:
    """The steps after the checkpoint, on these ranks. ``save_to``: another checkpoint, before them.

    ``in_gpu_memory``: rows of each table, which then is split.
    """
    mesh = mesh_module.start(timeout_s=60)
    results = {}
    for name, case in CHECKPOINTED.items():
        state = new_state(mesh, case, capacity, in_gpu_memory)
        load(Path(directory) / name / "iteration_00000000", state, mesh)
        held = {str(id_): row for id_, row in rows_by_id(state.model, mesh)["item_table"].items()}
        if save_to is not None:
            save(Path(save_to) / name, state, mesh)
        results[name] = {"held": held, "losses": steps_of(state, mesh, 3, 6)}
    mesh_module.finish()
    return results
