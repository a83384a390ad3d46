"""All items as candidates of retrieval: the ranks of held-out items among them, and the best of them for each user.

Every rank calls these functions together, because vectors of items may be looked up in sharded tables.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from hstu.ops.pytorch.operators import REFERENCE_KERNELS

CHUNK_ITEMS = 16384
"""Items of the corpus that are embedded and scored in one chunk."""
BLOCK_QUERIES = 512
"""Queries that are scored in one block. A block of scores takes CHUNK_ITEMS × BLOCK_QUERIES × 4 bytes = 32 MiB."""
_GROUP = 64
"""Columns of scores whose maximum is compared before they are."""

EmbedItems = Callable[[Tensor], Tensor]
"""Item ids, int64 [n] → vectors of the items, [n, E], not normalised. May be a collective."""


@dataclass(frozen=True)
class Queries:
    """The queries of U users of this rank, without padding."""

    vectors: Tensor
    """float32 [U, E], normalised, on the device."""
    user_ids: np.ndarray
    """int64 [U]: rows of the users in the store."""
    targets: np.ndarray
    """int64 [U]: ids of the held-out items."""
    seen_items: np.ndarray
    """int64 [n]: items to leave out, user after user; an item may occur more than once."""
    seen_lengths: np.ndarray
    """int64 [U]: how many of them belong to each user."""

    def __len__(self) -> int:
        """U."""
        return len(self.user_ids)


@dataclass(frozen=True)
class Corpus:
    """The candidate items as normalised vectors, chunk by chunk. An item whose vector is all zeros is no candidate.

    Such vectors are those of items that a model does not have.
    """

    embed_items: EmbedItems
    ids: Tensor
    """int64 [size], ascending, on the device. The *position* of an item is its index here."""
    l2_norm_eps: float
    chunk_items: int = CHUNK_ITEMS

    @property
    def size(self) -> int:
        """Number of items."""
        return len(self.ids)

    def chunks(self) -> Iterator[tuple[int, Tensor]]:
        """(position of the first item, float32 [n, E]) in ascending order. Collective if embed_items is.

        The last chunk repeats the last item, so that all chunks have the same n.
        """
        length = max(1, min(self.chunk_items, self.size))
        for first in range(0, self.size, length):
            positions = torch.arange(first, first + length, device=self.ids.device).clamp_(max=self.size - 1)
            yield first, REFERENCE_KERNELS.l2_normalize(self.embed_items(self.ids[positions]), self.l2_norm_eps)

    def vectors(self) -> Tensor:
        """All vectors, float32 [size, E], on the host. Collective as ``chunks``."""
        return torch.cat([items.cpu() for _, items in self.chunks()])[: self.size]

    def positions(self, ids: np.ndarray) -> np.ndarray:
        """Positions of ids, int64 [n]; -1 for ids that are not among the items."""
        if not self.size:
            return np.full_like(ids, -1)
        own = self.ids.cpu().numpy()
        found = np.minimum(np.searchsorted(own, ids), self.size - 1)
        return np.where(own[found] == ids, found, -1)


def target_ranks(queries: Queries, corpus: Corpus) -> np.ndarray:
    """Rank of the target of each query among all items that its user has not seen: float64 [U], 1 is best.

    The rank is 1 + the number of items that score higher + half the number that score the same. A target that is no
    candidate has the rank infinity: a miss for every metric. A score of nan beats every target, so that a diverged
    model ranks last. Collective if the corpus is.
    """
    device, positions = corpus.ids.device, corpus.positions(queries.targets)
    order = np.argsort(positions, kind="stable")  # then the targets of a chunk belong to few blocks
    scorer = _Scorer(queries, order, corpus)
    targets = positions[order]
    columns = scorer.on_device(targets)
    target_scores = torch.full((len(queries),), -torch.inf, device=device)
    for first, items in corpus.chunks():
        start, stop = np.searchsorted(targets, (first, first + len(items)))
        for block in scorer.blocks(start, stop):
            rows = slice(max(block.start, start), min(block.stop, stop))
            places = torch.arange(rows.start, rows.stop, device=device) - block.start
            target_scores[rows] = scorer.scores(block, items)[places, columns[rows] - first]

    higher, equal = (torch.zeros(len(queries), dtype=torch.int64, device=device) for _ in range(2))
    for first, items in corpus.chunks():
        start, stop = np.searchsorted(targets, (first, first + len(items)))
        for block in scorer.blocks():
            scores = scorer.unseen_scores(block, first, items)
            rows = slice(max(block.start, start), max(block.start, start, min(block.stop, stop)))
            places = torch.arange(rows.start, rows.stop, device=device) - block.start
            scores[places, columns[rows] - first] = -torch.inf  # a target does not compete with itself
            threshold = target_scores[block, None]
            higher[block] += (~(scores <= threshold)).sum(dim=1)
            equal[block] += (scores == threshold).sum(dim=1)
    found = torch.where(target_scores == -torch.inf, torch.inf, 1 + higher + equal.double() / 2)
    ranks = np.empty(len(queries))
    ranks[order] = found.cpu().numpy()
    return ranks


def recommend(queries: Queries, corpus: Corpus, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k best items that each user has not seen, best first.

    Returns (positions in the corpus int64, scores float32), both [U, min(k, corpus size)]. −1 and −inf fill the rows of
    users with fewer than k unseen items. Collective if the corpus is.
    """
    k = min(k, corpus.size)
    scorer = _Scorer(queries, np.arange(len(queries)), corpus)
    device = corpus.ids.device
    best_scores = torch.full((len(queries), k), -torch.inf, device=device)
    best_items = torch.full((len(queries), k), -1, device=device)
    for first, items in corpus.chunks():
        for block in scorer.blocks():
            found, groups = _above(scorer.unseen_scores(block, first, items), best_scores[block, -1:], k)
            best_scores[block], chosen = torch.cat([best_scores[block], found], dim=1).topk(k, dim=1)
            place = (chosen - k).clamp_(min=0)  # among the found ones
            new = first + groups.gather(1, place // _GROUP) * _GROUP + place % _GROUP
            best_items[block] = torch.where(chosen < k, best_items[block].gather(1, chosen.clamp(max=k - 1)), new)
    best_items[best_scores == -torch.inf] = -1
    return best_items.cpu().numpy(), best_scores.cpu().numpy()


def _above(scores: Tensor, threshold: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Some groups of columns of ``scores`` [b, n] that have the k best of each row that are above its threshold [b, 1].

    These lie in the k groups with the largest maxima, and in those alone whose maxima are above the threshold. After
    some chunks of a corpus, few are, and a maximum costs less than a selection.

    Returns the scores [b, c · _GROUP] and the number of each group, int64 [b, c], c of at least 1.
    """
    rows, columns = scores.shape
    if columns % _GROUP:
        scores = nn.functional.pad(scores, (0, -columns % _GROUP), value=-torch.inf)
    grouped = scores.view(rows, -1, _GROUP)
    maxima = grouped.amax(dim=2)
    above = int((maxima > threshold).sum(dim=1).max())
    groups = maxima.topk(min(max(1, above), k, maxima.shape[1]), dim=1, sorted=False).indices
    return grouped.gather(1, groups[:, :, None].expand(-1, -1, _GROUP)).flatten(1), groups


class _Scorer:
    """Scores blocks of queries, taken in the given order, against chunks of a corpus.

    All products have the same shape, in which a query always has the same row. So a score has the same bits whenever
    it is computed, and equal items tie.
    """

    def __init__(self, queries: Queries, order: np.ndarray, corpus: Corpus) -> None:
        self._num_queries, self._corpus_size, self._device = len(queries), corpus.size, corpus.ids.device
        vectors = queries.vectors[self.on_device(order)]
        self._vectors = nn.functional.pad(vectors, (0, 0, 0, -len(order) % BLOCK_QUERIES))
        row_of_query = np.argsort(order)
        rows, items = np.repeat(row_of_query, queries.seen_lengths), corpus.positions(queries.seen_items)
        by_block_and_item = np.lexsort((items, rows // BLOCK_QUERIES))
        self._seen_rows, self._seen_items = rows[by_block_and_item], items[by_block_and_item]
        block_starts = np.arange(0, len(self._vectors) + 1, BLOCK_QUERIES)
        self._seen_bounds = np.searchsorted(self._seen_rows // BLOCK_QUERIES, block_starts // BLOCK_QUERIES)

    def blocks(self, start: int = 0, stop: int | None = None) -> Iterator[slice]:
        """The blocks that contain queries [start, stop); by default all blocks."""
        stop = self._num_queries if stop is None else stop
        if start < stop:
            for first in range(start - start % BLOCK_QUERIES, stop, BLOCK_QUERIES):
                yield slice(first, min(first + BLOCK_QUERIES, self._num_queries))

    def scores(self, block: slice, items: Tensor) -> Tensor:
        """Scores float32 [queries of the block, n]; −inf at items that are no candidates."""
        scores = self._vectors[block.start : block.start + BLOCK_QUERIES] @ items.t()
        scores[:, (~items.any(dim=1)).nonzero()[:, 0]] = -torch.inf  # a mask would write all scores again
        return scores[: block.stop - block.start]

    def unseen_scores(self, block: slice, first: int, items: Tensor) -> Tensor:
        """``scores`` with −inf also at items that the user has seen and beyond the end of the corpus."""
        scores = self.scores(block, items)
        scores[:, self._corpus_size - first :] = -torch.inf
        start, stop = self._seen_bounds[block.start // BLOCK_QUERIES :][:2]
        start, stop = start + np.searchsorted(self._seen_items[start:stop], (first, first + len(items)))
        rows, seen = self._seen_rows[start:stop] - block.start, self._seen_items[start:stop] - first
        scores[self.on_device(rows), self.on_device(seen)] = -torch.inf
        return scores

    def on_device(self, array: np.ndarray) -> Tensor:
        """A host array as a tensor on the device of the corpus."""
        return torch.from_numpy(array).to(self._device)
