"""The protocol of retrieval for methods that are not HSTU: the histories to learn from, the targets, and their ranks.

The events are those of a run with DatasetArgs.valid_items = 1: the last of each user is the test target, the one before
it the validation target. A target is ranked among all items of the store without those that its user has seen.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from hstu.base.errors import DataError
from hstu.config.args import DatasetArgs
from hstu.data.batches.jagged import ranges, run_indices, run_offsets
from hstu.data.sampling.samples import SampleTable, build_samples
from hstu.data.store.sequence_store import SequenceStore

METRICS = ("HR@10", "NDCG@10", "HR@50", "MRR")
_BLOCK_USERS = 512
"""Users whose rows over all items are in memory at once."""
MOST_ITEMS = 30_000
"""Items × items in float64 take 7 GB there, of which EASE needs two."""


@dataclass(frozen=True, eq=False)
class Histories:
    """Items of U users, one user after another, oldest first. Equal to itself alone, so that results can be cached."""

    items: np.ndarray
    """int64 [n], each in [0, num_items)."""
    lengths: np.ndarray
    """int64 [U]"""
    num_items: int
    """Items of the store."""

    def __len__(self) -> int:
        """U."""
        return len(self.lengths)

    def block(self, first: int, stop: int) -> Histories:
        """The users [first, stop)."""
        bounds = run_offsets(self.lengths)
        return Histories(self.items[bounds[first] : bounds[stop]], self.lengths[first:stop], self.num_items)

    def places(self) -> tuple[np.ndarray, np.ndarray]:
        """(user, number of later events of that user) of each event, int64 [n]."""
        user, place = run_indices(self.lengths)
        return user, self.lengths[user] - 1 - place

    @cached_property
    def co_occurrences(self) -> np.ndarray:
        """float64 [num_items, num_items]: users whose history has both items; on the diagonal, users of the item."""
        if self.num_items > MOST_ITEMS:
            raise DataError(
                f"the data has {self.num_items:,} items, and item-kNN and EASE keep a matrix of items × items in "
                f"memory; allowed are {MOST_ITEMS:,}; leave them out with --peers"
            )
        counts = np.zeros((self.num_items, self.num_items))
        for first in range(0, len(self), _BLOCK_USERS):
            matrix = self.block(first, min(first + _BLOCK_USERS, len(self))).matrix()
            counts += matrix.T @ matrix  # whole numbers below 2^24, so float32 is exact
        return counts

    def matrix(self, weights: np.ndarray | float = 1.0) -> np.ndarray:
        """float32 [U, num_items]: the largest of the weights [n] of an item in a history; 0 for other items."""
        matrix = np.zeros((len(self), self.num_items), dtype=np.float32)
        np.maximum.at(matrix, (self.places()[0], self.items), np.float32(weights))
        return matrix


Score = Callable[[Histories], np.ndarray]
"""Histories of U users → scores float [U, num_items] of what they do next; higher is better."""


@dataclass(frozen=True)
class HeldOut:
    """The targets of one split: for each user all events before the target, and its item."""

    histories: Histories
    targets: np.ndarray
    """int64 [U]"""


@dataclass(frozen=True)
class Splits:
    """What is learnt from, and what is predicted."""

    train: Histories
    """Without the validation and the test targets."""
    train_and_valid: Histories
    """Without the test targets alone."""
    valid: HeldOut
    test: HeldOut


def read_splits(store: SequenceStore) -> Splits:
    """The splits of a store. DataError if its data says itself which events are train, valid and test."""
    if store.split is not None:
        raise DataError(
            f"{store.path} has a split of its own (column {store.split!r}), and the peers hold out the last two items "
            "of each user; preprocess the data without --split"
        )

    def samples(split: str, valid_items: int = 1) -> SampleTable:
        args = DatasetArgs(dataset_name=store.name, max_sequence_length=200, valid_items=valid_items)
        return build_samples(store, args, "retrieval", split, seed=0)  # type: ignore[arg-type]

    train, train_and_valid = samples("train"), samples("train", valid_items=0)
    return Splits(
        train=_histories(store, train, train.stop),
        train_and_valid=_histories(store, train_and_valid, train_and_valid.stop),
        valid=_held_out(store, samples("valid")),
        test=_held_out(store, samples("test")),
    )


def _histories(store: SequenceStore, samples: SampleTable, stop: np.ndarray) -> Histories:
    """The whole histories of samples until ``stop``, those events included that are too old for a model's sequence."""
    lengths = stop - samples.history_begin
    items = np.asarray(store.sequence(store.item_feature))[ranges(samples.history_begin, lengths)]
    return Histories(items.astype(np.int64), lengths, store.cardinality(store.item_feature))


def _held_out(store: SequenceStore, samples: SampleTable) -> HeldOut:
    assert samples.target is not None
    targets = np.asarray(store.sequence(store.item_feature))[samples.target].astype(np.int64)
    return HeldOut(_histories(store, samples, samples.target), targets)


def target_ranks(score: Score, held_out: HeldOut) -> np.ndarray:
    """Rank of each target, float64 [U]: 1 is best, and equal scores get midranks.

    Items in a history are left out, but never the target itself.
    """
    ranks = [np.zeros(0)]
    for first in range(0, len(held_out.targets), _BLOCK_USERS):
        stop = min(first + _BLOCK_USERS, len(held_out.targets))
        histories, targets = held_out.histories.block(first, stop), held_out.targets[first:stop]
        scores = np.array(score(histories), dtype=np.float64)
        own = scores[np.arange(len(targets)), targets]
        if not np.isfinite(own).all():
            raise FloatingPointError("a peer's score of a target is not finite")
        scores[histories.places()[0], histories.items] = -np.inf
        scores[np.arange(len(targets)), targets] = own
        higher, equal = ((compare(scores, own[:, None])).sum(axis=1) for compare in (np.greater, np.equal))
        ranks.append(1 + higher + (equal - 1) / 2)
    return np.concatenate(ranks)
