"""Measure how loss and hits depend on width, depth and sequence length, and fit a power law of the training FLOPs.

    python scripts/quality/scaling.py [--data tmp_data --raw DIR] [--threads 1] [--dry-run]

Films are retrieved on MovieLens-1M, where the loss is that of the last epoch of training. Clicks are ranked on data of
scripts/bench/known_signal.py, where the loss is that of test events, and the loss of the true probabilities is the
limit. L = a + b (C / C0)^-c is fitted by least squares to all sizes; C0 is the geometric mean of their FLOPs.

It writes docs/benchmarks/quality/scaling. Finished runs are kept, as in run.py. It needs scipy, which "hstu[dev]" has.
"""

from __future__ import annotations

import argparse
import math
import signal
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.optimize import OptimizeWarning, curve_fit

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "bench"))

from known_signal import ACTIONS, FEATURES, preprocess, write_tables

from hstu.base.errors import EXIT_DONE, EXIT_FAILURE
from hstu.base.figure import COLOURS, GREY, open_figure
from hstu.config.tool import tool
from scripts.quality.means import number
from scripts.quality.run import OUTPUT, preprocess_table, stop_as_ctrl_c
from scripts.quality.runs import ROOT, Places, Run, read_result_file
from scripts.quality.scheduler import execute
from scripts.quality.tables import Row, Table

AXES = ("width", "depth", "length")
USERS, EVENTS = 3000, 60


@dataclass(frozen=True)
class Point:
    """A trained model: its size, and what came of it."""

    size: Mapping[str, int]
    flops: float
    loss: float
    metric: float


@dataclass(frozen=True)
class Fit:
    """L = a + b (C / C0)^-c, with standard errors."""

    a: float
    b: float
    c: float
    errors: tuple[float, float, float]
    scale: float
    """C0."""

    def at(self, flops: np.ndarray) -> np.ndarray:
        """The losses of the curve."""
        return np.asarray(self.a + self.b * (flops / self.scale) ** -self.c)


def fit_power_law(flops: Sequence[float], losses: Sequence[float]) -> Fit | None:
    """Least squares with b > 0 and c above its standard error. None: fewer than four points, or no such curve."""
    if len(flops) < 4:
        return None
    x, y = np.asarray(flops), np.asarray(losses)
    scale = math.exp(float(np.log(x).mean()))
    spread = max(float(np.ptp(y)), 1e-9)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", OptimizeWarning)  # the covariance is unknown
            found, covariance = curve_fit(
                lambda c_, a, b, c: a + b * c_**-c, x / scale, y, p0=(float(y.min()) - spread, 2 * spread, 0.3),
                bounds=([-np.inf, 0, 0], np.inf), maxfev=20_000,
            )  # fmt: skip
    except (RuntimeError, OptimizeWarning):
        return None
    a, b, c = map(float, found)
    errors = np.sqrt(np.diag(covariance))
    return Fit(a, b, c, (float(errors[0]), float(errors[1]), float(errors[2])), scale) if c > errors[2] else None


def sizes(base: Mapping[str, int], axes: Mapping[str, Sequence[int]]) -> list[dict[str, int]]:
    """The base, and the base with each other value of each axis."""
    others = [{**base, axis: value} for axis, values in axes.items() for value in values if value != base[axis]]
    return [dict(base), *others]


def row_of(size: Mapping[str, int]) -> Row:
    """The model of one size, with one head."""
    return Row(
        name=" ".join(f"{axis} {size[axis]}" for axis in AXES),
        bindings=(
            f"NetworkArgs.hidden_size = {size['width']}",
            "NetworkArgs.num_attention_heads = 1",
            f"NetworkArgs.kv_channels = {size['width']}",
            f"NetworkArgs.num_layers = {size['depth']}",
            f"DatasetArgs.max_sequence_length = {size['length']}",
        ),
    )


@dataclass(frozen=True)
class Study:
    """Sizes of models on one dataset."""

    name: str
    table: Table
    sizes: Sequence[Mapping[str, int]]
    loss_name: str
    loss_of: Callable[[Run], float]
    metric: str
    limit: float | None = None
    """The loss that no model falls below but by chance; None: it is unknown."""


def loss_of_last_epoch(run: Run) -> float:
    """The mean training loss of the last epoch."""
    _, records = read_result_file(run.result_file)
    train = [record for record in records[:-1] if record.get("kind") == "train"]
    return float(np.mean([record["loss"] for record in train if record["epoch"] > train[-1]["epoch"] - 1 + 1e-6]))


