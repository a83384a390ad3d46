"""Evaluate a trained model: a run, a checkpoint or an export, on any split or period, with any metric of its task.

python scripts/evaluate.py --run_dir runs/quickstart
python scripts/evaluate.py --run_dir runs/quickstart --metrics HR@10,MRR --output test.json --per_user ranks.parquet
python scripts/evaluate.py --run_dir runs/quickstart --since 1998-04-01 --until 1998-04-08
torchrun --nproc_per_node 2 scripts/evaluate.py --run_dir runs/a --data tmp_data/newer
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import signal
import sys
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports ends the program without a traceback

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a checkout, installed or not

import pyarrow.parquet as pq
from pyarrow.csv import write_csv
from tabulate import tabulate

from hstu.base.errors import EXIT_DONE
from hstu.base.files import replace_text, written_aside
from hstu.base.times import as_date
from hstu.config.cli import check_new, parse_time, tool
from hstu.data.sampling.splits import Period, Split
from hstu.observe.logging import progress_log, quiet_libraries
from hstu.serve.command import add_model_arguments, load_model, require_model
from hstu.serve.loaded import LoadedModel
from hstu.serve.predict import Evaluation, choose_split, evaluate_split


class Results(NamedTuple):
    """What is reported of an evaluation. All ranks take part in computing it."""

    metrics: dict[str, float]
    users: int
    predictions: int
    by_gap: dict[str, tuple[int, dict[str, float]]]
    new: dict[str, tuple[int, int]]
    """Of a period: "new_users" and "new_items" → (number of them, number of their predictions)."""
    half_widths: dict[str, float]


@tool
def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    options, period = _parse(arguments)
    quiet_libraries()
    loaded = load_model(LoadedModel, options)
    if loaded.mesh.is_main:
        progress_log.setLevel(logging.INFO)
        progress_log.propagate = False  # libraries have given the root logger a handler
        progress_log.addHandler(logging.StreamHandler())
    split = period or choose_split(loaded.with_data(), options.split)
    metrics = [name for name in options.metrics.split(",") if name] if options.metrics else None
    evaluation = evaluate_split(loaded, split, metrics)
    results = Results(
        evaluation.metrics(),
        *evaluation.counts(),
        evaluation.by_gap(loaded),
        evaluation.new_counts() if period else {},
        evaluation.half_widths() if options.output else {},
    )
    rows = evaluation.rows(loaded) if options.per_user else None
    if not loaded.mesh.is_main:
        return EXIT_DONE
    _print(loaded, split, evaluation, results)
    if rows is not None:
        with written_aside(options.per_user) as aside:
            write = pq.write_table if options.per_user.suffix == ".parquet" else write_csv
            write(rows, aside)
    if options.output:
        document = _document(loaded, split, evaluation, results)
        replace_text(options.output, json.dumps(document, indent=1, ensure_ascii=False) + "\n")
    return EXIT_DONE


def _parse(arguments: Sequence[str] | None) -> tuple[argparse.Namespace, Period | None]:
    """The arguments, and the period that they name. Exits with a usage error if they are wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_arguments(parser)
    parser.add_argument("--split", help="valid or test; default: the last that the run evaluates")
    for name, which in (("since", "at or after"), ("until", "before")):
        parser.add_argument(
            f"--{name}",
            type=partial(parse_time, option=f"--{name}"),
            help=f"instead of a split: each event {which} this time, predicted from what was before it; seconds since "
            "1970, or a date in UTC such as 2026-01-31T18:00",
        )
    parser.add_argument("--first", action="store_true", help="of a period, only the first event of each user")
    parser.add_argument("--most", type=int, help="of a period, evaluate at most this many events, drawn at random")
    parser.add_argument("--metrics", help="metrics of the task, separated by commas; default: those of the run")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument(
        "--per_user",
        type=Path,
        help=".parquet or .csv file to write: the rank and score, or label and score, of each target",
    )
    options = parser.parse_args(arguments)
    require_model(parser, options)
    period = _period(parser, options)
    if options.per_user and options.per_user.suffix not in (".parquet", ".csv"):
        parser.error("--per_user takes the name of a .parquet or .csv file")
    for path in filter(None, (options.output, options.per_user)):
        check_new(path)
    return options, period


def _print(loaded: LoadedModel, split: Split | Period, evaluation: Evaluation, results: Results) -> None:
    data = loaded.with_data().eval_store.path
    seen = ", without the items that a user had before (filter_seen)" if loaded.leaves_out_seen else ""
    print(
        f"{loaded.checkpoint}\n{split} of {data}: {results.users:,} users, {results.predictions:,} predictions{seen}\n"
    )
    if evaluation.held_out is not None:
        skipped = evaluation.held_out - evaluation.not_drawn - results.predictions
        why = "no event before" if loaded.dataset.same_second_targets else "none before, or one in the same second"
        print(f"{evaluation.held_out:,} events, {skipped:,} of them not predicted: {why}")
        if isinstance(split, Period) and split.most is not None:
            print(f"{evaluation.not_drawn:,} more are not among those that were drawn")
        for name, (count, of_new) in results.new.items():
            print(f"{count:,} {name.replace('_', ' ')}, {of_new:,} predictions")
        print()
    print(tabulate(results.metrics.items(), headers=("metric", "value"), tablefmt="plain", floatfmt=".4f"))
    if results.by_gap:
        kinds = [*dict.fromkeys(name.partition("/")[0] for name in results.metrics)][:2]
        shown = [name for name in results.metrics if name.partition("/")[0] in kinds and "/new_" not in name]
        lines = [(name, count, *(values[each] for each in shown)) for name, (count, values) in results.by_gap.items()]
        print("\nBy the time since the event before:\n")
        print(tabulate(lines, headers=("gap", "targets", *shown), tablefmt="plain", floatfmt=".4f"))


def _document(loaded: LoadedModel, split: Split | Period, evaluation: Evaluation, results: Results) -> dict[str, Any]:
    """The content of --output."""
    evaluated: dict[str, Any] = {"split": split}
    if isinstance(split, Period):
        counts = {name: {"count": count, "predictions": of_new} for name, (count, of_new) in results.new.items()}
        evaluated = {"period": asdict(split), "events": evaluation.held_out, "new": counts}
    return {
        "checkpoint": str(loaded.checkpoint),
        "model": loaded.version,
        "data": str(loaded.with_data().eval_store.path),
        **evaluated,
        "half_widths": results.half_widths,
        "users": results.users,
        "predictions": results.predictions,
        "metrics": {name: value if math.isfinite(value) else None for name, value in results.metrics.items()},
        "by_gap": {name: {"targets": count, "metrics": values} for name, (count, values) in results.by_gap.items()},
    }


def _period(parser: argparse.ArgumentParser, options: argparse.Namespace) -> Period | None:
    """The period that the arguments name, or None. Exits with a usage error if they contradict each other."""
    if options.since is None and options.until is None:
        if options.first or options.most is not None:
            parser.error("--first and --most need --since, --until or both")
        return None
    if options.split:
        parser.error("give --split, or --since and --until")
    if None not in (options.since, options.until) and options.since >= options.until:
        parser.error(f"the period is empty: --until {as_date(options.until)} is not after --since")
    if options.most is not None and options.most < 1:
        parser.error(f"--most {options.most}: give 1 or more")
    return Period(options.since, options.until, options.first, options.most)


if __name__ == "__main__":
    sys.exit(main())
