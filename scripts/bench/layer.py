"""Time a whole HSTU layer beside a padded PyTorch layer.

    python scripts/bench/layer.py [--device cuda] [--output docs/benchmarks/layer/cpu.json]

bfloat16 by autocast, and on a CPU also float32. The padded layer runs as it is and compiled. On a CPU: the layer
of ML-1M retrieval (128 sequences of 107 items on average, one head of 50, relative bias), and wider ones (4 heads of
64) over sequences of equal length. On a GPU: hidden size 1024, 4 heads of 256, 32 sequences. Operations are counted as
NVIDIA recsys-examples counts them (hstu/ops/costs.py), without those that padding adds. "parts" are the kernels in
which our layer spends the most time, by the profiler.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from attention import BACKENDS, LABELS, MOST_SCORES, SEQUENCES, Shape, movielens_lengths, movielens_times
from harness import (
    Pass,
    Row,
    attempt,
    begin,
    compiled,
    finish,
    kernel_times,
    longest_kernels,
    name_of,
    operator_command_line,
    rates,
    runnable,
    time_passes,
)
from padded_baseline import PaddedLayer
from torch import Tensor, nn

from hstu.config.args import NetworkArgs
from hstu.model.stack import FusedHSTULayer, kernel_shapes
from hstu.ops.costs import ATTENTION_PASSES, PROJECTION_PASSES, attention_flops, projection_flops
from hstu.ops.select import resolve_kernels

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


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    commands = operator_command_line(__doc__)
    commands.add_argument("--length", type=int, nargs="+", help="of the sequences of the wider layers")
    return commands.parse_args(argv)


def main() -> None:
    """Measure and print."""
    options = parse()
    device, report = begin(options)
    report.setdefault("parts", {})
    for case in cases_of(options):
        for dtype in DTYPES[device.type]:
            timed = partial(measure, case, dtype, device, options, report["parts"])
            attempt(report, "layers", {"case": case.name, "dtype": name_of(dtype)}, timed, options.output)
    finish(report, options)


if __name__ == "__main__":
    main()
