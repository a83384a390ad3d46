"""Evaluation: ranking metrics of predictions, and retrieval against the whole corpus.

Every rank calls these functions together, with equally many batches (some may hold only padding).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from torch import Tensor, nn

from hstu.config.args import RankingArgs, RetrievalArgs
from hstu.data.batch import HSTUBatch
from hstu.model.gr_model import GRModel
from hstu.model.outputs import ModelOutput
from hstu.ops.pytorch.operators import REFERENCE_KERNELS
from hstu.parallel.collectives import gather_objects
from hstu.parallel.group import evaluate_batch
from hstu.parallel.mesh import Mesh
from hstu.parallel.tables import dynamic_tables
from hstu.train.batch_source import BatchSource
from hstu.train.metrics import Gather, RankingMetrics, only_rank, retrieval_metrics
from hstu.train.observations import Observations, of_ranking

CHUNK_ITEMS = 16384
"""Items of the corpus that are embedded and scored in one chunk."""
BLOCK_QUERIES = 512
"""Queries that are scored in one block. A block of scores takes CHUNK_ITEMS × BLOCK_QUERIES × 4 bytes = 32 MiB."""
_GROUP = 64
"""Columns of scores whose maximum is compared before they are."""

EmbedItems = Callable[[Tensor], Tensor]
"""Item ids, int64 [n] → vectors of the items, [n, E], not normalised. May be a collective."""
Forward = Callable[[HSTUBatch], ModelOutput]
"""A batch on the host → logits or queries of its sequences. May be a collective."""


class Evaluator(ABC):
    """Computes the metrics of the current model, the same on every rank. Collective.

    ``max_iters``: batches of each rank that are evaluated at most; None: all.
    """

    def __init__(self, model: GRModel, mesh: Mesh, max_iters: int | None) -> None:
        self.model = model
        self.mesh = mesh
        self.max_iters = max_iters
        self.between_batches: Callable[[], None] = lambda: None
        """Called on all ranks before every batch and before every chunk of the corpus; may raise on all of them."""

    def evaluate(self, batches: Iterable[HSTUBatch]) -> dict[str, float]:
        """Metrics over the batches of all ranks."""
        return self.metrics(self.observe(batches))

    @abstractmethod
    def observe(self, batches: Iterable[HSTUBatch]) -> Observations:
        """Each prediction for the batches of all ranks."""

    @abstractmethod
    def metrics(self, observations: Observations) -> dict[str, float]:
        """Metrics of these predictions. No collective."""

    def forward(self, batch: HSTUBatch) -> ModelOutput:
        """Output of the model for a batch on the host, computed by this rank or by its tp_cp group."""
        return evaluate_batch(self.model, batch, self.mesh)

    def _limited(self, batches: Iterable[HSTUBatch]) -> Iterator[HSTUBatch]:
        for batch in islice(batches, self.max_iters):
            self.mesh.heartbeat.mark()
            self.between_batches()
            yield batch

    def _gather(self, array: np.ndarray) -> np.ndarray:
        return np.concatenate(gather_objects(array, self.mesh.world_group))


class RankingEvaluator(Evaluator):
    """Metrics of the predicted actions."""

    def __init__(
        self, model: GRModel, args: RankingArgs, label_offset: int, mesh: Mesh, max_iters: int | None = None
    ) -> None:
        super().__init__(model, mesh, max_iters)
        self.names = args.eval_metrics
        self.num_tasks = args.num_tasks if args.prediction_head_arch[-1] == args.num_tasks else None
        self.label_offset = label_offset

    def observe(self, batches: Iterable[HSTUBatch]) -> Observations:
        """See Evaluator."""
        item = self.model.roles.item
        return observe_ranking(self.model, self._limited(batches), item, self.forward, self._gather)

    def metrics(self, observations: Observations) -> dict[str, float]:
        """See Evaluator."""
        metrics = RankingMetrics(self.names, num_tasks=self.num_tasks, label_offset=self.label_offset)
        metrics.update(observations.results, observations.labels, observations.users)
        return metrics.compute()


class RetrievalEvaluator(Evaluator):
    """Metrics of the ranks of the held-out items in the whole corpus."""

    def __init__(
        self, model: GRModel, args: RetrievalArgs, source: BatchSource, mesh: Mesh, max_iters: int | None = None
    ) -> None:
        super().__init__(model, mesh, max_iters)
        self.args = args
        self.source = source

    def observe(self, batches: Iterable[HSTUBatch]) -> Observations:
        """See Evaluator."""
        return observe_retrieval(self.model, self._limited(batches), self.corpus(), self.forward, self._gather)

    def metrics(self, observations: Observations) -> dict[str, float]:
        """See Evaluator."""
        return retrieval_metrics(self.args.eval_metrics, observations.results)

    def corpus(self, ids: np.ndarray | None = None) -> Corpus:
        """The items ``ids``, ascending. By default all items of the data.

        With a dynamic table, and without an item tower, those in the table.
        """
        if ids is None:
            in_table = None if self.args.item_tower else self._ids_in_dynamic_table()
            ids = self.source.item_ids() if in_table is None else in_table
        if ids is None:
            ids = np.arange(self.source.cardinalities[self.source.roles.item], dtype=np.int64)
        return Corpus(self.embed_items, torch.from_numpy(ids).to(self.mesh.device), self.args.l2_norm_eps)

    def _ids_in_dynamic_table(self) -> np.ndarray | None:
        """The ids that have a row on any rank, ascending; None for a static item table."""
        for table in dynamic_tables(self.model).values():
            if self.source.roles.item in table.spec.features:
                return np.sort(self._gather(_host(table.slots.content()[0])))
        return None

    def embed_items(self, ids: Tensor) -> Tensor:
        """Vectors of items, not normalised, for item ids. Collective if a table is sharded."""
        self.mesh.heartbeat.mark()
        self.between_batches()
        features = self.source.tower_features(_host(ids)) if self.args.item_tower else None
        return self.model.embed_items(ids, features)


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Inside, the model computes without dropout and gradients. Its former mode is restored afterwards."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


def observe_ranking(
    model: nn.Module,
    batches: Iterable[HSTUBatch],
    item_feature: str,
    forward: Forward,
    gather: Gather = only_rank,
) -> Observations:
    """Predictions for all labelled items in the ``batches`` of all ranks; the same on every rank."""
    found = [Observations.none(np.zeros((0, 1), dtype=np.float32), np.zeros(0, dtype=np.int64))]
    with evaluation_mode(model):
        for batch in batches:
            logits = forward(batch).logits
            assert logits is not None, "the model has no ranking head"
            requests = np.arange(batch.batch_size)  # no metric of the actions reads them
            found.append(of_ranking(batch, item_feature, _host(logits), _host(batch.labels), requests))
    return Observations.joined(found[1:] or found).gathered(gather)


def observe_retrieval(
    model: nn.Module,
    batches: Iterable[HSTUBatch],
    corpus: Corpus,
    forward: Forward,
    gather: Gather = only_rank,
) -> Observations:
    """The ranks of the held-out items among all items of ``corpus``; the same on every rank.

    Items in ``seen_values`` of a batch are removed from the corpus of that user, but never the held-out item itself.
    Memory is bounded by the queries of this rank and one block of scores.
    """
    with evaluation_mode(model):
        queries, history = collect_queries(forward, batches, corpus.ids.device)
        ranks = target_ranks(queries, corpus)
    targets = queries.targets
    return Observations(queries.user_ids, targets, history, np.arange(len(queries)), ranks, targets).gathered(gather)


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


def collect_queries(forward: Forward, batches: Iterable[HSTUBatch], device: torch.device) -> tuple[Queries, np.ndarray]:
    """Run the model over evaluation batches, in evaluation mode. Returns also the events it has read, int64 [U]."""
    vectors: list[Tensor] = [torch.zeros((0, 1), device=device)]
    users, targets, seen, seen_lengths, history = ([np.zeros(0, dtype=np.int64)] for _ in range(5))
    for batch in batches:
        queries = forward(batch).queries
        assert queries is not None, "the model is not a retrieval model"
        real = np.flatnonzero(_host(batch.user_ids) >= 0)
        vectors.append(queries[torch.from_numpy(real).to(device)].float())
        users.append(_host(batch.user_ids)[real])
        targets.append(_host(batch.labels)[real])
        history.append(batch.item_lengths[real])
        if batch.seen_values is None or batch.seen_offsets is None:
            seen_lengths.append(np.zeros(len(real), dtype=np.int64))
        else:  # padding rows have no seen items
            seen.append(_host(batch.seen_values))
            seen_lengths.append(np.diff(_host(batch.seen_offsets))[real])
    arrays = (np.concatenate(parts) for parts in (users, targets, seen, seen_lengths))
    return Queries(torch.cat(vectors[1:] or vectors), *arrays), np.concatenate(history)


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
        own = _host(self.ids)
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
    ranks = np.empty(len(queries))
    ranks[order] = np.where(_host(target_scores) == -np.inf, np.inf, 1 + _host(higher) + _host(equal) / 2)
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
    return _host(best_items), _host(best_scores)


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


def _host(tensor: Tensor) -> np.ndarray:
    array: np.ndarray = tensor.cpu().numpy()
    return array
