"""The page of a stream: each part with its counts, what the model of the part before scored on it, and the cost."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tabulate import tabulate

from hstu.base.figure import COLOURS, open_figure
from hstu.base.files import replace_text
from hstu.config.args.task import AT_LAST_EVENT

_KINDS = {"evaluation": "model", "frozen": "frozen model", "popular": "popular last time"}
"""What a result has evaluated → its name on the page."""


def write_page(results: Sequence[Mapping[str, Any]], folder: Path) -> None:
    """Write stream.md and, where two parts or more were evaluated, stream.png."""
    names = [*dict.fromkeys(name for result in results for name in metrics_of(result, "evaluation"))][:2]
    columns = [(kind, name) for name in names for kind in _KINDS if any(name in metrics_of(r, kind) for r in results)]
    rows = [
        [
            result["number"], result["name"], f"{datetime.fromtimestamp(result['newest'], UTC):%Y-%m-%d %H:%M}",
            *(f"{result['new'][key]:,}" for key in ("events", "users", "items")),
            result.get("evaluation", {}).get("predictions", ""),
            *(_value(result, kind, name) for kind, name in columns), round(sum(result["seconds"].values())),
        ]
        for result in results
    ]  # fmt: skip
    heads = ["part", "name", "newest event", "events", "new users", "new items", "scored",
             *(f"{name}, {_KINDS[kind]}" for kind, name in columns), "seconds"]  # fmt: skip
    plot = _draw(results, names, folder / "stream.png")
    text = f"""# Stream {folder.resolve().name}

Each part was scored by the model of the parts before it, and trained on afterwards. A model that reads the time of the
request is asked at the user's last event. ± is half of a 95 % interval over the events that were scored, where the
metric is a share of them. parts/<number>/result.json has all metrics.

{tabulate(rows, headers=heads, tablefmt="github", disable_numparse=True)}
"""
    replace_text(folder / "stream.md", text + ("\n![metrics over the parts](stream.png)\n" if plot else ""))


def metrics_of(result: Mapping[str, Any], kind: str) -> Mapping[str, float]:
    """Metric → value of what a result has evaluated, not told the time of the request; {} if it has not."""
    found: Mapping[str, Any] = result.get(kind, {})
    values = {name: value for name, value in found.get("metrics", found).items() if isinstance(value, float)}
    return {name: values.get(f"{name}/{AT_LAST_EVENT}", value) for name, value in values.items() if "/" not in name}


def _value(result: Mapping[str, Any], kind: str, name: str) -> str:
    value = metrics_of(result, kind).get(name)
    if value is None:
        return ""
    scored = result["evaluation"]["predictions"]
    is_share = name.startswith("HR@") and scored
    return f"{value:.4f}" + (f" ± {1.96 * math.sqrt(value * (1 - value) / scored):.4f}" if is_share else "")


def _draw(results: Sequence[Mapping[str, Any]], names: Sequence[str], image: Path) -> bool:
    if not names or sum("evaluation" in result for result in results) < 2:
        return False
    with open_figure(image, size=(6.5 * len(names), 4.2), dpi=150) as figure:
        for axes, name in zip(figure.subplots(1, len(names), squeeze=False).flat, names, strict=True):
            for colour, (kind, label) in zip(COLOURS, _KINDS.items(), strict=False):
                found = [(r["number"], metrics_of(r, kind)[name]) for r in results if name in metrics_of(r, kind)]
                if found:
                    axes.plot(*zip(*found, strict=True), color=colour, marker="o", markersize=4, label=label)
            axes.set(title=name, xlabel="part", ylim=(0, None))
            axes.locator_params(axis="x", integer=True)
            axes.legend()
    return True


def summary(result: Mapping[str, Any]) -> str:
    """A line about a part for the log."""
    scores = [f"{name} {value:.4f}" for name, value in metrics_of(result, "evaluation").items()]
    seconds = ", ".join(f"{name} {value:.0f} s" for name, value in result["seconds"].items())
    found = f"; the model before it: {' '.join(scores)}" if scores else ""
    return f"part {result['number']}, {result['name']}: {result['new']['events']:,} events{found}; {seconds}"
