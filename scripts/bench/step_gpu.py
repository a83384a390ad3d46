"""Time and profile training steps of variants of a gin file; prints one JSON object. For a GPU, runs on a CPU, too.

    python scripts/bench/step_gpu.py [--gin-config-file configs/benchmark_ranking.gin] [--bindings ...] [--steps 20]
    python scripts/bench/step_gpu.py --variant none "TrainerArgs.pipeline_type = 'none'" --variant prefetch ...

Variants run one after the other in one process; each result is written when it exists, and a refusal or an error is one
of them. "step_ms" is the wall clock over all steps, with an idle device before and after; "host_ms" is what the host
needs to enqueue a step. Where that is as long as the step, the device waits for the host. MFU counts operations as
NVIDIA recsys-examples does (hstu/ops/costs.py). "difference" is the largest relative difference of the first losses
from those of the first variant; with --tolerance a larger one is a failure. With a tolerance of 0, all algorithms are
deterministic.

From torch's profiler, over fewer steps: the time in which the device is busy; its kernels by category and by name; how
long several streams work at once; the gaps in which none does, with the kernels around the longest; and the calls with
which the host waits.
"""

from __future__ import annotations

import argparse
import gc
import logging
import os
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from harness import Row, attempt, command_line, describe, earlier, publish
from torch.profiler import DeviceType, ProfilerActivity, profile
from training import Training, prepare

from hstu.base.errors import UserError
from hstu.model.stack import DTYPES
from hstu.observe.throughput import FlopCounter, peak_tflops
from hstu.parallel import mesh as meshes

WARM_UP_STEPS = 4
"""Steps before the first timed one: kernels are compiled, memory is allocated."""
LOSSES = 8
"""First losses that are kept and compared."""
LONGEST = 24
"""Kernels that are listed by name."""
GAPS = 6
"""Gaps that are listed with the kernels around them."""
WAITS = ("Synchronize", "cudaMemcpy", "cudaFree", "aten::item", "aten::_local_scalar_dense")
"""Parts of the names of calls in which the host may wait for the device."""
CATEGORIES = {
    "attention forward": ("attention_forward", "forwardsm"),
    "attention backward": ("attention_backward", "backwardsm"),
    "residual and norm": ("add_layer_norm",),
    "norm, gate, dropout": ("norm_mul_dropout",),
    "tables": ("embedding", "fbgemm", "linearize_index", "jagged", "radixsort", "runlength", "lxu_", "cache"),
    "matrix products": ("linear_silu", "gemm", "nvjet", "cutlass", "xmma"),
    "SiLU": ("silu",),
    "tokens": ("permute_rows", "add_table_rows", "write_first_values"),
    "copies": ("memcpy", "memset"),
    "dense optimizer": ("multi_tensor", "adam"),
}
"""Category → parts of the names of its kernels, in lower case. The first category that fits counts."""


def category_of(kernel: str) -> str:
    """The category of a kernel on the device."""
    name = kernel.lower()
    found = (category for category, parts in CATEGORIES.items() if any(part in name for part in parts))
    return next(found, "elementwise and other")


def union(spans: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """The spans (begin and end) without overlaps, in order."""
    joined: list[tuple[float, float]] = []
    for begin, end in sorted(spans):
        if joined and begin <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(end, joined[-1][1]))
        else:
            joined.append((begin, end))
    return joined


def summary(events: Iterable[Any], steps: int) -> Row:
    """Milliseconds per step of the device and of the host's waits, from the events of torch's profiler."""
    events = list(events)
    on_device = [event for event in events if event.device_type == DeviceType.CUDA and not event.is_user_annotation]
    kernels: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    waits: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    categories: dict[str, float] = defaultdict(float)
    streams: dict[Any, list[tuple[float, float]]] = defaultdict(list)
    for event in events:
        ms = (event.time_range.end - event.time_range.start) / 1e3
        if event.device_type == DeviceType.CPU and any(part in event.name for part in WAITS):
            waits[event.name][0] += 1 / steps
            waits[event.name][1] += ms / steps
    for event in on_device:
        span = (event.time_range.start, event.time_range.end)
        kernels[event.name][0] += 1 / steps
        kernels[event.name][1] += (span[1] - span[0]) / 1e3 / steps
        categories[category_of(event.name)] += (span[1] - span[0]) / 1e3 / steps
        streams[getattr(event, "device_resource_id", 0)].append(span)
    busy = union(span for spans in streams.values() for span in spans)
    busy_ms = _length(busy) / steps
    return {
        "busy_ms": round(busy_ms, 3),
        "overlap_ms": round(sum(_length(union(spans)) for spans in streams.values()) / steps - busy_ms, 3),
        "kernels_per_step": round(len(on_device) / steps, 1),
        "categories": {name: round(ms, 3) for name, ms in sorted(categories.items(), key=lambda item: -item[1])},
        **_gaps(busy, on_device, steps),
        "kernels": _longest(kernels),
        "waits": _longest(waits),
    }


def _length(spans: Iterable[tuple[float, float]]) -> float:
    """Milliseconds of spans in µs."""
    return sum(end - begin for begin, end in spans) / 1e3


def _gaps(busy: Sequence[tuple[float, float]], on_device: Iterable[Any], steps: int) -> Row:
    """The time between busy spans, and the longest gaps with the kernels before and after."""
    ends = {event.time_range.end: event.name[:60] for event in on_device}
    begins = {event.time_range.start: event.name[:60] for event in on_device}
    gaps = [(after - before, ends[before], begins[after]) for (_, before), (after, _) in pairwise(busy)]
    longest = sorted(gaps, reverse=True)[:GAPS]
    return {
        "idle_ms": round(sum(gap for gap, *_ in gaps) / 1e3 / steps, 3),
        "gaps": [{"us": round(gap, 1), "after": before, "before": after} for gap, before, after in longest],
    }


