"""Runs whose data-parallel ranks share what belongs to the dense part, against runs in which each has all of it."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from hstu.checkpoint.load import load
from hstu.checkpoint.save import save
from hstu.checkpoint.state import TrainState
from hstu.checkpoint.tensors import TENSORS
from hstu.config.run_config import RunConfig
from hstu.estimate.data_parallel import state_bytes
from hstu.estimate.dry_run import dry_run
from hstu.estimate.estimate import transfers
from hstu.estimate.plan import plan_workload
from hstu.estimate.tables import replicated_bytes
from hstu.model.outputs import ModelOutput
from hstu.model.stack import FusedHSTULayer
from hstu.parallel.mesh import Mesh
from hstu.pipeline.finite import NonFiniteStep
from hstu.train.builder import build_evaluator, build_loss_scale, build_pipeline
from tests.distributed.launch import Launch, run_cases
from tests.distributed.tensor_cases import (
    MIXED,
    USER_TASKS,
    RunOptions,
    consolidated,
    make_config,
    new_run,
    write_store,
)
from tests.estimate.runs import held_bytes

STEPS = 20
KINDS = ("none", "optimizer", "weights")
PAIRS_ATOL = 1e-3
"""For metrics of three and more ranks: two users whose scores differ by rounding change places."""
ATOL = 4.8e-7
"""For fully sharded weights: their ends are elsewhere, where vector instructions round otherwise; cf. matrix.py.

Twice that for the weights of three and more ranks, with and without shard groups.
"""
AVERAGED = "OptimizerArgs.ema_decay = 0.9"
ELEVEN = "TrainerArgs.train_batch_size = 11"
"""Each epoch of ranking's 23 samples then ends with a batch of which the last of two ranks has nothing."""
CASES: dict[str, RunOptions] = {
    "adam": {
        "optimizer": "adam",
        "pipeline": "native",
        "bindings": [*MIXED, ELEVEN, AVERAGED, "TrainerArgs.max_grad_norm = 0.5", "OptimizerArgs.weight_decay = 0.01"],
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
        "bindings": ['PrecisionArgs.loss_scale = "dynamic"', "PrecisionArgs.growth_interval = 5"],
    },
    "item tower": {
        "optimizer": "adamw",
        "task": "retrieval",
        "bindings": ["RetrievalArgs.item_tower = True", "NetworkArgs.recompute_layer = True", AVERAGED],
    },
    "tasks": {"optimizer": "sgd", "bindings": [*USER_TASKS, ELEVEN]},
    "averages": {"optimizer": "adamw", "bindings": [ELEVEN, AVERAGED]},
}
RESUMED = (
    "none, then optimizer", "optimizer, then none", "optimizer, then weights", "weights, then none",
    "weights, then weights",
)  # fmt: skip
OTHERS = ("momentum", "item tower", "adam")
LAUNCHES = [
    pytest.param((Launch(2), ("adam",), ("none", "optimizer")), id="2 ranks"),
    pytest.param((Launch(2, 500), tuple(CASES), KINDS), id="2 ranks, all cases", marks=pytest.mark.slow),
    pytest.param((Launch(3, 500), OTHERS, KINDS), id="3 ranks", marks=pytest.mark.slow),
    pytest.param((Launch(4, 500, tp=2), OTHERS, KINDS), id="4 ranks, tp 2", marks=pytest.mark.slow),
    pytest.param((Launch(4, 500, cp=2), ("adam",), KINDS), id="4 ranks, cp 2", marks=pytest.mark.slow),
    pytest.param((Launch(4, 700, shards=2), tuple(CASES), KINDS), id="2 groups of 2", marks=pytest.mark.slow),
    pytest.param((Launch(4, 500, cp=2, shards=2), OTHERS, KINDS), id="2 groups of 2, cp 2", marks=pytest.mark.slow),
    pytest.param((Launch(8, 900, tp=2, shards=2), ("adam",), KINDS), id="2 groups of 2, tp 2", marks=pytest.mark.slow),
]
"""Ranks, cases, and kinds of sharding."""


def config_of(store: str, launch: Launch, case: RunOptions, kind: str) -> RunConfig:
    """The configuration of a case with one kind of sharding."""
    own = [
        f"TensorModelParallelArgs.tensor_model_parallel_size = {launch.tp}",
        f"ContextParallelArgs.context_parallel_size = {launch.cp}",
        f"DataParallelArgs.sharding = {kind!r}",
        "TrainerArgs.train_batch_size = 4",
    ]
    if kind != "none":
        own.append(f"DataParallelArgs.shard_group_size = {launch.shards}")
    return make_config(store, launch.ranks, **{**case, "bindings": [*own, *case.get("bindings", ())]})


