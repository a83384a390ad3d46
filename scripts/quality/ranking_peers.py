"""Measure other methods that predict ratings, on the users and labels of a ranking run.

    python scripts/quality/ranking_peers.py --store tmp_data/ml-1m --seeds 1 2 3 --output runs/ml_1m_peers

The users of a run with split = "user_holdout" and the same seed are trained on. The labels are the newest ratings of
the others, as many as DatasetArgs.max_sequence_length. All methods use the numbers of causal_features.py: what was
known before each rating. Means, neighbours and factors are such numbers themselves. LightGBM learns from all of them;
it is an optional dependency (pip install ".[quality]").

AUC>=4 is that of "four stars or more", over all labels and by the number of earlier ratings in the sample. LOGLOSS is
that of the stars as classes, of methods that give probabilities. OUTPUT/metrics.jsonl has a line per method and seed;
the same command continues where an earlier one was stopped. The printed table is also in OUTPUT/table.md.
"""

from __future__ import annotations

import argparse
import importlib
import json
import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports ends the program without a traceback

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np

from hstu.base.errors import EXIT_DONE, ConfigError
from hstu.config.args import DatasetArgs
from hstu.config.tool import tool
from hstu.data.batches.jagged import ranges
from hstu.data.sampling.samples import SampleTable, build_samples
from hstu.data.store.sequence_store import USER_FEATURE, SequenceStore
from hstu.train.metrics import auc
from scripts.quality.causal_features import Columns, causal_features
from scripts.quality.means import mean_and_error
from scripts.quality.ratings import Ratings, in_parts

SCORES = {
    "item mean": "item_mean",
    "item mean + running user mean": "baseline",
    "item-kNN": "knn",
    "online factor model": "factor_prediction",
}
"""Method → the number that is its prediction."""
TREES = "LightGBM on all numbers"
TREE_SETTINGS = {
    "objective": "multiclass", "learning_rate": 0.05, "num_leaves": 31, "min_data_in_leaf": 200, "max_bin": 127,
    "feature_fraction": 0.3, "bagging_fraction": 0.7, "bagging_freq": 1, "lambda_l2": 10.0, "verbose": -1,
}  # fmt: skip
"""Parameters of LightGBM."""
Metrics = dict[str, float]


@dataclass(frozen=True)
class Labels:
    """The labelled ratings of the held-out users.

    Args:
        events: in the store, int64 [M].
        place: number of earlier ratings in the sample, int64 [M].
        rating: [M].
    """

    events: np.ndarray
    place: np.ndarray
    rating: np.ndarray

    @classmethod
    def of(cls, ratings: Ratings, samples: SampleTable) -> Labels:
        """The labels of the samples of an evaluation."""
        lengths = samples.stop - samples.start
        events = ranges(samples.stop - samples.num_labels, samples.num_labels)
        place = events - np.repeat(samples.start, samples.num_labels)
        assert lengths.sum() == len(events), "all ratings of a sample are labels"
        return cls(events, place, ratings.rating[events])


def measure(scores: np.ndarray, labels: Labels, threshold: int) -> Metrics:
    """AUC of "at least ``threshold`` stars" over all labels and over the parts of the samples. scores: [M]."""
    is_liked = labels.rating >= threshold
    found = {f"AUC>={threshold}": auc(scores, is_liked)}
    for name, here in in_parts(labels.place):
        found[f"AUC>={threshold}, {name}"] = auc(scores[here], is_liked[here])
    return found


def require_lightgbm() -> ModuleType:
    """The optional library. Raises ConfigError where it is not installed."""
    try:
        return importlib.import_module("lightgbm")
    except ImportError:
        text = 'LightGBM is not installed; install it with pip install ".[quality]", or leave it out with --no_trees'
        raise ConfigError(text) from None


def train_trees(
    store: SequenceStore, ratings: Ratings, columns: Columns, labels: Labels, seed: int, rounds: int
) -> tuple[np.ndarray, np.ndarray]:
    """(the ratings that occur, the probability of each of them, float64 [M, ratings]) of gradient-boosted trees."""
    lightgbm = require_lightgbm()
    contexts = [name for name in store.contextual_features if name != USER_FEATURE]
    of_users = {name: np.asarray(store.context(name))[ratings.user] for name in contexts}
    inputs = np.stack([values.astype(np.float32) for values in (columns | of_users).values()], axis=1)
    in_training = ratings.fold[ratings.user] != ratings.held_out
    stars, classes = np.unique(ratings.rating, return_inverse=True)
    data = lightgbm.Dataset(inputs[in_training], classes[in_training])
    settings = TREE_SETTINGS | {"num_class": len(stars), "seed": seed}
    found = lightgbm.train(settings, data, rounds).predict(inputs[labels.events])
    return stars, np.asarray(found)


