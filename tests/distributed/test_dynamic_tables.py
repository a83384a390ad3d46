"""Dynamic tables trained by real ranks: as static ones where there is room, and right where there is none."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Unpack

import numpy as np
import pytest
import torch

from hstu.checkpoint.export import export
from hstu.checkpoint.load import load
from hstu.checkpoint.state import TrainState
from hstu.checkpoint.tensors import load_safetensors
from hstu.data.batches.batch import NEGATIVES, HSTUBatch, keyed_jagged
from hstu.model.gr_model import GRModel
from hstu.optim.optimizers import Optimizers
from hstu.parallel.collectives import gather_objects
from hstu.parallel.dynamic.hashing import initial_rows, mix, quantiles_of, table_key
from hstu.parallel.dynamic.slots import Counters
from hstu.parallel.dynamic.table import owners
from hstu.parallel.mesh import Mesh
from hstu.parallel.tables import dynamic_tables, sharded_weights
from hstu.pipeline.step import TrainStep
from hstu.train.builder import PIPELINES as PIPELINE_CLASSES
from tests.distributed.launch import Launch, free_port, run_cases, run_ranks
from tests.distributed.tensor_cases import write_store
from tests.distributed.test_matrix import Group, run_groups
from tests.distributed.toy import (
    FEATURES,
    GLOBAL_BATCH,
    ITEMS,
    USERS,
    ToyOptions,
    build,
    global_sequences,
    make_config,
    save,
    to_batch,
    train_step,
)

SIZES = {"user": USERS, "item": ITEMS}
STEPS = 5
PIPELINES = ("none", "native", "prefetch")
PRESSED: dict[str, dict[str, Any]] = {
    "lru": {},
    "lfu": {"evict_strategy": "lfu"},
    "hashed": {"dist_type": "hash_roundrobin"},
    "expiring": {"expire_iters": 2},
}
MIXED: dict[str, Any] = {
    "user": {"optimizer_str": "rowwise_adagrad", "learning_rate": 0.05},
    "item": {"learning_rate": 0.02},
}
IN_PIPELINES = {
    f"{pipeline}/{name}": {"pipeline": pipeline, "optimizer": name, "expire_iters": 3 if name == "adam" else None}
    for pipeline in PIPELINES
    for name in ("rowwise_adagrad", "adam")
}
UNDER_PRESSURE: dict[str, Any] = {
    f"none/{name}": {"pipeline": "none", "optimizer": "adagrad", **options} for name, options in PRESSED.items()
}
BUDGET = {"item_vocab_gpu_capacity": 5.0}
"""Of 12 rows."""
SPLIT = {
    f"split/{name}": {**(IN_PIPELINES | UNDER_PRESSURE)[name], **BUDGET}
    for name in ("native/rowwise_adagrad", "prefetch/adam", "none/lfu", "none/expiring")
}
CHECKPOINTED: dict[str, dict[str, Any]] = {
    "adam lru": {
        "options": {"optimizer": "sgd", "trained": {"item": {"optimizer_str": "adam"}}},
        "item": {"admission_threshold": 2},
    },
    "rowwise lfu": {
        "options": {"optimizer": "rowwise_adagrad"},
        "item": {"evict_strategy": "lfu", "dist_type": "continuous"},
    },
    "adam expiring": {
        "options": {"optimizer": "sgd", "trained": {"item": {"optimizer_str": "adam"}}},
        "item": {"evict_strategy": "none", "expire_iters": 1, "admission_threshold": 2, "initializer": "uniform"},
    },
}


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
    return to_batch(mine, id_of if as_ids else None)


def rows_by_id(model: GRModel, mesh: Mesh) -> dict[str, dict[int, list[float]]]:
    """table → id → row, of all ranks; an id that two ranks hold, or one that is not its owner, would be an error."""
    for table in dynamic_tables(model).values():
        args, ids = table.spec.dynamic, table.slots.content()[0]
        assert args is not None and (owners(ids, args, table.slots.capacity, mesh.world_size) == mesh.rank).all()
    own = {
        name: dict(zip(ids.tolist(), table.rows.read(len(ids))[0].tolist(), strict=True))
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
            normal = quantiles_of("normal", ids.device)
            rows = initial_rows(ids, spec.dim, spec.init_std, table_key(seed, name), normal)
            for shard in weight.local_shards():
                first, count = shard.metadata.shard_offsets[0], shard.metadata.shard_sizes[0]
                shard.tensor[:, : spec.dim] = rows[first : first + count]


def beside_static(mesh: Mesh, dist_type: str = "roundrobin", **options: Unpack[ToyOptions]) -> dict[str, Any]:
    """Losses and rows of a run on static tables and of one on dynamic tables with room for all ids."""
    config = make_config(**options)
    static, static_optimizers = build(config, mesh)
    start_as_dynamic(static, config.trainer.seed)
    table = {"item_vocab_size_or_capacity": 4 * ITEMS, "dist_type": dist_type}
    options["dynamic"] = dict.fromkeys(SIZES, table)
    dynamic, dynamic_optimizers = build(make_config(**options), mesh)
    losses: list[list[float]] = [[], []]
    for step in range(STEPS):
        for as_ids, (model, optimizers) in enumerate([(static, static_optimizers), (dynamic, dynamic_optimizers)]):
            batch = batch_of(step, mesh.rank, mesh.world_size, as_ids=bool(as_ids))
            losses[as_ids].append(train_step(model, optimizers, mesh, batch))
    rows, same = rows_by_id(dynamic, mesh), {}
    static.eval()
    for feature, size in SIZES.items():
        codes = np.arange(size)
        seen = {id_: code for code, id_ in zip(codes.tolist(), id_of(codes).tolist(), strict=True)}
        expected = static.rows_of({feature: torch.from_numpy(codes)})[feature]
        found = rows[f"{feature}_table"]
        same[feature] = [id_ in seen and row == expected[seen[id_]].tolist() for id_, row in found.items()]
    return {"losses": losses, "same": same}


def in_pipeline(mesh: Mesh, pipeline: str, optimizer: str, **item_table: Any) -> dict[str, Any]:
    """Losses, rows and counters of a run whose tables are too small, with an evaluation in the middle.

    ``item_table``: options of the dynamic table of the items.
    """
    dynamic = {
        "item": {"item_vocab_size_or_capacity": 12, **item_table},
        "user": {"item_vocab_size_or_capacity": 8, "evict_strategy": "lfu"},
    }
    model, optimizers = build(make_config(optimizer=optimizer, dynamic=dynamic), mesh)
    stages = PIPELINE_CLASSES[pipeline](TrainStep(model, optimizers, mesh))

    def batches() -> Iterator[HSTUBatch]:
        yield from (batch_of(step, mesh.rank, mesh.world_size, as_ids=True) for step in range(STEPS))

    iterator, losses = batches(), []
    for step in range(STEPS):
        losses.append(float(stages.progress(iterator).loss))
        if step == 2:
            with stages.evaluation():
                evaluate(model, mesh.device)
    counters = {
        name: vars(Counters(*table.pop_figures()[1:-1].tolist())) for name, table in dynamic_tables(model).items()
    }
    rows = rows_by_id(model, mesh)
    parts = [len(table.rows.blocks) for table in dynamic_tables(model).values()]
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
        slots = table.assign_rows(ids.repeat(100))[: len(ids)]  # often enough for lfu
        normal = quantiles_of("normal", ids.device)
        expected = initial_rows(ids, table.spec.dim, table.spec.init_std, table_key(7, name), normal)
        rows, states = table.rows.read(len(table.rows))
        slots = slots.to(rows.device)  # a table in two parts comes together in host memory
        expected = expected.to(rows.device)
        results.append(bool((slots != table.default_slot).all()) and torch.equal(rows[slots], expected))
        assert len(states) == len(optimizers.tables.training[name].states)
        results += [bool(state.any()) and not bool(state[slots].any()) for state in states.values()]
    return results


def steps_of(state: TrainState, mesh: Mesh, first: int, stop: int) -> list[float]:
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


def go_on(
    mesh: Mesh,
    case: dict[str, Any],
    load_from: Path | None = None,
    save_to: Path | None = None,
    capacity: int = 4 * ITEMS,
    in_gpu_memory: float | None = None,
) -> dict[str, Any]:
    """Rows and losses of three steps after a checkpoint, or else after three steps.

    ``in_gpu_memory``: rows of each table that lie there; the table then is split.
    """
    size = {"item_vocab_size_or_capacity": capacity, "item_vocab_gpu_capacity": in_gpu_memory}
    state = TrainState(*build(make_config(**case["options"], dynamic={"item": case["item"] | size}), mesh))
    if load_from is None:
        steps_of(state, mesh, 0, 3)
    else:
        load(load_from, state, mesh)
    held = rows_by_id(state.model, mesh)["item_table"]
    if save_to is not None:
        save(save_to, state, mesh)
    losses = steps_of(state, mesh, 3, 6)
    return {"held": held, "losses": losses, "after": sorted(rows_by_id(state.model, mesh)["item_table"])}


CASES: dict[str, Any] = {
    **{f"static/{name}": partial(beside_static, optimizer=name) for name in ("adagrad", "rowwise_adagrad")},
    "static/sgd, continuous": partial(beside_static, optimizer="sgd", dist_type="continuous", dim=6),
    "static/adam, hashed": partial(beside_static, optimizer="adam", dist_type="hash_roundrobin", dim=6),
    "static/rowwise": partial(
        beside_static, optimizer="partial_rowwise_adam", trained={"user": {"optimizer_str": "adagrad"}}
    ),
    "static/mixed": partial(
        beside_static, optimizer="adam", trained=MIXED, optimizer_args={"sparse_max_gradient": 0.01}
    ),
    **{name: partial(in_pipeline, **args) for name, args in (IN_PIPELINES | UNDER_PRESSURE | SPLIT).items()},
}


@pytest.fixture(scope="module")
def results() -> list[dict[str, Any]]:
    return run_cases(Launch(2, timeout_s=120), CASES)


def cases(prefix: str) -> list[str]:
    return [name for name in CASES if name.startswith(prefix)]


@pytest.mark.parametrize("case", cases("static/"))
def test_with_room_for_all_ids_a_run_is_that_of_a_static_table_exactly(results: Any, case: str) -> None:
    for of_rank in results:
        static, dynamic = of_rank[case]["losses"]
        assert static == dynamic and len(set(static)) == len(static)
        for feature, same in of_rank[case]["same"].items():
            assert all(same) and len(same) > 15, feature


@pytest.mark.parametrize("optimizer", ["rowwise_adagrad", "adam"])
def test_pipelines_give_ids_their_rows_in_the_order_of_the_steps(results: Any, optimizer: str) -> None:
    for of_rank in results:
        runs = [of_rank[f"{pipeline}/{optimizer}"] for pipeline in PIPELINES]
        assert runs[0] == runs[1] == runs[2]


@pytest.mark.parametrize("case", SPLIT)
def test_a_table_in_two_parts_is_trained_as_one_that_lies_in_one_piece_exactly(results: Any, case: str) -> None:
    for of_rank in results:
        split, whole = of_rank[case], of_rank[case.removeprefix("split/")]
        assert (split["parts"], whole["parts"]) == ([1, 2], [1, 1])
        assert split | {"parts": None} == whole | {"parts": None}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="NEEDS AN NVIDIA GPU: rows in two memories, and a cache")
@pytest.mark.parametrize("optimizer", ["rowwise_adagrad", "adam"])
def test_rows_are_trained_the_same_wherever_they_lie(optimizer: str) -> None:
    options: dict[str, Any] = {
        "whole": {},
        "split": BUDGET,
        "cached": {"item_vocab_gpu_capacity": 1.0, "caching": True},
    }  # 32 lines
    placed = {
        f"{pipeline}/{name}": partial(
            in_pipeline, pipeline=pipeline, optimizer=optimizer, item_vocab_size_or_capacity=38, **of_case
        )
        for pipeline in ("none", "prefetch")
        for name, of_case in options.items()
    }
    (told,) = run_cases(Launch(1, timeout_s=120), placed)
    expected = told["none/whole"]
    for result in told.values():
        assert result["losses"] == pytest.approx(expected["losses"], rel=1e-5)
        assert all(result["fresh"]) and result["counters"] == expected["counters"]
        for id_, row in expected["rows"]["item_table"].items():
            assert result["rows"]["item_table"][id_] == pytest.approx(row, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("case", [*cases("none/"), "native/adam"])
def test_slots_that_change_hands_begin_anew(results: Any, case: str) -> None:
    for of_rank in results:
        result = of_rank[case]
        assert all(result["fresh"]) and len(result["fresh"]) > 2
        counters = result["counters"]["item_table"]
        assert counters["evictions"] > 0 and counters["lookups"] > counters["hits"] > 0
        assert counters["waiting"] == 0


def test_ranks_groups_and_pipelines_train_what_one_process_trains(tmp_path: Path) -> None:
    write_store(tmp_path / "store")

    def group(tp: int, pipeline: str) -> Group:
        bindings = [f"TensorModelParallelArgs.tensor_model_parallel_size = {tp}"]
        if tp > 1:  # a table in two parts
            bindings.append("item_id/DynamicEmbeddingArgs.item_vocab_gpu_capacity = 13")
        run: Any = {"pipeline": pipeline, "dynamic": ["item_id", "age"], "bindings": bindings}
        return Group(tp, 1, free_port(), {f"tp {tp}": {"optimizer": "adam", "learning_rate": 0.005, **run}})

    store = str(tmp_path / "store")
    alone = run_ranks(1, run_groups, store, [group(1, "none")])[0]["tp 1"]
    groups = [group(1, "prefetch"), group(2, "native")]
    for told in run_ranks(Launch(4, timeout_s=120), run_groups, store, groups):
        assert len(told) == 2
        for name, result in told.items():
            assert result["losses"] == pytest.approx(alone["losses"], rel=1e-5), name


def test_a_checkpoint_goes_on_with_equal_losses_on_two_then_four_then_one_rank(tmp_path: Path) -> None:
    def run(ranks: int, load_from: str = "", save_to: str = "", **options: Any) -> dict[str, Any]:
        """All cases, with the names of directories for the checkpoints of each."""
        cases = {
            name: partial(
                go_on,
                case=case,
                load_from=tmp_path / load_from / name / "iteration_00000000" if load_from else None,
                save_to=tmp_path / save_to / name if save_to else None,
                **options,
            )
            for name, case in CHECKPOINTED.items()
        }
        return run_cases(ranks, cases)[0]

    original = run(2, save_to="first")
    on_four = run(4, load_from="first", save_to="second", in_gpu_memory=9.0)  # saved the same, split or not
    on_one = run(1, load_from="second")
    too_small = run(1, load_from="first", capacity=9)
    assert len(original["adam lru"]["after"]) > len(original["adam expiring"]["after"]), "some ids have expired"
    for case, expected in original.items():
        assert len(expected["held"]) > 9
        for resumed in (on_four[case], on_one[case]):
            assert resumed["held"] == expected["held"] and resumed["after"] == expected["after"]
            assert resumed["losses"] == pytest.approx(expected["losses"], rel=1e-5)
        kept = too_small[case]["held"]
        assert len(kept) == 9 and kept.items() <= expected["held"].items()
        checkpoint = tmp_path / "first" / case / "iteration_00000000"
        exported = load_safetensors(export(checkpoint, tmp_path / "exports" / case) / "model.safetensors")
        ids, rows = (exported[f"dynamic.item_table.{part}"].tolist() for part in ("ids", "weight"))
        assert ids == sorted(expected["held"]), "of both ranks"
        assert dict(zip(ids, rows, strict=True)) == expected["held"]
