"""What an H100 should reach at the shapes that NVIDIA publishes, by roofline: an estimate, beside its measured numbers.

    python scripts/bench/roofline.py [--output docs/benchmarks/kernels/roofline.json]

Attention: what the tiles of the compiled CUTLASS kernels (docs/benchmarks/kernels/cutlass.json) cover, as matrix
products on tensor cores and as elementwise work on the other units. Upper bound: the two overlap; lower: they follow
one another. Neither counts launches, prologues or uneven shares of the processors, which cost short sequences most.
Layer and step: hstu/train/estimate with the attention of the lower and of the upper bound. Prints Markdown tables.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # runs from a checkout, installed or not

from hstu.config.gin_io import load
from hstu.observe.logging import quiet_libraries
from hstu.train.estimate.estimate import Estimate, estimate
from hstu.train.estimate.machine import gpu
from hstu.train.estimate.situation import look_at

ROOT = Path(__file__).resolve().parents[2]
HEADS, WIDTH, SEQUENCES = 4, 256, 32
PROCESSORS, CLOCK_HZ = 132, 1.83e9
"""Of an H100 SXM, whose 989 TFLOPS are 4,096 operations a processor and clock."""
SPECIAL, LANES = 16, 128
"""Hyperbolic tangents and other float32 instructions a processor and clock."""
KERNELS = {"forward_sm90": (2, 4, "forward"), "queries_sm90": (3, 8, "backward"), "keys_sm90": (3, 8, "backward"),
           "values_sm90": (2, 4, "backward")}  # fmt: skip
"""Products a tile, float32 instructions a pair besides the one tanh (counted in the source), and when it runs."""
PASSES = {"forward": 1.0, "backward": 2.5}
"""Of the 2 · H · T² · d operations that are counted."""
LAYER = ("norm of the input", "W_uvqk", "SiLU", "attention", "norm, gate, dropout", "W_o", "residual")
PUBLISHED = {
    "forward": {512: 245, 1024: 409, 2048: 537, 4096: 622, 16384: 637},
    "backward": {512: 163, 1024: 256, 2048: 321, 4096: 360, 16384: 385},
    "layer": {1024: 302, 2048: 353, 4096: 413, 8192: 477},
    "step": {4099: 341.6},
}
"""TFLOPS of NVIDIA recsys-examples on an H100 SXM: kernels, layer and whole step with fixed lengths."""


def tiles() -> dict[str, tuple[int, int]]:
    """Rows and columns of the tiles of each kernel at the width of a head."""
    rows = json.loads((ROOT / "docs/benchmarks/kernels/cutlass.json").read_text())
    return {
        row["kernel"]: tuple(int(n) for n in row["config"].split(" × "))
        for row in rows
        if row["head_dim"] == WIDTH and row["kernel"] in KERNELS
    }


def covered_pairs(length: int, rows: int, columns: int) -> int:
    """Pairs of one causal sequence that are computed, those that a mask throws away included."""
    ends = np.minimum(np.arange(rows, length + rows, rows), length)
    return int((rows * -(-ends // columns) * columns).sum())


def attention_seconds(length: int) -> dict[str, tuple[float, float]]:
    """Way → (overlapped, one after another), of a batch."""
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
    """Of the benchmark's configuration, with attention at this share of the peak."""
    items = (length - 3) // 2
    bindings = [f"NetworkArgs.num_layers = {layers}", f"items/FeatureArgs.max_sequence_length = {items}"]
    config = load([str(ROOT / "configs/benchmark_ranking.gin")], bindings, "ranking")
    machine = replace(gpu("h100", torch.bfloat16), attention_efficiency=efficiency)
    return estimate(look_at(config, 1, 1, "cuda"), machine)


def expected() -> list[dict[str, Any]]:
    """A row a shape: TFLOPS, lower and upper bound, and what is published."""
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
    """A table a kind."""
    lines = []
    for what in PUBLISHED:
        some = [row for row in rows if row["what"] == what]
        table = {
            f"{what}, tokens a sequence": [f"{row['length']:,}" for row in some],
            "---": ["---"] * len(some),
            "estimate": [f"{row['low']:.0f} to {row['high']:.0f}" for row in some],
            "NVIDIA, measured": [f"{row['published']:.0f}" for row in some],
        }
        lines += ["", *(f"| {name} | {' | '.join(cells)} |" for name, cells in table.items())]
    return "\n".join(lines)


def main() -> None:
    """Reckon and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="also write JSON here")
    options = parser.parse_args()
    quiet_libraries()
    rows = expected()
    print(as_markdown(rows))
    if options.output:
        options.output.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
