"""Whole training runs on each rank, which several tests compare."""

from dataclasses import replace
from typing import Any, Unpack
from unittest import mock

import torch.distributed as dist

from hstu.config.run_config import RunConfig
from hstu.observe.logging import quiet_libraries
from hstu.parallel.mesh import Mesh
from hstu.train import evaluate
from tests.distributed.toy import dense_of, full_tables
from tests.train.tiny import TinyOptions, build, run, skip_measuring_the_peak, tiny_config


def train(mesh: Mesh, task: str, store: str, output: str, **options: Unpack[TinyOptions]) -> dict[str, Any]:
    """A whole run: what it measured and learnt. Batch sizes are global."""
    finished = run(config_for(mesh, task, store, output, options), mesh)
    model = finished.trainer.state.model
    tables = full_tables(model, mesh)
    if not mesh.is_main:
        return {}
    return {
        "losses": {record["iter"]: record["loss"] for record in finished.records if record["kind"] == "train"},
        "by task": [[record[key] for key in record if key.startswith("loss/")] for record in finished.records],
        "metrics": {record["split"]: record["metrics"] for record in finished.records if record["kind"] == "eval"},
        "tables": tables,
        "dense": {name: weight.tolist() for name, weight in dense_of(model).task.named_parameters()},
        "batches_per_epoch": finished.trainer.source.batches_per_epoch,
    }


def users_evaluated(mesh: Mesh, task: str, store: str, output: str, **options: Unpack[TinyOptions]) -> dict[str, Any]:
    """How many predictions an untrained model is judged by, own users, the metrics, and how often it sends objects."""
    trainer = build(config_for(mesh, task, store, output, options), mesh)
    evaluator, source = trainer.evaluator, trainer.source
    split = source.final_splits[-1]
    with mock.patch.object(dist, "all_gather_object", wraps=dist.all_gather_object) as pickled:
        metrics = evaluator.evaluate(source.eval_batches(split))
        with mock.patch.object(evaluate, "GATHERED_ROWS", 0):
            divided = evaluator.evaluate(source.eval_batches(split))
    count = int(evaluator.exchange.total(len(evaluator.observe(source.eval_batches(split)))))
    users = [int(user) for batch in source.eval_batches(split) for user in batch.user_ids if user >= 0]
    trainer.run_directory.close()
    return {"count": count, "users": users, "metrics": metrics, "divided": divided, "pickled": pickled.call_count}


def config_for(mesh: Mesh, task: str, store: str, output: str, options: TinyOptions) -> RunConfig:
    """The configuration for this number of ranks, in a process prepared for whole runs."""
    quiet_libraries()
    skip_measuring_the_peak()
    config = tiny_config(task, store, output, **options)
    trainer = replace(
        config.trainer,
        train_batch_size=config.trainer.train_batch_size // mesh.world_size,
        eval_batch_size=config.trainer.eval_batch_size // mesh.world_size,
    )
    return replace(config, trainer=trainer)
