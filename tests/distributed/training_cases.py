"""Whole training runs on each rank: what test_training.py, test_golden.py and others compare."""

import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Unpack

import numpy as np
import torch

from hstu.config.run_config import RunConfig
from hstu.data.batches.batch import HSTUBatch
from hstu.data.sampling.samples import Split
from hstu.observe.logging import quiet_libraries
from hstu.parallel.ddp import unwrap_dense
from hstu.parallel.mesh import Mesh
from hstu.pipeline.step import StepResult
from hstu.train.trainer import Trainer
from tests.distributed.pipeline_cases import digest
from tests.distributed.toy import full_tables
from tests.train.tiny import FinishedRun, TinyOptions, build, run, skip_measuring_the_peak, tiny_config


def stop_and_go(
    mesh: Mesh, task: str, store: str, output: str, stop: tuple[int, str] | None = None, **options: Unpack[TinyOptions]
) -> dict[str, Any]:
    """A whole run. ``stop``: the iteration, and the moment in it, in which the last rank gets SIGTERM."""
    trainer = build(_config(mesh, task, store, output, options), mesh)
    if stop is not None and mesh.rank == mesh.world_size - 1:
        SIGNALLED[stop[1]](trainer, stop[0])
    trainer.train()
    finished = FinishedRun(trainer, trainer.run_directory.path)
    weights = digest(trainer.state, mesh)
    if not mesh.is_main:
        return {}
    return {
        "weights": weights,
        "noise": torch.rand(2).tolist(),
        "history": trainer.state.carried["history"].state_dict(),
        "records": [{name: record[name] for name in RECORDED if name in record} for record in finished.records],
        "summary": {name: value for name, value in finished.summary.items() if name not in ("seconds", "throughput")},
        "position": [trainer.state.position.epoch, trainer.state.position.consumed],
        "batches_per_epoch": trainer.source.batches_per_epoch,
    }


RECORDED = ("kind", "iter", "epoch", "loss", "lr", "loss_scale", "skipped_steps", "metrics")


def signal_in_step(trainer: Trainer, iteration: int) -> None:
    """Before the step."""
    progress = trainer.pipeline.progress

    def signalled(batches: Iterator[HSTUBatch]) -> StepResult:
        if trainer.state.iteration + 1 == iteration:
            os.kill(os.getpid(), signal.SIGTERM)
        return progress(batches)

    trainer.pipeline.progress = signalled  # type: ignore[method-assign]


def _signal_in_micro_batch(trainer: Trainer, iteration: int) -> None:
    """After the forward of the first micro-batch, before that of the second."""
    dense, parts = unwrap_dense(trainer.state.model), trainer.args.gradient_accumulation_steps
    forwards = 0

    def hook(*_: Any) -> None:
        nonlocal forwards
        forwards += dense.training
        if dense.training and forwards == (iteration - 1) * parts + 1:
            os.kill(os.getpid(), signal.SIGTERM)

    dense.register_forward_hook(hook)


def _signal_in_evaluation(trainer: Trainer, iteration: int) -> None:
    """Over the first batch."""
    batches = trainer.source.eval_batches

    def signalled(split: Split) -> Iterator[HSTUBatch]:
        if trainer.state.iteration == iteration:
            os.kill(os.getpid(), signal.SIGTERM)
        return batches(split)

    trainer.source.eval_batches = signalled  # type: ignore[method-assign]


SIGNALLED = {"step": signal_in_step, "micro-batch": _signal_in_micro_batch, "evaluation": _signal_in_evaluation}


def train(mesh: Mesh, task: str, store: str, output: str, **options: Unpack[TinyOptions]) -> dict[str, Any]:
    """A whole run: what it measured and learnt. Batch sizes are global."""
    finished = run(_config(mesh, task, store, output, options), mesh)
    model = finished.trainer.state.model
    tables = full_tables(model, mesh)
    if not mesh.is_main:
        return {}
    return {
        "losses": {record["iter"]: record["loss"] for record in finished.records if record["kind"] == "train"},
        "metrics": {record["split"]: record["metrics"] for record in finished.records if record["kind"] == "eval"},
        "tables": tables,
        "dense": {name: weight.tolist() for name, weight in unwrap_dense(model).task.named_parameters()},
        "batches_per_epoch": finished.trainer.source.batches_per_epoch,
    }


def users_evaluated(mesh: Mesh, task: str, store: str, output: str, **options: Unpack[TinyOptions]) -> dict[str, Any]:
    """How many predictions an untrained model is judged by (of each kind of numbers), own users, and the metrics."""
    trainer = build(_config(mesh, task, store, output, options), mesh)
    evaluator, source = trainer.evaluator, trainer.source
    gather, counts = evaluator._gather, []

    def counting(local: np.ndarray) -> np.ndarray:
        gathered = gather(local)
        counts.append(len(gathered))
        return gathered

    evaluator._gather = counting  # type: ignore[method-assign]
    split = source.final_splits[-1]
    metrics = evaluator.evaluate(source.eval_batches(split))
    users = [int(user) for batch in source.eval_batches(split) for user in batch.user_ids if user >= 0]
    trainer.run_directory.close()
    return {"counts": counts, "users": users, "metrics": metrics}


def _config(mesh: Mesh, task: str, store: str, output: str, options: TinyOptions) -> RunConfig:
    """The configuration for this number of ranks, in a process prepared for whole runs."""
    quiet_libraries()
    skip_measuring_the_peak()
    config = tiny_config(task, store, output, **options)
    sizes = {
        "train_batch_size": config.trainer.train_batch_size // mesh.world_size,
        "eval_batch_size": config.trainer.eval_batch_size // mesh.world_size,
    }
    return replace(config, trainer=replace(config.trainer, **sizes))
