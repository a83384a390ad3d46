"""Measure another method that predicts ratings, on the users and labels of a ranking run.

    python scripts/quality/ranking_peers.py --store tmp_data/ml-1m-running --method prediction
    python scripts/quality/ranking_peers.py --store tmp_data/ml-1m-running --method lightgbm --trials 12
    … --method catboost --train_fraction 0.8
    … --method lightgbm --settings '{"num_leaves": 15, "learning_rate": 0.05}'

The store has running statistics (preprocess_dataset.py --running_statistics). Such a statistic can be the prediction
itself. LightGBM and CatBoost learn from all statistics and features but the ids of users and items; they are optional
dependencies (pip install ".[quality]").

The users are divided as in a run with the same seed, split = "user_holdout", train_fraction = 0.6 and valid_fraction =
0.1. The number of trees is that with the least LOGLOSS of validation users.
The metrics are those of the test users: AUC>=4 of "four stars or more", and LOGLOSS of the stars as classes.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import pandas as pd

from hstu.base.errors import EXIT_DONE, ConfigError
from hstu.config.args import DatasetArgs
from hstu.config.cli import tool
from hstu.data.batches.jagged import ranges
from hstu.data.sampling.samples import build_samples
from hstu.data.sampling.splits import Split
from hstu.data.store.sequence_store import USER_FEATURE, SequenceStore
from hstu.train.metrics import auc
from scripts.quality.evaluate import COUNTED, LIKED, in_parts, influences
from scripts.quality.tables import find

SPACES: dict[str, dict[str, tuple[float, ...]]] = {
    "lightgbm": {
        "learning_rate": (0.03, 0.05, 0.1), "num_leaves": (7, 15, 31, 63), "min_data_in_leaf": (20, 100, 500),
        "feature_fraction": (0.3, 0.6, 1.0), "bagging_fraction": (0.5, 0.7, 1.0), "lambda_l2": (0.0, 1.0, 10.0, 30.0),
    },
    "catboost": {
        "learning_rate": (0.05, 0.1, 0.2), "depth": (4, 5, 6, 7), "rsm": (0.3, 0.6, 1.0), "subsample": (0.5, 0.7, 0.9),
        "l2_leaf_reg": (1.0, 3.0, 10.0, 30.0), "random_strength": (0.0, 1.0, 3.0),
    },
}  # fmt: skip
"""What the trials draw from."""
MOST_ROUNDS, PATIENCE = 1000, 30
METRIC = f"AUC>={LIKED}"
Settings = dict[str, float]


@dataclass(frozen=True)
class Labels:
    """The labelled ratings of some users.

    Args:
        events: in the store, int64 [M].
        place: number of earlier labels of the sample, int64 [M].
        users: int64 [M].
    """

    events: np.ndarray
    place: np.ndarray
    users: np.ndarray

    @classmethod
    def of(
        cls, store: SequenceStore, part: Split, seed: int, split: str = "user_holdout", train_fraction: float = 0.6
    ) -> Labels:
        """All ratings to train on, those that are counted of others."""
        args = DatasetArgs(
            dataset_name=store.name, max_sequence_length=COUNTED, window_stride=COUNTED, split=split,
            train_fraction=train_fraction, valid_fraction=0.0 if split == "time" else 0.1,
        )  # fmt: skip
        samples = build_samples(store, args, "ranking", part, seed)
        first, count = samples.stop - samples.num_labels, samples.num_labels
        events = ranges(first, count)
        return cls(events, events - np.repeat(first, count), np.repeat(samples.user, count))

    @classmethod
    def cut_in_time(cls, store: SequenceStore, fraction: float, seed: int) -> tuple[Labels, Labels, Labels]:
        """(train, valid, test): ratings before the cut, of nine in ten users to learn from and of the others to stop
        by; and those that are counted of the ratings after it."""
        before, test = (cls.of(store, part, seed, "time", fraction) for part in ("train", "test"))
        is_valid = (np.random.default_rng(seed).random(store.num_users) < 0.1)[before.users]
        order = np.argsort(before.events)  # windows are the newest first
        kept = (order[each[order]] for each in (~is_valid, is_valid))
        train, valid = (cls(*(column[rows] for column in vars(before).values())) for rows in kept)
        return train, valid, test


def require(name: str) -> ModuleType:
    """The optional library. Raises ConfigError where it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError:
        raise ConfigError(f'{name} is not installed; install it with pip install ".[quality]"') from None


def inputs(store: SequenceStore) -> pd.DataFrame:
    """What trees learn from: [E, features]."""
    user = np.repeat(np.arange(store.num_users), np.diff(store.offsets()))
    item = np.asarray(store.sequence(store.item_feature))
    columns = {name: np.asarray(store.sequence(name)) for name in store.running_statistics}
    columns |= {name: store.context(name)[user] for name in store.contextual_features if name != USER_FEATURE}
    for name in store.item_side_features:
        codes, offsets = store.item_values(name)
        if offsets is None:
            columns[name] = codes[item]
            continue
        of_item = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
        for value in range(store.cardinality(name)):
            has = np.bincount(of_item[codes == value], minlength=len(offsets) - 1).astype(np.float32)
            columns[f"{name} {value}"] = has[item]
    return pd.DataFrame(columns)


