"""Compare the estimated step time and memory of CPU runs with real steps; prints one JSON object.

    python scripts/bench/estimate_check.py [--only NAME] [--rounds 5] [--steps 10] [--output FILE.json]

Each case runs in its own ranks with one thread each. Cases with more ranks than cores are skipped. Estimates (in this
process, by the code of scripts/estimate.py) and steps take turns, because other work on the machine slows both. The
result is the median over the rounds of estimate / measurement. Memory is the peak of torch's allocations in a step on
rank 0, by its profiler, over some steps; the estimate is for the largest batch of these. Cases of MovieLens need
tmp_data/ml-1m.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from harness import ROOT, command_line, publish
from training import prepare

from hstu.config.gin_io import load
from hstu.config.run_config import RunConfig, Task
from hstu.estimate.estimate import estimate, memory
from hstu.estimate.machine import this_cpu
from hstu.estimate.workload import plan_workload
from hstu.observe.logging import quiet_libraries
from hstu.parallel import mesh as meshes

CORES = sorted(os.sched_getaffinity(0))
WARM_UP = 3
MEMORY_STEPS = slice(1, 9)
"""Steps of a run whose memory is measured. The first step allocates what stays. Epochs of random data are equal."""
SMALL = [
    "NetworkArgs.num_layers = 2",
    "NetworkArgs.hidden_size = 128",
    "NetworkArgs.num_attention_heads = 2",
    "NetworkArgs.kv_channels = 64",
    "NetworkArgs.kernel_backend = 'pytorch'",
    "items/FeatureArgs.max_sequence_length = 128",
    "items/FeatureArgs.is_jagged = True",
    "TrainerArgs.train_batch_size = 16",
    "item/EmbeddingArgs.item_vocab_size_or_capacity = 100000",
    "user/EmbeddingArgs.item_vocab_size_or_capacity = 100000",
    "BenchmarkDatasetArgs.num_generated_batches = 8",
]
WIDE = [
    *SMALL,
    "NetworkArgs.hidden_size = 512",
    "NetworkArgs.kv_channels = 256",
    "TrainerArgs.train_batch_size = 4",
    "NetworkArgs.dtype_str = 'float32'",
]
LAYERS = [
    *SMALL,
    "NetworkArgs.num_layers = 8",
    "NetworkArgs.kernel_backend = 'cutlass'",
    "NetworkArgs.dtype_str = 'float32'",
]
TENSOR_PARALLEL = [*LAYERS, "TensorModelParallelArgs.tensor_model_parallel_size = 2"]
RANDOM = "configs/benchmark_ranking.gin"
# Name → (file, task, bindings, ranks)
CASES: dict[str, tuple[str, Task, list[str], int]] = {
    "ranking, bfloat16": (RANDOM, "ranking", SMALL, 1),
    "ranking, bfloat16, 2 ranks": (RANDOM, "ranking", SMALL, 2),
    "ranking, 512 wide": (RANDOM, "ranking", WIDE, 1),
    "ranking, 8 layers": (RANDOM, "ranking", LAYERS, 1),
    "ranking, 8 layers, 2 ranks": (RANDOM, "ranking", LAYERS, 2),
    "ranking, 8 layers, tensor parallel": (RANDOM, "ranking", TENSOR_PARALLEL, 2),
    "retrieval, ML-1M": ("configs/ml_1m_retrieval.gin", "retrieval", [], 1),
    "retrieval, ML-1M, 2 ranks": ("configs/ml_1m_retrieval.gin", "retrieval", [], 2),
}


def read(name: str) -> RunConfig:
    """The configuration of a case."""
    file, task, bindings, _ = CASES[name]
    return load([str(ROOT / file)], bindings, task)


def clock_of(name: str) -> Callable[[], float]:
    """Process time for a single rank, which other work disturbs less; wall time for several, which wait."""
    return time.process_time if CASES[name][3] == 1 else time.perf_counter


def run_rank(name: str, steps: int) -> None:
    """Print the largest peak of memory of MEMORY_STEPS, then the seconds of each of ``steps`` steps, as JSON."""
    quiet_libraries()
    file, task, bindings, _ = CASES[name]
    mesh, clock = meshes.start(read(name).tensor_parallel.tensor_model_parallel_size), clock_of(name)
    torch.set_num_threads(1)
    run = prepare(str(ROOT / file), bindings, task, mesh)
    pipeline, batches = run.pipeline, run.batches()
    peaks = [peak_bytes(lambda: pipeline.progress(batches)) for _ in range(MEMORY_STEPS.stop)]
    times = []
    for _ in range(WARM_UP + steps):
        begun = clock()
        pipeline.progress(batches).loss.item()
        times.append(clock() - begun)
    print(json.dumps({"times": times[WARM_UP:], "peak": max(peaks[MEMORY_STEPS])}), flush=True)
    meshes.finish()


def peak_bytes(step: Any) -> int:
    """Peak of the bytes that one call of ``step`` has allocated and not freed."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = [e for e in json.loads(trace.read_text())["traceEvents"] if e.get("name") == "[memory]"]
    live: dict[int, int] = {}
    most = 0
    for event in sorted(events, key=lambda event: event["ts"]):
        address, size = event["args"]["Addr"], event["args"]["Bytes"]
        live.pop(address, None)  # the step also frees what an earlier one has left, which does not count
        if size > 0:
            live[address] = size
            most = max(most, sum(live.values()))
    return most