def loss_on_test(run: Run) -> float:
    """The log loss of the test events."""
    result = run.stored()
    assert result is not None
    return result.metrics["LOGLOSS"]


def films() -> Study:
    """Retrieval on MovieLens-1M: two layers of width 16 on 32 items, and other sizes."""
    axes = {"width": (4, 8, 16, 32), "depth": (1, 2, 4), "length": (8, 16, 32, 64)}
    tried = sizes({"width": 16, "depth": 2, "length": 32}, axes)
    table = Table(
        title="Next film by size", task="retrieval", dataset="ml-1m", config="configs/ml_1m_retrieval.gin",
        metrics=("HR@10",), reference="", rows=tuple(map(row_of, tried)),
        bindings=(
            'RetrievalArgs.negatives = "full"', "RetrievalArgs.num_negatives = -1",
            'RetrievalArgs.eval_metrics = ("HR@10",)',
            "TrainerArgs.train_batch_size = 64", "TrainerArgs.num_train_epochs = 4.0", "TrainerArgs.log_interval = 12",
            "OptimizerArgs.learning_rate = 2e-3", "NetworkArgs.hidden_dropout = 0.0", "DatasetArgs.valid_items = 0",
        ),
    )  # fmt: skip
    return Study("ml_1m", table, tried, "training loss of the last epoch", loss_of_last_epoch, "HR@10")


def clicks(folder: Path) -> Study:
    """Ranking on generated data, which is written and preprocessed if absent: two layers of width 16, and others."""
    test = write_tables(folder, USERS, EVENTS)
    if not (folder / "store").is_dir():
        preprocess(folder)
    p = np.clip(test[[f"p_{name}" for name in ACTIONS]].to_numpy(), 1e-12, 1 - 1e-12)
    label = test[list(ACTIONS)].to_numpy() > 0
    tried = sizes(
        {"width": 16, "depth": 2, "length": 40}, {"width": (4, 8, 16, 32), "depth": (1, 2), "length": (10, 20, 40)}
    )
    table = Table(
        title="Clicks by size", task="ranking", dataset="store", config=str(folder / "store_ranking.gin"),
        metrics=("LOGLOSS", "AUC"), reference="", rows=tuple(map(row_of, tried)),
        bindings=(
            f"DatasetArgs.side_feature_names = {FEATURES}", "DatasetArgs.known_after = []",
            f"RankingArgs.prediction_head_arch = [16, {len(ACTIONS)}]", f"RankingArgs.num_tasks = {len(ACTIONS)}",
            'RankingArgs.eval_metrics = ("LOGLOSS", "AUC")', "TrainerArgs.num_train_epochs = 4.0",
            'LRScheduleArgs.schedule = "cosine"', "OptimizerArgs.learning_rate = 3e-3", "TrainerArgs.log_interval = 10",
        ),
    )  # fmt: skip
    limit = float(-np.where(label, np.log(p), np.log1p(-p)).mean())
    return Study("known_signal", table, tried, "log loss of test events", loss_on_test, "AUC", limit)


def runs_of(study: Study, places: Places, threads: int) -> list[Run]:
    """One run per size, with seed 1."""
    return [
        Run(table_name=study.name, table=study.table, row=row, seed=1, places=places, threads=threads)
        for row in study.table.rows
    ]


def points_of(study: Study, runs: Sequence[Run]) -> list[Point]:
    """What the finished runs measured."""
    return [
        Point(size, result.flops, study.loss_of(run), result.metrics[study.metric])
        for size, run in zip(study.sizes, runs, strict=True)
        if (result := run.stored()) is not None and result.flops
    ]


def describe(study: Study, points: Sequence[Point], fit: Fit | None) -> str:
    """A section of the page."""
    lines = [f"## {study.table.title}", ""]
    lines += [f"| {' | '.join(AXES)} | training FLOPs | {study.loss_name} | {study.metric} |", "|" + "---|" * 6]
    for point in sorted(points, key=lambda point: point.flops):
        size = " | ".join(str(point.size[axis]) for axis in AXES)
        lines.append(f"| {size} | {point.flops:.2e} | {point.loss:.4f} | {number(point.metric)} |")
    lines.append("")
    if len(points) < len(study.sizes):
        lines.append(f"{len(points)} of {len(study.sizes)} sizes have been run.")
    if fit is None:
        lines.append(
            "Four points are needed for a fit." if len(points) < 4 else "These points do not determine a power law."
        )
    else:
        a, b, c = (f"{value:.3f} ± {error:.3f}" for value, error in zip((fit.a, fit.b, fit.c), fit.errors, strict=True))
        lines.append(f"L = a + b (C / {fit.scale:.2e})^-c with a = {a}, b = {b}, c = {c} (standard errors of the fit).")
    if study.limit is not None:
        lines.append(f"The loss of the true probabilities is {study.limit:.4f}.")
    return "\n".join(lines) + "\n"


