"""Estimate by roofline what an H100 reaches at the shapes for which NVIDIA publishes measurements.

    python scripts/bench/roofline.py [--output docs/benchmarks/kernels/roofline.json]

Attention: the work of the tiles of the compiled CUTLASS kernels (docs/benchmarks/kernels/cutlass.json), split into
matrix products on tensor cores and elementwise work on the other units. In the upper bound the two overlap; in the
lower bound one follows the other. Neither bound counts launches, prologues or an uneven load of the processors, which
slow short sequences most. Layer and step: hstu/estimate with attention at the lower and at the upper bound. Prints
Markdown.
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from harness import ROOT, command_line, to_json

from hstu.config.gin_io import load
from hstu.estimate.estimate import Estimate, estimate
from hstu.estimate.machine import gpu
from hstu.estimate.workload import plan_workload
from hstu.observe.logging import quiet_libraries

HEADS, WIDTH, SEQUENCES = 4, 256, 32
PROCESSORS, CLOCK_HZ = 132, 1.83e9
"""Of an H100 SXM. Its 989 TFLOPS are 4,096 operations per processor and clock."""
SPECIAL, LANES = 16, 128
"""Hyperbolic tangents, and other float32 instructions, per processor and clock."""
KERNELS = {"forward_sm90": (2, 4, "forward"), "queries_sm90": (3, 8, "backward"), "keys_sm90": (3, 8, "backward"),
           "values_sm90": (2, 4, "backward")}  # fmt: skip
"""Kernel → products per tile, float32 instructions per pair besides one tanh (counted in the source), and its pass."""
PASSES = {"forward": 1.0, "backward": 2.5}
"""Counted operations of each pass, as a multiple of 2 · H · T² · d."""
LAYER = ("residual and norm", "W_uvqk", "SiLU", "attention", "norm, gate, dropout", "W_o")
PUBLISHED: dict[str, dict[int, float]] = {
    "forward": {512: 245, 1024: 409, 2048: 537, 4096: 622, 16384: 637},
    "backward": {512: 163, 1024: 256, 2048: 321, 4096: 360, 16384: 385},
    "layer": {1024: 302, 2048: 353, 4096: 413, 8192: 477},
    "step": {4099: 341.6},
}
"""Measured TFLOPS of NVIDIA recsys-examples on an H100 SXM, by tokens per sequence, with equal lengths."""


def tiles() -> dict[str, tuple[int, int]]:
    """Kernel → rows and columns of its tiles at head dim WIDTH."""
    rows = json.loads((ROOT / "docs/benchmarks/kernels/cutlass.json").read_text())
    found = {}
    for row in rows:
        if row["head_dim"] == WIDTH and row["kernel"] in KERNELS:
            height, _, width = row["config"].partition(" × ")
            found[row["kernel"]] = (int(height), int(width))
    return found


def covered_pairs(length: int, rows: int, columns: int) -> int:
    """Pairs that are computed for one causal sequence, including those that the mask discards."""
    ends = np.minimum(np.arange(rows, length + rows, rows), length)
    return int((rows * -(-ends // columns) * columns).sum())


def attention_seconds(length: int) -> dict[str, tuple[float, float]]:
    """Pass → seconds of a batch if both kinds of work overlap, and if one follows the other."""
    peak = gpu("h100", torch.bfloat16).peak_tflops * 1e12
    found = {"forward": (0.0, 0.0), "backward": (0.0, 0.0)}
    for kernel, shape in tiles().items():
        products, instructions, way = KERNELS[kernel]
        pairs = SEQUENCES * HEADS * covered_pairs(length, *shape)
        matrices = pairs * products * 2 * WIDTH / peak
        others = pairs * (1 / SPECIAL + instructions / LANES) / (PROCESSORS * CLOCK_HZ)
        best, worst = found[way]
        found[way] = (best + max(matrices, others), worst + matrices + others)
    return found


def whole(length: int, efficiency: float, layers: int) -> Estimate:
    """The estimate for the benchmark's configuration with attention at this share of the peak."""
    items = (length - 3) // 2
    bindings = [f"NetworkArgs.num_layers = {layers}", f"items/FeatureArgs.max_sequence_length = {items}"]
    config = load([str(ROOT / "configs/benchmark_ranking.gin")], bindings, "ranking")
    machine = replace(gpu("h100", torch.bfloat16), attention_efficiency=efficiency)
    return estimate(plan_workload(config, 1, 1, "cuda"), machine)


def expected() -> list[dict[str, Any]]:
    """One row per shape: lower and upper bound and published measurement in TFLOPS."""
    rows: list[dict[str, Any]] = []

    def add(what: str, length: int, low: float, high: float) -> None:
        published = PUBLISHED[what].get(length)
        rows.append({"what": what, "length": length, "low": low, "high": high, "published": published})

    def counted(length: int) -> float:
        return 2.0 * SEQUENCES * HEADS * length**2 * WIDTH

    peak = gpu("h100", torch.bfloat16).peak_tflops
    for way, passes in PASSES.items():
        for length in PUBLISHED[way]:
            best, worst = attention_seconds(length)[way]
            add(way, length, passes * counted(length) / worst / 1e12, passes * counted(length) / best / 1e12)
    for what, layers in (("layer", 1), ("step", 8)):
        for length in PUBLISHED[what]:
            rates = []
            for bound in (1, 0):
                seconds = sum(both[bound] for both in attention_seconds(length).values())
                found = whole(length, 3.5 * counted(length) / seconds / 1e12 / peak, layers)
                layer_s = sum(found.computing[name] for name in LAYER)
                rates.append(found.flops / layer_s / 1e12 if what == "layer" else found.tflops)
            add(what, length, *rates)
    return rows


def as_markdown(rows: list[dict[str, Any]]) -> str:
    """One table per kind of measurement."""
    lines = []
    for what in PUBLISHED:
        some = [row for row in rows if row["what"] == what]
        table = {
            f"{what}, tokens per sequence": [f"{row['length']:,}" for row in some],
            "---": ["---"] * len(some),
            "estimate": [f"{row['low']:.0f} to {row['high']:.0f}" for row in some],
            "NVIDIA, measured": [f"{row['published']:.0f}" for row in some],
        }
        lines += ["", *(f"| {name} | {' | '.join(cells)} |" for name, cells in table.items())]
    return "\n".join(lines)


def main() -> None:
    """Compute and print."""
    parser = command_line(__doc__, output=True)
    options = parser.parse_args()
    quiet_libraries()
    rows = expected()
    print(as_markdown(rows))
    if options.output:
        options.output.write_text(to_json(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
