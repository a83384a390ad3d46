"""Hold the estimate of a CPU run's step time and memory against real steps; one JSON object on standard output.

    python scripts/bench/estimate_check.py [--only NAME] [--rounds 5] [--steps 10] [--output FILE.json]

Each case runs in ranks of its own with one thread each; cases of more ranks than cores are left out. Estimates
(this process, by the code of scripts/estimate.py) and steps take turns, since other work on the machine slows both:
compared is the median over the rounds of estimate over measurement. Memory is the peak of what torch has allocated in
a step, by its profiler, on rank 0. The MovieLens cases need tmp_data/ml-1m.
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
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # runs from a checkout, installed or not

from hstu.config.gin_io import load
from hstu.config.run_config import RunConfig
from hstu.data.sampler import SamplerPosition
from hstu.observe.logging import quiet_libraries
from hstu.parallel import mesh as meshes
from hstu.train.builder import build_model, build_pipeline
from hstu.train.estimate.calibration import Clock, batch_seconds, this_cpu
from hstu.train.estimate.estimate import estimate
from hstu.train.estimate.situation import look_at
from hstu.train.sources import open_source

ROOT = Path(__file__).resolve().parents[2]
CORES = sorted(os.sched_getaffinity(0))
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
# Name → (file, task, bindings, ranks)
CASES: dict[str, tuple[str, str, list[str], int]] = {
    "retrieval, ML-1M": ("configs/ml_1m_retrieval.gin", "retrieval", [], 1),
    "ranking, ML-1M": ("configs/ml_1m_ranking.gin", "ranking", [], 1),
    "ranking, random, bfloat16": ("configs/benchmark_ranking.gin", "ranking", SMALL, 1),
    "ranking, random, 512 wide": ("configs/benchmark_ranking.gin", "ranking", WIDE, 1),
    "retrieval, ML-1M, 2 ranks": ("configs/ml_1m_retrieval.gin", "retrieval", [], 2),
    "ranking, random, bfloat16, 2 ranks": ("configs/benchmark_ranking.gin", "ranking", SMALL, 2),
    "ranking, ML-1M, tensor parallel": ("configs/ml_1m_ranking_tp2.gin", "ranking", [], 2),
}


def read(name: str) -> RunConfig:
    """The configuration of a case."""
    file, task, bindings, _ = CASES[name]
    return load([str(ROOT / file)], bindings, task)  # type: ignore[arg-type]


def clock_of(name: str) -> Clock:
    """Processor time of a single rank, which other work on the machine disturbs less; else ranks wait: wall time."""
    return time.process_time if CASES[name][3] == 1 else time.perf_counter


def be_a_rank(name: str) -> None:
    """For each line "N" on standard input N steps, answered by their seconds; then "memory": the peak of 8 steps."""
    quiet_libraries()
    config = read(name)
    mesh = meshes.start(config.tensor_parallel.tensor_model_parallel_size)
    torch.set_num_threads(1)
    clock = clock_of(name)
    source = open_source(config, mesh)
    model, optimizers = build_model(config, source, mesh)
    pipeline, batches = build_pipeline(config.trainer, model, optimizers, mesh), source.train_batches(SamplerPosition())
    for line in sys.stdin:
        if line.strip() == "memory":
            answer: Any = max(peak_bytes(lambda: pipeline.progress(batches)) for _ in range(8))
            print(json.dumps(answer), flush=True)
            break
        times = []
        for _ in range(int(line)):
            begun = clock()
            pipeline.progress(batches).loss.item()
            times.append(clock() - begun)
        print(json.dumps(times), flush=True)
    meshes.finish()


def peak_bytes(step: Any) -> int:
    """The most that one call of ``step`` has allocated at a time beyond what there was before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = [e for e in json.loads(trace.read_text())["traceEvents"] if e.get("name") == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event["ts"]):
        now += event["args"]["Bytes"]
        most = max(most, now)
    return most


class Ranks:
    """The ranks of a case, waiting for orders."""

    def __init__(self, name: str) -> None:
        world_size = CASES[name][3]
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        shared = {"WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size), "MASTER_PORT": str(port)}
        self.processes = [
            subprocess.Popen(
                [sys.executable, __file__, "--be-a-rank-of", name],
                env=os.environ | shared | {"RANK": str(r), "LOCAL_RANK": str(r), "MASTER_ADDR": "127.0.0.1"},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                cwd=ROOT,
            )
            for r in range(world_size)
        ]

    def ask(self, line: str) -> Any:
        """Rank 0's answer, once all have answered."""
        for process in self.processes:
            assert process.stdin is not None
            process.stdin.write(line + "\n")
            process.stdin.flush()
        answers = [process.stdout.readline() for process in self.processes if process.stdout is not None]
        return json.loads(answers[0])

    def end(self) -> None:
        """Let them go."""
        for process in self.processes:
            process.kill()
            process.wait()


def measure(name: str, rounds: int, steps: int) -> dict[str, Any]:
    """One case."""
    config, world_size, clock = read(name), CASES[name][3], clock_of(name)
    situation = look_at(config, world_size, world_size, "cpu")
    os.sched_setaffinity(0, CORES[:world_size])  # one each; the ranks inherit it
    ranks = Ranks(name)
    estimates, measured = [], []
    try:
        ranks.ask("3")
        for _ in range(rounds):
            with this_cpu(situation, clock) as machine:
                expected = estimate(situation, machine, batch_seconds(situation, clock))
            estimates.append(expected.step_s)
            measured.append(statistics.median(ranks.ask(str(steps))))
        peak = ranks.ask("memory")
    finally:
        ranks.end()
    transient = ["activations", "looked-up rows", "working memory"]
    if situation.dp_size == 1:  # else DDP's buckets, which stay
        transient.append("gradients of both")
    return {
        "case": name,
        "ranks": world_size,
        "estimated_ms": [round(1e3 * value, 1) for value in estimates],
        "measured_ms": [round(1e3 * value, 1) for value in measured],
        "ratio": round(statistics.median(e / m for e, m in zip(estimates, measured, strict=True)), 3),
        "step": {part: round(1e3 * value, 2) for part, value in expected.step.items()},
        "computing": {op: round(1e3 * value, 2) for op, value in expected.computing.items()},
        "estimated_transient_mb": round(sum(expected.memory[kind] for kind in transient) / 1e6, 2),
        "measured_transient_mb": round(peak / 1e6, 2),
    }


def main() -> None:
    """All cases, or one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=CASES)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=10, help="steps a round")
    parser.add_argument("--output", help="also write the JSON here")
    parser.add_argument("--be-a-rank-of", choices=CASES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.be_a_rank_of:
        be_a_rank(options.be_a_rank_of)
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
    text = json.dumps(report, indent=1)
    print(text)
    if options.output:
        Path(options.output).write_text(text + "\n")


if __name__ == "__main__":
    main()