def _longest(times: dict[str, list[float]]) -> list[Row]:
    chosen = sorted(times.items(), key=lambda item: -item[1][1])[:LONGEST]
    return [{"name": name[:100], "per_step": round(count, 2), "ms": round(ms, 3)} for name, (count, ms) in chosen]


class Messages(logging.Handler):
    """Keeps what the trainer says of its kernels, and its warnings."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a line once."""
        line = record.getMessage()
        if (record.levelno >= logging.WARNING or "kernel" in line) and line not in self.lines:
            self.lines.append(line[:400])


def measure(run: Training, steps: int, device: torch.device, trace: Path | None) -> Row:
    """The report of a run."""
    batches, on_gpu = run.batches(), device.type == "cuda"
    synchronize = partial(torch.cuda.synchronize, device) if on_gpu else lambda: None
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    counter = FlopCounter(run.config.network, run.source.roles)
    begun = time.perf_counter()
    losses = [run.pipeline.progress(batches).loss for _ in range(WARM_UP_STEPS)]
    synchronize()
    warm = time.perf_counter()
    counts = []
    for _ in range(steps):
        result = run.pipeline.progress(batches)
        losses.append(result.loss)
        counts.append(counter.count(result.batch))
    host_s = time.perf_counter() - warm
    synchronize()
    seconds = time.perf_counter() - warm
    tokens, flops = (sum(column) for column in zip(*counts, strict=True))
    peak, origin = peak_tflops(device, DTYPES[run.config.network.dtype_str])
    report = {
        "step_ms": round(seconds / steps * 1e3, 3),
        "host_ms": round(host_s / steps * 1e3, 3),
        "warm_up_s": round(warm - begun, 2),
        "tokens_per_step": tokens // steps,
        "tokens_per_s": round(tokens / seconds),
        "tflops": round(flops / seconds / 1e12, 3),
        "mfu_percent": round(100 * flops / seconds / 1e12 / peak, 2),
        "peak_tflops": [peak, origin],
        "peak_memory_gb": round(torch.cuda.max_memory_allocated(device) / 1e9, 3) if on_gpu else None,
        "losses": [float(loss) for loss in losses[:LOSSES]],
    }
    profiled = min(3, steps)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as recorded:
        for _ in range(profiled):
            run.pipeline.progress(batches)
        synchronize()
    if trace:
        recorded.export_chrome_trace(str(trace))
    return report | summary(recorded.events() or (), profiled)


def variant_row(options: argparse.Namespace, bindings: Sequence[str], mesh: meshes.Mesh, report: Row) -> list[Row]:
    """The row of a variant."""
    gc.collect()  # the model of the variant before, which an error may have kept until now
    if mesh.device.type == "cuda":
        torch.cuda.empty_cache()
    messages = Messages()
    logging.getLogger("hstu").addHandler(messages)
    begun = time.perf_counter()
    try:
        run = prepare(options.gin_config_file, [*options.bindings, *bindings], options.task, mesh)
        row: Row = {"build_s": round(time.perf_counter() - begun, 1)}
        row |= measure(run, options.steps, mesh.device, options.trace if len(report["steps"]) == 1 else None)
    except UserError as refusal:
        row = {"refused": describe(refusal)}
    finally:
        logging.getLogger("hstu").removeHandler(messages)
    first = next((each["losses"] for each in report["steps"] if "losses" in each), None)
    if first and "losses" in row:
        losses, expected = torch.tensor(row["losses"]), torch.tensor(first)
        row["difference"] = float(((losses - expected) / expected).abs().max())
        if options.tolerance is not None and not row["difference"] <= options.tolerance:
            row["error"] = f"losses differ by {row['difference']:.2g}, more than {options.tolerance:g}"
    return [{**row, "messages": messages.lines}]


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    add = (commands := command_line(__doc__, output=True)).add_argument
    add("--task", choices=("ranking", "retrieval"), default="ranking")
    add("--gin-config-file", default="configs/benchmark_ranking.gin")
    add("--bindings", nargs="*", default=[], help="of all variants")
    add("--variant", nargs="+", action="append", metavar=("NAME", "BINDING"), help="its own bindings")
    add("--steps", type=int, default=20, help="timed steps of each variant")
    add("--tolerance", type=float, help="largest relative difference of the losses that is no failure")
    add("--trace", type=Path, help="write the trace of the first variant here (.json.gz)")
    return commands.parse_args(argv)


def main() -> None:
    """Measure and print."""
    options = parse()
    logging.getLogger("hstu").setLevel(logging.INFO)
    mesh = meshes.start(deterministic=options.tolerance == 0.0)
    device = mesh.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    report: Row = {"device": name, "torch": torch.__version__, "bindings": options.bindings, **earlier(options)}
    for variant, *bindings in options.variant or [["as configured"]]:
        row = partial(variant_row, options, bindings, mesh, report)
        attempt(report, "steps", {"variant": variant}, row, options.output)
    publish(report, options.output)
    if any("error" in row for row in report["steps"]):  # the threads and requests that it leaves may never end
        sys.stdout.flush()
        os._exit(0)
    meshes.finish()


if __name__ == "__main__":
    main()
