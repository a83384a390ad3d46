"""How long training stands still for a checkpoint, waiting for it or not (ckpt_async), in turn; one JSON object.

python scripts/bench/checkpoint_cpu.py --directory DIR [--rows 250000 --hidden_size 256 --rounds 8]

Random data, two sharded tables of --rows rows. In each round: a save that is waited for, some undisturbed steps, a
save in the background and steps until that is committed. All checkpoints go to DIR, on the disk to be measured, with
fsync and a SHA-256 of every file as in any run.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # runs from a checkout, installed or not

from hstu.checkpoint.background import Background
from hstu.checkpoint.state import TrainState
from hstu.checkpoint.store import CheckpointStore
from hstu.config.gin_io import load
from hstu.data.batch import HSTUBatch
from hstu.data.sampler import SamplerPosition
from hstu.observe.logging import quiet_libraries
from hstu.parallel import mesh as meshes
from hstu.pipeline.base import TrainPipeline
from hstu.train.builder import build_model, build_pipeline
from hstu.train.sources import open_source


def prepare(options: argparse.Namespace, mesh: meshes.Mesh) -> tuple[TrainState, TrainPipeline, Iterator[HSTUBatch]]:
    """A model on random data, and its batches."""
    width = options.hidden_size
    bindings = [
        f"item/EmbeddingArgs.item_vocab_size_or_capacity = {options.rows}",
        f"user/EmbeddingArgs.item_vocab_size_or_capacity = {options.rows}",
        "items/FeatureArgs.max_sequence_length = 64",
        "TrainerArgs.train_batch_size = 8",
        "TrainerArgs.pipeline_type = 'none'",
        "BenchmarkDatasetArgs.num_generated_batches = 10",
        "NetworkArgs.num_layers = 2",
        f"NetworkArgs.hidden_size = {width}",
        f"NetworkArgs.kv_channels = {width // 4}",
        "NetworkArgs.dtype_str = 'float32'",
    ]
    config = load(["configs/benchmark_ranking.gin"], bindings, "ranking")
    source = open_source(config, mesh)
    model, optimizers = build_model(config, source, mesh)
    pipeline = build_pipeline(config.trainer, model, optimizers, mesh)
    return TrainState(model, optimizers, config.operative_gin()), pipeline, source.train_batches(SamplerPosition())


def seconds(part: Callable[[], Any]) -> float:
    """How long it takes."""
    begun = time.perf_counter()
    part()
    return time.perf_counter() - begun


def spread(values: list[float], digits: int = 4) -> dict[str, float]:
    """Median, smallest and largest."""
    numbers = {"median": statistics.median(values), "min": min(values), "max": max(values)}
    return {name: round(value, digits) for name, value in numbers.items()}


def measure(options: argparse.Namespace, mesh: meshes.Mesh) -> dict[str, Any]:
    """All rounds."""
    state, pipeline, batches = prepare(options, mesh)
    waiting = CheckpointStore(f"{options.directory}/waiting", "", mesh, keep_last=1)
    beside = CheckpointStore(f"{options.directory}/beside", "", mesh, 1, Background(mesh, 600))
    times: dict[str, list[float]] = {"save": [], "stall": [], "written": [], "step": [], "step_while_writing": []}

    def step() -> float:
        state.iteration += 1
        return seconds(lambda: pipeline.progress(batches))

    for _ in range(5):
        step()  # warm-up
    for _ in range(options.rounds):
        step()
        times["save"].append(seconds(lambda: waiting.save(state)))
        times["step"] += [step() for _ in range(options.steps)]
        begun = time.perf_counter()
        times["stall"].append(seconds(lambda: beside.save(state)))
        while beside.is_saving:
            times["step_while_writing"].append(step())
            beside.poll()
        times["written"].append(time.perf_counter() - begun)
    size = sum(path.stat().st_size for path in Path(options.directory).glob("beside/iter*/**/*") if path.is_file())
    first, rest = times["stall"][0], times["stall"][1:]
    return {
        "checkpoint_bytes": size,
        "save_s": spread(times["save"]),
        "async_stall_s": spread(rest),
        "async_first_stall_s": round(first, 4),
        "async_until_committed_s": spread(times["written"]),
        "stall_over_save": round(statistics.median(rest) / statistics.median(times["save"]), 4),
        "largest_stall_over_smallest_save": round(max(rest) / min(times["save"]), 4),
        "step_s": spread(times["step"]),
        "step_while_writing_s": spread(times["step_while_writing"]),
        "all_s": {name: [round(value, 4) for value in values] for name, values in times.items() if "step" not in name},
    }


def main() -> None:
    """Measure, and leave nothing behind."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, required=True, help="made, and removed afterwards")
    parser.add_argument("--rows", type=int, default=250_000, help="of each of the two tables")
    parser.add_argument("--hidden_size", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--steps", type=int, default=10, help="undisturbed steps a round")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    quiet_libraries()
    options.directory.mkdir(parents=True)
    mesh = meshes.start()
    torch.set_num_threads(options.threads)
    try:
        report = measure(options, mesh)
    finally:
        shutil.rmtree(options.directory)
    asked = {name: value for name, value in vars(options).items() if name != "directory"}
    print(json.dumps({"options": asked, "torch": torch.__version__, **report}))
    meshes.finish()


if __name__ == "__main__":
    main()
