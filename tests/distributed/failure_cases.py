"""Runs in which one rank fails: what runs on each rank in test_failures.py, also as a script under torchrun."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from hstu.config.errors import DataError
from hstu.config.run_config import RunConfig
from hstu.data.batch import HSTUBatch
from hstu.model.outputs import ModelOutput
from hstu.observe.peak import PeakTflops
from hstu.parallel import mesh as mesh_module
from hstu.parallel.dense import unwrap_dense
from hstu.parallel.mesh import Mesh
from hstu.pipeline.finite import NonFiniteStep
from hstu.train import builder, main
from hstu.train.trainer import Trainer
from tests.distributed.pipeline_cases import digest
from tests.train.tiny import tiny_config

Sabotage = Callable[[Trainer, Path], None]


def run_with(failures: dict[str, str], iteration: int, store: str, output: str, **options: Any) -> None:
    """A whole run, as the entry scripts start it, in which some ranks fail in ``iteration``: rank → how."""
    config = tiny_config("ranking", store, output, **options)
    torch.set_num_threads(1)
    builder.peak_tflops = lambda *_: PeakTflops(1.0, "assumed")  # type: ignore[assignment]  # takes longer than the run
    build = builder.build_trainer

    def build_and_sabotage(config: RunConfig, mesh: Mesh) -> Trainer:
        trainer = build(config, mesh)
        if str(mesh.rank) in failures:
            FAILURES[failures[str(mesh.rank)]](trainer, iteration, Path(output) / f"failed_at_{mesh.rank}")
        return trainer

    builder.build_trainer = build_and_sabotage
    sys.exit(main.run(config))


def in_loading(deed: Callable[[], None]) -> Callable[[Trainer, int, Path], None]:
    """Do it instead of loading the batch of an iteration, counted from the first of the process."""

    def sabotage(trainer: Trainer, iteration: int, failed_at: Path) -> None:
        load = trainer.source.train_batches

        def batches(*position: Any) -> Iterator[HSTUBatch]:
            for number, batch in enumerate(load(*position), 1):
                if number == iteration and not failed_at.exists():  # once, also if the run is started again
                    failed_at.write_text(str(time.time()))
                    deed()
                yield batch

        trainer.source.train_batches = batches  # type: ignore[method-assign]

    return sabotage


def over_an_evaluation(trainer: Trainer, iteration: int, failed_at: Path) -> None:
    """SIGTERM over the first of so many slow batches that the evaluation would take minutes."""
    load = trainer.source.eval_batches

    def batches(*split: Any) -> Iterator[HSTUBatch]:
        (batch,) = islice(load(*split), 1)
        for _ in range(1000):
            if trainer.state.iteration == iteration and not failed_at.exists():
                failed_at.write_text(str(time.time()))
                os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.3)
            yield batch

    trainer.source.eval_batches = batches  # type: ignore[method-assign]


def in_forward(deed: Callable[[ModelOutput], None]) -> Callable[[Trainer, int, Path], None]:
    """Do it to the output of the dense model in an iteration."""

    def sabotage(trainer: Trainer, iteration: int, failed_at: Path) -> None:
        forwards = 0

        def hook(_module: Any, _inputs: Any, output: ModelOutput) -> None:
            nonlocal forwards
            forwards += 1
            if forwards == iteration:
                failed_at.write_text(str(time.time()))
                deed(output)

        unwrap_dense(trainer.state.model).task.register_forward_hook(hook)

    return sabotage


def lose(output: ModelOutput) -> None:
    """A loss that is no number."""
    output.loss_sum = output.loss_sum * float("nan")


def lose_gradient(output: ModelOutput) -> None:
    """A finite loss, whose gradients are no numbers."""
    output.loss_sum.register_hook(lambda gradient: gradient * float("nan"))


def lose_weight_gradient(output: ModelOutput) -> None:
    """A finite loss and finite gradients of the rows; that of one weight is not."""
    node: Any = output.loss_sum.grad_fn
    while not hasattr(node, "variable"):
        node = next(other for other, _ in node.next_functions if other is not None)
    handle = node.variable.register_hook(lambda gradient: handle.remove() or gradient * float("inf"))


def sleep_through_sigterm() -> None:
    """As a rank that waits for its GPU: nothing it calls fails, and the signal's handler changes nothing."""
    threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGTERM)).start()
    time.sleep(1000)


def refuse(error: Exception) -> None:
    raise error


FAILURES: dict[str, Callable[[Trainer, int, Path], None]] = {
    "told to stop": in_loading(lambda: os.kill(os.getpid(), signal.SIGTERM)),
    "told to stop over an evaluation": over_an_evaluation,
    "killed": in_loading(lambda: os.kill(os.getpid(), signal.SIGKILL)),
    "frozen": in_loading(lambda: os.kill(os.getpid(), signal.SIGSTOP)),
    "asleep over a batch": in_loading(lambda: time.sleep(1000)),
    "asleep through SIGTERM": in_loading(sleep_through_sigterm),
    "asleep in the model": in_forward(lambda _: time.sleep(1000)),
    "a defect": in_forward(lambda _: refuse(ZeroDivisionError("one by nothing"))),
    "bad data": in_loading(lambda: refuse(DataError("row 7 is torn"))),
    "no number": in_forward(lose),
    "no gradient": in_forward(lose_gradient),
}
DEEDS = {"loss": lose, "gradient": lose_gradient, "weight": lose_weight_gradient}


def non_finite_steps(store: str, tp: int, cases: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Case → what is raised where the last rank's loss or gradient is no number in the third step, and the weights.

    A case is named "<pipeline> <optimizer> <which of DEEDS>".
    """
    mesh = mesh_module.start(tensor_parallel_size=tp, timeout_s=60)
    torch.set_num_threads(1)
    results = {}
    for name, case in cases.items():
        config = tiny_config(**case, store=store, output="", trainer={"pipeline_type": name.split()[0]})
        mesh_module.seed_initial_weights(config.trainer.seed)
        source = builder.open_source(config, mesh)
        model, optimizers = builder.build_model(config, source, mesh)
        pipeline = builder.build_pipeline(config.trainer, model, optimizers, mesh)
        state = builder.TrainState(model, optimizers)
        forwards = 0
        deed = DEEDS[name.split()[-1]]

        def hook(_module: Any, _inputs: Any, output: ModelOutput, deed: Callable[[ModelOutput], None] = deed) -> None:
            nonlocal forwards
            forwards += 1
            if forwards == 3 and mesh.rank == mesh.world_size - 1:
                deed(output)

        unwrap_dense(model).task.register_forward_hook(hook)
        batches = source.train_batches(state.position)
        weights, raised = [digest(state, mesh)], ""
        try:
            for _ in range(3):
                users = pipeline.progress(batches).batch.user_ids.tolist()
                weights.append(digest(state, mesh))
        except NonFiniteStep as error:
            raised = str(error)
        results[name] = {"raised": raised, "users": users, "weights": [*weights, digest(state, mesh)]}
    mesh_module.finish()
    return results


if __name__ == "__main__":
    logging.captureWarnings(True)
    run_with(**json.loads(Path(sys.argv[1]).read_text()))
