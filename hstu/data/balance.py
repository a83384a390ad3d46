"""Sharing a global batch out over ranks: by count, by tokens, or so that every rank has equally much to compute.

Everything is planned on the host from the lengths, which the sampler knows without reading a sample, and is a
function of the data and the place in the epoch alone. Every rank computes the whole plan and takes its part: nothing
is exchanged, in the step or outside it. Only *who* trains on a sample is decided here, never with which others.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Loads:
    """What training on each sample asks of a rank; S samples, in the order of the sample table."""

    tokens: np.ndarray
    """int64 [S], at least 1."""
    costs: np.ndarray
    """float64 [S], above 0; in any unit. What a rank has to compute is the sum over its samples."""


@dataclass(frozen=True)
class Sharing:
    """How global batches are shared out.

    ``balance``: equalise the ranks' costs. ``tokens_per_rank``: a batch ends before a rank has more tokens than this
    (one sample that alone has more is a rank's only one); None: batches end by the number of samples.
    """

    loads: Loads
    balance: bool = False
    tokens_per_rank: int | None = None


def even_bounds(begin: int, count: int, num_ranks: int) -> np.ndarray:
    """Where the shares of [begin, begin + count) begin and end, in sizes at most one apart; int64 [ranks + 1]."""
    return begin + count * np.arange(num_ranks + 1, dtype=np.int64) // num_ranks


def budget_bounds(
    tokens_until: np.ndarray, begin: int, num_ranks: int, tokens_per_rank: int, most_samples: int
) -> np.ndarray:
    """Where the shares of the global batch that begins at ``begin`` begin and end; int64 [ranks + 1].

    ``tokens_until``: int64 [S + 1], tokens of the first 0, 1, … samples of the epoch. Each rank takes the next
    samples as long as it has at most ``tokens_per_rank`` tokens and ``most_samples`` samples, but at least one. No
    rank is left without a sample, unless too few are left of the epoch: its last batches are cut finer for that.
    """
    num_samples = len(tokens_until) - 1
    bounds = _filled(tokens_until, begin, num_samples, num_ranks, tokens_per_rank, most_samples)
    left = num_samples - bounds[-1]
    if 0 < left < num_ranks:  # leave the last batch a sample a rank, if this one can spare them
        stop = max(num_samples - num_ranks, begin + num_ranks)
        bounds = _filled(tokens_until, begin, stop, num_ranks, tokens_per_rank, most_samples)
    while len(bounds) <= num_ranks and (counts := np.diff(bounds)).max() > 1:
        largest = int(np.where(counts > 1, np.diff(tokens_until[bounds]), -1).argmax())
        bounds.insert(largest + 1, bounds[largest] + int(counts[largest]) // 2)
    return np.array(bounds + bounds[-1:] * (num_ranks + 1 - len(bounds)), dtype=np.int64)


def _filled(
    tokens_until: np.ndarray, begin: int, stop: int, num_ranks: int, tokens_per_rank: int, most_samples: int
) -> list[int]:
    """Bounds of up to ``num_ranks`` shares of [begin, stop), each as large as it may be."""
    bounds = [begin]
    while len(bounds) <= num_ranks and bounds[-1] < stop:
        start = bounds[-1]
        fitting = int(np.searchsorted(tokens_until, tokens_until[start] + tokens_per_rank, side="right")) - 1
        bounds.append(min(max(fitting, start + 1), start + most_samples, stop))
    return bounds


def balanced_shares(
    costs: np.ndarray,
    counts: np.ndarray,
    tokens: np.ndarray | None = None,
    tokens_per_rank: int = 0,
) -> np.ndarray | None:
    """The rank of each of n samples, int64 [n], such that the largest sum of costs of a rank is small.

    The longest-processing-time rule: the costliest sample first, each to the rank that has least to do so far and has
    room (R. L. Graham, "Bounds on multiprocessing timing anomalies", SIAM J. Appl. Math. 17, 1969, here with limits).
    ``costs``: float64 [n]. ``counts``: int64 [ranks], the most samples of each rank. With ``tokens``, int64 [n], a rank
    also has at most ``tokens_per_rank`` of them; None where the rule finds no room for a sample.
    """
    order = np.argsort(-costs, kind="stable")
    sizes = [0] * len(costs) if tokens is None else tokens[order].tolist()
    # (cost so far, rank, room for samples, room for tokens); ties go to the lower rank, hence alike everywhere.
    ranks = [(0.0, rank, count, tokens_per_rank) for rank, count in enumerate(counts.tolist()) if count]
    chosen = []
    for cost, size in zip(costs[order].tolist(), sizes, strict=True):
        full = []
        while ranks and ranks[0][3] < size:
            full.append(heapq.heappop(ranks))
        if not ranks:
            return None
        load, rank, room, token_room = ranks[0]
        chosen.append(rank)
        if room > 1:
            heapq.heapreplace(ranks, (load + cost, rank, room - 1, token_room - size))
        else:
            heapq.heappop(ranks)
        for entry in full:
            heapq.heappush(ranks, entry)
    result = np.empty(len(costs), dtype=np.int64)
    result[order] = chosen
    return result


def rebalanced(counts: np.ndarray, loads: Loads, most_samples: int, tokens_per_rank: int | None) -> np.ndarray:
    """The rank of each sample of a global batch, of which the ranks were to take ``counts`` one after another.

    ``loads``: of the n samples. Returns int64 [n]. Without ``tokens_per_rank`` every rank keeps its number of samples;
    with it, it gets up to ``most_samples`` within its tokens. What was given stays where nothing better is found.
    """
    given = np.repeat(np.arange(len(counts)), counts)
    if tokens_per_rank is None:
        found = balanced_shares(loads.costs, counts)
    else:
        # A sample that is too long by itself fills a rank.
        tokens = np.minimum(loads.tokens, tokens_per_rank)
        found = balanced_shares(loads.costs, np.full_like(counts, most_samples), tokens, tokens_per_rank)
    return given if found is None or _largest(found, loads) >= _largest(given, loads) else found


def _largest(ranks: np.ndarray, loads: Loads) -> float:
    return float(np.bincount(ranks, weights=loads.costs).max())
