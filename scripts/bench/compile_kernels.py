"""Compile every GPU kernel ahead of time and report its resources. No GPU is needed.

    python scripts/bench/compile_kernels.py [--backend triton cutlass] [--capability 89 100] [--head-dim 128 256] \
        [--operator sampled_softmax_loss] [--output docs/benchmarks/kernels]

Writes ``kernels.md``, a table of one line per kernel, and per backend the raw numbers of every variant and
configuration, ``triton.json`` and ``cutlass.json``. Everything takes about an hour on two cores. Options that leave
kernels out keep what these files say of the others. Without ``--output`` nothing is written.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from harness import command_line, to_json
from kernel_variants import Compiled, compile_launch, read_cutlass_kernel, record, variants

Row = dict[str, Any]
IsChosen = Callable[[Row], bool]
"""Whether a kernel with this op, head_dim and capability is to be compiled."""
ATTENTION = "hstu_attention"
TRITON_CONFIGURATIONS: dict[int, int | None] = {80: None, 89: 1, 90: None, 100: 1}
"""Configurations of each kernel to compile, by compute capability: all, or the default alone to save time."""
CUTLASS_OUTPUTS = {"forward": "O", "queries": "dQ", "keys": "dK and dV"}
WIDE = 128
"""Head dim above which the table counts a kernel separately: only those may spill registers."""


def triton_rows(is_chosen: IsChosen, known: list[Row]) -> Iterator[Row]:
    """One row per kernel, variant, configuration and compute capability. Repeated launches are listed once."""
    seen = set()
    for capability, configurations in TRITON_CONFIGURATIONS.items():
        for variant in variants():
            described = {"head_dim": variant.head_dim, "op": variant.op, "variant": variant.description}
            if not is_chosen(described | {"capability": capability}):
                yield from _same(known, **described, capability=capability)
                continue
            print(f"sm_{capability} {variant.op} {variant.head_dim or ''} {variant.description}", file=sys.stderr)
            for launch in record(variant, capability):
                for index, config in enumerate(launch.configs[:configurations]):
                    row = row_of(compile_launch(launch, config, capability), **described)
                    row["is_default"] = index == 0
                    if (key := tuple(row.values())) not in seen:
                        seen.add(key)
                        yield row


def cutlass_rows(is_chosen: IsChosen, known: list[Row]) -> Iterator[Row]:
    """One row per kernel, head dim and compute capability, in bfloat16."""
    from hstu.ops.cutlass.attention import compile_ahead, kernel_name
    from hstu.ops.cutlass.attention import variants as cutlass_variants

    for variant in cutlass_variants():
        described = {"op": ATTENTION, "head_dim": variant.head_dim, "capability": 90}
        if not is_chosen(described):
            yield from _same(known, kernel=kernel_name(variant), head_dim=variant.head_dim)
            continue
        print(f"{kernel_name(variant)} {variant.head_dim}", file=sys.stderr)
        dtype = str(variant.dtype).removeprefix("torch.")
        output = CUTLASS_OUTPUTS[variant.kernel.value]
        yield row_of(
            read_cutlass_kernel(variant, *compile_ahead(variant)),
            head_dim=variant.head_dim,
            output=output,
            dtype=dtype,
            is_default=True,
        )


def _same(known: list[Row], **described: Any) -> Iterator[Row]:
    return (row for row in known if all(row[name] == value for name, value in described.items()))


ROWS = {"triton": triton_rows, "cutlass": cutlass_rows}
TITLES = {"triton": "Triton", "cutlass": "CUTLASS"}


def row_of(compiled: Compiled, **described: Any) -> Row:
    """The resources of one compiled kernel, after what it is an example of."""
    return {**described, **asdict(compiled)}


def as_markdown(rows: Iterable[Row]) -> list[str]:
    """The table: one line per kernel, with the smallest and the largest value over its variants."""
    kernels: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in rows:
        is_attention = row.get("op", ATTENTION) == ATTENTION
        heads = "" if not is_attention else f"≤ {WIDE}" if row["head_dim"] <= WIDE else f"> {WIDE}"
        kernels[row["kernel"].partition("_sm")[0], heads].append(row)
    capabilities = sorted({row["capability"] for group in kernels.values() for row in group})
    columns = (
        "kernel",
        "head dim",
        *(f"sm_{sm}: {name}" for sm in capabilities for name in ("registers", "KiB", "spills")),
    )
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for (kernel, heads), group in kernels.items():
        cells = [kernel, heads]
        for capability in capabilities:
            some = [row for row in group if row["capability"] == capability]
            default = [row for row in some if row["is_default"]]
            cells += [_span(row["registers"] for row in default), _span(row["shared_bytes"] // 1024 for row in default)]
            spills = max((row["spill_instructions"] for row in default), default=0)
            others = max((row["spill_instructions"] for row in some), default=0)
            cells.append(f"{spills}" if others == spills else f"{spills} ({others})")
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _span(values: Iterable[int]) -> str:
    found = sorted(set(values))
    return f"{found[0]} to {found[-1]}" if len(found) > 1 else f"{found[0]}" if found else ""


HEADING = """# Compiled kernels

