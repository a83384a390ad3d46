"""Evaluate a checkpoint of ranking on the test split, once, and write the metrics as JSON.

    python scripts/quality/evaluate.py --ckpt checkpoints/a/best --output test.json --per_user users.csv

The checkpoint predicts stars as classes, with the metric AUC>=4. Counted are the newest 200 ratings of each user,
however long a history the model reads. Metrics AUC>=K are also given by the place among them: "AUC>=4, 1-20" and so on.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import pandas as pd

from hstu.base.errors import EXIT_DONE
from hstu.config.cli import tool
from hstu.observe.logging import quiet_libraries
from hstu.serve.loaded import LoadedModel
from hstu.serve.predict import Evaluation, evaluate_split
from hstu.train.evaluate import Observations

LIKED = 4
"""The least number of stars that counts as liked."""
COUNTED = 200
"""The newest ratings of a user that are counted, so that rows with longer and shorter histories compare."""
PARTS = {"1-20": (0, 20), "21-50": (20, 50), "51-100": (50, 100), "101+": (100, sys.maxsize)}
"""Parts of what is counted, by the number of the user's earlier ratings in it."""


def in_parts(place: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """For each part, which labels are in it: bool [M]. place: number of earlier counted ratings, int64 [M]."""
    for name, (first, end) in PARTS.items():
        yield name, (first <= place) & (place < end)


def influences(scores: np.ndarray, is_liked: np.ndarray, users: np.ndarray) -> pd.Series:
    """What each user contributes to AUC − its mean, by user. All arrays: [M].

    The sum of squares estimates the variance of AUC over users (Obuchowski, Biometrics 53, 1997: clustered data), and
    that of the differences of two methods the variance of their difference.
    """
    ranks = pd.Series(scores).rank()
    above = np.zeros(len(scores))  # the share of the other class that is on the right side, less AUC
    for here, sign in ((is_liked, 1), (~is_liked, -1)):
        shares = (ranks[here] - ranks[here].rank()) / (~here).sum()
        above[here] = sign * (shares - shares.mean()) / here.sum()
    return pd.Series(above, name="influence").groupby(users).sum().rename_axis("user")


def counted(observations: Observations) -> Observations:
    """The newest ``COUNTED`` ratings of each user."""
    age = pd.Series(observations.events).groupby(observations.users).rank(ascending=False)
    return observations.select(age.to_numpy() <= COUNTED)


def by_place(evaluation: Evaluation) -> dict[str, float]:
    """AUC>=K over the parts of what is counted."""
    observations = evaluation.observations
    place = pd.Series(observations.events).groupby(observations.users).rank().to_numpy() - 1
    return {
        f"{name}, {part}": value
        for part, here in in_parts(place)
        for name, value in evaluation.evaluator.metrics(observations.select(here)).items()
        if name.startswith("AUC>=")
    }


@tool
def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt", type=Path, required=True, help="a checkpoint, whose configuration is used")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--per_user", type=Path, required=True, help="CSV file: the influence of each user on AUC>=4")
    options = parser.parse_args(arguments)
    quiet_libraries()
    loaded = LoadedModel.load(options.ckpt)
    evaluation = evaluate_split(loaded, "test")
    evaluation = replace(evaluation, observations=counted(evaluation.observations))
    metrics = evaluation.metrics() | by_place(evaluation)
    rows = evaluation.rows(loaded).to_pandas()
    liked = [name for name in rows if name.startswith("p_") and int(name.removeprefix("p_")) >= LIKED]
    scores, is_liked = rows[liked].sum(axis=1).to_numpy(), rows["label"].to_numpy() >= LIKED
    influences(scores, is_liked, rows["user"].to_numpy()).to_csv(options.per_user)
    options.output.write_text(json.dumps({"metrics": metrics}) + "\n")
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
