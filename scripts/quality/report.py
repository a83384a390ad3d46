"""The table of a campaign as Markdown: means and standard errors over seeds, and plots."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from hstu.base.figure import COLOURS, GREY, open_figure
from scripts.quality.means import mean_and_error, number, paired_difference
from scripts.quality.runs import Result, Run
from scripts.quality.tables import Table


def write_report(name: str, table: Table, runs: Sequence[Run], output: Path) -> Path:
    """Write <output>/<name>/README.md and its plots from the results that there are. Returns the path."""
    folder = output / name
    folder.mkdir(parents=True, exist_ok=True)
    results: dict[str, dict[int, Result]] = {row.name: {} for row in table.rows}
    for run in runs:
        if (result := run.stored()) is not None:
            results[run.row.name][run.seed] = result
    drawn = draw_metrics(table, results, folder / "metrics.png"), draw_curves(table, results, folder / "curves.png")
    images = [image for image in drawn if image]
    text = "\n".join([*_head(name, table, runs), *_lines(table, results), "", *_notes(table), ""])
    text += "".join(f"\n![{image.stem} of {name}]({image.name})\n" for image in images)
    page = folder / "README.md"
    page.write_text(text, encoding="utf-8")
    return page


def _head(name: str, table: Table, runs: Sequence[Run]) -> list[str]:
    facts = runs[0].data_facts() or {}
    data = ", ".join(f"{value:,} {what}" for what, value in facts.items())
    command = f"python scripts/quality/run.py --table {name} --seeds {max(run.seed for run in runs)}"
    command += f" --output … --gin-bindings {' '.join(map(repr, more))}" if (more := runs[0].bindings) else ""
    return [f"# {table.title}", "", f"Written by `{command}`. Data: {table.dataset}{', ' * bool(data)}{data}.", ""]


def _lines(table: Table, results: dict[str, dict[int, Result]]) -> list[str]:
    """The table itself."""
    compared = f"{table.metric} − {table.reference!r}"
    columns = ["row", *table.metrics, compared, "seeds", "epochs", "minutes"]
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    reference = _values(results.get(table.reference, {}), table.metric)
    for row, of_row in results.items():
        if not of_row:
            lines.append(f"| {row} | not run |" + " |" * (len(columns) - 2))
            continue
        cells = [row, *(number(*mean_and_error([*_values(of_row, metric).values()])) for metric in table.metrics)]
        own = _values(of_row, table.metric)
        cells.append("" if row == table.reference else number(*paired_difference(own, reference), sign=True))
        cells += [str(len(of_row)), _mean(of_row, "epoch", 1), _mean(of_row, "seconds", 60)]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _values(results: dict[int, Result], metric: str) -> dict[int, float]:
    return {seed: result.metrics[metric] for seed, result in results.items() if metric in result.metrics}


def _mean(results: dict[int, Result], field: str, unit: float) -> str:
    values = [value / unit for result in results.values() if (value := getattr(result, field)) is not None]
    return f"{np.mean(values):.1f}" if values else ""


def _notes(table: Table) -> list[str]:
    """How the numbers were chosen, and what the rows are."""
    how = ["Mean ± standard error over seeds. Differences are those of pairs with one seed. Minutes are wall time."]
    if table.validation:
        how.append(
            f"The checkpoint with the best {table.metric} on validation is evaluated on the test part, once. Epochs "
            "are those of this checkpoint. Rows that train on the validation part, too, train for as many."
        )
    else:
        how.append("No validation part is held out: all rows train as long as they say, and are evaluated once, then.")
    common = [*table.bindings, *table.validation]
    of_all = f"All rows: {_code(common)}. " if common else ""
    lines = [" ".join(how), "", f"{of_all}Each row, on top of its gin file:", "", "| row | settings |", "|---|---|"]
    for row in table.rows:
        if row.peer:
            lines.append(f"| {row.name} | {_code([' '.join(row.peer)])} |")
            continue
        own = [binding for binding in table.bindings_of(row) if binding not in common]
        shown = [*(" ".join(command) for command in table.prepare_of(row)), *own]
        lines.append(f"| {row.name} | {table.config_of(row)} {_code(shown)} |")
    return lines


def _code(texts: Sequence[str]) -> str:
    return " ".join(f"`{text}`" for text in texts)


def draw_metrics(table: Table, results: dict[str, dict[int, Result]], image: Path) -> Path | None:
    """A panel for each of the first two metrics: a point with its standard error for each row, and its seeds."""
    shown = {row: of_row for row, of_row in results.items() if of_row}
    if not shown:
        return None
    metrics = table.metrics[:2]
    with open_figure(image, size=(6 * len(metrics) + 3, 1.2 + 0.45 * len(shown)), dpi=120) as figure:
        for axes, metric in zip(figure.subplots(1, len(metrics), sharey=True, squeeze=False)[0], metrics, strict=True):
            for place, of_row in enumerate(shown.values()):
                values = [*_values(of_row, metric).values()]
                if not values:
                    continue
                mean, error = mean_and_error(values)
                axes.plot(values, [place] * len(values), "o", color=GREY, markersize=3, alpha=0.6)
                bar = None if math.isnan(error) else error
                axes.errorbar(mean, place, xerr=bar, fmt="o", color=COLOURS[0], capsize=4)
            axes.set(title=metric, yticks=range(len(shown)), yticklabels=[*shown])
        axes.invert_yaxis()
    return image


def draw_curves(table: Table, results: dict[str, dict[int, Result]], image: Path) -> Path | None:
    """The first metric on validation over epochs: the mean over the seeds of a row, and its standard error."""
    curves = {row: [each.curve for each in of_row.values() if each.curve] for row, of_row in results.items()}
    curves = {row: of_row for row, of_row in curves.items() if of_row}
    if not curves:
        return None
    with open_figure(image, size=(11, 5), dpi=120) as figure:
        axes = figure.subplots()
        for number_, (row, of_row) in enumerate(curves.items()):
            colour = COLOURS[number_ % len(COLOURS)]
            length = min(map(len, of_row))
            epochs = [epoch for epoch, _ in of_row[0][:length]]
            pairs = [mean_and_error([curve[at][1] for curve in of_row]) for at in range(length)]
            means, errors = np.array(pairs).T
            style = "-" if number_ < len(COLOURS) else "--"
            axes.plot(epochs, means, style, marker="o", markersize=3, color=colour, label=row)
            if not np.isnan(errors).any():
                axes.fill_between(epochs, means - errors, means + errors, color=colour, alpha=0.15, linewidth=0)
        axes.set(title=f"{table.metric} on validation", xlabel="epoch")
        axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), fontsize=9)
    return image
