"""What runs on each rank in test_training.py and test_golden.py: whole training runs, several in one launch."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from hstu.observe.logging import quiet_libraries
from hstu.observe.peak import PeakTflops
from hstu.parallel import mesh as mesh_module
from hstu.parallel.dense import unwrap_dense
from hstu.train import builder
from tests.distributed.table_cases import full_tables
from tests.train.tiny import build, run, tiny_config


def run_cases(cases: dict[str, dict[str, Any]], tp: int = 1) -> dict[str, Any]:
    """Name → the function of this module to ``call`` and its other arguments, one case after the other."""
    quiet_libraries()
    mesh = mesh_module.start(tensor_parallel_size=tp, timeout_s=60)
    torch.set_num_threads(1)  # the tensors are tiny, and ranks that wait for one another must not spin
    builder.peak_tflops = lambda *_: PeakTflops(1.0, "assumed")  # type: ignore[assignment]  # takes longer than a case
    functions = {function.__name__: function for function in (train, users_evaluated)}
    results = {}
    for name, case in cases.items():
        arguments = dict(case)
        results[name] = functions[arguments.pop("call")](mesh, **arguments)
    mesh_module.finish()
    return results


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
