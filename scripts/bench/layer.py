"""Time a whole HSTU layer beside a padded PyTorch layer, and that one compiled, in float32 and bfloat16.

    python scripts/bench/layer.py [--device cuda] [--output docs/benchmarks/layer/cpu.json]

On a CPU: the layer of ML-1M retrieval (128 sequences of 107 items on average, one head of 50, relative bias), and
wider ones (4 heads of 64) over equally long sequences. On a GPU: hidden size 1024, 4 heads of 256, 32 sequences.
bfloat16 is by autocast, as in a run. Operations are counted as NVIDIA recsys-examples count them
(hstu/observe/flops.py), without what padding adds. "parts" is where ours spends its time, by the profiler.
With --output FILE.json also draws FILE.png.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # runs from a checkout, installed or not

from attention import BACKENDS, LABELS, MOST_SCORES, SEQUENCES, Shape, movielens_lengths, movielens_times
from padded_baseline import PaddedLayer
from timing import Panel, Pass, Row, begin, ceiling, compiled, draw, finish, name_of, parser, rates, time_passes

from hstu.config.args import NetworkArgs
from hstu.model.layer import HSTULayer
from hstu.observe.flops import sequence_flops

DTYPES = (torch.float32, torch.bfloat16)
PARTS = 6
"""The longest so many are told."""
PROFILED_STEPS = 5


@dataclass(frozen=True)
class Case:
    """A layer and its batch."""

    name: str
    shape: Shape
    hidden: int
    relative_bias: bool = False

    def network(self, dtype: torch.dtype) -> NetworkArgs:
        """As a configuration would have it."""
        return NetworkArgs(
            num_layers=1,
            hidden_size=self.hidden,
            num_attention_heads=self.shape.heads,
            kv_channels=self.shape.head_dim,
            position_encoding="relative_bias" if self.relative_bias else "none",
            dtype_str=name_of(dtype),
        )

    def flops(self) -> tuple[float, float]:
        """Of forward and of backward."""
        nothing = np.zeros_like(self.shape.lengths)
        size = dict(num_layers=1, num_heads=self.shape.heads, head_dim=self.shape.head_dim)
        both = float(sequence_flops(self.shape.lengths, nothing, hidden_size=self.hidden, **size).sum())
        attention = float(sequence_flops(self.shape.lengths, nothing, hidden_size=0, **size).sum())
        forward = (both - attention) / 3 + attention / 3.5
        return forward, both - forward


def cases_of(options: argparse.Namespace) -> Iterator[Case]:
    """What is measured."""
    if options.device == "cuda":
        for length in options.length or (1024, 2048, 4096, 8192):
            yield Case(str(length), Shape(np.full(SEQUENCES, length), 4, 256), 1024)
        return
    yield Case("ML-1M", Shape(movielens_lengths(128, np.random.default_rng(0)), 1, 50), 50, relative_bias=True)
    for length in options.length or (128, 512, 2048):
        yield Case(str(length), Shape(np.full(max(1, 8192 // length), length), 4, 64), 256)


def run_layer(layer: nn.Module, x: Tensor, dtype: torch.dtype, *rest: object) -> Tensor:
    """The output, in the precision of a run."""
    with torch.autocast(x.device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
        out: Tensor = layer(x, *rest)
    return out


def passes_of(case: Case, dtype: torch.dtype, device: torch.device, with_compiled: bool) -> dict[str, Pass]:
    """Ours first, the fastest of them in front."""
    lengths, longest = case.shape.lengths, int(case.shape.lengths.max())
    network, rng = case.network(dtype), np.random.default_rng(0)
    times = movielens_times(lengths, rng).to(device) if case.relative_bias else None
    layout = case.shape.layout(device, times)
    x = torch.randn(int(lengths.sum()), case.hidden, device=device, requires_grad=True)
    passes = {}
    for backend in BACKENDS[device.type]:
        layer = HSTULayer(network, longest, backend).to(device)
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


def parts_of(each: Pass, device: torch.device) -> dict[str, float]:
    """Milliseconds of a forward and backward in the operators that take longest by themselves, and in the rest."""
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CUDA] if on_gpu else [ProfilerActivity.CPU]
    with profile(activities=activities) as recorded:
        for _ in range(PROFILED_STEPS):
            out = each.forward()
            torch.autograd.grad(out, each.leaves, torch.ones_like(out), allow_unused=True)
    spent = {
        event.key: (event.self_device_time_total if on_gpu else event.self_cpu_time_total) / 1e3 / PROFILED_STEPS
        for event in recorded.key_averages()
    }
    longest = sorted(spent, key=lambda name: -spent[name])[:PARTS]
    rest = sum(spent.values()) - sum(spent[name] for name in longest)
    return {name: round(spent[name], 3) for name in longest} | {"everything else": round(rest, 3)}


def plot(report: Row, image: Path) -> None:
    """GFLOPS of forward and backward together by length, a panel a type."""
    panels = []
    for dtype in map(name_of, DTYPES):
        lines: dict[str, list[tuple[float, float]]] = {}
        for row in report["layers"]:
            if row["dtype"] == dtype and row["case"].isdigit():
                lines.setdefault(row["variant"], []).append((int(row["case"]), row["gflops"]))
        limit = ("products", ceiling(report, f"{dtype}_gflops"))
        panels.append(Panel(dtype, "tokens a sequence", "GFLOPS", lines, limit))
    draw(panels, image, f"A layer, forward and backward, {report['device']}")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    commands = parser(__doc__)
    commands.add_argument("--length", type=int, nargs="+")
    return commands.parse_args(argv)


def main() -> None:
    """Measure and print."""
    options = parse()
    device, report = begin(options)
    report |= {"layers": [], "parts": {}}
    for case in cases_of(options):
        forward, backward = case.flops()
        for dtype in DTYPES:
            passes = passes_of(case, dtype, device, options.compile)
            for name, times in time_passes(passes, device, options.rounds).items():
                row = {"case": case.name, "variant": name, "dtype": name_of(dtype), **times}
                report["layers"].append(rates(row, forward, backward, "gflops"))
            report["parts"][f"{case.name}, {name_of(dtype)}"] = parts_of(next(iter(passes.values())), device)
    finish(report, options)
    if options.output:
        plot(report, options.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
