"""The table of a campaign as Markdown: means, standard errors over seeds, intervals over users, and plots."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from hstu.base.figure import COLOURS, GREY, open_figure
from hstu.config.args.task import AT_LAST_EVENT
from hstu.serve.predict import GAPS
from hstu.sweep.trial import data_facts, number
from hstu.train.metrics import retrieval_gains
from scripts.quality.evaluate import COUNTED
from scripts.quality.runs import RANKS, Result, Run, read_ranks
from scripts.quality.tables import ROOT, Table

_UNTOLD = "DatasetArgs.query_time = 'last_event'"


def write_report(table: Table, runs: Sequence[Run], output: Path) -> Path:
    """Write <output>/<table>/README.md and its plots from the results that there are. Returns the path."""
    name, folder = table.name, output / table.name
    folder.mkdir(parents=True, exist_ok=True)
    results: dict[str, dict[int, Result]] = {row.name: {} for row in table.rows}
    for run in runs:
        if (result := run.stored()) is not None:
            results[run.row.name][run.seed] = _at_both_clocks(result, run)
    ranks = read_ranks(folder / RANKS)
    drawn = draw_metrics(table, results, folder / "metrics.png"), draw_curves(table, results, folder / "curves.png")
    images = [image for image in drawn if image]
    lines = [*_lines(table, results, ranks), "", *_by_gap(table, results, ranks), *_notes(table, not ranks.empty), ""]
    text = "\n".join([*_head(table, runs), *lines])
    text += "".join(f"\n![{image.stem} of {name}]({image.name})\n" for image in images)
    page = folder / "README.md"
    page.write_text(text, encoding="utf-8")
    return page


def _head(table: Table, runs: Sequence[Run]) -> list[str]:
    facts = data_facts(runs[0].store) or {}
    data = ", ".join(f"{value:,} {what}" for what, value in facts.items())
    command = f"python scripts/quality/run.py --table {table.name} --seeds {max(run.seed for run in runs)}"
    command += f" --output … --gin-bindings {' '.join(map(repr, more))}" if (more := runs[0].bindings) else ""
    return [f"# {table.title}", "", f"Written by `{command}`. Data: {table.dataset}{', ' * bool(data)}{data}.", ""]


def _at_both_clocks(result: Result, run: Run) -> Result:
    """The result; a method that reads no time of the request has its one number in both columns."""
    if not run.row.peer and _UNTOLD not in run.settings:
        return result
    at_last_event = {f"{name}/{AT_LAST_EVENT}": value for name, value in result["metrics"].items()}
    return result | {"metrics": at_last_event | result["metrics"]}


def _lines(table: Table, results: dict[str, dict[int, Result]], ranks: pd.DataFrame) -> list[str]:
    """The table itself."""
    has_trials = any(row.trials for row in table.rows)
    own_columns = [f"{table.metric} − {table.reference!r}"]
    own_columns += ["95 % of users"] * (not ranks.empty) + ["trials"] * has_trials
    columns = ["row", *table.metrics, *own_columns, "seeds", "epochs", "minutes"]
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    reference = _values(results.get(table.reference, {}), table.metric)
    for row, of_row in results.items():
        if not of_row:
            lines.append(f"| {row} | not run |" + " |" * (len(columns) - 2))
            continue
        cells = [row, *(number(*mean_and_error([*_values(of_row, metric).values()])) for metric in table.metrics)]
        own = _values(of_row, table.metric)
        cells.append("" if row == table.reference else number(*paired_difference(own, reference), sign=True))
        cells += [_half_widths(table, ranks, row if 1 in of_row else "")] * (not ranks.empty)
        cells += [str(table.row(row).trials)] * has_trials
        cells += [str(len(of_row)), _mean(of_row, "epoch", 1), _mean(of_row, "seconds", 60)]
        lines.append("| " + " | ".join(cells) + " |")
    for whose, *values in table.published:
        lines.append(f"| {whose} | {' | '.join(map(number, values))} |" + " |" * (len(columns) - 3))
    return lines


def _half_widths(table: Table, ranks: pd.DataFrame, row: str) -> str:
    """Half of the 95 % intervals over the users of one seed, ``± .0102 / .0171``: of the first two metrics, or in
    ranking of the first one and of its difference from the reference."""
    if row not in ranks:
        return ""
    if table.task == "ranking":
        own, reference = ranks[row], ranks.get(table.reference, ranks[row])
        errors = [math.sqrt((each**2).sum()) for each in (own, own - reference)[: 1 + (row != table.reference)]]
    else:
        gains = (retrieval_gains(name, ranks[row].dropna().to_numpy()) for name in table.metrics[:2])
        errors = [mean_and_error(each.tolist())[1] for each in gains]
    return "± " + " / ".join(number(1.96 * error) for error in errors)


def _by_gap(table: Table, results: dict[str, dict[int, Result]], ranks: pd.DataFrame) -> list[str]:
    """The second metric of seed 1 by the time since the event before the target, where the data has times."""
    if "gap" not in ranks:
        return []
    groups = [*ranks.groupby(np.searchsorted([*GAPS.values()], ranks["gap"]))]
    shown = [f"{[*GAPS][number_]} ({len(part):,})" for number_, part in groups]
    lines = [f"{table.metrics[1]} of seed 1 by the time since the event before the target (targets):", ""]
    lines += [f"| row | {' | '.join(shown)} |", "|---" * (len(groups) + 1) + "|"]
    for row in (name for name, of_row in results.items() if 1 in of_row):
        for column in (name for name in (row, f"{row}/{AT_LAST_EVENT}") if name in ranks):
            parts = (retrieval_gains(table.metrics[1], part[column].dropna().to_numpy()) for _, part in groups)
            lines.append(f"| {column} | {' | '.join(number(float(np.mean(each))) for each in parts)} |")
    return [*lines, ""]


def _values(results: dict[int, Result], metric: str) -> dict[int, float]:
    return {seed: found["metrics"][metric] for seed, found in results.items() if metric in found["metrics"]}


def _mean(results: dict[int, Result], field: str, unit: float) -> str:
    values = [value / unit for result in results.values() if (value := result.get(field)) is not None]
    return f"{np.mean(values):.1f}" if values else ""


def _notes(table: Table, has_ranks: bool) -> list[str]:
    """How the numbers were chosen, and what the rows are."""
    how = ["Mean ± standard error over seeds. Differences are those of pairs with one seed. Minutes are wall time."]
    how.append(
        f"The checkpoint with the best {table.metric} on validation, or the last one of a training without it, is "
        "evaluated on the test part, once. Epochs are those of this checkpoint."
    )
    if table.task == "ranking":
        how.append(f"Counted are the newest {COUNTED} ratings of each test user.")
    if has_ranks and table.task == "retrieval":
        how.append(
            "95 % of users: half of the width of the 95 % interval of the mean over the users of seed 1, for the first "
            f"two metrics, from [the rank of each user's target](../README.md#recompute-a-table) in {RANKS}."
        )
    elif has_ranks:
        how.append(
            f"95 % of users: half of the width of the 95 % interval over the users of seed 1, of {table.metric} and of "
            f"its difference from {table.reference!r}, from [influences](../README.md#recompute-a-table) "
            f"in {RANKS}. Trials: settings that were compared on the validation users of seed 1."
        )
    if any(name.endswith(AT_LAST_EVENT) for name in table.metrics):
        how.append(
            "`HR@10` is told the time of the target, to the second; `HR@10/last_event` is asked at the time of the "
            "event before it. A method that reads no time of the request has the same number in both columns."
        )
    if table.published:
        how.append("Rows without seeds are what papers report for the same files; they were not run here.")
    lines = [" ".join(how), "", "What each row adds to the file that its gin file includes:", "", "| row | settings |"]
    lines.append("|---|---|")
    for row in table.rows:
        if row.config is None:
            lines.append(f"| {row.name} | {_code([' '.join(row.peer)])} |")
            continue
        shown = row.config.relative_to(ROOT) if row.config.is_relative_to(ROOT) else row.config
        own = [line for line in row.config.read_text(encoding="utf-8").splitlines() if " = " in line]
        lines.append(f"| {row.name} | {_code([str(shown)])}: {_code(own)} |")
    return lines


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """The mean and its standard error, from the sample variance; the error of a single value is nan."""
    if not values:
        return math.nan, math.nan
    error = float(np.std(values, ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return float(np.mean(values)), error


def paired_difference(values: dict[int, float], reference: dict[int, float]) -> tuple[float, float]:
    """Mean and standard error of the differences, seed by seed, over the seeds that both have."""
    return mean_and_error([value - reference[seed] for seed, value in values.items() if seed in reference])


def _code(texts: Sequence[str]) -> str:
    return " ".join(f"`{text}`" for text in texts)


def draw_metrics(table: Table, results: dict[str, dict[int, Result]], image: Path) -> Path | None:
    """Panels of the first two metrics, also at the last event: each row with its standard error, and its seeds."""
    shown = {row: of_row for row, of_row in results.items() if of_row}
    if not shown:
        return None
    metrics = [*table.metrics[:2], *(name for name in table.metrics[2:] if name.endswith(AT_LAST_EVENT))]
    labels = [*shown, *(whose for whose, *_ in table.published)]
    with open_figure(image, size=(4 * len(metrics) + 4, 1.2 + 0.35 * len(labels)), dpi=120) as figure:
        for axes, metric in zip(figure.subplots(1, len(metrics), sharey=True, squeeze=False)[0], metrics, strict=True):
            for place, of_row in enumerate(shown.values()):
                values = [*_values(of_row, metric).values()]
                if not values:
                    continue
                mean, error = mean_and_error(values)
                axes.plot(values, [place] * len(values), "o", color=GREY, markersize=3, alpha=0.6)
                bar = None if math.isnan(error) else error
                axes.errorbar(mean, place, xerr=bar, fmt="o", color=COLOURS[0], capsize=4)
            for place, (_, *published) in enumerate(table.published, len(shown)):
                if (at := table.metrics.index(metric)) < len(published):
                    axes.plot(published[at], place, "D", color=GREY)
            axes.locator_params(axis="x", nbins=5)
            axes.set(title=metric, yticks=range(len(labels)), yticklabels=labels)
        axes.invert_yaxis()
    return image


def draw_curves(table: Table, results: dict[str, dict[int, Result]], image: Path) -> Path | None:
    """The first metric on validation over epochs: the mean over the seeds of a row, and its standard error."""
    curves = {
        row: [each["curve"] for each in of_row.values() if len(each.get("curve", ())) > 1]
        for row, of_row in results.items()
    }
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