`python scripts/bench/compile_kernels.py --output docs/benchmarks/kernels` writes this page and the raw numbers of every
variant and configuration: [triton.json](triton.json), [cutlass.json](cutlass.json). Of those for sm_90,
[some have run](../h100/README.md#what-has-run-and-what-has-not), the others on no GPU yet.
Columns, for the default configuration of each kernel: registers per thread (the CUTLASS kernels of sm_90
then give 232 to each thread that computes up to head dim 64, else 240), KiB of shared memory per program, and spill
instructions (loads and stores of registers that did not fit). In brackets: the most spills in any other configuration,
on sm_80 and sm_90; training runs the default. For sm_89 and sm_100 only the default configurations are compiled.
"""


def page(tables: dict[str, list[str]]) -> str:
    """``kernels.md``: one table per backend."""
    return "\n".join([HEADING, *(line for name, table in tables.items() for line in (f"## {name}", "", *table, ""))])


def read(directory: Path | None, backend: str) -> list[Row]:
    """The raw numbers that an earlier run has written; none without a directory."""
    file = directory / f"{backend}.json" if directory else None
    rows: list[Row] = json.loads(file.read_text(encoding="utf-8")) if file and file.exists() else []
    return rows


def main(argv: list[str] | None = None) -> None:
    """Compile all kernels and write the page and the raw numbers."""
    parser = command_line(__doc__, output=True)
    parser.add_argument("--backend", choices=tuple(ROWS), nargs="+", default=list(ROWS))
    parser.add_argument("--head-dim", type=int, nargs="+", default=None, help="only these (default: all)")
    parser.add_argument("--capability", type=int, nargs="+", default=None, help="only these (default: all)")
    parser.add_argument("--operator", nargs="+", default=None, help="only these (default: all)")
    args = parser.parse_args(argv)
    chosen = {"head_dim": args.head_dim, "capability": args.capability, "op": args.operator}

    def is_chosen(row: Row) -> bool:
        return all(values is None or row[name] in values for name, values in chosen.items())

    rows = {name: list(ROWS[name](is_chosen, read(args.output, name))) for name in args.backend}
    everything = {name: rows.get(name) or read(args.output, name) for name in ROWS}
    text = page({TITLES[name]: as_markdown(some) for name, some in everything.items() if some})
    print(text)
    if args.output:
        args.output.mkdir(parents=True, exist_ok=True)
        for name, some in rows.items():
            (args.output / f"{name}.json").write_text(to_json(some), encoding="utf-8")
        (args.output / "kernels.md").write_text(text, encoding="utf-8")
    for name, some in rows.items():
        spilling = sum(bool(row["spill_instructions"]) for row in some)
        print(f"{name}: {len(some)} kernels compiled, {spilling} of them spill registers", file=sys.stderr)


if __name__ == "__main__":
    main()
