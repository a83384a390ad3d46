"""Estimate by roofline what an H100 reaches at the shapes for which NVIDIA publishes measurements.

    python scripts/bench/roofline.py [--output docs/benchmarks/kernels/roofline.json]

Attention: the tiles of the compiled CUTLASS kernels (docs/benchmarks/kernels/cutlass.json), in the order of the kernels
and on their CTAs. A tile is matrix products, limited by tensor cores, shared memory or L2, and elementwise work on the
other units. In the upper estimate the two overlap; in the lower one, one follows the other. Each block of rows adds a
prologue and an epilogue. A kernel takes at least as long as its launch takes the host. Layer and step: hstu/estimate
with attention at the lower and at the upper estimate. Prints Markdown, with the deviation from NVIDIA's measurements.
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from attention import Shape
from harness import ROOT, command_line, to_json

from hstu.config.gin_io import load
from hstu.estimate.estimate import Estimate, estimate
from hstu.estimate.machine import gpu
from hstu.estimate.workload import plan_workload
from hstu.observe.logging import quiet_libraries
from hstu.ops.cutlass.schedule import Rows, list_blocks, most_work, num_ctas, work_of
from hstu.ops.kernels import AttentionConfig

HEADS, WIDTH, SEQUENCES = 4, 256, 32
PROCESSORS, CLOCK_HZ = 132, 1.83e9
"""Of an H100 SXM. Its 989 TFLOPS are 4,096 operations per processor and clock."""
SPECIAL, LANES = 16, 128
"""Hyperbolic tangents, and other float32 instructions, per processor and clock."""
SHARED_BYTES, L2_BYTES = 128, 28
"""Bytes per processor and clock: of shared memory, and (an assumption: 6.8 TB/s in all) that L2 sends."""
PROLOGUE_S, EPILOGUE_S = 1.0e-6, 1.5e-6
"""Of a block: until its first product starts, and from its last product until its rows are stored. Assumptions."""
LAUNCH_S = (40e-6, 80e-6)
"""Host time of a launch, in the upper and in the lower estimate. Assumptions."""
KERNELS = {
    "forward_sm90": ("forward", Rows.QUERIES, (1, 1), 4, 0),
    "queries_sm90": ("backward", Rows.QUERIES, (2, 1), 8, 0),
    "keys_sm90": ("backward", Rows.KEYS, (2, 2), 9, 4),
}
"""Kernel → its pass, the rows of its blocks, products per tile (both operands in shared memory, one in registers),
float32 instructions per pair besides one tanh, and bytes per pair that warpgroups pass through shared memory.

All are counted in the source.
"""
PASSES = {"forward": 1.0, "backward": 2.5}
"""Counted operations of each pass, as a multiple of 2 · H · T² · d."""
PUBLISHED: dict[str, dict[int, float]] = {
    "forward": {512: 245, 1024: 409, 2048: 537, 4096: 622, 16384: 637},
    "backward": {512: 163, 1024: 256, 2048: 321, 4096: 360, 16384: 385},
    "layer": {1024: 302, 2048: 353, 4096: 413, 8192: 477},
    "step": {4099: 341.6},
}
"""Measured TFLOPS of NVIDIA recsys-examples on an H100 SXM, by tokens per sequence, with equal lengths."""
STEP_LENGTH, STEP_LAYERS = 4099, 8
PUBLISHED_MS = {"forward": 15.7, "backward": 65.6}
"""Measured time of attention in a step of STEP_LAYERS layers with STEP_LENGTH tokens per sequence, by NVIDIA."""


def tiles() -> dict[str, tuple[int, int]]:
    """Kernel → rows and columns of its tiles at head dim WIDTH."""
    rows = json.loads((ROOT / "docs/benchmarks/kernels/cutlass.json").read_text())
    found = {}
    for row in rows:
        if row["head_dim"] == WIDTH and row["kernel"] in KERNELS:
            height, _, width = row["config"].partition(" × ")
            found[row["kernel"]] = (int(height), int(width))
    return found


def block_tiles(length: int, rows: Rows, block: int, tile: int) -> np.ndarray:
    """Number of tiles of each block of each head, in the order of the kernels, for SEQUENCES of this length."""
    layout = Shape(np.full(SEQUENCES, length), HEADS, WIDTH).layout(torch.device("cpu"))
    config = AttentionConfig(1.0, length)
    blocks = list_blocks(layout, config, rows, block)
    return np.repeat(work_of(blocks, layout, config, rows, block, tile) - 1, HEADS)


def slowest_cta(seconds: np.ndarray) -> float:
    """Seconds of the CTA with the most work."""
    return float(most_work(seconds, num_ctas(seconds, PROCESSORS)))


def tile_seconds(kernel: str, block: int, tile: int) -> tuple[float, float]:
    """Seconds of a tile on one processor if both kinds of work overlap, and if one follows the other."""
    _, _, (scores, sums), instructions, passed = KERNELS[kernel]
    peak = gpu("h100", torch.bfloat16).peak_tflops * 1e12 / PROCESSORS
    tensor_cores = block * tile * (scores + sums) * 2 * WIDTH / peak
    # Each warpgroup of 64 rows reads the whole tile for each product, and TMA writes two tiles.
    row_bytes, loaded = 2 * WIDTH, 2 * tile * 2 * WIDTH
    read = (scores * block + (scores + sums) * block // 64 * tile) * row_bytes
    shared = (read + loaded + passed * block * tile) / SHARED_BYTES / CLOCK_HZ
    matrices = max(tensor_cores, shared, loaded / L2_BYTES / CLOCK_HZ)
    others = block * tile * (1 / SPECIAL + instructions / LANES) / CLOCK_HZ
    return max(matrices, others), matrices + others


def attention_seconds(length: int) -> dict[str, tuple[float, float]]:
    """Pass → seconds of a batch on the device: the lower and the higher estimate."""
    found = dict.fromkeys(PASSES, (0.0, 0.0))
    for kernel, (block, tile) in tiles().items():
        way, rows, *_ = KERNELS[kernel]
        counts = block_tiles(length, rows, block, tile)
        best, worst = (
            slowest_cta(PROLOGUE_S + counts * seconds + EPILOGUE_S) for seconds in tile_seconds(kernel, block, tile)
        )
        found[way] = (found[way][0] + best, found[way][1] + worst)
    return found


def launched_seconds(length: int) -> dict[str, tuple[float, float]]:
    """As :func:`attention_seconds`, but at least the time in which the host launches the kernels of the pass."""
    found = {}
    for way, device in attention_seconds(length).items():
        launches = sum(kernel[0] == way for kernel in KERNELS.values())
        best, worst = (max(seconds, launches * launch) for seconds, launch in zip(device, LAUNCH_S, strict=True))
        found[way] = (best, worst)
    return found


def whole(length: int, efficiency: float, layers: int) -> Estimate:
    """The estimate for the benchmark's configuration with attention at this share of the peak."""
    items = (length - 3) // 2
    bindings = [f"NetworkArgs.num_layers = {layers}", f"items/FeatureArgs.max_sequence_length = {items}"]
    config = load([str(ROOT / "configs/benchmark_ranking.gin")], bindings, "ranking")
    machine = replace(gpu("h100", torch.bfloat16), attention_efficiency=efficiency)
    return estimate(plan_workload(config, 1, 1, "cuda"), machine)


