"""Plots the training loss and each evaluated metric over iterations."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional

import numpy as np

from hstu.base.figure import COLOURS, GREY, open_figure
from hstu.config.args.task import AT_LAST_EVENT
from hstu.observe.records import read_metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Point = tuple[int, float]
_MOST_COLUMNS = 3
_TASK_COLOURS = (*COLOURS[:6], "#332288", "#661100", "#999933", "#882255", "#44AA99", "#AA4499")  # without black
_BLACK = "#000000"


def draw_curves(
    metrics_file: Path, image: Path, task_names: Sequence[str] = (), best: Optional[int] = None
) -> Optional[Path]:
    """Draw a PNG from metrics.jsonl: a panel for the loss and one per metric. Returns None if there is nothing to draw.

    Validation metrics are lines, a single test evaluation is a star, and iteration ``best`` is a dotted line.
    ``task_names`` replace task0, task1, ….
    """
    if not metrics_file.exists():
        return None
    records = read_metrics(metrics_file)
    metrics = metric_curves(records, task_names)
    logged = [{**record, "kind": "eval", "split": "", "metrics": record} for record in records if "loss" in record]
    losses = {task: points for (_, task), points in metric_curves(logged, task_names).get("loss", {}).items()}
    if not losses and not metrics:
        return None

    panels = 1 + max(len(metrics), 1)
    columns = min(panels, _MOST_COLUMNS)
    rows = math.ceil(panels / columns)
    with open_figure(image, size=(6 * columns, 4.2 * rows), dpi=150) as figure:
        title = metrics_file.parent.resolve().name + (f"   (dotted: best, at iteration {best})" if best else "")
        figure.suptitle(title, x=0.01, ha="left", color=GREY, fontsize=11)
        first, *others = figure.subplots(rows, columns, squeeze=False).flat
        named = (*losses, *(task for curves in metrics.values() for _, task in curves))
        tasks = dict.fromkeys(task for task in named if task)
        colours = dict(zip(tasks, cycle(_TASK_COLOURS), strict=False))
        _draw_losses(first, losses, colours)
        if not metrics:
            others[0].set(title="not evaluated yet", xticks=[], yticks=[])
        for axes, (name, curves) in zip(others, metrics.items(), strict=False):
            _draw_metric(axes, name, curves, colours)
        for axes in others[panels - 1 :]:
            axes.set_axis_off()
        if best:
            for axes in (first, *others[: len(metrics)]):
                axes.axvline(best, color=GREY, linestyle=":", linewidth=1.5, zorder=1)
    return image


def metric_curves(
    records: Sequence[Mapping[str, Any]], task_names: Sequence[str] = ()
) -> dict[str, dict[tuple[str, str], list[Point]]]:
    """Metric → (split, task, or "" for the mean) → points (iteration, value), without undefined values."""
    curves: dict[str, dict[tuple[str, str], list[Point]]] = {}
    names = {f"task{index}": name for index, name in enumerate(task_names)}
    for record in (record for record in records if record["kind"] == "eval"):
        for name, value in record["metrics"].items():
            metric, _, task = name.partition("/")
            if value is not None:
                curve = record["split"], names.get(task, task)
                curves.setdefault(metric, {}).setdefault(curve, []).append((record["iter"], value))
    return curves


def _draw_losses(axes: Axes, losses: Mapping[str, Sequence[Point]], colours: Mapping[str, str]) -> None:
    """Draw the loss and its parts. Tasks have ``colours``; their sum is black."""
    import pandas as pd

    if "" not in losses:
        axes.set(title="no training loss logged", xticks=[], yticks=[])
        return
    tasks = [task for task in losses if task]
    for task in [*tasks, ""]:
        iterations, values = zip(*losses[task], strict=True)
        colour, many = colours.get(task, _BLACK if tasks else COLOURS[0]), len(values) >= 20
        # A bias-corrected exponential moving average over about 1/30 of the values; up to 30 values stay as they are.
        *_, last = shown = list(pd.Series(values).ewm(alpha=1 / max(len(values) / 30, 1)).mean())
        if many:
            axes.plot(iterations, values, color=colour, alpha=0.3, linewidth=1.0)
        axes.plot(iterations, shown, "-" if many else "o-", color=colour, linewidth=2.0, markersize=4)
        if tasks:
            axes.plot([], [], color=colour, linewidth=4, label=f"{task or 'sum'}  {last:.3f}")
    # A few huge losses at the start would flatten the rest of the curve.
    low, high = min(value for points in losses.values() for _, value in points), float(np.quantile(values, 0.98))
    if many and max(values) > high + 2 * (high - low) > low:
        axes.set_ylim(low - 0.05 * (high - low), high + 0.2 * (high - low))
    axes.set(xlabel="iteration", title=f"Training loss   {last:.3f}")
    _add_legend(axes, tasks)


def _draw_metric(
    axes: Axes, name: str, curves: Mapping[tuple[str, str], list[Point]], colours: Mapping[str, str]
) -> None:
    """Draw one metric. Tasks have ``colours``; their mean is black."""
    last = [
        f"{split} {_star(split, points)}{points[-1][1]:.4f}" for (split, task), points in curves.items() if not task
    ]
    axes.set(xlabel="iteration", title="  ".join([name, *last]))
    tasks = [task for task in dict.fromkeys(task for _, task in curves) if task]
    for task in [*tasks, ""]:
        colour = colours.get(task, _BLACK if tasks else COLOURS[0])
        drawn = {split: curves[split, task] for split in ("valid", "test") if (split, task) in curves}
        for split, points in drawn.items():
            final = bool(_star(split, points))
            axes.plot(
                *zip(*points, strict=True),
                "*" if final else "o-" if split == "valid" else "s--",
                color=colour,
                linewidth=2.6 if tasks and not task else 1.6,
                markersize=14.0 if final else 4.0,
                markeredgecolor="white" if final else colour,
                zorder=5 if final else 2,
            )
        if drawn:  # tasks with names have no mean
            values = (f"{_star(split, points)}{points[-1][1]:.4f}" for split, points in drawn.items())
            label = task or ("request" if AT_LAST_EVENT in tasks else "mean")
            axes.plot([], [], color=colour, linewidth=4, label="  ".join([label, *values]))
    _add_legend(axes, tasks)


def _add_legend(axes: Axes, tasks: Sequence[str]) -> None:
    if tasks:
        axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), fontsize=9, borderaxespad=0.0, handlelength=0.8)


def _star(split: str, points: Sequence[Point]) -> str:
    """Mark of the single test evaluation at the end of a run."""
    return "★ " if split == "test" and len(points) == 1 else ""
