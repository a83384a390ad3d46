"""Compile every CUTLASS kernel ahead of time, for sm_80 and sm_90; no GPU is needed.

    python scripts/bench/compile_cutlass.py [--output docs/benchmarks/kernels]

Writes cutlass.md, a table (registers, shared memory, spills, share of warp-group products), and cutlass.json.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import cutlass

from hstu.ops.cutlass.compile_ahead import compile_variant
from hstu.ops.cutlass.kernels import Variant, variants

Row = dict[str, Any]
COMPUTES = {"forward": "O", "queries": "dQ", "keys": "dK and dV (256: dK)", "values": "dV"}


def describe(variant: Variant) -> Row:
    """A row of the table."""
    compiled = compile_variant(variant)
    return {
        "computes": COMPUTES[variant.kernel.value],
        "head_dim": variant.head_dim,
        "dtype": str(variant.dtype).removeprefix("torch."),
        **asdict(compiled),
        "wgmma_share": round(compiled.wgmma_share, 4),
    }


def as_markdown(rows: list[Row]) -> str:
    """The table for people."""
    lines = [
        f"nvidia-cutlass-dsl {cutlass.__version__}, bfloat16. Compiled, interpreted on a CPU, **never run on a GPU**.",
        "Tile: rows of a block × columns streamed at a time. Registers: what a thread is launched with; on sm_90 both",
        "warpgroups that compute then take 240 a thread. Shared memory in KiB a CTA. Spills: loads and stores of",
        "registers that did not fit. wgmma: warp-group products, their share of all instructions (of the code, not of",
        "what is executed), and the places that wait for them; mma: warp products.",
        "",
        "| sm | kernel | computes | head dim | tile | registers | shared | spills | wgmma | waits | mma |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        wgmma = f"{row['wgmma']} ({row['wgmma_share']:.1%}) | {row['wgmma_waits']}" if row["wgmma"] else " | "
        lines.append(
            f"| {row['capability']} | {row['kernel']} | {row['computes']} | {row['head_dim']} | {row['config']} | "
            f"{row['registers']} | {row['shared_bytes'] / 1024:.0f} | {row['spill_instructions']} | {wgmma} | "
            f"{row['mma'] or ''} |"
        )
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> None:
    """Compile and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("docs/benchmarks/kernels"))
    args = parser.parse_args(argv)
    rows: list[Row] = []
    for variant in variants():
        rows.append(describe(variant))
        print(f"{rows[-1]['kernel']} {variant.head_dim}", file=sys.stderr)
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "cutlass.md").write_text(as_markdown(rows), encoding="utf-8")
    (args.output / "cutlass.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    spilling = [row for row in rows if row["spill_instructions"]]
    print(f"{len(rows)} kernels compiled, {len(spilling)} of them spill registers")


if __name__ == "__main__":
    main()
