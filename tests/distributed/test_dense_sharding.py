"""Runs whose data-parallel ranks share what belongs to the dense part, against runs in which each has all of it."""

from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from hstu.checkpoint.load import load
from hstu.checkpoint.save import save
from hstu.checkpoint.state import TrainState
from hstu.config.run_config import RunConfig
from hstu.estimate import memory, traffic
from hstu.estimate.plan import plan_workload
from hstu.parallel.mesh import Mesh
from hstu.train.builder import build_loss_scale, build_pipeline
from hstu.train.store_source import StoreSource
from tests.distributed.launch import Launch, run_cases
from tests.distributed.tensor_cases import MIXED, RunOptions, consolidated, make_config, new_run, write_store
from tests.estimate.runs import held_bytes

STEPS = 20
KINDS = ("none", "optimizer")
AVERAGED = "OptimizerArgs.ema_decay = 0.9"
CASES: dict[str, RunOptions] = {
    "adam": {
        "optimizer": "adam",
        "pipeline": "native",
        "bindings": [*MIXED, AVERAGED, "TrainerArgs.max_grad_norm = 0.5", "OptimizerArgs.weight_decay = 0.01"],
    },
    "momentum": {
        "optimizer": "sgd",
        "pipeline": "prefetch",
        "replicated": ["item_id", "action"],
        "bindings": ["OptimizerArgs.momentum = 0.9", "TrainerArgs.gradient_accumulation_steps = 2", AVERAGED],
    },
    "adagrad": {
        "optimizer": "adagrad",
        "task": "retrieval",
        "bindings": ['NetworkArgs.dtype_str = "float16"', "PrecisionArgs.growth_interval = 5"],
    },
}
RESUMED = ("none, then optimizer", "optimizer, then none", "optimizer, then optimizer")
LAUNCHES = [
    pytest.param((2, 1, ("adam",)), id="2 ranks"),
    pytest.param((2, 1, ("momentum", "adagrad")), id="2 ranks, other cases", marks=pytest.mark.slow),
    pytest.param((3, 1, tuple(CASES)), id="3 ranks", marks=pytest.mark.slow),
    pytest.param((4, 2, tuple(CASES)), id="4 ranks, tp 2", marks=pytest.mark.slow),
]
"""Ranks, ranks of a tensor-parallel group, and cases."""


def config_of(store: str, ranks: int, tp: int, case: RunOptions, kind: str) -> RunConfig:
    """The configuration of a case with one kind of sharding."""
    own = [
        f"TensorModelParallelArgs.tensor_model_parallel_size = {tp}",
        f"DataParallelArgs.sharding = {kind!r}",
        "TrainerArgs.train_batch_size = 4",
    ]
    return make_config(store, ranks, **{**case, "bindings": [*case.get("bindings", ()), *own]})


def compare_kinds(mesh: Mesh, store: str, directory: Path, case: RunOptions) -> dict[str, Any]:
    """Runs of all kinds, each saved half-way, and runs of each kind that go on from there."""
    told: dict[str, Any] = {}
    for kind in KINDS:
        config = config_of(store, mesh.world_size, mesh.tp_size, case, kind)
        source, state = new_run(mesh, config)
        told[kind] = {"initial": consolidated(state, mesh), "held": held_by_dense_optimizers(state)}
        first = train(mesh, config, source, state, STEPS // 2)
        save(directory / kind, state, mesh)
        told[kind] |= outcome(mesh, state, first + train(mesh, config, source, state, STEPS // 2))
    for name in RESUMED:
        saved_by, kind = name.split(", then ")
        config = config_of(store, mesh.world_size, mesh.tp_size, case, kind)
        source, state = new_run(mesh, config)
        load(next((directory / saved_by).iterdir()), state, mesh)
        told[name] = outcome(mesh, state, train(mesh, config, source, state, STEPS // 2))
    return told


def train(mesh: Mesh, config: RunConfig, source: StoreSource, state: TrainState, steps: int) -> list[float]:
    """So many steps, one after the other; the losses."""
    scale = build_loss_scale(config)
    pipeline = build_pipeline(config.trainer, state.model, state.optimizers, mesh, scale)
    if scale is not None:
        scale.value = 2.0**20  # overflows at first
    batches, losses = source.train_batches(state.position), []
    for _ in range(steps):
        result = pipeline.progress(batches)
        state.iteration, state.position = state.iteration + 1, result.batch.position
        losses.append(float(result.loss))
    return losses


def held_by_dense_optimizers(state: TrainState) -> int:
    """Bytes of the states of dense weights and replicated tables on this rank."""
    optimizers = state.optimizers
    states = {**optimizers.dense.state_tensors(), **optimizers.tables.replicated_state_tensors()}
    return sum(map(held_bytes, states.values()))


def outcome(mesh: Mesh, state: TrainState, losses: list[float]) -> dict[str, Any]:
    """What a run has learnt, and what it evaluates."""
    tensors = consolidated(state, mesh)
    with state.optimizers.averaged_weights():
        averaged = consolidated(state, mesh)
    assert consolidated(state, mesh) == tensors
    weights = {name: values for name, values in averaged.items() if name.startswith("model.")}
    return {"losses": losses[-STEPS // 2 :], "tensors": tensors, "averaged": weights}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("dense") / "store"
    write_store(path)
    return str(path)


@dataclass(frozen=True)
class Launched:
    """What each rank of a launch has told."""

    ranks: int
    tp: int
    cases: tuple[str, ...]
    told: list[dict[str, Any]]


@pytest.fixture(scope="module", params=LAUNCHES)
def launched(request: Any, store: str, tmp_path_factory: Any) -> Launched:
    ranks, tp, names = request.param
    directory = tmp_path_factory.mktemp("saved")
    cases = {name: partial(compare_kinds, store=store, directory=directory / name, case=CASES[name]) for name in names}
    return Launched(ranks, tp, names, run_cases(Launch(ranks, 200, tp), cases))


def test_sharded_states_train_the_same_weights_bit_for_bit(launched: Launched) -> None:
    for rank, case in product(launched.told, launched.cases):
        whole, shared = rank[case]["none"], rank[case]["optimizer"]
        assert shared["initial"] == whole["initial"]
        for name in ("losses", "tensors", "averaged"):
            assert shared[name] == whole[name], (case, name)
        moved = [name for name, values in whole["tensors"].items() if values != whole["initial"][name]]
        assert {name for name in whole["averaged"] if ".numbers." not in name} <= set(moved)
        trained = {name: whole["tensors"][name] for name in whole["averaged"]}
        assert (whole["averaged"] == trained) == (case == "adagrad"), "it has no average"


def test_a_run_goes_on_with_another_sharding_bit_for_bit(launched: Launched) -> None:
    for rank, case, name in product(launched.told, launched.cases, RESUMED):
        straight = {part: rank[case]["none"][part] for part in ("losses", "tensors", "averaged")}
        assert rank[case][name] == straight, (case, name)


def test_the_estimate_knows_the_states_of_a_rank_and_what_is_gathered(launched: Launched, store: str) -> None:
    for case, kind in product(launched.cases, KINDS):
        config = config_of(store, launched.ranks, launched.tp, CASES[case], kind)
        workload = plan_workload(config, launched.ranks, launched.ranks, "cpu")
        assert memory.dense_state_bytes(workload) == max(rank[case][kind]["held"] for rank in launched.told)
        sent = [t for t in traffic.transfers(workload, workload.typical, ()) if t.name == "updated dense weights"]
        assert len(sent) == (kind == "optimizer")