def peers(
    store: SequenceStore, seed: int, *, args: DatasetArgs, threshold: int = 4, folds: int = 5, tree_rounds: int = 200
) -> dict[str, Metrics]:
    """Method → its metrics on the held-out users of a run with this seed; without LightGBM for ``tree_rounds`` = 0."""
    ratings = Ratings.of(store, seed, args.train_fraction, folds)
    columns = causal_features(store, ratings)
    labels = Labels.of(ratings, build_samples(store, args, "ranking", "valid", seed))
    found = {name: measure(columns[column][labels.events], labels, threshold) for name, column in SCORES.items()}
    if tree_rounds:
        stars, probabilities = train_trees(store, ratings, columns, labels, seed, tree_rounds)
        found[TREES] = measure(probabilities[:, stars >= threshold].sum(1), labels, threshold)
        of_label = probabilities[np.arange(len(labels.rating)), np.searchsorted(stars, labels.rating)]
        found[TREES]["LOGLOSS"] = float(-np.log(of_label).mean())
    return found


def table(records: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: a row per method with the mean of each metric over the seeds, and its standard error."""
    methods = dict.fromkeys(record["method"] for record in records)
    names = dict.fromkeys(name for record in records for name in record["metrics"])
    lines = [f"| method | {' | '.join(names)} | seeds |", "|---" * (len(names) + 2) + "|"]
    for method in methods:
        of_method = [record["metrics"] for record in records if record["method"] == method]
        cells = [_mean([metrics[name] for metrics in of_method if name in metrics]) for name in names]
        lines.append(f"| {method} | {' | '.join(cells)} | {len(of_method)} |")
    return "\n".join(lines) + "\n"


def _mean(values: Sequence[float]) -> str:
    if not values:
        return ""
    mean, error = mean_and_error(values)
    return f"{mean:.4f}" if np.isnan(error) else f"{mean:.4f} ± {error:.4f}"


@tool
def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path, required=True, help="a sequence store with ratings and times")
    parser.add_argument("--output", type=Path, required=True, help="directory for the results")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1], help="TrainerArgs.seed of the runs")
    parser.add_argument("--train_fraction", type=float, default=0.7, help="DatasetArgs.train_fraction of the runs")
    parser.add_argument("--labels", type=int, default=200, help="DatasetArgs.max_sequence_length of the runs")
    parser.add_argument("--threshold", type=int, default=4, help="the least rating that counts as liked")
    parser.add_argument("--tree_rounds", type=int, default=200, help="of LightGBM")
    parser.add_argument("--no_trees", action="store_true", help="leave out LightGBM")
    options = parser.parse_args(arguments)
    store = SequenceStore.open(options.store)
    args = DatasetArgs(
        dataset_name=store.path.name, max_sequence_length=options.labels, train_fraction=options.train_fraction
    )
    rounds = 0 if options.no_trees else options.tree_rounds
    if rounds:
        require_lightgbm()
    settings = {
        "store": store.path.name, "train_fraction": options.train_fraction, "labels": options.labels,
        "threshold": options.threshold, "tree_rounds": rounds,
    }  # fmt: skip
    options.output.mkdir(parents=True, exist_ok=True)
    file = options.output / "metrics.jsonl"
    earlier = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    records = [record for record in earlier if record["settings"] == settings and record["seed"] in options.seeds]
    for seed in options.seeds:
        if any(record["seed"] == seed for record in records):
            continue
        found = peers(store, seed, args=args, threshold=options.threshold, tree_rounds=rounds)
        new = [
            {"method": name, "seed": seed, "settings": settings, "metrics": metrics} for name, metrics in found.items()
        ]
        with file.open("a") as lines:
            lines.write("".join(f"{json.dumps(record)}\n" for record in new))
        records += new
    (options.output / "table.md").write_text(text := table(records))
    print(text, end="")
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
