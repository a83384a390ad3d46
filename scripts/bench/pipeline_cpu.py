"""Time a training step under each pipeline_type, steps interleaved; one JSON object on standard output.

python scripts/bench/pipeline_cpu.py [--gin-config-file configs/ml_100k_retrieval.gin --task retrieval --steps 60]

Needs the data of the configuration. One process: what is measured is the cost of the pipelines' bookkeeping, for on a
CPU there is neither a copy to the device nor a stream to overlap with.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # runs from a checkout, installed or not

from hstu.config.gin_io import load
from hstu.data.batch import HSTUBatch
from hstu.data.sampler import SamplerPosition
from hstu.observe.logging import quiet_libraries
from hstu.parallel import mesh as meshes
from hstu.pipeline.base import TrainPipeline
from hstu.train.builder import PIPELINES, build_model, build_pipeline
from hstu.train.sources import open_source


def prepare(kind: str, options: argparse.Namespace, mesh: meshes.Mesh) -> tuple[TrainPipeline, Iterator[HSTUBatch]]:
    """A pipeline with a model of its own, and its batches; all kinds start from the same weights."""
    config = load([options.gin_config_file], [f"TrainerArgs.pipeline_type = {kind!r}"], options.task)
    source = open_source(config, mesh)
    meshes.seed_initial_weights(config.trainer.seed)
    model, optimizers = build_model(config, source, mesh)
    return build_pipeline(config.trainer, model, optimizers, mesh), source.train_batches(SamplerPosition())


def seconds(pipeline: TrainPipeline, batches: Iterator[HSTUBatch]) -> float:
    """Duration of one step."""
    begun = time.perf_counter()
    pipeline.progress(batches)
    return time.perf_counter() - begun


def overhead(times: dict[str, list[float]], kind: str) -> float:
    """Median over rounds of a step's milliseconds beyond those of none's step on the same batch."""
    return 1e3 * statistics.median(a - b for a, b in zip(times[kind], times["none"], strict=True))


def main() -> None:
    """Run all pipelines, a step of each in turn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gin-config-file", default="configs/ml_100k_retrieval.gin")
    parser.add_argument("--task", choices=("ranking", "retrieval"), default="retrieval")
    parser.add_argument("--steps", type=int, default=60, help="timed steps a pipeline")
    parser.add_argument("--warm-up", type=int, default=5, help="steps before, not timed")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    quiet_libraries()
    mesh = meshes.start()
    torch.set_num_threads(options.threads)
    runs = {kind: prepare(kind, options, mesh) for kind in PIPELINES}
    times: dict[str, list[float]] = {kind: [] for kind in runs}
    order = list(runs)
    for step in range(options.warm_up + options.steps):
        for kind in order:
            taken = seconds(*runs[kind])
            if step >= options.warm_up:
                times[kind].append(taken)
        order = order[1:] + order[:1]  # no kind always follows the same one
    report = {
        kind: {
            "median_ms": round(1e3 * statistics.median(taken), 2),
            "min_ms": round(1e3 * min(taken), 2),
            "beyond_none_ms": round(overhead(times, kind), 2),
        }
        for kind, taken in times.items()
    }
    print(
        json.dumps({"options": vars(options), "torch": torch.__version__, "device": str(mesh.device), "step": report})
    )
    meshes.finish()


if __name__ == "__main__":
    main()
