"""Retrieval over all items. All ranks call these functions together: item vectors may come from sharded tables."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor, nn

from hstu.base.ids import codes_of
from hstu.observe.logging import Progress
from hstu.ops.pytorch.operators import REFERENCE_KERNELS

CHUNK_ITEMS = 16384
"""Items embedded per chunk. On a GPU also the items scored at once: 32 MiB of scores for BLOCK_QUERIES."""
CPU_PRODUCT_ITEMS = 2048
"""Items scored at once on a CPU. Their 4 MiB of scores stay in its caches, and the memory is reused."""
BLOCK_QUERIES = 512
"""Most queries scored at once."""
_GROUP = 16
"""Scores per group. The maximum of a group is compared before its scores."""

EmbedItems = Callable[[Tensor], Tensor]
"""Item ids, int64 [n] → item vectors, [n, E], not normalised. May be a collective."""


@dataclass(frozen=True)
class Queries:
    """The queries of U users of this rank, without padding."""

    vectors: Tensor
    """float32 [U, E], normalised, on the device."""
    user_ids: np.ndarray
    """int64 [U]: the users' rows in the store."""
    targets: np.ndarray
    """int64 [U]: ids of the held-out items."""
    seen_items: np.ndarray
    """int64 [n]: items to leave out, user after user, possibly repeated."""
    seen_lengths: np.ndarray
    """int64 [U]: number of ``seen_items`` of each user."""

    def __len__(self) -> int:
        return len(self.user_ids)

    @cached_property
    def is_target_seen(self) -> np.ndarray:
        """Whether each target is among the user's ``seen_items``: bool [U]."""
        rows = np.repeat(np.arange(len(self)), self.seen_lengths)
        return np.bincount(rows[self.seen_items == self.targets[rows]], minlength=len(self)) > 0


