"""Negatives drawn on the host from counters, so a sample's draws depend on neither rank, world size nor worker."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from hstu.config.args import RetrievalArgs
from hstu.data.hashing import random_below, random_bits

# Above this many corpus items per draw, sorting the draws is cheaper than a table of the corpus.
_DENSE_ITEMS_PER_DRAW = 32
# A block of this size stays in a core's cache through all its operations.
_DRAWS_PER_BLOCK = 1 << 16


@dataclass(frozen=True)
class Negatives:
    """The negatives of the retrieval loss. ``num``: draws per position, 0 for the whole pool."""

    kind: Literal["in_batch", "uniform", "full"]
    num: int = 0
    shared: bool = False

    @classmethod
    def of(cls, args: RetrievalArgs) -> Negatives:
        """From the options."""
        return cls(args.negatives, max(args.num_negatives, 0), args.shared_negatives)  # type: ignore[arg-type]


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


def draw_shared(keys: LabelKeys, num: int, corpus_size: int) -> np.ndarray:
    """Item codes for a whole global batch, int64 [num], equal on all its ranks; repeats are kept."""
    bits = random_bits(keys.seed, keys.epoch, keys.global_start, np.arange(num))
    return random_below(corpus_size, (bits >> np.uint64(32)).astype(np.uint32))


def draw_uniform(keys: LabelKeys, num: int, corpus_size: int) -> tuple[np.ndarray, np.ndarray]:
    """(candidate item codes int64 [S], indices into them int32 [M, num]), independent and uniform over the corpus.

    The candidates are exactly the distinct items drawn. An optimizer moves every row that is looked up, so any further
    row would make the tables depend on the number of ranks.
    """
    if corpus_size > _DENSE_ITEMS_PER_DRAW * len(keys.ordinals) * num:
        codes = random_below(corpus_size, _draw_32_bits(keys, num))
        distinct, indices = np.unique(codes, return_inverse=True)
        return distinct, indices.reshape(codes.shape).astype(np.int32, copy=False)
    rows = max(1, _DRAWS_PER_BLOCK // num)
    blocks = [slice(start, start + rows) for start in range(0, len(keys.ordinals), rows)]
    drawn = np.zeros(corpus_size, dtype=bool)
    indices = np.empty((len(keys.ordinals), num), dtype=np.int32)
    for block in blocks:
        codes = random_below(corpus_size, _draw_32_bits(keys, num, block))
        drawn[codes] = True
        indices[block] = codes
    distinct = np.flatnonzero(drawn)
    index_of = np.empty(corpus_size, dtype=np.int32)
    index_of[distinct] = np.arange(len(distinct), dtype=np.int32)
    for block in blocks:
        indices[block] = index_of.take(indices[block], mode="clip")  # faster than a bounds check
    return distinct, indices


def _draw_32_bits(keys: LabelKeys, num: int, rows: slice = slice(None)) -> np.ndarray:
    """Random uint32 [M, num], or ``rows`` of them; each 64-bit number gives two."""
    pairs = np.arange((num + 1) // 2)
    bits = random_bits(keys.seed, keys.epoch, keys.ordinals[rows, None], keys.places[rows, None], pairs)
    return bits.astype("<u8", copy=False).view("<u4")[:, :num]
