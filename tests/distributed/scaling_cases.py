"""What runs on each rank in test_loss_scale.py: steps with a scaled loss, and with gradients that overflow on one rank.

They compute in float32, in which scaling by a power of two is exact: what is compared has the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch

from hstu.data.batch import HSTUBatch
from hstu.data.store import SequenceStore
from hstu.model.outputs import ModelOutput
from hstu.observe.peak import PeakTflops
from hstu.parallel import mesh as mesh_module
from hstu.parallel.collectives import gather_objects
from hstu.parallel.dense import unwrap_dense
from hstu.parallel.mesh import Mesh
from hstu.train import builder
from hstu.train.trainer import Trainer
from tests.distributed.pipeline_cases import digest
from tests.train.tiny import build, tables_with_dynamic, tiny_config

STEPS = 4
BAD_STEP = 2
"""Whose gradients overflow, counted from 1."""


def run(cases: dict[str, dict[str, Any]], store: str, output: str, tp: int) -> dict[str, Any]:
    """Case → way → what ``steps`` tells."""
    mesh = mesh_module.start(tensor_parallel_size=tp, timeout_s=60)
    torch.set_num_threads(1)
    builder.peak_tflops = lambda *_: PeakTflops(1.0, "assumed")  # type: ignore[assignment]  # takes longer than a case
    ways: dict[str, dict[str, Any]] = {
        "unscaled": {},
        "fixed": {"precision": {"loss_scale": 1024.0}},
        "without the batch": {"leave_out": True},
        "overflow": {"precision": {"growth_interval": 2}, "overflow": True},
    }
    results = {
        name: {way: steps(mesh, store, f"{output}/{name}/{way}", **options, **case) for way, options in ways.items()}
        for name, case in cases.items()
    }
    mesh_module.finish()
    return results


def steps(
    mesh: Mesh,
    store: str,
    output: str,
    *,
    leave_out: bool = False,
    overflow: bool = False,
    dynamic: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """STEPS steps. ``leave_out``: without the batch of BAD_STEP. ``overflow``: its gradients do, on the last rank.

    ``dynamic``: the items' table is; its rows are not compared, but the weights that are trained on them.
    """
    if dynamic:
        options["tables"] = tables_with_dynamic(SequenceStore.open(store), 30)
    if overflow:
        options["precision"]["loss_scale"] = "dynamic"
    trainer = build(tiny_config(store=store, output=output, **options), mesh)
    if overflow and mesh.rank == mesh.world_size - 1:
        _overflow(trainer)
    batches = _batches(trainer, leave_out)
    told: dict[str, Any] = {"weights": [digest(trainer.state, mesh)], "scales": [], "losses": []}
    for number in range(1, STEPS + 1 - leave_out):
        trainer.state.iteration = mesh.progress.iteration = number
        result = trainer.pipeline.progress(batches)
        told["losses"].append(float(result.loss))
        told["weights"].append(digest(trainer.state, mesh))
        scale = trainer.pipeline.loss_scale
        told["scales"].append(gather_objects(None if scale is None else scale.value, mesh.world_group))
    told["table steps"] = trainer.state.optimizers.tables.steps
    trainer.run_directory.close()
    return told


def _batches(trainer: Trainer, leave_out: bool) -> Iterator[HSTUBatch]:
    for number, batch in enumerate(trainer.source.train_batches(trainer.state.position), 1):
        if not (leave_out and number == BAD_STEP):
            yield batch


def _overflow(trainer: Trainer) -> None:
    """In the backward of the first micro-batch of BAD_STEP; the loss itself is finite."""
    forwards, parts = 0, trainer.args.gradient_accumulation_steps

    def hook(_module: Any, _inputs: Any, output: ModelOutput) -> None:
        nonlocal forwards
        forwards += 1
        if forwards == (BAD_STEP - 1) * parts + 1:
            output.loss_sum.register_hook(lambda gradient: gradient * math.inf)

    unwrap_dense(trainer.state.model).register_forward_hook(hook)