def expected() -> list[dict[str, Any]]:
    """One row per shape: lower and upper estimate and published measurement, in TFLOPS or ms."""
    rows: list[dict[str, Any]] = []

    def add(what: str, length: int, published: float, *estimates: float) -> None:
        low, high = sorted(estimates)
        rows.append({"what": what, "length": length, "low": low, "high": high, "published": published})

    def counted(length: int) -> float:
        return 2.0 * SEQUENCES * HEADS * length**2 * WIDTH

    peak = gpu("h100", torch.bfloat16).peak_tflops
    for way, passes in PASSES.items():
        for length, published in PUBLISHED[way].items():
            seconds = launched_seconds(length)[way]
            add(way, length, published, *(passes * counted(length) / each / 1e12 for each in seconds))
    for what, layers in (("layer", 1), ("step", STEP_LAYERS)):
        for length, published in PUBLISHED[what].items():
            rates = []
            for bound in (0, 1):
                device_s = sum(both[bound] for both in attention_seconds(length).values())
                found = whole(length, 3.5 * counted(length) / device_s / 1e12 / peak, layers)
                if what == "layer":  # what a second one adds
                    more = whole(length, 3.5 * counted(length) / device_s / 1e12 / peak, 2 * layers)
                    rates.append((more.flops - found.flops) / (more.step_s - found.step_s) / 1e12)
                else:
                    rates.append(found.tflops)
            add(what, length, published, *rates)
    for way, published in PUBLISHED_MS.items():
        milliseconds = (STEP_LAYERS * 1e3 * each for each in attention_seconds(STEP_LENGTH)[way])
        add(f"{way} of a step, ms", STEP_LENGTH, published, *milliseconds)
    return rows


def deviation(row: dict[str, Any]) -> str:
    """How far the estimates lie from the measurement."""
    low, high = (100 * (row[bound] / row["published"] - 1) for bound in ("low", "high"))
    return f"{low:+.0f} to {high:+.0f} %"


def as_markdown(rows: list[dict[str, Any]]) -> str:
    """One table per kind of measurement."""
    lines = []
    for what in dict.fromkeys(row["what"] for row in rows):
        some = [row for row in rows if row["what"] == what]
        digits = 1 if what.endswith("ms") else 0
        table = {
            f"{what}, tokens per sequence": [f"{row['length']:,}" for row in some],
            "---": ["---"] * len(some),
            "estimate": [f"{row['low']:.{digits}f} to {row['high']:.{digits}f}" for row in some],
            "NVIDIA, measured": [f"{row['published']:.{digits}f}" for row in some],
            "estimate against NVIDIA": [deviation(row) for row in some],
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
