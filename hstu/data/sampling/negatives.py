"""Negatives of the retrieval loss: draws from the corpus, and hard negatives, which a user was shown and did not take.

The host draws from counters, so a sample's draws are independent of rank, world size and worker. Draws are uniform or
follow the items' counts in the training samples. ``expected_log_counts`` serves the logQ correction of the loss.
"""

from dataclasses import dataclass
from typing import Literal, Self

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
    """Draws per position; 0 means the whole pool."""
    shared: bool = False
    """One set of draws for all positions of a global batch."""
    exponent: float = 0.0
    """Corpus draws are proportional to an item's count to this power; 0 means uniform."""
    logq: bool = False
    """Correct the logits for the expected count of an item among the negatives."""
    hard: int = 0
    """Largest number of a position's draws that hard negatives replace."""

    @classmethod
    def of(cls, args: RetrievalArgs) -> Self:
        """Reads the options."""
        exponent = _WORD2VEC_EXPONENT if args.negatives == "popularity" else 0.0
        shared = args.shared_negatives or args.negatives == "mixed"
        num, kind = max(args.num_negatives, 0), args.negatives
        return cls(kind, num, shared, exponent, args.logq_correction, args.hard_negatives)  # type: ignore[arg-type]

    @property
    def has_batch_pool(self) -> bool:
        """Whether items of the batch are negatives."""
        return self.kind in ("in_batch", "mixed")


class ItemDistribution:
    """Draws item codes in [0, size), uniformly or in proportion to ``weights`` [size].

    Weighted draws use an alias table: each code has a column, which it shares with one other code.
    Sources: A. Walker, ACM Transactions on Mathematical Software 3(3), 1977; built by prefix sums as in L. Hübschle-
    Schneider, P. Sanders, "Parallel weighted random sampling", ESA 2019.
    """

    def __init__(self, size: int, weights: np.ndarray | None = None) -> None:
        self.size = size
        self._weights = weights
        self._columns = None if weights is None else _alias_table(self.probabilities() * size)

    def probabilities(self) -> np.ndarray:
        """float64 [size]."""
        return np.full(self.size, 1 / self.size) if self._weights is None else self._weights / self._weights.sum()

    def items(self, bits: np.ndarray) -> np.ndarray:
        """int64 codes for random uint32 ``bits``. Each probability is exact to 2^-31."""
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
    """(each code's share of its own column, uint32 in units of 2^-32; the code that fills the rest, int32). ``scaled``:
    float64 [size], probabilities times size. Heavy codes (>= 1) fill the columns of light codes in order. Where a heavy
    code gives away more than its excess over 1, the next heavy code fills the rest of its column."""
    own, other = np.ones(len(scaled)), np.arange(len(scaled), dtype=np.int32)
    light, heavy = np.flatnonzero(scaled < 1), np.flatnonzero(scaled >= 1)
    if len(light) and len(heavy):
        missing, excess = np.cumsum(1 - scaled[light]), np.cumsum(scaled[heavy] - 1)
        given = np.concatenate([[0.0], missing[:-1]])  # before each light code
        own[light] = scaled[light]
        other[light] = heavy[np.searchsorted(excess, given).clip(max=len(heavy) - 1)]
        ends = np.searchsorted(missing, excess[:-1], side="right")  # the light code that exhausts the excess
        emptied = np.flatnonzero(ends < len(light))
        own[heavy[emptied]] = 1 + excess[emptied] - missing[ends[emptied]]
        other[heavy[emptied]] = heavy[emptied + 1]
    return np.minimum(own.clip(min=0) * 2.0**32, 2.0**32 - 1).astype(np.uint32), other


def count_items(
    store: SequenceStore, feature: str, samples: SampleTable, *, random_windows: bool = False
) -> np.ndarray:
    """How often each item occurs in ``samples``, float64 [cardinality]. With ``random_windows``, the expected count per
    epoch, as if all events of a history were in equally many windows."""
    lengths = samples.stop - samples.start
    counted = samples.stop - samples.history_begin if random_windows else lengths
    codes, size = store.sequence(feature), store.cardinality(feature)
    counts = np.zeros(size)
    blocks = np.searchsorted(run_offsets(counted), np.arange(_EVENTS_PER_BLOCK, counted.sum(), _EVENTS_PER_BLOCK))
    for rows in np.split(np.arange(len(samples)), blocks):
        found = codes[ranges(samples.stop[rows] - counted[rows], counted[rows])].astype(np.int64)
        known = (found >= 0) & (found < size)  # reading a batch raises for other codes
        weights = np.repeat(lengths[rows] / counted[rows], counted[rows])
        counts += np.bincount(found[known], weights[known], minlength=size)
    return counts


def expected_log_counts(
    negatives: Negatives, draws: ItemDistribution, counts: np.ndarray, batches_per_epoch: int
) -> np.ndarray:
    """log of an item's expected count among the negatives of a position, float32 [size]; 0 if it never occurs. ``num``
    corpus draws have an item ``num`` times its probability. A global batch has an item with c training occurrences with
    probability 1 − (1 − 1 / batches)^c, as if each occurrence fell into a random batch. Draws from the items of a batch
    must still be divided by their number. ``counts``: the result of count_items."""
    expected = np.zeros(draws.size)
    if negatives.has_batch_pool:
        # An item of a batch occurs at least once.
        expected += 1 - (1 - 1 / batches_per_epoch) ** np.where(counts > 0, counts, 1)
    if negatives.kind == "in_batch":
        expected *= max(negatives.num, 1)
    else:
        expected += negatives.num * draws.probabilities()
    return np.log(np.where(expected > 0, expected, 1)).astype(np.float32)


Key = tuple[int | np.ndarray, ...]
"""Counters of draws. For M labels int64 [M, 1]: seed, epoch, and index of the sample and of the label within it."""


def draw_31_bits(labels: Key, num: int) -> np.ndarray:
    """Random int32 in [0, 2^31), [M, num]."""
    return (_draw_32_bits(labels, num) >> np.uint32(1)).astype(np.int32)


def draw_shared(batch: Key, num: int, corpus: ItemDistribution) -> np.ndarray:
    """Item codes for a global batch, int64 [num], equal on all its ranks and possibly repeated."""
    return corpus.items((random_bits(*batch, np.arange(num)) >> np.uint64(32)).astype(np.uint32))


def draw_each(
    labels: Key, num: int, corpus: ItemDistribution, hard: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """(distinct item codes int64 [S], indices into them int32 [M, num]): independent draws for each label. ``hard``:
    int64 [M, up to num] codes that replace the first draws of a label; -1 keeps the draw. Only drawn items are
    returned: an optimizer moves every looked-up row, so others would make tables depend on the number of ranks."""
    codes = corpus.items(_draw_32_bits(labels, num))
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


def _draw_32_bits(labels: Key, num: int) -> np.ndarray:
    """Random uint32 [M, num]; each 64-bit number gives two."""
    bits = random_bits(*labels, np.arange((num + 1) // 2))
    return bits.astype("<u8", copy=False).view("<u4")[:, :num]


def shown_not_taken(store: SequenceStore, events: np.ndarray, stops: np.ndarray, num: int) -> np.ndarray:
    """Items of the user's last request before each event that the user did not take: codes, int64 [n, num].

    The first ``num`` in the order shown; -1 fills the rest. The user takes an item by an event of it before the next
    request. A user's newest request gives no negatives, because the events that follow it may be held out. ``events``:
    int64 [n], indices into the store's events. ``stops``: int64 [n], the ends of their samples; no later event is read.
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
