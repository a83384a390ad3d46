"""What runs on each rank in test_balancing.py."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from hstu.config.run_config import RunConfig
from hstu.data.batch import HSTUBatch
from hstu.data.loader import build_loader
from hstu.data.sampler import BatchPlan, SamplerPosition, TrainSampler, epoch_order
from hstu.parallel import mesh as mesh_module
from hstu.parallel.mesh import Mesh
from hstu.pipeline.none import SequentialPipeline
from hstu.train.builder import build_model
from hstu.train.sources import StoreSource, open_source
from hstu.train.work import StepWork
from tests.train.tiny import tiny_config

STEPS = 12


def run_cases(store: str, directory: str, cases: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Train each case in turn: name → losses, and of each step this rank's users, tokens and padded batch size."""
    mesh = mesh_module.start(timeout_s=60)
    results = {}
    for name, case in cases.items():
        arguments = dict(case)
        as_ranks = arguments.pop("as_ranks", None)
        config = tiny_config(store=store, output=f"{directory}/{name}", **arguments)
        results[name] = _train(config, mesh, as_ranks)
    mesh_module.finish()
    return results


def _train(config: RunConfig, mesh: Mesh, as_ranks: dict[str, Any] | None) -> dict[str, Any]:
    mesh_module.seed_initial_weights(config.trainer.seed)
    source = open_source(config, mesh)
    assert isinstance(source, StoreSource)
    model, optimizers = build_model(config, source, mesh)
    pipeline = SequentialPipeline(model, optimizers, mesh, max_grad_norm=0.0)
    batches = source.train_batches(SamplerPosition()) if as_ranks is None else _joined(source, **as_ranks)
    work = StepWork(config.network, source.roles)
    result: dict[str, Any] = {"losses": [], "users": [], "tokens": [], "costs": [], "sizes": [], "positions": []}
    model.train()
    for _ in range(STEPS):
        step = pipeline.progress(batches)
        tokens, flops = work.of(step.batch)
        result["losses"].append(step.loss.item())
        result["users"].append(step.batch.user_ids[: step.batch.real_batch_size].tolist())
        result["tokens"].append(tokens)
        result["costs"].append(flops)
        result["sizes"].append(step.batch.batch_size)
        assert step.batch.position is not None
        result["positions"].append([step.batch.position.epoch, step.batch.position.consumed])
    result["batches_per_epoch"] = source.batches_per_epoch
    return result


def _joined(source: StoreSource, num_ranks: int, batch_size: int) -> Iterator[HSTUBatch]:
    """On a single process: the global batches that ``num_ranks`` ranks would share, each as one batch."""
    trainer, samples = source._config.trainer, source._train_samples
    assert source._sharing is not None
    first = TrainSampler(len(samples), batch_size, 0, num_ranks, trainer.seed, True, sharing=source._sharing)

    def plans() -> Iterator[BatchPlan]:
        for plan in first:
            ordinals = np.arange(plan.global_start, plan.position.consumed)
            order = epoch_order(len(samples), trainer.seed, plan.epoch, shuffle=True)
            yield BatchPlan(order[ordinals], ordinals, plan.epoch, plan.global_start, plan.position)

    return build_loader(source._collator(source.store, samples, num_ranks * batch_size, training=True), plans())
