"""Negatives of the retrieval loss: uniform draws from the corpus, and how often an item is expected among them.

The host draws from counters, so a sample's draws are independent of rank, world size and worker.
``expected_log_counts`` serves the logQ correction of the loss.
"""

from dataclasses import dataclass
from typing import Literal, Self

import numpy as np

from hstu.base.hashing import random_below, random_bits
from hstu.config.args import RetrievalArgs
from hstu.data.batches.jagged import ranges, run_offsets
from hstu.data.sampling.samples import SampleTable
from hstu.data.store.sequence_store import SequenceStore

# Above this many corpus items per draw, sorting the draws is cheaper than a table of the corpus.
_DENSE_ITEMS_PER_DRAW = 32
_EVENTS_PER_BLOCK = 1 << 24


@dataclass(frozen=True)
class Negatives:
    """The negatives of the retrieval loss."""

    kind: Literal["in_batch", "uniform", "mixed", "full"]
    num: int = 0
    """Draws per position; 0 means the whole pool."""
    shared: bool = False
    """One set of draws for all positions of a global batch."""
    logq: bool = False
    """Correct the logits for the expected count of an item among the negatives."""

    @classmethod
    def of(cls, args: RetrievalArgs) -> Self:
        """Reads the options."""
        shared = args.shared_negatives or args.negatives == "mixed"
        num, kind = max(args.num_negatives, 0), args.negatives
        return cls(kind, num, shared, args.logq_correction)  # type: ignore[arg-type]

    @property
    def has_batch_pool(self) -> bool:
        """Whether items of the batch are negatives."""
        return self.kind in ("in_batch", "mixed")


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


def expected_log_counts(negatives: Negatives, counts: np.ndarray, batches_per_epoch: int) -> np.ndarray:
    """log of an item's expected count among the negatives of a position, float32 [corpus size]. Of ``num`` draws
    from the corpus it has an equal share. A global batch has an item with c training occurrences with
    probability 1 − (1 − 1 / batches)^c, as if each occurrence fell into a random batch. Draws from the items of a batch
    must still be divided by their number. ``counts``: the result of count_items."""
    expected = np.zeros(len(counts))
    if negatives.has_batch_pool:
        # An item of a batch occurs at least once.
        expected += 1 - (1 - 1 / batches_per_epoch) ** np.where(counts > 0, counts, 1)
    if negatives.kind == "in_batch":
        expected *= max(negatives.num, 1)
    else:
        expected += negatives.num * (1 / len(counts))
    return np.log(expected).astype(np.float32)


Key = tuple[int | np.ndarray, ...]
"""Counters of draws. For M labels int64 [M, 1]: seed, epoch, and index of the sample and of the label within it."""


def draw_31_bits(labels: Key, num: int) -> np.ndarray:
    """Random int32 in [0, 2^31), [M, num]."""
    return (_draw_32_bits(labels, num) >> np.uint32(1)).astype(np.int32)


def draw_shared(batch: Key, num: int, corpus_size: int) -> np.ndarray:
    """Item codes for a global batch, int64 [num], equal on all its ranks and possibly repeated."""
    return random_below(corpus_size, (random_bits(*batch, np.arange(num)) >> np.uint64(32)).astype(np.uint32))


def draw_each(labels: Key, num: int, corpus_size: int) -> tuple[np.ndarray, np.ndarray]:
    """(distinct item codes int64 [S], indices into them int32 [M, num]): independent draws for each label. Only drawn
    items are returned: an optimizer moves every looked-up row, so others would make tables depend on the number of
    ranks."""
    codes = random_below(corpus_size, _draw_32_bits(labels, num))
    if corpus_size > _DENSE_ITEMS_PER_DRAW * codes.size:
        distinct, indices = np.unique(codes, return_inverse=True)
        return distinct, indices.reshape(codes.shape).astype(np.int32, copy=False)
    drawn = np.zeros(corpus_size, dtype=bool)
    drawn[codes] = True
    distinct = np.flatnonzero(drawn)
    index_of = np.empty(corpus_size, dtype=np.int32)
    index_of[distinct] = np.arange(len(distinct), dtype=np.int32)
    return distinct, index_of.take(codes, mode="clip")  # faster than a bounds check


def _draw_32_bits(labels: Key, num: int) -> np.ndarray:
    """Random uint32 [M, num]; each 64-bit number gives two."""
    bits = random_bits(*labels, np.arange((num + 1) // 2))
    return bits.astype("<u8", copy=False).view("<u4")[:, :num]