def draw(found: Sequence[tuple[Study, Sequence[Point], Fit | None]], image: Path) -> None:
    """A panel for the loss and one for the metric of each study, over FLOPs; a colour for each axis."""
    with open_figure(image, size=(12, 4.4 * len(found)), dpi=120) as figure:
        for (study, points, fit), panels in zip(found, figure.subplots(len(found), 2, squeeze=False), strict=True):
            base = study.sizes[0]
            for axes, name in zip(panels, (study.loss_name, study.metric), strict=True):
                for axis, colour in zip(AXES, COLOURS, strict=False):
                    of_axis = [
                        p for p in points if all(p.size[other] == base[other] for other in AXES if other != axis)
                    ]
                    of_axis.sort(key=lambda point: point.flops)
                    values = [point.loss if name == study.loss_name else point.metric for point in of_axis]
                    axes.plot([point.flops for point in of_axis], values, "o-", color=colour, label=axis)
                axes.set(title=f"{study.table.title}: {name}", xscale="log", xlabel="training FLOPs")
            if fit is not None and points:
                ends = [point.flops for point in points]
                grid = np.geomspace(min(ends), max(ends), 50)
                panels[0].plot(grid, fit.at(grid), "--", color=GREY, label="fit")
            if study.limit is not None:
                panels[0].axhline(study.limit, color="black", linewidth=1, label="true probabilities")
            panels[0].legend()


@tool
def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", type=Path, default=ROOT / "tmp_data", help="directory of the preprocessed data")
    add("--raw", type=Path, help="directory with a directory of raw files for each dataset; else they are downloaded")
    add("--work", type=Path, default=ROOT / "runs" / "quality", help="directory for runs and generated data")
    add("--output", type=Path, default=OUTPUT / "scaling", help="directory for the page, the plot and raw metrics")
    add("--threads", type=int, default=1)
    add("--jobs", type=int, default=1, help="runs at a time")
    add("--studies", nargs="+", choices=("known_signal", "ml_1m"), default=["known_signal", "ml_1m"], help="only these")
    add("--dry-run", action="store_true", help="list the runs")
    options = parser.parse_args(arguments)
    places = Places(data=options.data.absolute(), work=options.work.absolute(), output=options.output.absolute())
    generated = Places(data=places.work / "known_signal_data", work=places.work, output=places.output)
    studies = [(films(), places), (clicks(generated.data), generated)]
    runs = {study.name: runs_of(study, where, options.threads) for study, where in studies}
    if options.dry_run:
        for run in (run for name in options.studies for run in runs[name]):
            run.check()
            print(f"{run}: {'done' if run.stored() else 'to do'}")
        return EXIT_DONE
    if "ml_1m" in options.studies:
        preprocess_table(films().table, places, options.raw)
    signal.signal(signal.SIGTERM, stop_as_ctrl_c)
    failed = []
    try:
        for name in options.studies:
            failed += execute(runs[name], options.jobs)
    finally:
        print(f"page: {write_page([study for study, _ in studies], runs, places.output)}", flush=True)
    return EXIT_FAILURE if failed else EXIT_DONE


def write_page(studies: Sequence[Study], runs: Mapping[str, Sequence[Run]], output: Path) -> Path:
    """Write README.md and the plot from the runs that are finished. Returns the path."""
    found = []
    for study in studies:
        points = points_of(study, runs[study.name])
        found.append((study, points, fit_power_law([p.flops for p in points], [p.loss for p in points])))
    output.mkdir(parents=True, exist_ok=True)
    draw(found, output / "scaling.png")
    head = (
        "# Loss and hits by size\n\nWritten by `python scripts/quality/scaling.py`. One seed. Models have one head. "
        "Length is the number of newest items or events that a model is trained on and sees.\n\n"
        "![loss and metrics over training FLOPs](scaling.png)\n"
    )
    page = output / "README.md"
    page.write_text("\n".join([head, *(describe(*each) for each in found)]), encoding="utf-8")
    return page


if __name__ == "__main__":
    sys.exit(main())
