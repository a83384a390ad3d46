"""Measure other methods that predict ratings, on the users and labels of a ranking run.

    python scripts/quality/ranking_peers.py --store tmp_data/ml-1m --seeds 1 2 3 --output peers.md

The users of a run with split = "user_holdout" and the same seed are trained on. The labels are the newest ratings of
the others, as many as DatasetArgs.max_sequence_length. All methods use the numbers of causal_features.py. Means,
neighbours and factors are such numbers themselves. LightGBM learns from all of them; it is an optional dependency (pip
install ".[quality]").

AUC>=4 is that of "four stars or more", over all labels and by the number of earlier ratings in the sample. LOGLOSS is
that of the stars as classes, of methods that give probabilities. OUTPUT is the printed table.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np

from hstu.base.errors import EXIT_DONE, ConfigError
from hstu.config.args import DatasetArgs
from hstu.config.cli import tool
from hstu.data.batches.jagged import ranges
from hstu.data.sampling.samples import SampleTable, build_samples
from hstu.data.store.sequence_store import USER_FEATURE, SequenceStore
from hstu.train.metrics import auc
from scripts.quality.causal_features import Columns, causal_features
from scripts.quality.means import mean_and_error, number
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


def table(found: Sequence[dict[str, Metrics]]) -> str:
    """Markdown: a row per method with the mean of each metric over the seeds, and its standard error."""
    names = dict.fromkeys(name for methods in found for metrics in methods.values() for name in metrics)
    lines = [f"| method | {' | '.join(names)} | seeds |", "|---" * (len(names) + 2) + "|"]
    for method in found[0]:
        values = {name: [methods[method][name] for methods in found if name in methods[method]] for name in names}
        cells = (number(*mean_and_error(each)) for each in values.values())
        lines.append(f"| {method} | {' | '.join(cells)} | {len(found)} |")
    return "\n".join(lines) + "\n"


@tool
def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path, required=True, help="a sequence store with ratings and times")
    parser.add_argument("--output", type=Path, help="file for the table")
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
    found = [peers(store, seed, args=args, threshold=options.threshold, tree_rounds=rounds) for seed in options.seeds]
    text = table(found)
    if options.output:
        options.output.write_text(text)
    print(text, end="")
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
