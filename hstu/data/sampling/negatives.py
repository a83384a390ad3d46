"""Negatives of the retrieval loss: draws from the corpus, and hard ones, which a user was shown and did not take.

Draws are made on the host from counters, so a sample's draws depend on neither rank, world size nor worker. Items are
drawn uniformly or by how often the training samples have them; ``expected_log_counts`` says how often an item is then
among the negatives, by which the logQ correction divides.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from hstu.base.hashing import random_below, random_bits
from hstu.config.args import RetrievalArgs
from hstu.data.batches.jagged import ranges, run_indices, run_offsets
from hstu.data.sampling.samples import SampleTable
from hstu.data.store.sequence_store import SequenceStore

# Above this many corpus items per draw, sorting the draws is cheaper than a table of the corpus.
_DENSE_ITEMS_PER_DRAW = 32
_EVENTS_PER_BLOCK = 1 << 24
_WORD2VEC_EXPONENT = 0.75
"""T. Mikolov et al., "Distributed representations of words and phrases and their compositionality", NeurIPS 2013."""


@dataclass(frozen=True)
class Negatives:
    """The negatives of the retrieval loss."""

    kind: Literal["in_batch", "uniform", "popularity", "mixed", "full"]
    num: int = 0
    """Draws per position, 0 for the whole pool."""
    shared: bool = False
    """One set of draws for all positions of a global batch."""
    exponent: float = 0.0
    """Draws from the corpus are proportional to an item's count to this power; 0: uniform."""
    logq: bool = False
    """Correct the logits for how often an item is expected among the negatives."""
    hard: int = 0
    """How many of the draws of a position hard negatives replace at most."""

    @classmethod
    def of(cls, args: RetrievalArgs) -> Negatives:
        """From the options."""
        exponent = _WORD2VEC_EXPONENT if args.negatives == "popularity" else 0.0
        shared = args.shared_negatives or args.negatives == "mixed"
        num, kind = max(args.num_negatives, 0), args.negatives
        return cls(kind, num, shared, exponent, args.logq_correction, args.hard_negatives)  # type: ignore[arg-type]

    @property
    def has_batch_pool(self) -> bool:
        """Whether the items of the batch are negatives."""
        return self.kind in ("in_batch", "mixed")


class ItemDistribution:
    """Draws item codes in [0, size): uniformly or, with ``weights`` [size], in proportion to those.

    Weighted draws use an alias table: each code has a column, which it shares with one other code.
    Sources: A. Walker, ACM Transactions on Mathematical Software 3(3), 1977; built by prefix sums as in L. Hübschle-
    Schneider, P. Sanders, "Parallel weighted random sampling", ESA 2019.
    """

    def __init__(self, size: int, weights: np.ndarray | None = None) -> None:
        self.size = size
        self._weights = weights
        self._columns = None if weights is None else _alias_table(self.probabilities() * size)

    def probabilities(self) -> np.ndarray:
        """float64 [size]"""
        return np.full(self.size, 1 / self.size) if self._weights is None else self._weights / self._weights.sum()

    def items(self, bits: np.ndarray) -> np.ndarray:
        """The codes, int64, that random uint32 ``bits`` draw. Each probability is exact to 2^-31."""
        if self._columns is None:
            return random_below(self.size, bits)
        kept, other = self._columns
        places = bits.astype(np.uint64)
        places *= np.uint64(self.size)
        columns = (places >> np.uint64(32)).view(np.int64)
        rests = places.astype(np.uint32)  # the lower 32 bits
        # mode="clip" is faster than a bounds check.
        return np.where(rests < kept.take(columns, mode="clip"), columns, other.take(columns, mode="clip"))


