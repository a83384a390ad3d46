"""Evaluate a trained model: a run, a checkpoint or an export, on any split, with any metric of its task.

python scripts/evaluate.py --run_dir runs/quickstart
python scripts/evaluate.py --run_dir runs/quickstart --metrics HR@10,MRR --segments history,popularity --output t.json
torchrun --nproc_per_node 2 scripts/evaluate.py --checkpoint runs/a/checkpoints --compare runs/b

Intervals are percentiles of a bootstrap over users. Several ranks divide the users and the resamples.
"""

from __future__ import annotations

import argparse
import json
import math
import signal
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports ends the program without a traceback

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a checkout, installed or not

from tabulate import tabulate

from hstu.base.errors import EXIT_DONE, ConfigError, printable
from hstu.config.tool import tool
from hstu.observe.logging import quiet_libraries
from hstu.serve.command import add_model_arguments, check_new, load_model, note, require_model, write_text
from hstu.serve.evaluation import Evaluation, Interval, Resampling, Scores, choose_split, compare, evaluate_split
from hstu.serve.loaded import LoadedModel

_SHOWN_SEGMENTS = 30


@tool
def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = _parser()
    options = parser.parse_args(arguments)
    require_model(parser, options)
    if options.resamples < 0:
        parser.error("--resamples must be at least 0")
    if not 0 < options.confidence < 1:
        parser.error("--confidence must be between 0 and 1, such as 0.95")
    if options.output:
        check_new(options.output)
    quiet_libraries()
    document = _evaluate(options)
    if document is not None:
        print(_as_text(document))
        if options.output:
            write_text(options.output, json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    return EXIT_DONE


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add_model_arguments(parser)
    add("--split", help="valid or test; default: the last that the run evaluates")
    add("--metrics", help="metrics of the task, separated by commas; default: those of the run")
    add(
        "--segments",
        default="",
        help="also give the metrics by history (events that the model has read), popularity (ten parts of the items), "
        "cold (items that training has not seen) or a contextual feature; separated by commas",
    )
    add("--compare", help="another run, checkpoint or export to compare with on the same users")
    add("--resamples", type=int, default=200, help="resamples of the bootstrap (default 200); 0: no intervals")
    add("--confidence", type=float, default=0.95, help="share of the resamples in an interval (default 0.95)")
    add("--seed", type=int, default=0, help="seed of the resamples (default 0)")
    add("--output", type=Path, help="JSON file to write")
    return parser


def _evaluate(options: argparse.Namespace) -> dict[str, Any] | None:
    """The document to write, on one rank. Collective."""
    loaded = load_model(LoadedModel, options)
    evaluation = _predict(loaded, options)
    resampling = Resampling(loaded.mesh, options.resamples, options.confidence, options.seed)
    _progress(evaluation, f"predictions={len(evaluation.observations):,}")
    document: dict[str, Any] = {
        "checkpoint": str(loaded.checkpoint),
        "data": str(loaded.with_data().eval_store.path),
        "split": evaluation.split,
        "resamples": options.resamples,
        "confidence": options.confidence,
        **_as_json(evaluation.scores(resampling)),
        "segments": {},
    }
    for by in dict.fromkeys(filter(None, options.segments.split(","))):
        document["segments"][by] = {name: _as_json(scores) for name, scores in evaluation.by_segment(by, resampling)}
        _progress(evaluation, f"segments={by}")
    if options.compare:
        other = LoadedModel.load(options.compare, mesh=loaded.mesh, data=options.data)
        if other.config.task != loaded.config.task:
            raise ConfigError(
                f"--compare {options.compare}: it is a {other.config.task} model, and {loaded.checkpoint} a "
                f"{loaded.config.task} model; compare models of one task"
            )
        note(other, *other.report)
        users, differences = compare(evaluation, _predict(other, options), resampling)
        document["comparison"] = {
            "with": str(other.checkpoint),
            "users": users,
            "metrics": {name: _finite(asdict(difference)) for name, difference in differences.items()},
        }
    return document if loaded.mesh.is_main else None


def _progress(evaluation: Evaluation, done: str) -> None:
    """Resamples of many predictions take minutes."""
    if evaluation.loaded.mesh.is_main:
        print(f"evaluate split={evaluation.split} {done}", file=sys.stderr)


def _predict(loaded: LoadedModel, options: argparse.Namespace) -> Evaluation:
    metrics = [name for name in options.metrics.split(",") if name] if options.metrics else None
    return evaluate_split(loaded, choose_split(loaded.with_data(), options.split), metrics)


def _as_json(scores: Scores) -> dict[str, Any]:
    document: dict[str, Any] = _finite(asdict(scores))
    return document


def _finite(value: Any) -> Any:
    """The same with None for what is not a number, which JSON does not have."""
    if isinstance(value, dict):
        return {name: _finite(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _as_text(document: dict[str, Any]) -> str:
    """The document as tables."""
    whole = [["metric", "value", f"{100 * document['confidence']:g} % interval"]]
    whole += [
        [name, _number(value), _interval(document["intervals"].get(name))]
        for name, value in document["metrics"].items()
    ]
    counts = f"{document['users']:,} users, {document['predictions']:,} predictions"
    blocks = [f"{document['checkpoint']}\n{document['split']} of {document['data']}: {counts}", _table(whole)]
    for by, segments in document["segments"].items():
        blocks.append(_table([[by, "users", "predictions", *document["metrics"]], *_rows(segments)]))
        if len(segments) > _SHOWN_SEGMENTS:
            blocks[-1] += f"\n{len(segments) - _SHOWN_SEGMENTS} smaller segments are in the file of --output"
    if "comparison" in document:
        found = document["comparison"]
        rows = [
            [
                name,
                _number(entry["this"]),
                _number(entry["other"]),
                _number(entry["difference"], signed=True),
                _interval(entry["interval"], signed=True),
                "-" if entry["share_above"] is None else f"{100 * entry['share_above']:.1f} %",
            ]
            for name, entry in found["metrics"].items()
        ]
        head = ["metric", "this", "other", "this - other", "interval", "above 0"]
        blocks.append(f"other: {found['with']}, {found['users']:,} users of both\n{_table([head, *rows])}")
    return "\n\n".join(blocks)


def _rows(segments: dict[str, Any]) -> list[list[str]]:
    largest = sorted(segments, key=lambda name: -segments[name]["predictions"])[:_SHOWN_SEGMENTS]
    return [
        [printable(name, keep=""), f"{entry['users']:,}", f"{entry['predictions']:,}"]
        + [
            f"{_number(value)} {_interval(entry['intervals'].get(metric))}"
            for metric, value in entry["metrics"].items()
        ]
        for name, entry in segments.items()
        if name in largest
    ]


def _number(value: float | None, signed: bool = False) -> str:
    return "-" if value is None else f"{value:{'+' if signed else ''}.4f}"


def _interval(interval: Interval | None, signed: bool = False) -> str:
    return "" if interval is None or None in interval else f"[{', '.join(_number(end, signed) for end in interval)}]"


def _table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of texts as columns of equal width."""
    return tabulate(rows, tablefmt="plain", disable_numparse=True)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(main())
