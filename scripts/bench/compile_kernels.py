"""Compile every Triton kernel ahead of time, in every configuration that it may be run in; no GPU is needed.

    python scripts/bench/compile_kernels.py [--capability 80 90] [--head-dim 128 256] [--output docs/benchmarks/kernels]

Writes kernels.md, a table (registers, shared memory, spills, share of warp-group products), and kernels.json.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import triton

from hstu.ops.triton.compile_ahead import Compiled, compile_launch
from hstu.ops.triton.variants import Variant, record, variants

Row = dict[str, Any]


def compile_variant(variant: Variant, capability: int) -> list[Row]:
    """One row for each kernel of the variant and each of its configurations."""
    rows = []
    for launch in record(variant, capability):
        for place, config in enumerate(launch.configs):
            compiled = compile_launch(launch, config, capability)
            rows.append(describe(variant, compiled, is_first=place == 0))
    return rows


def describe(variant: Variant, compiled: Compiled, is_first: bool) -> Row:
    """A row of the table."""
    return {
        "op": variant.op,
        "head_dim": variant.head_dim,
        "variant": variant.description,
        "first": is_first,
        **asdict(compiled),
        "wgmma_share": round(compiled.wgmma_share, 4),
    }


def without_repeats(rows: Iterable[Row]) -> list[Row]:
    """Rows that say the same are listed once."""
    seen: dict[tuple[Any, ...], Row] = {}
    for row in rows:
        seen.setdefault(tuple(row.values()), row)
    return list(seen.values())


def as_markdown(rows: list[Row]) -> str:
    """The table for people."""
    lines = [
        f"Triton {triton.__version__}. One line a kernel, variant and configuration; **bold** configurations are the",
        "ones that run where nothing may be measured. Shared memory in KiB a program. Spills: loads and stores of",
        "registers that did not fit. wgmma: warp-group products, their share of all instructions; mma: warp products.",
        "",
        "| sm | kernel | head dim | variant | configuration | registers | shared | spills | wgmma | mma |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        config = f"**{row['config']}**" if row["first"] else row["config"]
        wgmma = f"{row['wgmma']} ({row['wgmma_share']:.1%})" if row["wgmma"] else ""
        lines.append(
            f"| {row['capability']} | {row['kernel']} | {row['head_dim'] or ''} | {row['variant']} | {config} | "
            f"{row['registers']} | {row['shared_bytes'] / 1024:.0f} | {row['spill_instructions']} | {wgmma} | "
            f"{row['mma'] or ''} |"
        )
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> None:
    """Compile and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--capability", type=int, nargs="+", default=[80, 90])
    parser.add_argument("--head-dim", type=int, nargs="+", default=None, help="only these (default: all)")
    parser.add_argument("--output", type=Path, default=Path("docs/benchmarks/kernels"))
    args = parser.parse_args(argv)
    rows: list[Row] = []
    for capability in args.capability:
        for variant in variants():
            if args.head_dim is None or variant.head_dim in args.head_dim:
                print(f"sm_{capability} {variant.op} {variant.head_dim or ''} {variant.description}", file=sys.stderr)
                rows += compile_variant(variant, capability)
    rows = without_repeats(rows)
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "kernels.md").write_text(as_markdown(rows), encoding="utf-8")
    (args.output / "kernels.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    spilling = [row for row in rows if row["spill_instructions"]]
    print(f"{len(rows)} kernels compiled, {len(spilling)} of them spill registers")


if __name__ == "__main__":
    main()
