"""Time and profile training steps of a gin file; prints one JSON object. Meant for a GPU, runs on a CPU, too.

    python scripts/bench/step_gpu.py [--gin-config-file configs/benchmark_ranking.gin] [--bindings ...] [--steps 40]
    python scripts/bench/step_gpu.py --compare none native prefetch     losses of the pipelines, which must be equal

"step_ms" is the wall clock over all steps, with an idle device before and after. "host_ms" is what the host needs to
enqueue a step: where it is as long as the step, the device waits for the host. From torch's profiler, over fewer steps:
the time in which the device is busy, its kernels by name, and the calls with which the host waits for it. MFU counts
operations as NVIDIA recsys-examples does (hstu/ops/costs.py).
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from harness import Row, command_line, publish
from pipeline_cpu import Training, prepare
from torch.profiler import DeviceType, ProfilerActivity, profile

from hstu.model.precision import DTYPES
from hstu.observe.logging import quiet_libraries
from hstu.observe.throughput import peak_tflops
from hstu.parallel import mesh as meshes
from hstu.train.flops import FlopCounter

WARM_UP_STEPS = 4
"""Steps before the first timed one: kernels are compiled, memory is allocated."""
LONGEST = 24
"""Kernels that are listed by name."""
WAITS = ("Synchronize", "cudaMemcpy", "cudaFree", "aten::item", "aten::_local_scalar_dense")
"""Parts of the names of calls in which the host may wait for the device."""


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def busy_ms(spans: Iterable[tuple[float, float]]) -> float:
    """Milliseconds in which at least one of the spans (begin and end in µs) runs: kernels of two streams overlap."""
    total, reached = 0.0, float("-inf")
    for begin, end in sorted(spans):
        total += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return total / 1e3


def summary(events: Iterable[Any], steps: int) -> Row:
    """The device's busy time, its kernels and the host's waits per step, from the events of torch's profiler."""
    events = list(events)
    on_device = [event for event in events if event.device_type == DeviceType.CUDA and not event.is_user_annotation]
    kernels: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    waits: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for event in events:
        name, ms = event.name, (event.time_range.end - event.time_range.start) / 1e3
        if event.device_type == DeviceType.CPU and any(part in name for part in WAITS):
            waits[name][0] += 1 / steps
            waits[name][1] += ms / steps
    for event in on_device:
        kernels[event.name[:100]][0] += 1 / steps
        kernels[event.name[:100]][1] += (event.time_range.end - event.time_range.start) / 1e3 / steps
    spans = [(event.time_range.start, event.time_range.end) for event in on_device]
    return {
        "busy_ms": round(busy_ms(spans) / steps, 3),
        "kernels_per_step": round(len(on_device) / steps, 1),
        "kernels": _longest(kernels),
        "waits": _longest(waits),
    }


def _longest(times: dict[str, list[float]]) -> list[Row]:
    chosen = sorted(times.items(), key=lambda item: -item[1][1])[:LONGEST]
    return [{"name": name, "per_step": round(count, 2), "ms": round(ms, 3)} for name, (count, ms) in chosen]


def measure(run: Training, steps: int, device: torch.device) -> Row:
    """The report of a run."""
    batches = run.batches()
    counter = FlopCounter(run.config.network, run.source.roles)
    tokens, flops, host_s, losses = 0, 0.0, 0.0, []
    for _ in range(WARM_UP_STEPS):
        run.pipeline.progress(batches)
    synchronize(device)
    begun = time.perf_counter()
    for _ in range(steps):
        result = run.pipeline.progress(batches)
        losses.append(result.loss)
        counted = counter.count(result.batch)
        tokens, flops = tokens + counted[0], flops + counted[1]
    host_s = time.perf_counter() - begun
    synchronize(device)
    seconds = time.perf_counter() - begun
    peak = peak_tflops(device, DTYPES[run.config.network.dtype_str])
    tflops = flops / seconds / 1e12
    report = {
        "step_ms": round(seconds / steps * 1e3, 3),
        "host_ms": round(host_s / steps * 1e3, 3),
        "tokens_per_step": tokens // steps,
        "tokens_per_s": round(tokens / seconds),
        "tflops": round(tflops, 3),
        "mfu_percent": round(100 * tflops / peak.value, 2),
        "peak_tflops": [peak.value, peak.source],
        "peak_memory_gb": round(torch.cuda.max_memory_allocated(device) / 1e9, 3) if device.type == "cuda" else None,
        "losses": [round(float(loss), 6) for loss in (losses[0], losses[-1])],
    }
    profiled = max(1, steps // 8)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with profile(activities=activities) as recorded:
        for _ in range(profiled):
            run.pipeline.progress(batches)
        synchronize(device)
    return report | summary(recorded.events() or (), profiled)


def compare(kinds: Iterable[str], run_of: Callable[[str], Training], steps: int) -> Row:
    """The losses of the first steps of each pipeline, and whether they have the same bits."""
    losses = {}
    for kind in kinds:
        run = run_of(kind)
        batches = run.batches()
        losses[kind] = torch.stack([run.pipeline.progress(batches).loss.cpu() for _ in range(steps)])
        run.pipeline.resolve()
    first = next(iter(losses.values()))
    return {
        "equal": {kind: torch.equal(each, first) for kind, each in losses.items()},
        "losses": {kind: [round(float(loss), 7) for loss in each] for kind, each in losses.items()},
    }


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    add = (commands := command_line(__doc__, output=True)).add_argument
    add("--task", choices=("ranking", "retrieval"), default="ranking")
    add("--gin-config-file", default="configs/benchmark_ranking.gin")
    add("--bindings", nargs="*", default=[])
    add("--steps", type=int, default=40)
    add("--compare", nargs="+", metavar="PIPELINE", help="compare the losses of these pipelines; time nothing")
    return commands.parse_args(argv)


def main() -> None:
    """Measure and print."""
    options = parse()
    quiet_libraries()
    mesh = meshes.start()

    def run_of(*bindings: str) -> Training:
        return prepare(options.gin_config_file, [*options.bindings, *bindings], options.task, mesh)

    device = mesh.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    report: Row = {"device": name, "torch": torch.__version__, "bindings": options.bindings, "steps": options.steps}
    if options.compare:
        report |= compare(options.compare, lambda kind: run_of(f"TrainerArgs.pipeline_type = {kind!r}"), options.steps)
    else:
        report |= measure(run_of(), options.steps, device)
    publish(report, options.output)
    meshes.finish()
    if options.compare and not all(report["equal"].values()):
        raise SystemExit("the losses of the pipelines differ")


if __name__ == "__main__":
    main()