def run_ranks(name: str, steps: int) -> dict[str, Any]:
    """What rank 0 of the case prints."""
    world_size = CASES[name][3]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size), "MASTER_PORT": str(port)}
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, "--be-a-rank-of", name, "--steps", str(steps)],
            env=os.environ | shared | {"RANK": str(r), "LOCAL_RANK": str(r), "MASTER_ADDR": "127.0.0.1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            cwd=ROOT,
        )
        for r in range(world_size)
    ]
    printed = [process.communicate()[0] for process in processes]
    found: dict[str, Any] = json.loads(printed[0])
    return found


def measure(name: str, rounds: int, steps: int) -> dict[str, Any]:
    """Estimate and measure one case."""
    config, world_size, clock = read(name), CASES[name][3], clock_of(name)
    workload = plan_workload(config, world_size, world_size, "cpu")
    os.sched_setaffinity(0, CORES[:world_size])  # one core per rank; the ranks inherit this
    estimates, measured = [], []
    for _ in range(rounds):
        expected = estimate(workload, this_cpu(workload, clock))
        estimates.append(expected.step_s)
        found = run_ranks(name, steps)
        measured.append(statistics.median(found["times"]))
    planned = (workload.steps * MEMORY_STEPS.stop)[MEMORY_STEPS]
    of_rank_0 = replace(workload, steps=tuple(step[:1] for step in planned))
    held = memory(of_rank_0, ())
    transient = ["activations", "looked-up rows", "working memory"]
    if workload.dp_size == 1:  # with DDP, gradients are in its permanent buckets
        transient.append("gradients of both")
    return {
        "case": name,
        "ranks": world_size,
        "estimated_ms": [round(1e3 * value, 1) for value in estimates],
        "measured_ms": [round(1e3 * value, 1) for value in measured],
        "ratio": round(statistics.median(e / m for e, m in zip(estimates, measured, strict=True)), 3),
        "step": {part: round(1e3 * value, 2) for part, value in expected.step.items()},
        "computing": {op: round(1e3 * value, 2) for op, value in expected.computing.items()},
        "estimated_transient_mb": round(sum(held[kind] for kind in transient) / 1e6, 2),
        "measured_transient_mb": round(found["peak"] / 1e6, 2),
    }


def main() -> None:
    """Run all cases, or one, and print the report."""
    parser = command_line(__doc__, rounds=5, output=True)
    parser.add_argument("--only", choices=CASES)
    parser.add_argument("--steps", type=int, default=10, help="steps per round")
    parser.add_argument("--be-a-rank-of", choices=CASES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.be_a_rank_of:
        run_rank(options.be_a_rank_of, options.steps)
        return
    quiet_libraries()
    rows = []
    for name in [options.only] if options.only else [name for name in CASES if CASES[name][3] <= len(CORES)]:
        rows.append(measure(name, options.rounds, options.steps))
        row = rows[-1]
        print(
            f"{name:36s} estimate / measured {row['ratio']:.3f}, memory "
            f"{row['estimated_transient_mb'] / row['measured_transient_mb']:.3f}",
            file=sys.stderr,
        )
    report = {
        "torch": torch.__version__,
        "cpu": platform.processor() or platform.machine(),
        "cores": len(CORES),
        "cases": rows,
    }
    publish(report, options.output)


if __name__ == "__main__":
    main()
