"""Runs whose data-parallel ranks share what belongs to the dense part, against runs in which each has all of it."""

from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hstu.checkpoint.load import load
from hstu.model.stack import FusedHSTULayer, ModelOutput
from hstu.parallel.mesh import Mesh
from hstu.pipeline.finite import NonFiniteStep
from hstu.train.builder import build_evaluator, build_loss_scale, build_pipeline
from tests.distributed.launch import Launch, run_cases
from tests.distributed.tensor_cases import (
    MIXED,
    USER_TASKS,
    RunOptions,
    advance,
    consolidated,
    make_config,
    new_run,
    write_store,
)
from tests.distributed.test_tensor_parallel import PUBLISHED
from tests.distributed.toy import save

STEPS = 12
KINDS = ("none", "weights")
RESUMED = ("none, then weights", "weights, then none")
PARTS = ("losses", "metrics", "tensors", "averaged")
RTOL, ATOL = 1e-6, 4.8e-7
"""For fully sharded weights: their ends are elsewhere, where vector instructions round otherwise (test_matrix.py)."""
AVERAGED = "OptimizerArgs.ema_decay = 0.9"
ELEVEN = "TrainerArgs.train_batch_size = 11"
"""Each epoch of ranking's 23 samples then ends with a batch of which the last of two ranks has nothing."""
CASES: dict[str, RunOptions] = {
    "adam": {
        "optimizer": "adam",
        "pipeline": "native",
        "bindings": [
            *MIXED,
            ELEVEN,
            AVERAGED,
            *PUBLISHED,
            "TrainerArgs.max_grad_norm = 0.5",
            "OptimizerArgs.weight_decay = 0.01",
        ],
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
}
LAUNCHES = [("adam",), pytest.param(tuple(CASES)[1:], marks=pytest.mark.slow)]
"""Cases of two ranks. test_matrix.py has more ranks, and groups of both kinds."""


class Run:
    """A run that is trained a number of steps at a time."""

    def __init__(self, mesh: Mesh, store: str, case: RunOptions, kind: str) -> None:
        self.mesh = mesh
        own = [
            f"TensorModelParallelArgs.tensor_model_parallel_size = {mesh.tp_size}",
            f"DataParallelArgs.sharding = {kind!r}",
            "TrainerArgs.train_batch_size = 4",
        ]
        options: RunOptions = {**case, "bindings": [*own, *case.get("bindings", ())]}
        config = make_config(store, mesh.world_size, **options)
        self.source, self.state = new_run(mesh, config)
        self.scale = build_loss_scale(config)
        if self.scale is not None:
            self.scale.value = 2.0**127  # overflows at first
        self.pipeline = build_pipeline(config.trainer, self.state.model, self.state.optimizers, mesh, self.scale)
        self.batches = self.source.train_batches(self.state.position)
        self.evaluator = build_evaluator(config, self.source, self.state.model, mesh)

    def go_on(self, checkpoint: Path, other: "Run") -> None:
        """Go on from a checkpoint in a directory, with the loss scale that another run has now."""
        load(next(checkpoint.iterdir()), self.state, self.mesh)
        self.batches = self.source.train_batches(self.state.position)
        if self.scale is not None and other.scale is not None:
            self.scale.load_state_dict(other.scale.state_dict())

    def train(self, steps: int) -> list[float]:
        """So many steps, one after the other; the losses, each followed by its parts by task."""
        return [loss for _ in range(steps) for loss in advance(self.pipeline, self.batches, self.state).losses.tolist()]

    def outcome(self, losses: list[float]) -> dict[str, Any]:
        """What it has learnt, and the metrics of the averaged weights."""
        tensors = consolidated(self.state, self.mesh)
        with self.state.optimizers.dense.averaged_weights():
            averaged = consolidated(self.state, self.mesh)
        batches = self.source.eval_batches(self.source.final_splits[-1])
        with self.pipeline.evaluation(), self.state.optimizers.dense.averaged_weights():
            metrics = self.evaluator.evaluate(batches)
        assert consolidated(self.state, self.mesh) == tensors
        weights = {name: values for name, values in averaged.items() if name.startswith("model.")}
        return {"losses": losses, "metrics": metrics, "tensors": tensors, "averaged": weights}


def compare_kinds(mesh: Mesh, store: str, directory: Path, case: RunOptions) -> dict[str, Any]:
    """Runs of all kinds, each saved half-way, and runs that go on from there."""
    told: dict[str, Any] = {}
    following = {name: Run(mesh, store, case, name.split(", then ")[1]) for name in RESUMED}
    for kind in KINDS:
        run = Run(mesh, store, case, kind)
        told[kind] = {"initial": consolidated(run.state, mesh)}
        run.train(STEPS // 2)
        save(directory / kind, run.state, mesh)
        for name, other in following.items():
            if name.startswith(f"{kind}, then"):
                other.go_on(directory / kind, run)
        told[kind] |= run.outcome(run.train(STEPS // 2))
    return told | {name: run.outcome(run.train(STEPS // 2)) for name, run in following.items()}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("dense") / "store"
    write_store(path)
    return str(path)


@pytest.fixture(scope="module", params=LAUNCHES)
def launched(request: Any, store: str, tmp_path_factory: Any) -> list[tuple[str, dict[str, Any]]]:
    """Of each rank and case: its name, and what it has told."""
    directory = tmp_path_factory.mktemp("saved")
    cases = {
        name: partial(compare_kinds, store=store, directory=directory / name, case=CASES[name])
        for name in request.param
    }
    return [told for rank in run_cases(Launch(2, 300), cases) for told in rank.items()]


def assert_close(found: Any, expected: Any, name: str) -> None:
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key, values in expected.items():
            # Where predictions are almost equal, the last bit of a weight changes their order.
            atol = 1e-3 if key == "AUC" else ATOL
            np.testing.assert_allclose(found[key], values, RTOL, atol, err_msg=f"{name}, {key}")
    else:
        np.testing.assert_allclose(found, expected, RTOL, err_msg=name)


def test_sharded_runs_train_the_same_weights(launched: Any) -> None:
    for case, told in launched:
        whole = told["none"]
        for part in ("initial", *PARTS):
            assert_close(told["weights"][part], whole[part], f"{case}, {part}")
        moved = [name for name, values in whole["tensors"].items() if values != whole["initial"][name]]
        assert {name for name in whole["averaged"] if ".numbers." not in name} <= set(moved)
        trained = {name: whole["tensors"][name] for name in whole["averaged"]}
        assert (whole["averaged"] != trained) == (AVERAGED in CASES[case]["bindings"])


def test_a_run_goes_on_with_another_sharding(launched: Any) -> None:
    for (case, told), name, part in product(launched, RESUMED, PARTS):
        assert_close(told[name][part], told["none"][part], f"{case}, {name}, {part}")


def freed_and_refused(mesh: Mesh, store: str) -> dict[str, Any]:
    """Bytes of gathered weights of layers that are left for backward; the error of a step with nan on rank 1."""
    run = Run(mesh, store, CASES["tasks"], "weights")
    dense, kept = run.state.model.dense, []
    layers = [module for module in dense.modules() if isinstance(module, FusedHSTULayer)]
    for layer in layers:
        layer.register_forward_pre_hook(lambda layer, _: kept.append(layer.uvqk.weight))
    told: dict[str, Any] = {}
    left = dense.register_forward_hook(
        lambda *_: told.update(left=[weight.untyped_storage().nbytes() for weight in kept])
    )
    run.train(1)
    left.remove()
    before = consolidated(run.state, mesh)
    dense.register_forward_hook(lambda _module, _inputs, output: _spoil(output) if mesh.rank == 1 else None)
    with pytest.raises(NonFiniteStep) as error:
        run.train(1)
    return told | {"error": str(error.value), "unchanged": consolidated(run.state, mesh) == before}


def _spoil(output: ModelOutput) -> None:
    """Add 0 to the loss, with a gradient of nan."""
    assert output.logits is not None
    output.loss_sum = output.loss_sum + (output.logits * 0.0).sqrt().sum()


def test_weights_of_layers_are_freed_until_backward_and_a_rank_with_nan_is_named(store: str) -> None:
    for rank in run_cases(2, {"run": partial(freed_and_refused, store=store)}):
        told = rank["run"]
        assert told["left"] == [0, 0] and told["unchanged"]
        assert "the gradient is not finite" in told["error"] and "nan or inf on rank 1" in told["error"]
        assert "rank 0" not in told["error"]