@dataclass(frozen=True)
class Trees:
    """Gradient-boosted trees that learn the stars of ratings as classes.

    Args:
        method: "lightgbm" or "catboost".
        inputs: [E, features].
        ratings: [E].
    """

    method: str
    inputs: pd.DataFrame
    ratings: np.ndarray
    seed: int
    threads: int

    def fit(self, settings: Settings, train: Labels, valid: Labels) -> tuple[Any, int]:
        """Learn from users until LOGLOSS of others no longer falls. Returns the model and its number of rounds."""
        library, y = require(self.method), np.unique(self.ratings, return_inverse=True)[1]
        learnt, stop = ((self.inputs.iloc[each.events], y[each.events]) for each in (train, valid))
        if self.method == "lightgbm":
            given = {"objective": "multiclass", "num_class": int(y.max()) + 1, "bagging_freq": 1, "max_bin": 127}
            given |= {"seed": self.seed, "num_threads": self.threads, "verbose": -1, **settings}
            data = library.Dataset(*learnt)
            until = [library.early_stopping(PATIENCE, verbose=False)]
            model = library.train(given, data, MOST_ROUNDS, [data.create_valid(*stop)], callbacks=until)
            return model, model.best_iteration
        given = {"loss_function": "MultiClass", "bootstrap_type": "Bernoulli", "border_count": 127, "verbose": False}
        given |= {"random_seed": self.seed, "thread_count": self.threads, "allow_writing_files": False, **settings}
        model = library.CatBoostClassifier(iterations=MOST_ROUNDS, **given)
        model.fit(*learnt, eval_set=stop, early_stopping_rounds=PATIENCE)
        return model, model.best_iteration_ + 1

    def answers(self, model: Any, labels: Labels) -> tuple[np.ndarray, dict[str, float]]:
        """(the probability of "liked" of each label, [M]; all metrics)."""
        predict = model.predict if self.method == "lightgbm" else model.predict_proba
        probabilities, stars = np.asarray(predict(self.inputs.iloc[labels.events])), np.unique(self.ratings)
        ratings, scores = self.ratings[labels.events], probabilities[:, stars >= LIKED].sum(1)
        of_label = probabilities[np.arange(len(ratings)), np.searchsorted(stars, ratings)]
        return scores, measure(scores, ratings, labels.place) | {"LOGLOSS": float(-np.log(of_label).mean())}

    def compare(self, count: int, train: Labels, valid: Labels) -> list[dict[str, Any]]:
        """Metrics of validation users with random settings, the same ones in each call; the best AUC last."""
        rng, found = np.random.default_rng(0), []
        for _ in range(count):
            settings = {name: rng.choice(values).item() for name, values in SPACES[self.method].items()}
            model, rounds = self.fit(settings, train, valid)
            found.append({"settings": settings, "rounds": rounds} | self.answers(model, valid)[1])
            print(json.dumps(found[-1]), file=sys.stderr, flush=True)
        return sorted(found, key=lambda each: each[METRIC])


def measure(scores: np.ndarray, ratings: np.ndarray, place: np.ndarray) -> dict[str, float]:
    """AUC of "liked" over all labels and over the parts of the samples. All arrays: [M]."""
    is_liked = ratings >= LIKED
    parts = {f"{METRIC}, {name}": auc(scores[here], is_liked[here]) for name, here in in_parts(place)}
    return {METRIC: auc(scores, is_liked)} | parts


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--store", type=Path, required=True, help="a sequence store with running statistics of ratings")
    add("--method", required=True, help=f"{', '.join(SPACES)}, or the name of a running statistic")
    add("--train_fraction", type=float, help="of the ratings; a cut in time divides them instead of users")
    add("--seed", type=int, default=1, help="TrainerArgs.seed of the run")
    add("--settings", type=json.loads, default={}, help="of trees, as JSON")
    add("--trials", type=int, help="only compare so many random settings of trees on the validation users")
    add("--threads", type=int, default=1, help="of trees")
    add("--output", type=Path, help="also write the metrics here, as JSON")
    add("--per_user", type=Path, help="also write the influence of each user on AUC here, as CSV")
    return parser.parse_args(arguments)


@tool
def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    options = parse(arguments)
    store = SequenceStore.open(options.store)
    find("method", options.method, dict.fromkeys((*SPACES, *store.running_statistics)))
    if options.train_fraction is None:
        train, valid, test = (Labels.of(store, split, options.seed) for split in ("train", "valid", "test"))
    else:
        train, valid, test = Labels.cut_in_time(store, options.train_fraction, options.seed)
    ratings = np.asarray(store.sequence(str(store.action_feature)))
    if options.method in SPACES:
        trees = Trees(options.method, inputs(store), ratings, options.seed, options.threads)
        if options.trials:
            print(*map(json.dumps, trees.compare(options.trials, train, valid)), sep="\n")
            return EXIT_DONE
        scores, metrics = trees.answers(trees.fit(options.settings, train, valid)[0], test)
    else:
        known = np.asarray(store.sequence(options.method))[test.events].astype(np.float64)
        scores = np.where(np.isnan(known), np.nanmean(known), known)  # nothing is known on the first day
        metrics = measure(scores, ratings[test.events], test.place)
    print(json.dumps(metrics))
    if options.output:
        options.output.write_text(json.dumps({"metrics": metrics}) + "\n")
    if options.per_user:
        users = store.raw_ids(USER_FEATURE)[test.users]
        influences(scores, ratings[test.events] >= LIKED, users).to_csv(options.per_user)
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
