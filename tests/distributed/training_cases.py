"""What runs on each rank in test_training.py and test_golden.py: whole training runs, several in one launch."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from hstu.data.batch import HSTUBatch
from hstu.data.sequences import Split
from hstu.observe.logging import quiet_libraries
from hstu.observe.peak import PeakTflops
from hstu.parallel import mesh as mesh_module
from hstu.parallel.dense import unwrap_dense
from hstu.pipeline.base import StepResult
from hstu.train import builder
from hstu.train.trainer import Trainer
from tests.distributed.launch import call_each
from tests.distributed.pipeline_cases import digest
from tests.distributed.table_cases import full_tables
from tests.train.tiny import FinishedRun, build, run, tiny_config


def run_cases(cases: dict[str, dict[str, Any]], tp: int = 1) -> dict[str, Any]:
    """Name → the function of this module to ``call`` and its other arguments, one case after the other."""
    quiet_libraries()
    mesh = mesh_module.start(tensor_parallel_size=tp, timeout_s=60)
    torch.set_num_threads(1)  # the tensors are tiny, and ranks that wait for one another must not spin
    builder.peak_tflops = lambda *_: PeakTflops(1.0, "assumed")  # type: ignore[assignment]  # takes longer than a case
    functions = {function.__name__: function for function in (train, stop_and_go, users_evaluated)}
    results = call_each(functions, cases, mesh)
    mesh_module.finish()
    return results


def stop_and_go(
    mesh: mesh_module.Mesh, task: str, store: str, output: str, stop: list[Any] | None, **options: Any
) -> dict[str, Any]:
    """A whole run; ``stop``: [in which iteration, at what] its last rank gets SIGTERM."""
    trainer = build(tiny_config(task, store, output, **_per_rank(options, mesh)), mesh)
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
        "history": trainer.state.carried["history"].state(),
        "records": [{name: record[name] for name in RECORDED if name in record} for record in finished.records],
        "summary": {name: value for name, value in finished.summary.items() if name not in ("seconds", "throughput")},
        "position": [trainer.state.position.epoch, trainer.state.position.consumed],
        "batches_per_epoch": trainer.source.batches_per_epoch,
    }


RECORDED = ("kind", "iter", "epoch", "loss", "lr", "loss_scale", "skipped_steps", "metrics")


def _signal_in_step(trainer: Trainer, iteration: int) -> None:
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


SIGNALLED = {"step": _signal_in_step, "micro-batch": _signal_in_micro_batch, "evaluation": _signal_in_evaluation}


def train(mesh: mesh_module.Mesh, task: str, store: str, output: str, **options: Any) -> dict[str, Any]:
    """A whole run (the arguments are those of ``tiny_config``; batch sizes are global): what it measured and learnt."""
    finished = run(tiny_config(task, store, output, **_per_rank(options, mesh)), mesh)
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


def users_evaluated(mesh: mesh_module.Mesh, task: str, store: str, output: str, **options: Any) -> dict[str, Any]:
    """How many predictions an untrained model is judged by, the users of this rank, and the metrics."""
    trainer = build(tiny_config(task, store, output, **_per_rank(options, mesh)), mesh)
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


def _per_rank(options: dict[str, Any], mesh: mesh_module.Mesh) -> dict[str, Any]:
    options = dict(options)
    if options.pop("predefined_tables", False):
        options["tables"] = ()
    trainer = dict(options.get("trainer", {}))
    for name in ("train_batch_size", "eval_batch_size"):
        trainer[name] = trainer[name] // mesh.world_size
    return {**options, "trainer": trainer}
