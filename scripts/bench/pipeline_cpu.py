"""Time a training step under each pipeline_type, all in turn; prints one JSON object.

python scripts/bench/pipeline_cpu.py [--gin-config-file configs/ml_100k_retrieval.gin --task retrieval --steps 60]

The data of the configuration must exist. A CPU has neither a copy to the device nor a stream to overlap with, so this
measures the bookkeeping of the pipelines. Other benchmarks import :func:`prepare` from here.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from harness import command_line, publish, time_in_turn

from hstu.config.gin_io import load
from hstu.config.run_config import RunConfig
from hstu.data.batch import HSTUBatch
from hstu.data.sampler import SamplerPosition
from hstu.model.gr_model import GRModel
from hstu.observe.logging import quiet_libraries
from hstu.optim.optimizers import Optimizers
from hstu.parallel import mesh as meshes
from hstu.pipeline.none import TrainPipeline
from hstu.train.batch_source import BatchSource
from hstu.train.builder import PIPELINES, build_model, build_pipeline
from hstu.train.sources import open_source


@dataclass
class Training:
    """Everything that a run needs to train."""

    config: RunConfig
    source: BatchSource
    model: GRModel
    optimizers: Optimizers
    pipeline: TrainPipeline

    def batches(self) -> Iterator[HSTUBatch]:
        """Training batches from the first one on."""
        return self.source.train_batches(SamplerPosition())


def prepare(
    gin_file: str, bindings: Sequence[str], task: Any, mesh: meshes.Mesh, source: BatchSource | None = None
) -> Training:
    """Open the data, unless given, and build the model with the same initial weights each time."""
    config = load([gin_file], list(bindings), task)
    source = source or open_source(config, mesh)
    meshes.seed_initial_weights(config.trainer.seed)
    model, optimizers = build_model(config, source, mesh)
    return Training(config, source, model, optimizers, build_pipeline(config.trainer, model, optimizers, mesh))


def train(pipeline: TrainPipeline, batches: Iterator[HSTUBatch], number: int) -> None:
    """One training step; ``number`` is that of the round."""
    pipeline.progress(batches)


def main() -> None:
    """Measure and print."""
    add = (parser := command_line(__doc__, threads=2)).add_argument
    add("--gin-config-file", default="configs/ml_100k_retrieval.gin")
    add("--task", choices=("ranking", "retrieval"), default="retrieval")
    add("--steps", type=int, default=60, help="timed steps of each pipeline")
    options = parser.parse_args()
    quiet_libraries()
    mesh = meshes.start()
    torch.set_num_threads(options.threads)
    steps = {}
    for kind in PIPELINES:
        run = prepare(options.gin_config_file, [f"TrainerArgs.pipeline_type = {kind!r}"], options.task, mesh)
        steps[kind] = partial(train, run.pipeline, run.batches())
    times = time_in_turn(steps, mesh.device, options.steps)
    report = {
        kind: {
            "median_ms": round(statistics.median(taken), 2),
            "min_ms": round(min(taken), 2),
            "beyond_none_ms": round(statistics.median(a - b for a, b in zip(taken, times["none"], strict=True)), 2),
        }
        for kind, taken in times.items()
    }
    publish({"options": vars(options), "torch": torch.__version__, "device": str(mesh.device), "step": report})
    meshes.finish()


if __name__ == "__main__":
    main()