def _alias_table(scaled: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(share of each column that is its own code's, uint32 in units of 2^-32; the code of the rest, int32).

    ``scaled``: float64 [size], probabilities times size. Heavy codes (1 or more) fill the columns of light ones in
    order. One that has given away more than its excess over 1 has the rest of its own column filled by the next.
    """
    own, other = np.ones(len(scaled)), np.arange(len(scaled), dtype=np.int32)
    light, heavy = np.flatnonzero(scaled < 1), np.flatnonzero(scaled >= 1)
    if len(light) and len(heavy):
        missing, excess = np.cumsum(1 - scaled[light]), np.cumsum(scaled[heavy] - 1)
        given = np.concatenate([[0.0], missing[:-1]])  # before each light code
        own[light] = scaled[light]
        other[light] = heavy[np.searchsorted(excess, given).clip(max=len(heavy) - 1)]
        ends = np.searchsorted(missing, excess[:-1], side="right")  # the light code that takes more than the excess
        emptied = np.flatnonzero(ends < len(light))
        own[heavy[emptied]] = 1 + excess[emptied] - missing[ends[emptied]]
        other[heavy[emptied]] = heavy[emptied + 1]
    return np.minimum(own.clip(min=0) * 2.0**32, 2.0**32 - 1).astype(np.uint32), other


def count_items(
    store: SequenceStore, feature: str, samples: SampleTable, *, random_windows: bool = False
) -> np.ndarray:
    """How often each item occurs in ``samples``, [cardinality], float64.

    ``random_windows``: how often it is expected in an epoch, if each event of a history is in as many of its windows.
    """
    lengths = samples.stop - samples.start
    counted = samples.stop - samples.history_begin if random_windows else lengths
    codes, size = store.sequence(feature), store.cardinality(feature)
    counts = np.zeros(size)
    blocks = np.searchsorted(run_offsets(counted), np.arange(_EVENTS_PER_BLOCK, counted.sum(), _EVENTS_PER_BLOCK))
    for rows in np.split(np.arange(len(samples)), blocks):
        found = codes[ranges(samples.stop[rows] - counted[rows], counted[rows])].astype(np.int64)
        known = (found >= 0) & (found < size)  # reading a batch reports others
        weights = np.repeat(lengths[rows] / counted[rows], counted[rows])
        counts += np.bincount(found[known], weights[known], minlength=size)
    return counts


def expected_log_counts(
    negatives: Negatives, draws: ItemDistribution, counts: np.ndarray, batches_per_epoch: int
) -> np.ndarray:
    """log of how often an item is expected among the negatives of a position, float32 [size]; 0 if never.

    ``num`` draws from the corpus have an item ``num`` times its probability. Of the global batches of an epoch, one has
    an item that the training samples have c times, with probability 1 − (1 − 1 / batches)^c: as if each occurrence fell
    into any batch. Draws from the items of a batch must still be divided by their number. ``counts``: of count_items.
    """
    expected = np.zeros(draws.size)
    if negatives.has_batch_pool:
        expected += 1 - (1 - 1 / batches_per_epoch) ** np.where(counts > 0, counts, 1)  # an item of a batch occurs
    if negatives.kind == "in_batch":
        expected *= max(negatives.num, 1)
    else:
        expected += negatives.num * draws.probabilities()
    return np.log(np.where(expected > 0, expected, 1)).astype(np.float32)


@dataclass(frozen=True)
class LabelKeys:
    """Addresses of M labelled items in the random stream, independent of their batch."""

    seed: int
    epoch: int
    ordinals: np.ndarray
    """int64 [M]: indices of their samples in the order of the epoch."""
    places: np.ndarray
    """int64 [M]: 0, 1, … within the sample."""
    global_start: int
    """First ordinal of the global batch."""


def draw_31_bits(keys: LabelKeys, num: int) -> np.ndarray:
    """Random int32 in [0, 2^31), [M, num]."""
    return (_draw_32_bits(keys, num) >> np.uint32(1)).astype(np.int32)


def draw_shared(keys: LabelKeys, num: int, corpus: ItemDistribution) -> np.ndarray:
    """Item codes for a whole global batch, int64 [num], equal on all its ranks; repeats are kept."""
    bits = random_bits(keys.seed, keys.epoch, keys.global_start, np.arange(num))
    return corpus.items((bits >> np.uint64(32)).astype(np.uint32))


def draw_each(
    keys: LabelKeys, num: int, corpus: ItemDistribution, hard: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """(candidate item codes int64 [S], indices into them int32 [M, num]): independent draws for each label.

    hard: codes, int64 [M, up to num], that replace the first draws of a label; -1: the draw stays.

    The candidates are exactly the distinct items drawn. An optimizer moves every row that is looked up, so any further
    row would make the tables depend on the number of ranks.
    """
    codes = corpus.items(_draw_32_bits(keys, num))
    if hard is not None:
        np.copyto(codes[:, : hard.shape[1]], hard, where=hard >= 0, casting="same_kind")
    if corpus.size > _DENSE_ITEMS_PER_DRAW * codes.size:
        distinct, indices = np.unique(codes, return_inverse=True)
        return distinct, indices.reshape(codes.shape).astype(np.int32, copy=False)
    drawn = np.zeros(corpus.size, dtype=bool)
    drawn[codes] = True
    distinct = np.flatnonzero(drawn)
    index_of = np.empty(corpus.size, dtype=np.int32)
    index_of[distinct] = np.arange(len(distinct), dtype=np.int32)
    return distinct, index_of.take(codes, mode="clip")  # faster than a bounds check


def _draw_32_bits(keys: LabelKeys, num: int) -> np.ndarray:
    """Random uint32 [M, num]; each 64-bit number gives two."""
    pairs = np.arange((num + 1) // 2)
    bits = random_bits(keys.seed, keys.epoch, keys.ordinals[:, None], keys.places[:, None], pairs)
    return bits.astype("<u8", copy=False).view("<u4")[:, :num]


def shown_not_taken(store: SequenceStore, events: np.ndarray, stops: np.ndarray, num: int) -> np.ndarray:
    """Items of the user's last request before each event that the user did not take: codes, int64 [n, num].

    They are the first ones in the order in which they were shown; -1 fills the rest. An item is taken if the user has
    an event of it before the next request. A user's newest request has no next one yet, and gives none: whether an item
    of it is taken may be what is held out.

    Args:
        events: int64 [n], places in the store's events.
        stops: int64 [n], the end of the events of each event's sample. Later ones are not read.
    """
    found = np.full((len(events), num), -1, dtype=np.int64)
    requests, offsets = store.requests(), store.offsets()
    users = np.searchsorted(offsets, events, side="right") - 1
    rows = np.searchsorted(requests.history_ends, events, side="right") - 1
    following = np.minimum(rows + 1, len(requests) - 1)
    is_answered = (
        (rows >= 0)
        & (following > rows)
        & (requests.users[rows] == users)
        & (requests.users[following] == users)
        & (requests.history_ends[following] <= stops)
    )
    answered, which = np.unique(rows[is_answered], return_inverse=True)
    if not len(answered):
        return found
    item, size = store.item_feature, store.cardinality(store.item_feature)
    shown_by, _ = run_indices(requests.sizes[answered])
    shown = store.candidates(item)[ranges(requests.offsets[answered], requests.sizes[answered])].astype(np.int64)
    begins = requests.history_ends[answered]
    counts = requests.history_ends[answered + 1] - begins
    taken_by, _ = run_indices(counts)
    taken = store.sequence(item)[ranges(begins, counts)].astype(np.int64)
    is_left = ~np.isin(shown_by * size + shown, taken_by * size + taken)
    left_by, left = shown_by[is_left], shown[is_left]
    places = run_indices(np.bincount(left_by, minlength=len(answered)))[1]
    fits = places < num
    of_requests = np.full((len(answered), num), -1, dtype=np.int64)
    of_requests[left_by[fits], places[fits]] = left[fits]
    found[is_answered] = of_requests[which]
    return found
