"""All ratings of a store with the split of a run, and how features are kept from their own labels: cross-fitting.

The training users are divided into folds. What is estimated from the ratings of others (means of items, similarities,
factors) is estimated once per fold, from the training users outside it, and applied to the users of the fold. The
held-out users get what is estimated from all training users. So no feature of a user depends on another's held-out
ratings, and none on the user's own ratings but the earlier ones.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pandas as pd

from hstu.base.errors import DataError
from hstu.base.hashing import random_bits
from hstu.config.args import DatasetArgs
from hstu.data.batches.jagged import ranges, run_indices
from hstu.data.sampling.samples import build_samples
from hstu.data.store.sequence_store import USER_FEATURE, SequenceStore

PARTS = {"1-20": (0, 20), "21-50": (20, 50), "51-100": (50, 100), "101+": (100, sys.maxsize)}
"""Parts of a sample, by the number of its earlier ratings."""
_FOLD_STREAM = 0x464F_4C44


def in_parts(place: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """For each part, which labels are in it: bool [M]. place: number of earlier ratings in the sample, int64 [M]."""
    for name, (first, end) in PARTS.items():
        yield name, (first <= place) & (place < end)


@dataclass(frozen=True)
class Ratings:
    """E ratings of U users, one user after another, each in time order.

    Args:
        offsets: user u has the ratings [offsets[u], offsets[u + 1]); int64 [U + 1].
        item: code below num_items, int64 [E].
        rating: float64 [E].
        time: seconds, int64 [E].
        fold: of each user, int64 [U]; ``held_out`` for users who are not trained on.
        held_out: the number of folds of training users.
    """

    offsets: np.ndarray
    item: np.ndarray
    rating: np.ndarray
    time: np.ndarray
    fold: np.ndarray
    num_items: int
    held_out: int

    @classmethod
    def of(cls, store: SequenceStore, seed: int, train_fraction: float, num_folds: int) -> Ratings:
        """The ratings of a store, whose users are divided as in a run with the same seed and split = "user_holdout"."""
        if store.action_feature is None or store.timestamp_feature is None:
            raise DataError(f"{store.path} has no ratings or no times; preprocess the data with --action and --time")
        if store.split is not None:
            raise DataError(
                f"{store.path} has a split of its own (column {store.split!r}), and features are made for a split of "
                "users; preprocess the data without --split"
            )
        args = DatasetArgs(dataset_name=store.path.name, max_sequence_length=200, train_fraction=train_fraction)
        trained = build_samples(store, args, "ranking", "train", seed).user
        fold = np.full(store.num_users, num_folds)
        keys = np.asarray(store.raw_ids(USER_FEATURE)[trained])
        if keys.dtype != np.int64:
            keys = trained
        fold[trained[np.argsort(random_bits(seed, _FOLD_STREAM, keys))]] = np.arange(len(trained)) % num_folds
        return cls(
            offsets=np.asarray(store.offsets(), dtype=np.int64),
            item=np.asarray(store.sequence(store.item_feature), dtype=np.int64),
            rating=np.asarray(store.sequence(store.action_feature), dtype=np.float64),
            time=np.asarray(store.sequence(store.timestamp_feature), dtype=np.int64),
            fold=fold,
            num_items=store.cardinality(store.item_feature),
            held_out=num_folds,
        )

    def __len__(self) -> int:
        """E."""
        return len(self.item)

    @property
    def lengths(self) -> np.ndarray:
        """Ratings of each user."""
        return np.diff(self.offsets)

    @cached_property
    def user(self) -> np.ndarray:
        """The user of each rating, int64 [E]."""
        return np.repeat(np.arange(len(self.lengths)), self.lengths)

    @cached_property
    def place(self) -> np.ndarray:
        """How many ratings of the user are earlier, int64 [E]."""
        return run_indices(self.lengths)[1]

    def folds(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """For each fold and for the held-out users: (users to estimate from, users to apply it to)."""
        for fold in range(self.held_out + 1):
            estimated_from = (self.fold != fold) & (self.fold != self.held_out)
            if (applied_to := np.flatnonzero(self.fold == fold)).size:
                yield np.flatnonzero(estimated_from), applied_to

    def events_of(self, users: np.ndarray) -> np.ndarray:
        """The ratings of some users, int64."""
        return ranges(self.offsets[users], self.lengths[users])

    def steps(self, users: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """The t-th ratings of all users that have so many, t = 0, 1, …: (places in ``users``, ratings).

        It makes one vectorised step of what must go from rating to rating.
        """
        lengths = self.lengths[users]
        order = np.argsort(-lengths, kind="stable")
        starts = self.offsets[users][order]
        having = np.searchsorted(-lengths[order], -np.arange(lengths.max(initial=0)), side="left")
        for step, count in enumerate(having.tolist()):
            yield order[:count], starts[:count] + step


def sums_before(values: np.ndarray, group: np.ndarray) -> np.ndarray:
    """The sum of the earlier values of the same group, float64 [n]. Others have no influence, not even by rounding."""
    earlier = pd.Series(values, dtype=np.float64).groupby(group).shift(1, fill_value=0.0)
    return earlier.groupby(group).cumsum().to_numpy()
