"""The page of a GPU session: its measurements beside the estimates for an H100 and what NVIDIA publishes.

``gpu_session.py --report DIR`` writes it from the records in DIR and its subdirectories.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import roofline
from gpu_parts import LOSS_TOLERANCE, PARTS, failures, rows_of, state_of

Row = dict[str, Any]
ESTIMATED: dict[str, tuple[str, ...]] = {
    "matrix products": ("matrix products",),
    "residual and norm": ("residual and norm",),
    "norm, gate, dropout": ("norm, gate, dropout",),
    "tables": ("sharded tables", "replicated tables"),
    "dense optimizer": ("dense optimizer",),
    "elementwise and other": ("other operators", "loss"),
}
"""Category of kernels in step_gpu.py → operators of hstu/estimate. Attention is estimated by roofline.py."""

OF_STEPS = ("variant", "step_ms", "busy_ms", "overlap_ms", "peak_memory_gb", "difference")
COLUMNS: dict[str, tuple[str, ...]] = {
    "operators": ("operator", "variant", "forward_ms", "backward_ms", "gflops", "gb_s", "errors"),
    **dict.fromkeys(("kernel backends on ML-1M", "pipelines", "tables in host memory", "FSDP and offload"), OF_STEPS),
    "dynamic tables": ("stream", "variant", "ms", "times_baseline", "mega_ids_s"),
}
"""Item → the entries of its rows that the page shows. "difference" is the largest relative one of the losses."""


class Estimates:
    """What is expected of an H100, computed now, and NVIDIA's published numbers."""

    def __init__(self) -> None:
        self.rows = {(row["what"], row["length"]): row for row in roofline.expected()}
        step = roofline.whole(roofline.STEP_LENGTH, 1.0, roofline.STEP_LAYERS)
        operators, self.step_flops = step.computing, step.flops
        self.category_ms = {
            category: f"{1e3 * sum(operators.get(name, 0.0) for name in names):.1f}"
            for category, names in ESTIMATED.items()
        }
        for way in ("forward", "backward"):
            self.category_ms[f"attention {way}"] = self.of(f"{way} of a step, ms", roofline.STEP_LENGTH, 1)
        self.step_length = roofline.STEP_LENGTH

    def step_ms(self, *bounds: str) -> str:
        """Milliseconds of the step at these TFLOPS: "low" and "high" of the estimate, or "published"."""
        row = self.rows["step", self.step_length]
        return " to ".join(f"{self.step_flops / row[bound] / 1e9:.0f}" for bound in bounds)

    def of(self, what: str, length: int, digits: int = 0) -> str:
        """The lower and the upper estimate; empty if there is none."""
        row = self.rows.get((what, length))
        return f"{row['low']:.{digits}f} to {row['high']:.{digits}f}" if row else ""

    def published(self, what: str, length: int) -> str:
        """NVIDIA's measurement; empty if there is none."""
        row = self.rows.get((what, length))
        return f"{row['published']:g}" if row else ""


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    """A Markdown table with an empty line after it."""
    lines = [" | ".join(head), "|".join(["---"] * len(head)), *(" | ".join(map(_cell, row)) for row in rows)]
    return [*(f"| {line} |" if "---|" not in line else f"|{line}|" for line in lines), ""]


