"""Time HSTU attention with a span beside attention to the whole history, on sequences of 1K to 64K tokens.

    python scripts/bench/attention_window.py [--device cuda] [--output docs/benchmarks/operators/attention_window.json]

A batch is one causal sequence without context and candidates. "semi-local" adds full_tokens newest tokens that see the
whole history. Operations are counted as in attention.py, without the pairs that the window hides. Attention to the
whole history is left out above --longest-whole tokens. All variants of a length run in turn. On a CPU, times are those
of the processor, summed over threads. With --output FILE.json it also draws FILE.png: the milliseconds of a forward and
backward.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
import torch
from attention import BACKENDS, LABELS, Shape, kernels_of
from harness import Panel, Pass, Row, begin, draw, finish, name_of, operator_command_line, rates, time_passes

from hstu.ops.costs import Window, attention_flops
from hstu.ops.functional import hstu_attention
from hstu.ops.kernels import AttentionConfig, Backend, RelativeBias
from hstu.ops.layout import NUM_TIME_BUCKETS

HEADS, HEAD_DIM = 2, 64


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    add = (commands := operator_command_line(__doc__)).add_argument
    add("--length", type=int, nargs="+", default=[1024 << step for step in range(7)])
    add("--span", type=int, default=256)
    add("--full-tokens", type=int, default=128)
    add("--longest-whole", type=int, default=8192)
    add("--dtype", choices=("float32", "bfloat16"), default="float32")
    return commands.parse_args(argv)


def measure(length: int, options: argparse.Namespace, device: torch.device) -> list[Row]:
    """One row per variant."""
    shape, dtype = Shape(np.array([length]), HEADS, HEAD_DIM), getattr(torch, options.dtype)
    layout = shape.layout(device, 60 * torch.arange(length, device=device))
    q, k, v = (torch.randn(length, HEADS, HEAD_DIM, dtype=dtype, device=device).requires_grad_() for _ in range(3))
    tables = [torch.randn(size, device=device).requires_grad_() for size in (2 * length - 1, NUM_TIME_BUCKETS)]
    variants = {
        "whole history": (None, 0, False),
        "span": (options.span, 0, False),
        "span, relative bias": (options.span, 0, True),
        "semi-local": (options.span, options.full_tokens, False),
    }
    passes, operations = {}, {}
    for backend in BACKENDS[device.type]:
        for name, (span, full, has_bias) in variants.items():
            if (span is None and length > options.longest_whole) or (backend is Backend.CUTLASS and span is not None):
                continue
            kernels = kernels_of(backend, HEAD_DIM, dtype, has_bias).attention
            config = AttentionConfig(HEAD_DIM**-0.5, length, max_span=span, full_tokens=full)
            bias = RelativeBias(*tables) if has_bias else None

            def forward(config=config, bias=bias, kernels=kernels) -> torch.Tensor:  # type: ignore[no-untyped-def]
                return hstu_attention(q, k, v, layout, config, bias, kernels)

            label = f"{label_of(backend)}, {name}"
            passes[label] = Pass(forward, [q, k, v, *(tables if has_bias else ())])
            none = np.zeros_like(shape.lengths)
            window = Window(span, full, num_contextuals=0)
            operations[label] = float(attention_flops(shape.lengths, none, HEADS, HEAD_DIM, window=window).sum())
    return [
        rates({"length": length, "variant": name, **times}, operations[name], 2.5 * operations[name], "gflops")
        for name, times in time_passes(passes, device, options.rounds, time.process_time).items()
    ]


def main() -> None:
    """Measure and print."""
    options = parse()
    device, report = begin(options)
    report |= {"dtype": name_of(getattr(torch, options.dtype)), "heads": HEADS, "head_dim": HEAD_DIM}
    report |= {"span": options.span, "full_tokens": options.full_tokens}
    report["lengths"] = [row for length in options.length for row in measure(length, options, device)]
    finish(report, options)
    if options.output:
        title = f"Forward and backward of attention with a span of {options.span}, {options.dtype}"
        panels = [panel_of(label_of(backend), report["lengths"]) for backend in BACKENDS[device.type]]
        draw(panels, options.output.with_suffix(".png"), title)


def label_of(backend: Backend) -> str:
    """The first words of a backend's variants."""
    return LABELS.get(backend, f"ours, {backend.value}")


def panel_of(label: str, rows: list[Row]) -> Panel:
    """The milliseconds of a backend's variants by length."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        if row["variant"].startswith(label):
            variant, total = row["variant"].removeprefix(f"{label}, "), row["forward_ms"] + row["backward_ms"]
            lines.setdefault(variant, []).append((row["length"] / 1024, total))
    return Panel(label, "K tokens", "ms", lines)


if __name__ == "__main__":
    main()
