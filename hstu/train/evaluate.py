"""Evaluation: ranking metrics of predictions, and retrieval against the whole corpus.

Every rank calls these functions together, with equally many batches (some may hold padding only).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from hstu.data.batch import HSTUBatch
from hstu.ops.normalise import l2_normalise
from hstu.train.metrics import Gather, RankingMetrics, only_rank, retrieval_metrics

CHUNK_ITEMS = 16384
"""Items of the corpus that are embedded and scored at a time."""
BLOCK_QUERIES = 512
"""Queries that are scored at a time. A block of scores takes CHUNK_ITEMS × BLOCK_QUERIES × 4 bytes = 32 MiB."""

EmbedItems = Callable[[Tensor], Tensor]
"""Item codes, int64 [n] → rows of the item table, [n, E], not normalised. May be collective."""


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """No dropout and no gradients inside; afterwards the model is in the mode in which it was."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


def evaluate_ranking(
    model: nn.Module,
    batches: Iterable[HSTUBatch],
    metrics: RankingMetrics,
    device: torch.device,
    gather: Gather = only_rank,
) -> dict[str, float]:
    """Metrics over all labelled items of ``batches`` of all ranks; the same numbers on each rank."""
    with evaluation_mode(model):
        for batch in batches:
            logits = model(batch.to(device)).logits
            users = np.repeat(_host(batch.user_ids), _host(batch.num_labels))
            metrics.update(_host(logits), _host(batch.labels), users)
    return metrics.compute(gather)


def evaluate_retrieval(
    model: nn.Module,
    batches: Iterable[HSTUBatch],
    corpus: Corpus,
    metric_names: Sequence[str],
    gather: Gather = only_rank,
) -> dict[str, float]:
    """Metrics of the held-out items' ranks among all items of ``corpus``; the same numbers on each rank.

    Items in the batches' ``seen_values``, where they have any, are removed; the held-out item itself never is.
    Memory is bounded by the queries of this rank and one block of scores.
    """
    with evaluation_mode(model):
        ranks = target_ranks(collect_queries(model, batches, corpus.device), corpus)
    return retrieval_metrics(metric_names, gather(ranks))


@dataclass(frozen=True)
class Queries:
    """U users of this rank; padding is already gone."""

    vectors: Tensor
    """float32 [U, E], normalised, on the device."""
    user_ids: np.ndarray
    """int64 [U]: rows of the users in the store."""
    targets: np.ndarray
    """int64 [U]: codes of the held-out items."""
    seen_items: np.ndarray
    """int64 [.]: items to leave out, user after user; repeats are fine."""
    seen_lengths: np.ndarray
    """int64 [U]: how many of them are each user's."""

    def __len__(self) -> int:
        """U."""
        return len(self.user_ids)


def collect_queries(model: nn.Module, batches: Iterable[HSTUBatch], device: torch.device) -> Queries:
    """Run the model over evaluation batches. The model must be in evaluation mode."""
    vectors: list[Tensor] = [torch.zeros((0, 1), device=device)]
    users, targets, seen, seen_lengths = ([np.zeros(0, dtype=np.int64)] for _ in range(4))
    for batch in batches:
        queries = model(batch.to(device)).queries
        real = np.flatnonzero(_host(batch.user_ids) >= 0)
        vectors.append(queries[torch.from_numpy(real).to(device)].float())
        users.append(_host(batch.user_ids)[real])
        targets.append(_host(batch.labels)[real])
        if batch.seen_values is None or batch.seen_offsets is None:
            seen_lengths.append(np.zeros(len(real), dtype=np.int64))
        else:  # padding has seen nothing
            seen.append(_host(batch.seen_values))
            seen_lengths.append(np.diff(_host(batch.seen_offsets))[real])
    return Queries(
        torch.cat(vectors[1:] or vectors),
        *(np.concatenate(parts) for parts in (users, targets, seen, seen_lengths)),
    )


@dataclass(frozen=True)
class Corpus:
    """All items [0, size) as normalised vectors, a chunk at a time."""

    embed_items: EmbedItems
    size: int
    l2_norm_eps: float
    device: torch.device
    chunk_items: int = CHUNK_ITEMS
    absent_are_zero: bool = False
    """Rows of zeros are items without a row of their own: they are no candidates, and as targets rank last."""

    def chunks(self) -> Iterator[tuple[int, Tensor]]:
        """(code of the first item, float32 [n, E]) by ascending code. Collective if embed_items is.

        The last chunk is filled up with repetitions of the last item, so that all have the same n.
        """
        length = min(self.chunk_items, self.size)
        for first in range(0, self.size, length):
            ids = torch.arange(first, first + length, device=self.device).clamp_(max=self.size - 1)
            yield first, l2_normalise(self.embed_items(ids), self.l2_norm_eps)