def _cell(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1 else f"{value:,.1f}"
    return str(value).replace("|", "\\|").replace("\n", " ")


def load(folder: Path) -> dict[int, Row]:
    """Part → its records, of the newest file of each part."""
    parts = {}
    for part in PARTS:
        files = sorted(folder.rglob(f"part-{part}.json"), key=lambda file: file.stat().st_mtime)
        if files:
            parts[part] = json.loads(files[-1].read_text(encoding="utf-8"))
    if not parts:
        raise SystemExit(f"{folder} has no part-N.json; run gpu_session.py --part 1 --out {folder} first")
    return parts


def page(parts: Mapping[int, Row]) -> str:
    """The page."""
    estimates = Estimates()
    items = {name: record for part in sorted(parts) for name, record in parts[part].items()}
    lines = ["# Measured on a GPU", ""]
    lines += ["`python scripts/bench/gpu_session.py --report DIR` writes this page from the records of a session.", ""]
    if any(records["machine"]["gpu"] is None for records in parts.values()):
        lines += ["**A rehearsal on a CPU: its numbers say nothing about a GPU.**", ""]
    for part, records in sorted(parts.items()):
        machine = records["machine"]
        lines.append(f"- Part {part}: {machine['at']}, {machine['gpu'] or 'no GPU'}")
    lines.append("")
    versions = {row["variant"]: row.get("version") for row in rows_of(items.get("imports", {}))}
    lines += [", ".join(f"{name} {version}" for name, version in versions.items() if version), ""]
    lines += ["Estimates are for an H100 SXM. NVIDIA's numbers are those of recsys-examples on one.", ""]
    sections: tuple[tuple[str, str, Callable[[Row, Estimates], list[str]]], ...] = (
        ("the step", "The step: 8 layers, width 1024, 4 heads of 256, 32 sequences of 4,099 tokens", step_lines),
        ("attention", "Attention, TFLOPS", attention_lines),
        ("layer", "A layer, TFLOPS", layer_lines),
    )
    for name, title, write in sections:
        if name in items:
            lines += [f"## {title}", "", *write(items[name], estimates)]
    for name, keys in COLUMNS.items():
        if name in items:
            lines += [f"## {name[0].upper()}{name[1:]}", "", *columns(rows_of(items[name]), keys)]
    lines += ["## What ran", ""]
    planned = ((part, item.name, parts[part].get(item.name)) for part in sorted(parts) for item in PARTS[part])
    lines += table(
        ("part", "item", "result"), ((part, name, state_of(of) if of else "not run") for part, name, of in planned)
    )
    lines += ["## Errors and refusals", "", *problem_lines(items)]
    return "\n".join(lines).rstrip() + "\n"


def step_lines(record: Row, estimates: Estimates) -> list[str]:
    """The variants of the step, and their GPU time by category."""
    rows = [row for row in rows_of(record) if "step_ms" in row]
    rates = ("tokens_per_s", "tflops", "mfu_percent", "peak_memory_gb")
    keys = ("variant", "step_ms", *rates, "busy_ms", "idle_ms", "host_ms")
    head = ("variant", "ms", "tokens/s", "TFLOPS", "MFU %", "memory GB", "busy ms", "idle ms", "host ms")
    length = estimates.step_length
    others = [
        ["estimate", estimates.step_ms("high", "low"), "", estimates.of("step", length)],
        ["NVIDIA", estimates.step_ms("published"), "", estimates.published("step", length)],
    ]
    lines = table(head, [*([row[key] for key in keys] for row in rows), *([*each, *[""] * 5] for each in others)])
    names = dict.fromkeys(name for row in rows for name in row["categories"])
    head = ("GPU time, ms", *(row["variant"] for row in rows), "estimate")
    categories = dict.fromkeys([*names, *estimates.category_ms])
    lines += table(
        head,
        (
            [name, *(row["categories"].get(name) for row in rows), estimates.category_ms.get(name)]
            for name in categories
        ),
    )
    for row in rows:
        lines += [f"- {row['variant']}: {message}" for message in row["messages"] if "kernel" in message]
        lines += [f"- {row['variant']}, gap of {gap['us']} µs after {gap['after']}" for gap in row["gaps"][:3]]
    return [*lines, ""]


def attention_lines(record: Row, estimates: Estimates) -> list[str]:
    """Forward / backward by length, the errors of ours, and the ceilings of the same run."""
    rows = [row for row in record.get("report", {}).get("lengths", ()) if "gflops" in row]
    variants = list(dict.fromkeys(row["variant"] for row in rows))
    by_length: dict[int, dict[str, Row]] = {}
    for row in rows:
        by_length.setdefault(row["length"], {})[row["variant"]] = row

    def line(length: int, found: Mapping[str, Row]) -> list[object]:
        cells = [_pair(found[name], "forward_gflops", "backward_gflops") if name in found else "" for name in variants]
        worst = max((max(row["errors"].values()) for row in found.values() if "errors" in row), default=None)
        for of in (estimates.of, estimates.published):
            cells.append(" / ".join(filter(None, (of(way, length) for way in ("forward", "backward")))))
        return [f"{length:,}", *cells, f"{worst:.1e}" if worst is not None else ""]

    head = ("tokens per sequence", *variants, "estimate", "NVIDIA", "largest error of ours")
    return [*table(head, (line(length, by_length[length]) for length in sorted(by_length))), *ceiling_lines(record)]


def _pair(row: Row, *keys: str) -> str:
    return " / ".join(f"{row[key] / 1e3:.3g}" for key in keys)


def ceiling_lines(record: Row) -> list[str]:
    """The limits that were measured in the same run."""
    found = record.get("report", {}).get("ceilings")
    if not found:
        return []
    products = (f"{name} products {found[f'{name}_gflops'] / 1e3:.3g} TFLOPS" for name in ("bfloat16", "float32"))
    return [f"Ceilings of this run: {', '.join(products)}, copy {found['copy_gb_s']:,.0f} GB/s.", ""]


def layer_lines(record: Row, estimates: Estimates) -> list[str]:
    """Forward and backward together."""
    rows = [dict(row) for row in rows_of(record) if "gflops" in row]
    for row in rows:
        length = int(row["case"]) if row["case"].isdigit() else 0
        row |= {"estimate": estimates.of("layer", length), "NVIDIA": estimates.published("layer", length)}
        row["TFLOPS"] = row["gflops"] / 1e3
    keys = ("case", "variant", "forward_ms", "backward_ms", "TFLOPS", "estimate", "NVIDIA")
    return [*columns(rows, keys), *ceiling_lines(record)]


def columns(rows: Iterable[Row], keys: Sequence[str]) -> list[str]:
    """A table of the rows that have a time, with these entries."""
    timed = (row for row in rows if any(key.endswith("ms") and key in row for key in keys))
    return table(keys, ([_largest(row.get(key)) for key in keys] for row in timed))


def _largest(value: Any) -> Any:
    return f"{max(value):.1e}" if isinstance(value, list) else value


def problem_lines(items: Mapping[str, Row]) -> list[str]:
    """What failed and what was refused, item by item."""
    lines = []
    for name, record in items.items():
        found = [*failures(record), *(row for row in rows_of(record) if "refused" in row)]
        lines += [f"- {name}, {row.get('variant', '')}: {row.get('error') or row['refused']}" for row in found]
        if name != "machine" and record["exit_code"] != 0 and not found:
            last = next((line for line in reversed(record["tail"].splitlines()) if line.strip()), "no output")
            lines.append(f"- {name}: {last[:300]}")
    return [*(lines or ["None."]), "", f"Losses of kernel backends may differ by {LOSS_TOLERANCE:g} (relative).", ""]


def write_page(folder: Path, file: Path) -> None:
    """Write the page of the records below ``folder``."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(page(load(folder)), encoding="utf-8")
    print(f"written: {file}")