@dataclass(frozen=True)
class Corpus:
    """The candidate items as normalised vectors. A vector of zeros marks an item that the model does not contain."""

    embed_items: EmbedItems
    ids: Tensor
    """int64 [size], ascending, on the device. An item's index here is its *position*."""
    l2_norm_eps: float
    chunk_items: int = CHUNK_ITEMS

    @property
    def size(self) -> int:
        """Number of candidate items."""
        return len(self.ids)

    def chunks(self) -> Iterator[tuple[int, Tensor]]:
        """Yield (position of the first item, float32 [n, E]), padded with the last item. May be collective."""
        embedded = max(1, min(self.chunk_items, self.size))
        parts = -(-embedded // CPU_PRODUCT_ITEMS) if self.ids.device.type == "cpu" else 1
        length = -(-embedded // parts)
        for start in range(0, self.size, parts * length):
            positions = torch.arange(start, start + parts * length, device=self.ids.device).clamp_(max=self.size - 1)
            items = REFERENCE_KERNELS.l2_normalize(self.embed_items(self.ids[positions]), self.l2_norm_eps)
            for first in range(start, min(start + parts * length, self.size), length):
                yield first, items[first - start : first - start + length]

    def vectors(self) -> Tensor:
        """All vectors, float32 [size, E], on the host. Collective if embed_items is."""
        return torch.cat([items.cpu() for _, items in self.chunks()])[: self.size]

    def positions(self, ids: np.ndarray) -> np.ndarray:
        """Positions of ids, int64 [n]; -1 for unknown ids."""
        return codes_of(ids, self.ids.cpu().numpy())


def target_ranks(queries: Queries, corpus: Corpus) -> tuple[np.ndarray, np.ndarray]:
    """Rank of each query's target among all items that the user has not seen, and its score: float64 [U], 1 is best.

    The rank is 1 + the number of higher scores + half the number of equal scores. It is infinity, a miss for every
    metric, if the target is seen or no candidate. A nan score beats every target, so a diverged model ranks last.
    """
    device, positions = corpus.ids.device, np.where(queries.is_target_seen, -1, corpus.positions(queries.targets))
    order = np.argsort(positions, kind="stable")  # so that the targets of a chunk belong to few blocks
    scorer = _Scorer(queries, order, corpus)
    targets = positions[order]
    columns = scorer.on_device(targets)
    target_scores = torch.full((len(queries),), -torch.inf, device=device)
    for first, items in corpus.chunks():
        start, stop = np.searchsorted(targets, (first, first + len(items)))
        for block in scorer.blocks(start, stop):
            rows = slice(max(block.start, start), min(block.stop, stop))
            indices = torch.arange(rows.start, rows.stop, device=device) - block.start
            target_scores[rows] = scorer.scores(block, items)[indices, columns[rows] - first]

    higher, equal = (torch.zeros(len(queries), dtype=torch.int64, device=device) for _ in range(2))
    progress = Progress(f"ranking {len(queries):,} targets among items", corpus.size)
    for first, items in corpus.chunks():
        progress.update(first)
        start, stop = np.searchsorted(targets, (first, first + len(items)))
        for block in scorer.blocks():
            scores = scorer.unseen_scores(block, first, items)
            rows = slice(max(block.start, start), max(block.start, start, min(block.stop, stop)))
            indices = torch.arange(rows.start, rows.stop, device=device) - block.start
            scores[indices, columns[rows] - first] = -torch.inf  # a target does not compete with itself
            threshold = target_scores[block, None]
            higher[block] += (~(scores <= threshold)).sum(dim=1)
            equal[block] += (scores == threshold).sum(dim=1)
    found = torch.where(target_scores == -torch.inf, torch.inf, 1 + higher + equal.double() / 2)
    results = np.empty((2, len(queries)))
    results[:, order] = torch.stack([found, target_scores.double()]).cpu().numpy()
    return results[0], results[1]


def pair_scores(vectors: Tensor, rows: np.ndarray, positions: np.ndarray, corpus: Corpus) -> Tensor:
    """Scores of (user, item) pairs, float32 [n]; NaN for items that are not in the corpus or have no vector.

    Pair i is ``vectors[rows[i]]``, one of the normalised [U, E], and the item at ``positions[i]``, −1 for none.
    """
    device = corpus.ids.device
    scores = torch.full((len(rows),), torch.nan, device=device)
    for first, items in corpus.chunks():
        here = np.flatnonzero((positions >= first) & (positions < first + len(items)))
        of_items = items[torch.from_numpy(positions[here] - first).to(device)]
        products = (vectors[torch.from_numpy(rows[here]).to(device)].float() * of_items).sum(dim=1)
        scores[torch.from_numpy(here).to(device)] = products.masked_fill_(~of_items.any(dim=1), torch.nan)
    return scores


def recommend(queries: Queries, corpus: Corpus, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k best items that each user has not seen, best first; ties in corpus order. A nan score is never chosen.

    Returns (positions int64, scores float32), both [U, min(k, corpus size)], padded with −1 and −inf.
    """
    k = min(k, corpus.size)
    smallest = max(16, 1 << (len(queries) - 1).bit_length())  # of fewer queries, products may round equal items apart
    scorer = _Scorer(queries, np.arange(len(queries)), corpus, min(smallest, BLOCK_QUERIES))
    device = corpus.ids.device
    scores = torch.full((len(queries), k), -torch.inf, device=device)
    items = torch.full((len(queries), k), -1, device=device)
    best = [_Best(scores[block], items[block]) for block in scorer.blocks()]
    for first, vectors in corpus.chunks():
        for block, of_block in zip(scorer.blocks(), best, strict=True):
            of_block.add(scorer.unseen_scores(block, first, vectors), first)
    for of_block in best:
        of_block.choose()
    return items.cpu().numpy(), scores.cpu().numpy()


class _Best:
    """The best items of b users: ``scores`` float32 [b, k] and ``items`` int64 [b, k], updated in place.

    Scores above a user's k-th best are buffered until a sort is worthwhile. After the first chunk few scores are, so
    finding them takes most of the time.
    """

    def __init__(self, scores: Tensor, items: Tensor) -> None:
        self.scores, self.items = scores, items
        self._waiting: list[tuple[Tensor, Tensor, Tensor]] = []  # (users, items, scores): int64 [n], int64 [n], [n]
        self._counts = torch.zeros(len(scores), dtype=torch.int64, device=scores.device)  # buffered scores per user
        self._enough = max(64, scores.shape[1])  # buffered scores of one user that trigger a sort

    def add(self, scores: Tensor, first: int) -> None:
        """Add scores [b, n] of items from position ``first`` on. Call in ascending order of ``first``."""
        threshold = self.scores[:, -1:]
        if first == 0:  # otherwise all scores would be buffered, as there is no k-th best yet
            kth = scores.topk(min(self.scores.shape[1], scores.shape[1]), dim=1).values[:, -1:]
            threshold = kth.nextafter(threshold).fmax(threshold)  # fmax, because kth may be nan
        users, columns, above = _above(scores, threshold)
        self._waiting.append((users, first + columns, above))
        self._counts += users.bincount(minlength=len(self._counts))
        if first == 0 or self._counts.max() >= self._enough:
            self.choose()

    def choose(self) -> None:
        if not self._waiting:
            return
        users, items, scores = (torch.cat(each) for each in zip(*self._waiting, strict=True))
        order = items.argsort()
        order = order[users[order].argsort(stable=True)]
        users, items, scores = users[order], items[order], scores[order]
        indices = torch.arange(len(users), device=users.device) - (self._counts.cumsum(0) - self._counts)[users]
        shape = len(self._counts), int(self._counts.max())
        padded_scores, padded_items = self.scores.new_full(shape, -torch.inf), self.items.new_full(shape, -1)
        padded_scores[users, indices], padded_items[users, indices] = scores, items

        k = self.scores.shape[1]
        ordered, chosen = torch.cat([self.scores, padded_scores], dim=1).sort(dim=1, descending=True, stable=True)
        self.scores.copy_(ordered[:, :k])
        self.items.copy_(torch.cat([self.items, padded_items], dim=1).gather(1, chosen[:, :k]))
        self._waiting.clear()
        self._counts.zero_()


def _above(scores: Tensor, threshold: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(row, column, score) of all scores [b, n] above the threshold [b, 1] of their row.

    The maxima of groups are compared first, because few are above. A group is every (n / _GROUP)-th column, which is
    faster than neighbouring columns.
    """
    if scores.shape[1] % _GROUP:
        scores = nn.functional.pad(scores, (0, -scores.shape[1] % _GROUP), value=-torch.inf)
    grouped = scores.view(len(scores), _GROUP, -1)
    rows, groups = (~(grouped.amax(dim=1) <= threshold)).nonzero(as_tuple=True)  # the maximum is nan if any score is
    members = grouped[rows, :, groups]
    found, member = (members > threshold[rows]).nonzero(as_tuple=True)
    return rows[found], member * grouped.shape[2] + groups[found], members[found, member]


class _Scorer:
    """Scores blocks of queries, in the given order, against chunks of a corpus.

    All products have the same shape, and a query always has the same row in them. Recomputed scores are therefore
    bitwise equal, and equal items tie.
    """

    def __init__(self, queries: Queries, order: np.ndarray, corpus: Corpus, block_queries: int = BLOCK_QUERIES) -> None:
        self._block = block_queries
        self._num_queries, self._corpus_size, self._device = len(queries), corpus.size, corpus.ids.device
        vectors = queries.vectors[self.on_device(order)]
        self._vectors = nn.functional.pad(vectors, (0, 0, 0, -len(order) % self._block))
        row_of_query = np.argsort(order)
        rows, items = np.repeat(row_of_query, queries.seen_lengths), corpus.positions(queries.seen_items)
        by_block_and_item = np.lexsort((items, rows // self._block))
        self._seen_rows, self._seen_items = rows[by_block_and_item], items[by_block_and_item]
        block_starts = np.arange(0, len(self._vectors) + 1, self._block)
        self._seen_bounds = np.searchsorted(self._seen_rows // self._block, block_starts // self._block)

    def blocks(self, start: int = 0, stop: int | None = None) -> Iterator[slice]:
        """Blocks that contain queries [start, stop)."""
        stop = self._num_queries if stop is None else stop
        if start < stop:
            for first in range(start - start % self._block, stop, self._block):
                yield slice(first, min(first + self._block, self._num_queries))

    def scores(self, block: slice, items: Tensor) -> Tensor:
        """Scores float32 [queries of the block, n]; −inf for items that are no candidates."""
        scores = self._vectors[block.start : block.start + self._block] @ items.t()
        first_zero = (items[:, 0] == 0).nonzero()[:, 0]
        scores[:, first_zero[~items[first_zero].any(dim=1)]] = -torch.inf  # a mask would rewrite all scores
        return scores[: block.stop - block.start]

    def unseen_scores(self, block: slice, first: int, items: Tensor) -> Tensor:
        """``scores`` with −inf also for items that the user has seen and for padding at the end of the corpus."""
        scores = self.scores(block, items)
        scores[:, self._corpus_size - first :] = -torch.inf
        start, stop = self._seen_bounds[block.start // self._block :][:2]
        start, stop = start + np.searchsorted(self._seen_items[start:stop], (first, first + len(items)))
        rows, seen = self._seen_rows[start:stop] - block.start, self._seen_items[start:stop] - first
        scores[self.on_device(rows), self.on_device(seen)] = -torch.inf
        return scores

    def on_device(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self._device)