def target_ranks(queries: Queries, corpus: Corpus) -> np.ndarray:
    """Rank of each query's target among all items that its user has not seen: float64 [U], 1 is best.

    1 + the items that score higher + half of those that score the same; absent items rank behind all others. Scores
    that are nan beat every target, so a model that diverged ranks last, not first. Collective if the corpus is.
    """
    order = np.argsort(queries.targets, kind="stable")  # so that a chunk's targets belong to few blocks
    scorer = _Scorer(queries, order, corpus)
    targets = queries.targets[order]
    columns = scorer.on_device(targets)
    target_scores = torch.empty(len(queries), device=corpus.device)
    for first, items in corpus.chunks():
        start, stop = np.searchsorted(targets, (first, first + len(items)))
        for block in scorer.blocks(start, stop):
            rows = slice(max(block.start, start), min(block.stop, stop))
            places = torch.arange(rows.start, rows.stop, device=corpus.device) - block.start
            target_scores[rows] = scorer.scores(block, items)[places, columns[rows] - first]

    higher, equal = (torch.zeros(len(queries), dtype=torch.int64, device=corpus.device) for _ in range(2))
    for first, items in corpus.chunks():
        start, stop = np.searchsorted(targets, (first, first + len(items)))
        for block in scorer.blocks():
            scores = scorer.unseen_scores(block, first, items)
            rows = slice(max(block.start, start), max(block.start, start, min(block.stop, stop)))
            places = torch.arange(rows.start, rows.stop, device=corpus.device) - block.start
            scores[places, columns[rows] - first] = -torch.inf  # a target does not compete with itself
            threshold = target_scores[block, None]
            higher[block] += (~(scores <= threshold)).sum(dim=1)
            equal[block] += (scores == threshold).sum(dim=1)
    ranks = np.empty(len(queries))
    ranks[order] = 1 + _host(higher) + _host(equal) / 2
    return ranks


def recommend(queries: Queries, corpus: Corpus, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k best items of each user that it has not seen, best first; all of them where there are fewer than k.

    Returns (codes int64, scores float32), both [U, min(k, corpus size)]; −1 and −inf fill the rows of users with
    fewer unseen items. Collective if the corpus is.
    """
    k = min(k, corpus.size)
    scorer = _Scorer(queries, np.arange(len(queries)), corpus)
    best_scores = torch.full((len(queries), k), -torch.inf, device=corpus.device)
    best_items = torch.full((len(queries), k), -1, device=corpus.device)
    for first, items in corpus.chunks():
        codes = torch.arange(first, first + len(items), device=corpus.device)
        for block in scorer.blocks():
            scores = torch.cat([best_scores[block], scorer.unseen_scores(block, first, items)], dim=1)
            candidates = torch.cat([best_items[block], codes.expand(len(scores), -1)], dim=1)
            best_scores[block], places = scores.topk(k, dim=1)
            best_items[block] = candidates.gather(1, places)
    best_items[best_scores == -torch.inf] = -1
    return _host(best_items), _host(best_scores)


class _Scorer:
    """Scores blocks of queries, taken in the given order, against chunks of a corpus.

    All products have one shape, in which a query always has the same row: so a score has the same bits whenever it
    is computed, and equal items tie.
    """

    def __init__(self, queries: Queries, order: np.ndarray, corpus: Corpus) -> None:
        self._num_queries, self._corpus_size, self._device = len(queries), corpus.size, corpus.device
        self._absent_are_zero = corpus.absent_are_zero
        vectors = queries.vectors[self.on_device(order)]
        self._vectors = nn.functional.pad(vectors, (0, 0, 0, -len(order) % BLOCK_QUERIES))
        row_of_query = np.argsort(order)
        rows, items = np.repeat(row_of_query, queries.seen_lengths), queries.seen_items
        by_block_and_item = np.lexsort((items, rows // BLOCK_QUERIES))
        self._seen_rows, self._seen_items = rows[by_block_and_item], items[by_block_and_item]
        block_starts = np.arange(0, len(self._vectors) + 1, BLOCK_QUERIES)
        self._seen_bounds = np.searchsorted(self._seen_rows // BLOCK_QUERIES, block_starts // BLOCK_QUERIES)

    def blocks(self, start: int = 0, stop: int | None = None) -> Iterator[slice]:
        """The blocks that hold queries of [start, stop), by default all."""
        stop = self._num_queries if stop is None else stop
        if start < stop:
            for first in range(start - start % BLOCK_QUERIES, stop, BLOCK_QUERIES):
                yield slice(first, min(first + BLOCK_QUERIES, self._num_queries))

    def scores(self, block: slice, items: Tensor) -> Tensor:
        """float32 [queries of the block, n]; −inf at absent items."""
        scores = self._vectors[block.start : block.start + BLOCK_QUERIES] @ items.t()
        if self._absent_are_zero:
            scores.masked_fill_(~items.any(dim=1), -torch.inf)
        return scores[: block.stop - block.start]

    def unseen_scores(self, block: slice, first: int, items: Tensor) -> Tensor:
        """The same, with −inf at items that the query's user has seen and beyond the end of the corpus."""
        scores = self.scores(block, items)
        scores[:, self._corpus_size - first :] = -torch.inf
        start, stop = self._seen_bounds[block.start // BLOCK_QUERIES :][:2]
        start, stop = start + np.searchsorted(self._seen_items[start:stop], (first, first + len(items)))
        rows, seen = self._seen_rows[start:stop] - block.start, self._seen_items[start:stop] - first
        scores[self.on_device(rows), self.on_device(seen)] = -torch.inf
        return scores

    def on_device(self, array: np.ndarray) -> Tensor:
        """A host array on the corpus' device."""
        return torch.from_numpy(array).to(self._device)


def _host(tensor: Tensor) -> np.ndarray:
    array: np.ndarray = tensor.cpu().numpy()
    return array