class Run:
    """A run that is trained a number of steps at a time."""

    def __init__(self, mesh: Mesh, store: str, case: RunOptions, kind: str) -> None:
        self.mesh = mesh
        shards = None if mesh.replica_group is None else dist.get_world_size(mesh.shard_group)
        launch = Launch(mesh.world_size, tp=mesh.tp_size, cp=mesh.cp_size, shards=shards)
        self.config = config_of(store, launch, case, kind)
        self.source, self.state = new_run(mesh, self.config)
        self.scale = build_loss_scale(self.config)
        if self.scale is not None:
            self.scale.value = 2.0**127  # overflows at first
        step = self.config.trainer, self.state.model, self.state.optimizers, mesh, self.scale
        self.pipeline = build_pipeline(*step)
        self.batches = self.source.train_batches(self.state.position)
        self.evaluator = build_evaluator(self.config, self.source, self.state.model, mesh)

    def go_on(self, checkpoint: Path, other: "Run") -> None:
        """Go on from a checkpoint in a directory, with the loss scale that another run has now."""
        load(next(checkpoint.iterdir()), self.state, self.mesh)
        self.batches = self.source.train_batches(self.state.position)
        if self.scale is not None and other.scale is not None:
            self.scale.load_state_dict(other.scale.state_dict())

    def train(self, steps: int) -> list[float]:
        """So many steps, one after the other; the losses."""
        losses = []
        for _ in range(steps):
            result = self.pipeline.progress(self.batches)
            assert result.batch.position is not None
            self.state.iteration, self.state.position = self.state.iteration + 1, result.batch.position
            losses.append(float(result.loss))
        return losses

    def evaluate(self) -> dict[str, float]:
        """The metrics of the averaged weights."""
        batches = self.source.eval_batches(self.source.final_splits[-1])
        with self.pipeline.evaluation(), self.state.optimizers.averaged_weights():
            return self.evaluator.evaluate(batches)

    def outcome(self, losses: list[float]) -> dict[str, Any]:
        """What it has learnt, and what it evaluates."""
        tensors = consolidated(self.state, self.mesh)
        with self.state.optimizers.averaged_weights():
            averaged = consolidated(self.state, self.mesh)
        metrics = self.evaluate()
        assert consolidated(self.state, self.mesh) == tensors
        weights = {name: values for name, values in averaged.items() if name.startswith("model.")}
        return {"losses": losses, "metrics": metrics, "tensors": tensors, "averaged": weights}


