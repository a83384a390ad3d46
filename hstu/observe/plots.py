"""The curves of a run: the training loss, and the evaluated metrics, over iterations."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional

import numpy as np

from hstu.data.figure import COLOURS, GREY, open_figure
from hstu.observe.records import read_metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Point = tuple[int, float]


def draw_curves(metrics_file: Path, image: Path) -> Optional[Path]:
    """Draw a PNG with two panels from a metrics.jsonl: the loss on the left, the metrics on the right.

    Metrics of the validation split are lines, those of the test split stars. Returns ``image``, or None if the file has
    nothing to draw yet.
    """
    if not metrics_file.exists():
        return None
    records = read_metrics(metrics_file)
    losses = [(r["iter"], r["loss"]) for r in records if r["kind"] == "train" and r["loss"] is not None]
    curves = eval_curves(records)
    if not losses and not curves:
        return None

    with open_figure(image, size=(12, 4.6), dpi=150) as figure:
        figure.suptitle(metrics_file.parent.resolve().name, x=0.01, ha="left", color=GREY, fontsize=11)
        left, right = figure.subplots(1, 2)
        _draw_losses(left, losses)
        _draw_metrics(right, curves)
    return image


def eval_curves(records: Sequence[dict[str, Any]]) -> dict[tuple[str, str], list[Point]]:
    """(split, metric) → its points (iteration, value) in order, without undefined values."""
    curves: dict[tuple[str, str], list[Point]] = {}
    for record in records:
        if record["kind"] != "eval":
            continue
        for name, value in record["metrics"].items():
            if value is not None:
                curves.setdefault((record["split"], name), []).append((record["iter"], value))
    return curves


def smoothed(values: Sequence[float]) -> list[float]:
    """Exponential moving average over about a thirtieth of the values, corrected for the bias towards the first."""
    import pandas as pd

    averages: list[float] = pd.Series(values).ewm(alpha=1 / max(len(values) / 30, 1)).mean().tolist()
    return averages


def _draw_losses(axes: Axes, losses: Sequence[Point]) -> None:
    axes.set(title="Training loss", xlabel="iteration")
    if not losses:
        _write_text(axes, "no training loss logged")
        return
    iterations, values = zip(*losses, strict=True)
    many = len(values) >= 20
    axes.plot(iterations, values, color=COLOURS[0], alpha=0.3 if many else 1.0, linewidth=1.0 if many else 2.0)
    if many:
        axes.plot(iterations, smoothed(values), color=COLOURS[0], linewidth=2.0)
    else:
        axes.plot(iterations, values, "o", color=COLOURS[0], markersize=4)
    # A few huge losses at the start would flatten the rest of the curve.
    low, high = min(values), float(np.quantile(values, 0.98))
    if many and max(values) > high + 2 * (high - low) > low:
        axes.set_ylim(low - 0.05 * (high - low), high + 0.2 * (high - low))
    _annotate_last(axes, iterations[-1], smoothed(values)[-1] if many else values[-1])


def _draw_metrics(axes: Axes, curves: dict[tuple[str, str], list[Point]]) -> None:
    axes.set(title="Evaluation", xlabel="iteration")
    if not curves:
        _write_text(axes, "not evaluated yet")
        return
    last = {key: points[-1][1] for key, points in curves.items()}
    # In the order of the ends of the lines, so that the legend reads like the picture.
    height = {name: max(value for (_, other), value in last.items() if other == name) for _, name in curves}
    for index, name in enumerate(sorted(height, key=lambda name: -height[name])):
        colour = COLOURS[index % len(COLOURS)]
        label = name
        for split in ("valid", "test"):
            if (split, name) not in curves:
                continue
            # A single point is the final evaluation of a run; several points are a curve.
            final = split == "test" and len(curves[split, name]) == 1
            label += f"\n{'★ ' if final else ''}{split} {last[split, name]:.4f}"
            axes.plot(
                *zip(*curves[split, name], strict=True),
                "*" if final else "o-",
                color=colour,
                markersize=14.0 if final else 4.0,
                markeredgecolor="white" if final else colour,
                zorder=5 if final else 2,
            )
        axes.plot([], [], color=colour, linewidth=4, label=label)
    axes.legend(loc="upper left", bbox_to_anchor=(1.02, 1.0), fontsize=10, borderaxespad=0.0, handlelength=0.8)


def _annotate_last(axes: Axes, iteration: int, value: float) -> None:
    axes.annotate(
        f"{value:.3f}",
        (iteration, value),
        xytext=(6, 0),
        textcoords="offset points",
        va="center",
        color=COLOURS[0],
        fontweight="bold",
        annotation_clip=False,
    )


def _write_text(axes: Axes, text: str) -> None:
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", color=GREY)
    axes.set(xticks=[], yticks=[])
