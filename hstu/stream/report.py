"""The page of a stream: what the model of the part before scored on each part, what is in the part, and the cost."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tabulate import tabulate

from hstu.base.figure import COLOURS, open_figure
from hstu.base.files import replace_text
from hstu.base.times import as_date
from hstu.config.args.task import AT_LAST_EVENT
from hstu.observe.logging import format_seconds

_KINDS = {"evaluation": "model", "frozen": "frozen model", "popular": "popular last time"}
"""What a result has evaluated → its name on the page."""
_STEPS = ("append", "evaluate", "frozen", "train", "export")
Result = Mapping[str, Any]


def write_page(results: Sequence[Result], folder: Path) -> None:
    """Write stream.md and, where two parts or more were evaluated, stream.png."""
    names = [*dict.fromkeys(name for result in results for name in metrics_of(result, "evaluation"))][:2]
    plot = "\n![metrics over the parts](stream.png)\n" if _draw(results, names, folder / "stream.png") else ""
    text = f"""# Stream {folder.resolve().name}

Each part was scored by the model of the parts before it, and trained on afterwards. A model that reads the time of the
request is asked at the user's last event. ± is half of a 95 % interval over users. parts/<number>/result.json has all
metrics.

{_table(results, lambda result: _scores(result, names))}
{plot}
## Events

*Gone* had events in the part before and has none in this one. *Drift* is the Jensen-Shannon divergence, in bits, of the
shares that items have of the events of the two parts: 0 for equal shares, 1 without a common item.

{_table(results, _events)}

## Cost

*Age* is the time from the newest event to the end of its part's steps, when the model knows it.

{_table(results, _costs)}
"""
    replace_text(folder / "stream.md", text)


def metrics_of(result: Result, kind: str, key: str = "metrics") -> Mapping[str, float]:
    """Metric → value of what a result has evaluated, not told the time of the request; {} if it has not.

    ``key``: "metrics", or "half_widths" of their intervals.
    """
    found: Mapping[str, Any] = result.get(kind, {})
    values = {name: value for name, value in found.get(key, {}).items() if isinstance(value, float)}
    shown = (name for name in values if "/new_" not in name and not name.endswith(f"/{AT_LAST_EVENT}"))
    return {name: values.get(f"{name}/{AT_LAST_EVENT}", values[name]) for name in shown}


def _table(results: Sequence[Result], columns: Callable[[Result], Mapping[str, object]]) -> str:
    """A row per part: its number, its name, and the columns that any part has."""
    rows = [{"part": result["number"], "name": result["name"], **columns(result)} for result in results]
    names = dict.fromkeys(name for row in rows for name in row)
    cells = [[row.get(name, "") for name in names] for row in rows]
    return tabulate(cells, headers=[*names], tablefmt="github", disable_numparse=True)


def _scores(result: Result, names: Sequence[str]) -> dict[str, object]:
    found: dict[str, object] = {}
    for name in names:
        for kind, label in _KINDS.items():
            if (value := metrics_of(result, kind).get(name)) is not None:
                half = metrics_of(result, kind, "half_widths").get(name)
                found[f"{name}, {label}"] = f"{value:.4f}" + ("" if half is None else f" ± {half:.4f}")
    scored = {"scored": f"{result['evaluation']['predictions']:,}"} if "evaluation" in result else {}
    return {**scored, **found}


def _events(result: Result) -> dict[str, object]:
    new, gone = result["new"], result.get("gone", {})
    counts = {"events": new["events"], "new users": new["users"], "gone users": gone.get("users")}
    counts |= {"new items": new["items"], "gone items": gone.get("items")}
    shares = {name: f"{result[name]:.3f}" for name in ("drift", "mean action") if name in result}
    return {**{name: f"{count:,}" for name, count in counts.items() if count is not None}, **shares}


def _costs(result: Result) -> dict[str, object]:
    seconds, newest = result["seconds"], result["newest"]
    total = sum(seconds.values())
    found: dict[str, object] = {f"{name}, s": f"{seconds[name]:.0f}" if name in seconds else "" for name in _STEPS}
    if total:
        found |= {"events per second": f"{result['new']['events'] / total:.1f}", "newest event": as_date(newest)}
    return found | ({"age": format_seconds(result["done"] - newest)} if total and "done" in result else {})


def _draw(results: Sequence[Result], names: Sequence[str], image: Path) -> bool:
    if not names or sum("evaluation" in result for result in results) < 2:
        return False
    with open_figure(image, size=(6.5 * len(names), 4.2), dpi=150) as figure:
        for axes, name in zip(figure.subplots(1, len(names), squeeze=False).flat, names, strict=True):
            for colour, (kind, label) in zip(COLOURS, _KINDS.items(), strict=False):
                found = [
                    (result["number"], values[name], metrics_of(result, kind, "half_widths").get(name, 0.0))
                    for result in results
                    if name in (values := metrics_of(result, kind))
                ]
                if found:
                    parts, scores, halves = zip(*found, strict=True)
                    axes.errorbar(parts, scores, halves, color=colour, marker="o", markersize=4, label=label)
            axes.set(title=name, xlabel="part", ylim=(0, None))
            axes.locator_params(axis="x", integer=True)
            axes.legend()
    return True


def summary(result: Result) -> str:
    """A line about a part for the log."""
    scores = [f"{name} {value:.4f}" for name, value in metrics_of(result, "evaluation").items()]
    seconds = ", ".join(f"{name} {value:.0f} s" for name, value in result["seconds"].items())
    found = f"; the model before it: {' '.join(scores)}" if scores else ""
    return f"part {result['number']}, {result['name']}: {result['new']['events']:,} events{found}; {seconds}"
