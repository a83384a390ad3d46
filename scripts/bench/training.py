"""A run of a gin file whose steps a benchmark takes itself. The data of the configuration must exist."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import harness  # noqa: F401  (puts the checkout on Python's path)

from hstu.config.gin_io import load
from hstu.config.run_config import RunConfig
from hstu.data.batches.batch import HSTUBatch
from hstu.data.sampling.sampler import SamplerPosition
from hstu.model.gr_model import GRModel
from hstu.optim.optimizers import Optimizers
from hstu.parallel import mesh as meshes
from hstu.pipeline.pipelines import TrainPipeline
from hstu.train.batch_source import BatchSource
from hstu.train.builder import build_model, build_pipeline
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
