"""The parts of whole trainers, and what steps with each pipeline lead to, on a store of 25 users, 4 in a batch.

Retrieval trains on all of them, ranking on 17: on one rank or two, the last batch of an epoch has one user and else
empty sequences; of two ranks one then has nothing but empty sequences.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Unpack
from unittest import mock

import torch.distributed as dist

from hstu.checkpoint.state import TrainState
from hstu.config.run_config import RunConfig
from hstu.data.sampling.sampler import SamplerPosition
from hstu.observe.logging import quiet_libraries
from hstu.parallel.collectives import gather_objects
from hstu.parallel.mesh import Mesh, seed_initial_weights
from hstu.parallel.shards import ShardedView
from hstu.pipeline.pipelines import TrainPipeline
from hstu.train import evaluate
from hstu.train.batch_source import BatchSource
from hstu.train.builder import build_evaluator, build_model, build_pipeline
from hstu.train.evaluate import Evaluator
from hstu.train.sources import open_source
from tests.conftest import write_small_store
from tests.distributed.toy import dense_of, full_tables
from tests.train.tiny import ITEM_FEATURES, TinyOptions, build, run, skip_measuring_the_peak, tiny_config, walks

STEPS = 9
PIPELINES = ("none", "native", "prefetch")


def write_store(path: Path) -> str:
    """25 users with 4 to 11 events each. Returns the path."""
    return str(write_small_store(path, **walks(25), item_features=ITEM_FEATURES).path)


def make_config(
    store: str, pipeline: str, task: str = "ranking", output: str = "", **options: Unpack[TinyOptions]
) -> RunConfig:
    """A run of the tiny model with dropout."""
    trainer = {"train_batch_size": 4, "eval_batch_size": 3, "pipeline_type": pipeline, **options.get("trainer", {})}
    fraction = {"train_fraction": 0.68} if task == "ranking" else {}
    chosen: TinyOptions = {
        "sharded": ("item_id", "town"),
        "optimizer": {"optimizer_str": "sgd"},
        **options,
        "trainer": trainer,
        "dataset": {**fraction, **options.get("dataset", {})},
        "network": {"hidden_dropout": 0.2, **options.get("network", {})},
    }
    return tiny_config(task, store, output, **chosen)


def assemble(config: RunConfig, mesh: Mesh) -> tuple[TrainPipeline, BatchSource, Evaluator, TrainState]:
    """What a trainer is made of, without its run directory."""
    source = open_source(config, mesh)
    seed_initial_weights(config.trainer.seed)
    model, optimizers = build_model(config, source, mesh)
    pipeline = build_pipeline(config.trainer, model, optimizers, mesh)
    evaluator = build_evaluator(config, source, model, mesh)
    return pipeline, source, evaluator, TrainState(model, optimizers)


def digest(state: TrainState, mesh: Mesh) -> list[str]:
    """A hash a rank of all tables, dense weights and optimizer states."""
    sha = hashlib.sha256()
    for _, tensor in sorted(state.tensors().items()):
        for part in tensor.shards.values() if isinstance(tensor, ShardedView) else [tensor]:
            sha.update(part.detach().cpu().contiguous().numpy().tobytes())
    return gather_objects(sha.hexdigest(), mesh.world_group)


def train(
    mesh: Mesh,
    store: str,
    pipeline_type: str,
    task: str = "ranking",
    evaluate_after: Sequence[int] = (0, 2, 3, 6),
    **options: Unpack[TinyOptions],
) -> dict[str, Any]:
    """STEPS steps with evaluations in between: losses, positions, sizes of the batches trained on, metrics, weights."""
    pipeline, source, evaluator, state = assemble(make_config(store, pipeline_type, task, **options), mesh)
    batches = source.train_batches(SamplerPosition())
    told: dict[str, Any] = {"losses": [], "by task": [], "positions": [], "real": [], "metrics": []}
    for step in range(STEPS + 1):
        if step > 0:
            state.optimizers.set_lr_multiplier(1.0 / step)
            result = pipeline.progress(batches)
            assert result.batch.position is not None
            told["losses"].append(float(result.loss))
            told["by task"].append(result.losses.tolist()[1:])
            told["positions"].append([result.batch.position.epoch, result.batch.position.consumed])
            told["real"].append(result.batch.real_batch_size)
        if step in evaluate_after:
            with pipeline.evaluation():
                told["metrics"] += [evaluator.evaluate(source.eval_batches(split)) for split in source.final_splits]
    told["weights"] = digest(state, mesh)
    return told


def train_whole(mesh: Mesh, task: str, store: str, output: str, **options: Unpack[TinyOptions]) -> dict[str, Any]:
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
