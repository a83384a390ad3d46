"""Time a whole HSTU layer beside a padded PyTorch layer; or measure the memory that a layer saves for backward.

    python scripts/bench/layer.py [--device cuda] [--output docs/benchmarks/layer/cpu.json]
    python scripts/bench/layer.py --memory [--rounds 7] [--output docs/benchmarks/layer/memory.json]

Time: bfloat16 by autocast, and on a CPU also float32. The padded layer runs as it is and compiled. On a CPU: the layer
of ML-1M retrieval (128 sequences of 107 items on average, one head of 50, relative bias), and wider ones (4 heads of
64) over sequences of equal length. On a GPU: hidden size 1024, 4 heads of 256, 32 sequences. Operations are counted as
NVIDIA recsys-examples counts them (hstu/ops/costs.py), without those that padding adds. "parts" are the kernels in
which our layer spends the most time, by the profiler. With --output FILE.json it also draws FILE.png on a CPU.

Memory, on a CPU, for each recomputation option of NetworkArgs, compute type and backend: bytes per token and layer that
stay allocated after the forward pass, beside the formula hstu.ops.layer.saved_bytes; the peak of a step in bytes per
token; and milliseconds of forward and backward per layer.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from attention import BACKENDS, LABELS, MOST_SCORES, SEQUENCES, Shape, movielens_lengths, movielens_times
from harness import (
    Panel,
    Pass,
    Row,
    attempt,
    begin,
    ceiling,
    compiled,
    draw,
    finish,
    kernel_times,
    longest_kernels,
    name_of,
    operator_command_line,
    publish,
    rates,
    runnable,
    time_in_turn,
    time_passes,
)
from padded_baseline import PaddedLayer
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from hstu.config.args import NetworkArgs
from hstu.model.stack import FusedHSTULayer, kernel_shapes
from hstu.ops.costs import ATTENTION_PASSES, PROJECTION_PASSES, attention_flops, projection_flops
from hstu.ops.kernels import Backend
from hstu.ops.layer import saved_bytes
from hstu.ops.layout import JaggedLayout
from hstu.ops.select import resolve_kernels, select_kernels

NETWORK = NetworkArgs(
    num_layers=4, hidden_size=256, num_attention_heads=4, kv_channels=64, position_encoding=("relative_bias",)
)
LONGEST = 200
"""Tokens of the longest of the SEQUENCES whose memory is measured."""
OPTIONS: dict[str, dict[str, Any]] = {
    "all is kept": {},
    "recompute_input_layernorm": {"recompute_input_layernorm": True},
    "recompute_input_silu": {"recompute_input_silu": True},
    "both": {"recompute_input_layernorm": True, "recompute_input_silu": True},
    "recompute_layer": {"recompute_layer": True},
}
TYPES = {"float32": 4, "bfloat16": 2}
"""Compute type → bytes of an element."""
DTYPES = {"cpu": (torch.float32, torch.bfloat16), "cuda": (torch.bfloat16,)}
"""Compute types by device: nobody trains in float32 on a GPU, and CUTLASS has no kernels for it."""
PARTS = 6
"""Operators that "parts" lists by name."""


@dataclass(frozen=True)
class Case:
    """A layer and its batch."""

    name: str
    shape: Shape
    hidden: int
    relative_bias: bool = False

    def network(self, dtype: torch.dtype) -> NetworkArgs:
        """The configuration of the layer."""
        return NetworkArgs(
            num_layers=1,
            hidden_size=self.hidden,
            num_attention_heads=self.shape.heads,
            kv_channels=self.shape.head_dim,
            position_encoding=("relative_bias",) if self.relative_bias else ("none",),
            dtype_str=name_of(dtype),
        )

    def flops(self) -> tuple[float, float]:
        """Floating-point operations of forward and of backward."""
        lengths, heads, width = self.shape.lengths, self.shape.heads, self.shape.head_dim
        attention = float(attention_flops(lengths, np.zeros_like(lengths), heads, width).sum())
        projections = float(projection_flops(lengths, self.hidden, heads, width).sum())
        forward = attention + projections
        return forward, ATTENTION_PASSES * attention + PROJECTION_PASSES * projections - forward


def cases_of(options: argparse.Namespace) -> Iterator[Case]:
    """The layers to measure on the device."""
    if options.device == "cuda":
        for length in options.length or (1024, 2048, 4096, 8192):
            yield Case(str(length), Shape(np.full(SEQUENCES, length), 4, 256), 1024)
        return
    yield Case("ML-1M", Shape(movielens_lengths(128, np.random.default_rng(0)), 1, 50), 50, relative_bias=True)
    for length in options.length or (128, 512, 2048):
        yield Case(str(length), Shape(np.full(max(1, 8192 // length), length), 4, 64), 256)


def run_layer(layer: nn.Module, x: Tensor, dtype: torch.dtype, *rest: object) -> Tensor:
    """The output, computed in ``dtype`` by autocast as in training."""
    with torch.autocast(x.device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
        out = layer(x, *rest)
        return torch.add(*out) if isinstance(out, tuple) else out


def passes_of(case: Case, dtype: torch.dtype, device: torch.device, with_compiled: bool) -> dict[str, Pass]:
    """All variants; our fastest kernels come first."""
    lengths, longest = case.shape.lengths, int(case.shape.lengths.max())
    network, rng = case.network(dtype), np.random.default_rng(0)
    times = movielens_times(lengths, rng).to(device) if case.relative_bias else None
    layout = case.shape.layout(device, times)
    x = torch.randn(int(lengths.sum()), case.hidden, device=device, requires_grad=True)
    passes = {}
    for backend in BACKENDS[device.type]:
        layer = FusedHSTULayer(network, longest, resolve_kernels(backend, kernel_shapes(network))).to(device)
        passes[LABELS.get(backend, f"ours, {backend.value}")] = Pass(
            lambda layer=layer: run_layer(layer, x, dtype, layout), [x, *layer.parameters()]  # type: ignore[misc]
        )  # fmt: skip
    if case.shape.padded_pairs * case.shape.heads <= MOST_SCORES[device.type]:
        rows = torch.randn(len(lengths), longest, case.hidden, device=device, requires_grad=True)
        spread = torch.arange(longest, device=device).expand(len(lengths), -1) * 3600
        mask = torch.ones(longest, longest, device=device).tril()
        plain = PaddedLayer(network, longest).to(device)
        leaves = [rows, *plain.parameters()]
        passes["padded"] = Pass(lambda: run_layer(plain, rows, dtype, spread, mask), leaves)
        if with_compiled:
            quick = compiled(plain)
            passes["padded, compiled"] = Pass(lambda: run_layer(quick, rows, dtype, spread, mask), leaves)  # type: ignore[arg-type]
    return passes


def measure(case: Case, dtype: torch.dtype, device: torch.device, options: argparse.Namespace, parts: Row) -> list[Row]:
    """One row per variant. Adds the kernels of our first one to ``parts``."""
    passes, rows = runnable(passes_of(case, dtype, device, options.compile))
    forward, backward = case.flops()
    for name, times in time_passes(passes, device, options.rounds).items():
        rows.append(rates({"variant": name, **times}, forward, backward, "gflops"))
    if passes:
        spent = kernel_times(next(iter(passes.values())), device)
        parts[f"{case.name}, {name_of(dtype)}"] = longest_kernels(spent, PARTS)
    return rows


def plot(report: Row, image: Path) -> None:
    """GFLOPS of forward and backward together by length, one panel per dtype."""
    panels = []
    for dtype in dict.fromkeys(row["dtype"] for row in report["layers"]):
        lines: dict[str, list[tuple[float, float]]] = {}
        for row in report["layers"]:
            if row["dtype"] == dtype and row["case"].isdigit():
                lines.setdefault(row["variant"], []).append((int(row["case"]), row["gflops"]))
        limit = ("products", ceiling(report, f"{dtype}_gflops"))
        panels.append(Panel(dtype, "tokens per sequence", "GFLOPS", lines, limit))
    draw(panels, image, f"A layer, forward and backward, {report['device']}")


@dataclass
class MemoryCase:
    """Layers with one of the OPTIONS, and their input."""

    network: NetworkArgs
    layers: Sequence[FusedHSTULayer]
    dtype: str
    layout: JaggedLayout
    x: Tensor

    def forward(self) -> Tensor:
        """The output of the last layer."""
        x, update = self.x, None
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.dtype == "bfloat16"):
            for layer in self.layers:
                x, update = layer(x, self.layout, update)
            assert update is not None
            return x + update

    def step(self) -> None:
        """Forward and backward."""
        self.forward().sum().backward()

    def memory(self) -> dict[str, float]:
        """Bytes per token by the allocator's count: saved per layer after forward, and the peak of a step.

        The count after forward includes the output of the last layer, and excludes the input of the first.
        """
        forward = _allocations(self.forward)
        step = np.cumsum(_allocations(self.step))
        tokens = len(self.x)
        return {
            "kept_a_layer": round(sum(forward) / tokens / self.network.num_layers, 2),
            "most_of_a_step": round(int(step.max()) / tokens),
        }


def _allocations(run: Callable[[], object]) -> list[int]:
    """Bytes of every allocation during ``run``, negative where memory is freed. Its result is kept until the end."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        result = run()
    assert recorded.profiler is not None and recorded.profiler.kineto_results is not None
    changes = [event.nbytes() for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    del result
    return changes


def memory_cases(backend: Backend, dtype: str) -> dict[str, MemoryCase]:
    """One case per option, all with the same weights."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(LONGEST // 4, LONGEST + 1, SEQUENCES).astype(np.int64)
    heads, head_dim = NETWORK.num_attention_heads, NETWORK.kv_channels
    layout = Shape(lengths, heads, head_dim).layout(torch.device("cpu"), movielens_times(lengths, rng))
    cases = {}
    for name, options in OPTIONS.items():
        torch.manual_seed(0)
        network = replace(NETWORK, dtype_str=dtype, **options)
        kernels = resolve_kernels(backend, kernel_shapes(network))
        x = torch.randn(layout.num_tokens, network.hidden_size, requires_grad=True)
        layers = [FusedHSTULayer(network, LONGEST, kernels) for _ in range(network.num_layers)]
        cases[name] = MemoryCase(network, layers, dtype, layout, x)
    return cases


def measure_memory(backend: Backend, dtype: str, rounds: int) -> dict[str, dict[str, float]]:
    """Memory and times of each option."""
    cases = memory_cases(backend, dtype)
    steps = {name: lambda _, case=case: case.step() for name, case in cases.items()}
    times = time_in_turn(steps, torch.device("cpu"), rounds)
    return {
        name: {
            **case.memory(),
            "formula": saved_bytes(case.network, len(case.x), 1, TYPES[dtype], 4) / len(case.x),
            "ms_a_layer_median": round(statistics.median(times[name]) / case.network.num_layers, 2),
            "ms_a_layer_fastest": round(min(times[name]) / case.network.num_layers, 2),
        }
        for name, case in cases.items()
    }


def memory_report(rounds: int) -> Row:
    """The report of ``--memory``."""
    kernels = select_kernels("cutlass", False, torch.device("cpu"), kernel_shapes(NETWORK))
    backends = dict.fromkeys([kernels.served_by["attention"].backend, Backend.PYTORCH])
    return {
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "tokens": len(next(iter(memory_cases(Backend.PYTORCH, "float32").values())).x),
        "hidden_size": NETWORK.hidden_size,
        "heads": [NETWORK.num_attention_heads, NETWORK.kv_channels],
        "dropout": NETWORK.hidden_dropout,
        "kernels": {
            backend.value: {dtype: measure_memory(backend, dtype, rounds) for dtype in TYPES} for backend in backends
        },
    }


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    commands = operator_command_line(__doc__)
    commands.add_argument("--length", type=int, nargs="+", help="of the sequences of the wider layers")
    commands.add_argument("--memory", action="store_true", help="measure memory and recomputation, on a CPU")
    return commands.parse_args(argv)


def main() -> None:
    """Measure and print."""
    options = parse()
    if options.memory:
        publish(memory_report(options.rounds), options.output)
        return
    device, report = begin(options)
    report.setdefault("parts", {})
    for case in cases_of(options):
        for dtype in DTYPES[device.type]:
            timed = partial(measure, case, dtype, device, options, report["parts"])
            attempt(report, "layers", {"case": case.name, "dtype": name_of(dtype)}, timed, options.output)
    finish(report, options)
    if options.output and device.type == "cpu":
        plot(report, options.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