def compare_kinds(mesh: Mesh, store: str, directory: Path, case: RunOptions, kinds: Sequence[str]) -> dict[str, Any]:
    """Runs of all kinds, each saved half-way, and runs that go on from there."""
    told: dict[str, Any] = {}
    following = {name: Run(mesh, store, case, name.split(", then ")[1]) for name in resumed(kinds)}
    for kind in kinds:
        run = Run(mesh, store, case, kind)
        told[kind] = {"initial": consolidated(run.state, mesh), "held": held_by_dense_optimizers(run.state)}
        told[kind]["untrained"] = run.evaluate()
        run.train(STEPS // 2)
        told[kind]["stored"] = stored(save(directory / kind, run.state, mesh))
        for name, other in following.items():
            if name.startswith(f"{kind}, then"):
                other.go_on(directory / kind, run)
        told[kind] |= run.outcome(run.train(STEPS // 2))
    return told | {name: run.outcome(run.train(STEPS // 2)) for name, run in following.items()}


def stored(checkpoint: Path) -> tuple[dict[str, int], int]:
    """Numbers of each tensor that a checkpoint has, and bytes of its files that belong to none."""
    metadata = FileSystemReader(checkpoint / TENSORS).read_metadata()
    counts = {
        name: sum(chunk.sizes.numel() for chunk in tensor.chunks)
        for name, tensor in metadata.state_dict_metadata.items()
        if isinstance(tensor, TensorStorageMetadata)
    }
    files = sum(path.stat().st_size for path in (checkpoint / TENSORS).glob("*.distcp"))
    return counts, files - sum(piece.length for piece in metadata.storage_data.values())


def resumed(kinds: Sequence[str]) -> list[str]:
    """The runs that go on with one of ``kinds`` after another."""
    return [name for name in RESUMED if set(name.split(", then ")) <= {*kinds}]


def held_by_dense_optimizers(state: TrainState) -> int:
    """Bytes of the states of dense weights and replicated tables on this rank."""
    optimizers = state.optimizers
    states = {**optimizers.dense.state_tensors(), **optimizers.tables.replicated_state_tensors()}
    return sum(map(held_bytes, states.values()))


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("dense") / "store"
    write_store(path)
    return str(path)


@dataclass(frozen=True)
class Launched:
    """What each rank of a launch has told."""

    launch: Launch
    cases: tuple[str, ...]
    kinds: tuple[str, ...]
    told: list[dict[str, Any]]

    @property
    def rtol(self) -> float:
        """Of fully sharded weights. FSDP sums the gradients of three and more ranks in another order than DDP."""
        return 1e-6 if self.launch.ranks // self.launch.tp == 2 else 1e-5


@pytest.fixture(scope="module", params=LAUNCHES)
def launched(request: Any, store: str, tmp_path_factory: Any) -> Launched:
    launch, names, kinds = request.param
    directory = tmp_path_factory.mktemp("saved")
    common = {"store": store, "kinds": kinds}
    cases = {name: partial(compare_kinds, directory=directory / name, case=CASES[name], **common) for name in names}
    return Launched(launch, names, kinds, run_cases(launch, cases))


def assert_close(found: Any, expected: Any, rtol: float, name: str) -> None:
    """``rtol`` 0: bit for bit."""
    atol = ATOL if rtol <= 1e-6 else PAIRS_ATOL if name.endswith("metrics") else 2 * ATOL
    if rtol == 0:
        assert found == expected, name
    elif isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key, values in expected.items():
            np.testing.assert_allclose(found[key], values, rtol, atol, err_msg=f"{name}, {key}")
    else:
        np.testing.assert_allclose(found, expected, rtol, err_msg=name)


PARTS = ("losses", "metrics", "tensors", "averaged")


def test_sharded_runs_train_the_same_weights_and_sharded_states_alone_the_same_bits(launched: Launched) -> None:
    for rank, case in product(launched.told, launched.cases):
        whole = rank[case]["none"]
        for kind, part in product(launched.kinds[1:], ("initial", "untrained", *PARTS)):
            rtol = 0.0 if kind == "optimizer" else launched.rtol
            assert_close(rank[case][kind][part], whole[part], rtol, f"{case}, {kind}, {part}")
        moved = [name for name, values in whole["tensors"].items() if values != whole["initial"][name]]
        assert {name for name in whole["averaged"] if ".numbers." not in name} <= set(moved)
        trained = {name: whole["tensors"][name] for name in whole["averaged"]}
        is_averaged = AVERAGED in CASES[case]["bindings"]
        assert (whole["averaged"] != trained) == is_averaged and whole["metrics"] != whole["untrained"]


def test_a_run_goes_on_with_another_sharding(launched: Launched) -> None:
    for rank, case, name, part in product(launched.told, launched.cases, resumed(launched.kinds), PARTS):
        rtol = launched.rtol if "weights" in name else 0.0
        assert_close(rank[case][name][part], rank[case]["none"][part], rtol, f"{case}, {name}, {part}")


def test_a_checkpoint_has_every_number_once(launched: Launched) -> None:
    for rank, case, kind in product(launched.told, launched.cases, launched.kinds):
        numbers = {name: np.size(values) for name, values in rank[case]["none"]["initial"].items()}
        assert rank[case][kind]["stored"] == (numbers, 0), f"{case}, {kind}"


def test_the_estimate_knows_the_states_of_a_rank_and_what_is_gathered(launched: Launched, store: str) -> None:
    for case, kind in product(launched.cases, launched.kinds):
        config = config_of(store, launched.launch, CASES[case], kind)
        workload = plan_workload(config, launched.launch.ranks, launched.launch.ranks, "cpu")
        run = dry_run(workload, workload.typical)
        states = state_bytes(workload, run) + replicated_bytes(workload, run)[2]
        assert states == max(rank[case][kind]["held"] for rank in launched.told)
        names = {transfer.name for transfer in transfers(workload, run, ())}
        assert ("updated dense weights" in names) == (kind == "optimizer")
        assert ("dense weights in backward" in names) == (kind == "weights")


def freed_and_refused(mesh: Mesh, store: str, case: str) -> dict[str, Any]:
    """Bytes of gathered weights of layers that are left for backward; the error of a step with nan on rank 1."""
    run = Run(mesh, store, CASES[case], "weights")
    dense, kept = run.state.model.dense, []
    layers = [module for module in dense.modules() if isinstance(module, FusedHSTULayer)]
    for layer in layers:
        layer.register_forward_pre_hook(lambda layer, _: kept.append(layer.uvqk.weight))
    told: dict[str, Any] = {}
    left = dense.register_forward_hook(
        lambda *_: told.update(left=[weight.untyped_storage().nbytes() for weight in kept])
    )
    run.train(1)
    told["seen"] = [type(weight).__name__ for weight in kept]
    left.remove()
    before = consolidated(run.state, mesh)
    dense.register_forward_hook(lambda _module, _inputs, output: _spoil(output) if mesh.rank == 1 else None)
    try:
        run.train(1)
    except NonFiniteStep as error:
        told["error"] = str(error)
    return told | {"unchanged": consolidated(run.state, mesh) == before}


def _spoil(output: ModelOutput) -> None:
    """Add 0 to the loss, with a gradient of nan."""
    assert output.logits is not None
    output.loss_sum = output.loss_sum + (output.logits * 0.0).sqrt().sum()


def test_weights_of_layers_are_freed_until_backward_and_a_rank_with_nan_is_named(store: str) -> None:
    cases = {name: partial(freed_and_refused, store=store, case=name) for name in ("tasks", "averages")}
    for rank, name in product(run_cases(Launch(2, 100), cases), cases):
        told = rank[name]
        assert told["seen"] == ["Parameter"] * 2 and not any(told["left"])
        assert "the gradient is not finite" in told["error"] and "nan or inf on rank 1" in told["error"]
        assert "rank 0" not in told["error"] and told["unchanged"]
