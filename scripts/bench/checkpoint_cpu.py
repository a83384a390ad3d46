"""Measure how long a checkpoint stops training, with and without ckpt_async, in turn; prints one JSON object.

python scripts/bench/checkpoint_cpu.py --directory DIR [--rows 250000 --hidden_size 256 --rounds 8]

The model has two sharded tables of --rows rows and random data. Each round has a save in the foreground, some
undisturbed steps, and a save in the background with steps until it is committed. All checkpoints go to DIR, on the disk
to be measured, with fsync and a SHA-256 of every file as in training.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from harness import command_line, publish
from training import prepare as prepare_training

from hstu.checkpoint.state import TrainState
from hstu.checkpoint.store import BackgroundWriter, CheckpointStore
from hstu.data.batch import HSTUBatch
from hstu.observe.logging import quiet_libraries
from hstu.parallel import mesh as meshes
from hstu.pipeline.none import TrainPipeline


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
    run = prepare_training("configs/benchmark_ranking.gin", bindings, "ranking", mesh)
    return TrainState(run.model, run.optimizers, run.config.operative_gin()), run.pipeline, run.batches()


def seconds(part: Callable[[], Any]) -> float:
    """Duration of a call."""
    begun = time.perf_counter()
    part()
    return time.perf_counter() - begun


def spread(values: list[float], digits: int = 4) -> dict[str, float]:
    """Median, smallest and largest."""
    numbers = {"median": statistics.median(values), "min": min(values), "max": max(values)}
    return {name: round(value, digits) for name, value in numbers.items()}


def measure(options: argparse.Namespace, mesh: meshes.Mesh) -> dict[str, Any]:
    """Run all rounds and summarize them."""
    state, pipeline, batches = prepare(options, mesh)
    waiting = CheckpointStore(f"{options.directory}/waiting", "", mesh, keep_last=1)
    beside = CheckpointStore(f"{options.directory}/beside", "", mesh, 1, BackgroundWriter(mesh, 600))
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
    """Measure, print, and remove all checkpoints."""
    parser = command_line(__doc__, rounds=8, threads=2)
    parser.add_argument("--directory", type=Path, required=True, help="created, and removed afterwards")
    parser.add_argument("--rows", type=int, default=250_000, help="of each of the two tables")
    parser.add_argument("--hidden_size", type=int, default=256)
    parser.add_argument("--steps", type=int, default=10, help="undisturbed steps per round")
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
    publish({"options": asked, "torch": torch.__version__, **report})
    meshes.finish()


if __name__ == "__main__":
    main()
