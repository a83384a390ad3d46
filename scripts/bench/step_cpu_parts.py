"""The parts of a step with their GFLOPS, and what attention costs over sum of n² and over B N²; for step_cpu.py."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import product
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from attention import Shape, movielens_times
from torch.profiler import ProfilerActivity, profile, record_function

from hstu.config.args import NetworkArgs
from hstu.data.batch import HSTUBatch
from hstu.ops.attention import hstu_attention
from hstu.ops.backends import Backend
from hstu.ops.cpu import attention, norm_mul_dropout
from hstu.ops.relative_bias import NUM_TIME_BUCKETS, RelativeBias

PARTS = {
    "attention, forward": ("attention.forward",),
    "attention, backward": ("attention.backward",),
    "linear layers": ("aten::mm", "aten::addmm"),
    "sampled softmax": ("SampledSoftmaxLoss",),
    "SiLU of the projection": ("aten::silu", "aten::silu_backward"),
    "norm · gate · dropout": ("norm_mul_dropout.forward", "norm_mul_dropout.backward", "aten::ge"),
    "input norm": ("aten::native_layer_norm", "aten::native_layer_norm_backward"),
    "unit vectors": ("_Unit", "_UnitBackward"),
    "random numbers of dropout": ("aten::random_",),
    "copies, gathers, scatters": ("aten::copy_", "aten::index_select", "aten::index_add_", "aten::scatter_add_"),
}
"""Part → names in the profile. What a kernel takes is its self time on the thread that calls it."""
KERNELS = (attention, norm_mul_dropout)
"""Modules whose forward and backward a layer calls, and the profile would not name."""
STEPS = 8


def _processor_seconds(run: Callable[[], object]) -> float:
    begun = time.process_time()
    run()
    return time.process_time() - begun


def parts_of_a_step(
    step: Callable[[int], None], batches: Sequence[HSTUBatch], network: NetworkArgs, ceiling: float
) -> dict[str, dict[str, float]]:
    """Milliseconds of each part of a step, its GFLOPS and their share of ``ceiling``; the rest comes last."""
    with named_kernels(), profile(activities=[ProfilerActivity.CPU]) as recorded:
        begun = time.perf_counter()
        for number in range(STEPS):
            step(number % len(batches))
        whole_ms = (time.perf_counter() - begun) * 1e3 / STEPS
    spent: dict[str, float] = defaultdict(float)
    for event in recorded.key_averages():
        spent[event.key] += event.self_cpu_time_total / 1e3 / STEPS
    flops = flops_of_parts(batches, network)
    parts: dict[str, dict[str, float]] = {}
    for name, keys in PARTS.items():
        ms = sum(spent[key] for key in keys)
        parts[name] = {"ms": round(ms, 2)}
        if name in flops:
            gflops = flops[name] / ms / 1e6
            parts[name] |= {"gflops": round(gflops, 1), "of_ceiling": round(gflops / ceiling, 3)}
    known = sum(part["ms"] for part in parts.values())
    return parts | {"everything else": {"ms": round(whole_ms - known, 2)}, "profiled step": {"ms": round(whole_ms, 2)}}


@contextmanager
def named_kernels() -> Iterator[None]:
    """The profile has the calls of KERNELS as ``module.function``."""
    with ExitStack() as stack:
        for module, name in product(KERNELS, ("forward", "backward")):
            label = f"{module.__name__.rpartition('.')[2]}.{name}"
            stack.enter_context(patch.object(module, name, record_function(label)(getattr(module, name))))
        yield


def flops_of_parts(batches: Sequence[HSTUBatch], network: NetworkArgs) -> dict[str, float]:
    """Floating-point operations of a mean step that the mathematics asks for: pairs that are masked count nothing."""
    tokens = np.mean([batch.item_lengths.sum() for batch in batches])
    pairs = np.mean([(batch.item_lengths * (batch.item_lengths + 1) // 2).sum() for batch in batches])
    scores = np.mean([batch.draws.numel() for batch in batches if batch.draws is not None])
    layers, inner = network.num_layers, network.num_attention_heads * network.kv_channels
    return {
        "attention, forward": layers * 4 * inner * float(pairs),
        "attention, backward": layers * 10 * inner * float(pairs),
        "linear layers": layers * 3 * 2 * network.hidden_size * 5 * inner * float(tokens),
        "sampled softmax": 6 * network.item_width * float(scores),
    }


def attention_costs(width: int = 50, repeats: int = 5) -> list[dict[str, Any]]:
    """Milliseconds of attention, forward and backward, of batches that differ in how unequal their lengths are.

    Processor time on one thread, which neither other processes nor a waiting thread disturb.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    costs = []
    for longest in (100, 200, 400, 800):
        for name, lengths in {
            "all equal": np.full(64, longest),
            "uniform": rng.integers(1, longest + 1, 64),
            "one long, others short": np.append(rng.integers(1, 21, 63), longest),
        }.items():
            lengths = lengths.astype(np.int64)
            layout = Shape(lengths, 1, width).layout(torch.device("cpu"), movielens_times(lengths, rng))
            inputs = [torch.randn(layout.num_tokens, 1, width, requires_grad=True) for _ in range(3)]
            tables = [torch.randn(n, requires_grad=True) for n in (2 * longest - 1, NUM_TIME_BUCKETS)]

            def run(layout=layout, inputs=inputs, tables=tables) -> None:  # type: ignore[no-untyped-def]
                q, k, v = inputs
                bias = RelativeBias(*tables)
                out = hstu_attention(q, k, v, layout, alpha=0.1, scaling_seqlen=200, bias=bias, backend=Backend.CPU)
                torch.autograd.grad(out.sum(), [*inputs, *tables])

            best = min(_processor_seconds(run) for _ in range(repeats))
            square = int((lengths**2).sum())
            padded = len(lengths) * longest**2
            costs.append({"lengths": name, "sum_n2": square, "b_n2": padded, "ms": round(best * 1e3, 3)})
    torch.set_num_threads(threads)
    return costs


def draw_costs(costs: Sequence[dict[str, Any]], image: Path) -> None:
    """Two panels: the cost over sum of n², on one line, and over B N², scattered."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2, sharey=True)
    for panel, key, label in zip(panels, ("sum_n2", "b_n2"), ("Σ n²", "B · N²"), strict=True):
        for marker, name in zip("osv", dict.fromkeys(cost["lengths"] for cost in costs), strict=True):
            points = [(cost[key], cost["ms"]) for cost in costs if cost["lengths"] == name]
            panel.plot(*zip(*points, strict=True), marker, label=f"lengths {name}", alpha=0.8)
        panel.set(xscale="log", yscale="log", xlabel=f"{label} (pairs of tokens)")
        panel.grid(True, color="#e6e6e6")
    panels[0].set(ylabel="attention, forward + backward (CPU ms)", title="cost over Σ n²")
    panels[1].set(title="the same over B · N², what padding would cost")
    panels[0].legend(frameon=False)
    figure.savefig(image)
