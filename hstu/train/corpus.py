"""Retrieval over all items. All ranks call these functions together: item vectors may come from sharded tables.

Queries or items are sent, whichever are fewer. If these are the queries, each rank embeds its part of the corpus only,
and scores it for the queries of all ranks, gathered in rounds. Otherwise each embeds all items for its own queries.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed import ReduceOp

from hstu.base.ids import codes_of
from hstu.observe.logging import Progress
from hstu.ops.pytorch.operators import REFERENCE_KERNELS
from hstu.parallel.exchange import ALONE, Exchange

CHUNK_ITEMS = 16384
"""Items embedded per chunk. On a GPU also the items scored at once: 32 MiB of scores for BLOCK_QUERIES."""
CPU_PRODUCT_ITEMS = 2048
"""Items scored at once on a CPU. Their 4 MiB of scores stay in its caches, and the memory is reused."""
BLOCK_QUERIES = 512
ROUND_QUERIES = 16384
"""Most queries gathered at once, or one per rank: 16 MiB with vectors of width 256."""
PART_CHUNKS = 8
"""Chunks of a rank's part of the corpus that stay in memory for all rounds: 128 MiB with vectors of width 256."""
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
    between: Callable[[], None] = lambda: None
    """Called on all ranks when queries are gathered; may raise on all ranks."""
    part: range | None = None
    """Positions that ``chunks`` covers, also beyond the last item. None: all."""

    @property
    def size(self) -> int:
        """Number of candidate items."""
        return len(self.ids)

    @property
    def covered(self) -> range:
        """Positions that ``chunks`` covers."""
        return range(self.size) if self.part is None else self.part

    @property
    def products(self) -> tuple[int, int]:
        """(products per chunk, items of a product): the fewest chunks, of equal size."""
        covered = max(1, len(self.covered))
        items = -(-covered // -(-covered // self.chunk_items))
        products = -(-items // CPU_PRODUCT_ITEMS) if self.ids.device.type == "cpu" else 1
        return products, -(-items // products)

    def embed(self, positions: Tensor) -> Tensor:
        """Normalised vectors, float32 [n, E]. Collective if embed_items is."""
        return REFERENCE_KERNELS.l2_normalize(self.embed_items(self.ids[positions]), self.l2_norm_eps)

    def chunks(self) -> Iterator[tuple[int, Tensor]]:
        """Yield (position of the first item, float32 [n, E]), padded with the last item. May be collective."""
        (products, length), here = self.products, self.covered
        for start in here[:: products * length]:
            positions = torch.arange(start, start + products * length, device=self.ids.device)
            items = self.embed(positions.clamp_(max=self.size - 1))
            for first in range(start, min(start + products * length, here.stop), length):
                yield first, items[first - start : first - start + length]

    def vectors(self) -> Tensor:
        """All vectors, float32 [size, E], on the host. Collective if embed_items is."""
        return torch.cat([items.cpu() for _, items in self.chunks()])[: self.size]

    def positions(self, ids: np.ndarray) -> np.ndarray:
        """Positions of ids, int64 [n]; -1 for unknown ids."""
        return codes_of(ids, self.ids.cpu().numpy())


def target_ranks(queries: Queries, corpus: Corpus, exchange: Exchange = ALONE) -> tuple[np.ndarray, np.ndarray]:
    """Rank of each query's target among all items that the user has not seen, and its score: float64 [U], 1 is best.

    The rank is 1 + the number of higher scores + half the number of equal scores. It is infinity, a miss for every
    metric, if the target is seen or no candidate. A nan score beats every target, and a nan target ranks last.
    """
    positions = np.where(queries.is_target_seen, -1, corpus.positions(queries.targets))
    search = _Search(queries, corpus, exchange, positions)
    target_scores = search.target_scores(positions)
    counts = torch.zeros((len(queries), 2), dtype=torch.int64, device=target_scores.device)
    here = search.corpus.covered
    progress = Progress(f"ranking {len(queries):,} targets among items", len(here))
    for chunks in search.chunks():
        progress.update(chunks[0][0] - here.start)
        for number in range(search.rounds):
            thresholds = search.gathered(target_scores[:, None], number)
            found = counts.new_zeros((search.rows, 2))
            for first, items in chunks:
                for block in search.blocks():
                    scores = search.unseen_scores(number, block, first, items)
                    found[block, 0] += (~(scores <= thresholds[block])).sum(dim=1)
                    found[block, 1] += (scores == thresholds[block]).sum(dim=1)
            own = search.own(number)
            counts[own] += search.exchange.summed(found)[: own.stop - own.start]
    ranks = 1 + counts[:, 0] + counts[:, 1].double() / 2
    ranks.masked_fill_(target_scores.isnan(), corpus.size).masked_fill_(target_scores == -torch.inf, torch.inf)
    return ranks.cpu().numpy(), target_scores.double().cpu().numpy()


def recommend(queries: Queries, corpus: Corpus, k: int, exchange: Exchange = ALONE) -> tuple[np.ndarray, np.ndarray]:
    """The k best items that each user has not seen, best first; ties in corpus order. A nan score is never chosen.

    Returns (positions int64, scores float32), both [U, min(k, corpus size)], padded with −1 and −inf.
    """
    k = min(k, corpus.size)
    search = _Search(queries, corpus, exchange)
    best_items, best_scores = np.empty((len(queries), k), np.int64), np.empty((len(queries), k), np.float32)
    for number in range(search.rounds):
        scores = torch.full((search.rows, k), -torch.inf, device=corpus.ids.device)
        items = torch.full((search.rows, k), -1, device=corpus.ids.device)
        best = [_Best(scores[block], items[block]) for block in search.blocks()]
        for chunks in search.chunks():
            for first, vectors in chunks:
                for block, of_block in zip(search.blocks(), best, strict=True):
                    of_block.add(search.unseen_scores(number, block, first, vectors), first)
        for of_block in best:
            of_block.choose()
        by_part = (search.exchange.swap(each).view(search.exchange.size, -1, k) for each in (scores, items))
        own = search.own(number)
        scores, items = (each.transpose(0, 1).flatten(1)[: own.stop - own.start] for each in by_part)
        ordered, chosen = scores.sort(dim=1, descending=True, stable=True)  # parts are in corpus order
        best_scores[own] = ordered[:, :k].cpu().numpy()
        best_items[own] = items.gather(1, chosen[:, :k]).cpu().numpy()
    return best_items, best_scores


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
        self._is_empty = True

    def add(self, scores: Tensor, first: int) -> None:
        """Add scores [b, n] of items from position ``first`` on. Call in ascending order of ``first``."""
        threshold = self.scores[:, -1:]
        if self._is_empty:  # otherwise all scores would be buffered, as there is no k-th best yet
            numbers = scores.masked_fill(scores.isnan(), -torch.inf)
            kth = numbers.topk(min(self.scores.shape[1], scores.shape[1]), dim=1).values[:, -1:]
            threshold = kth.nextafter(threshold)
        users, columns, above = _above(scores, threshold)
        self._waiting.append((users, first + columns, above))
        self._counts += users.bincount(minlength=len(self._counts))
        if self._is_empty or self._counts.max() >= self._enough:
            self.choose()
        self._is_empty = False

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


class _Search:
    """Scores of the queries of all ranks for this rank's part of the corpus, or of its own queries for all items.

    A round has ``share`` queries of each rank, in rank order. Its blocks of queries are scored for chunks of items. All
    products have the same shape. Recomputed scores are therefore bitwise equal, and equal items tie.
    """

    def __init__(self, queries: Queries, corpus: Corpus, exchange: Exchange, targets: np.ndarray | None = None) -> None:
        """``targets``: positions of items that do not compete with themselves, -1 for none."""
        self._longest = longest = int(exchange.total(len(queries), ReduceOp.MAX))
        if exchange.total(len(queries)) >= corpus.size:
            exchange, longest = ALONE, len(queries)
        span = max(1, -(-corpus.size // exchange.size))
        part = range(exchange.rank * span, (exchange.rank + 1) * span)
        self.exchange, self.corpus = exchange, corpus if exchange is ALONE else replace(corpus, part=part)
        self.share = longest if exchange is ALONE else min(longest, max(1, ROUND_QUERIES // exchange.size))
        self.rows, self.rounds = self.share * exchange.size, max(1, -(-longest // max(1, self.share)))
        # Of fewer queries, products may round equal items apart.
        fewest = max(16, 1 << (self.rows - 1).bit_length()) if targets is None else BLOCK_QUERIES
        self._block = min(fewest, BLOCK_QUERIES)
        self._num_blocks = -(-self.rows // self._block)
        self._vectors, self._round = queries.vectors, (-1, queries.vectors)

        users = np.repeat(np.arange(len(queries)), queries.seen_lengths)
        positions = corpus.positions(queries.seen_items)
        if targets is not None:
            users, positions = np.append(users, np.arange(len(queries))), np.append(positions, targets)
        known = positions >= 0
        rounds, rows = np.divmod(users[known], max(1, self.share))
        rows += exchange.rank * self.share
        blocks, owners = rounds * self._num_blocks + rows // self._block, positions[known] // span
        blocks, rows, positions = exchange.to_owners(owners, blocks, rows, positions[known])
        order = np.lexsort((positions, blocks))
        self._seen_rows, self._seen_items = rows[order], positions[order]
        self._seen_bounds = np.searchsorted(blocks[order], np.arange(self.rounds * self._num_blocks + 1))

    def own(self, number: int) -> slice:
        """The queries of this rank in a round."""
        start = min(number * self.share, len(self._vectors))
        return slice(start, min(start + self.share, len(self._vectors)))

    def gathered(self, rows: Tensor, number: int) -> Tensor:
        """Rows [U, n] of the queries of a round, padded to whole blocks."""
        if self.exchange is not ALONE:
            self.corpus.between()
        own = rows[self.own(number)]
        return _padded(self.exchange.gather(_padded(own, self.share)), self._num_blocks * self._block)

    def chunks(self) -> Iterator[list[tuple[int, Tensor]]]:
        """Chunks of the corpus, as many as stay in memory for all rounds. Collective."""
        several = 1 if self.exchange is ALONE else PART_CHUNKS * self.corpus.products[0]
        chunks = self.corpus.chunks()
        while found := list(islice(chunks, several)):
            yield found

    def blocks(self) -> Iterator[slice]:
        """The rows of each block of a round."""
        for first in range(0, self.rows, self._block):
            yield slice(first, min(first + self._block, self.rows))

    def target_scores(self, positions: np.ndarray) -> Tensor:
        """Score of the item at each query's position, float32 [U]; −inf for −1 and for items without a vector."""
        scores = torch.full((len(positions),), -torch.inf, device=self._vectors.device)
        if not self.corpus.size:
            return scores
        (_, length), chunk = self.corpus.products, self.corpus.chunk_items
        ids, count = self._on_device(positions.clip(min=0)), min(self._block, length)
        for start in range(0, self._longest, chunk):  # equally often on all ranks
            for items in self.corpus.embed(ids[start : start + chunk]).split(count):
                vectors = self._vectors[start : start + len(items)]
                products = _scores(_padded(vectors, self._block), _padded(items, length))
                scores[start : start + len(items)] = products.diagonal()[: len(items)]
                start += len(items)
        return scores.masked_fill_(self._on_device(positions < 0), -torch.inf)

    def unseen_scores(self, number: int, block: slice, first: int, items: Tensor) -> Tensor:
        """Scores of a block, float32 [b, n]; −inf for items that are no candidates, seen, or beyond this part."""
        if self._round[0] != number:
            self._round = number, self.gathered(self._vectors, number)
        scores = _scores(self._round[1][block.start : block.start + self._block], items)[: block.stop - block.start]
        scores[:, max(0, min(self.corpus.covered.stop, self.corpus.size) - first) :] = -torch.inf
        start, stop = self._seen_bounds[number * self._num_blocks + block.start // self._block :][:2]
        start, stop = start + np.searchsorted(self._seen_items[start:stop], (first, first + len(items)))
        rows, seen = self._seen_rows[start:stop] - block.start, self._seen_items[start:stop] - first
        scores[self._on_device(rows), self._on_device(seen)] = -torch.inf
        return scores

    def _on_device(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self._vectors.device)


def _padded(rows: Tensor, count: int) -> Tensor:
    return nn.functional.pad(rows, (0, 0, 0, count - len(rows)))


def _scores(vectors: Tensor, items: Tensor) -> Tensor:
    """Scores float32 [b, n]; −inf for items that are no candidates."""
    scores = vectors @ items.t()
    first_zero = (items[:, 0] == 0).nonzero()[:, 0]
    scores[:, first_zero[~items[first_zero].any(dim=1)]] = -torch.inf  # a mask would rewrite all scores
    return scores
