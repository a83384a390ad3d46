"""RetrievalGR: predict the next item by nearest neighbours; sampled or full softmax over items, and its negatives.

Output shapes depend only on input shapes, and invalid entries are masked, so the host never waits for the device.
"""

from collections.abc import Callable, Mapping

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hstu.config.args import RetrievalArgs
from hstu.data.batches.batch import NEGATIVES, PADDING_ID, POOL, HSTUBatch, of_negatives, of_pool
from hstu.model.inputs import ItemTower
from hstu.model.stack import ModelOutput, SequenceEncoder, labelled_rows, own_rows
from hstu.ops.functional import softmax_loss
from hstu.ops.kernels import NEVER_SEEN, Negatives, SeenItems
from hstu.ops.layout import JaggedLayout, TokenRuns, newest_elements, to_device
from hstu.ops.pytorch.softmax_loss import first_indices

GatherPool = Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]
"""(rows [S, E], ids [S], the ranks' largest S) → the same of all data-parallel ranks, padded with zero rows and
PADDING_ID. Differentiable. Collective."""

_BEFORE_THE_SEQUENCE = -1
"""First position of items that a user had before the sequence begins."""
DRAW_BITS = 31
"""Raw draws are random integers in [0, 2^31)."""


class LogCounts(nn.Module):
    """log of the expected count of each item among the negatives of a position, for the logQ correction.

    log_counts: float32 [number of items]. ids: int64 [number of items], the items' ids; None: 0, 1, ….
    """

    log_counts: Tensor
    ids: Tensor | None

    def __init__(self, log_counts: Tensor, ids: Tensor | None = None) -> None:
        super().__init__()
        order = None if ids is None else ids.argsort()
        self.register_buffer("ids", None if ids is None else ids[order], persistent=False)
        self.register_buffer("log_counts", log_counts if order is None else log_counts[order], persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        """log counts of ``ids``, int64 [S]; undefined for padding."""
        places = ids if self.ids is None else torch.searchsorted(self.ids, ids)
        return self.log_counts[places.clamp(0, len(self.log_counts) - 1)]


class RetrievalDense(nn.Module):
    """The dense part of retrieval: a sequence encoder and a softmax over items.

    The output at each event's newest token is the query for the next item. The score of an item is its cosine
    similarity to the query, divided by the temperature. The vector of an item is its row of the item table, or the
    output of an item tower for this row and the item's features. Queries are projected to the width of the item table
    if it differs from hidden_size. The negatives come with the batch.

    ``gather_pool``: collects the in-batch pool over data-parallel ranks.
    """

    def __init__(
        self,
        encoder: SequenceEncoder,
        args: RetrievalArgs,
        gather_pool: GatherPool = lambda rows, ids, _: (rows, ids),
        log_counts: LogCounts | None = None,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        network, features = encoder.network, encoder.features
        hidden, width = network.hidden_size, network.item_width
        self.query_projection = nn.Linear(hidden, width) if width != hidden else nn.Identity()
        self.tower = ItemTower(network, features) if features.tower else None
        self.item_feature = features.item
        self.args = args
        self.gather_pool = gather_pool
        self.log_counts = log_counts
        self.kernels = encoder.inputs.kernels

    def forward(self, embeddings: Mapping[str, Tensor], batch: HSTUBatch) -> ModelOutput:
        """Returns the loss of the batch's labels in training mode, the queries at newest tokens in evaluation mode.

        ``embeddings``: rows of items, NEGATIVES and tower features. Collective in training with in-batch negatives.
        """
        tokens, layout = self.encoder(embeddings, batch)
        if self.training:
            return ModelOutput(self.loss_sum(tokens, layout, embeddings, batch))
        no_loss = tokens.new_zeros((), dtype=torch.float32)
        return ModelOutput(no_loss, queries=self._newest_queries(tokens, layout))

    def queries(self, tokens: Tensor) -> Tensor:
        """Normalised queries [n, item_width] of encoded tokens [n, hidden_size]."""
        return self._unit(self.query_projection(tokens))

    def _unit(self, vectors: Tensor) -> Tensor:
        return self.kernels.l2_normalize(vectors, self.args.l2_norm_eps)

    def _newest_queries(self, tokens: Tensor, layout: JaggedLayout) -> Tensor:
        """Queries at the newest token of each sequence, [B, item_width]; zeros for empty sequences."""
        filled, device = np.flatnonzero(layout.seqlens), tokens.device
        newest = TokenRuns(np.cumsum(layout.seqlens)[filled] - 1, np.ones_like(filled))
        found = own_rows(newest, layout, self.encoder.comm)
        rows = tokens.index_select(0, to_device(newest.first[found.own] - found.first_token, device))
        queries = self.encoder.comm.gather_rows(self.queries(rows), found.counts)
        return queries.new_zeros(layout.batch_size, queries.shape[1]).index_copy(0, to_device(filled, device), queries)

    def loss_sum(
        self, tokens: Tensor, layout: JaggedLayout, embeddings: Mapping[str, Tensor], batch: HSTUBatch
    ) -> Tensor:
        """Sum of −log softmax over labelled items, each predicted from the token before it."""
        rows, labels = labelled_rows(tokens, layout, batch, self.encoder.comm, shift=-1)
        queries = self.queries(rows)
        item_ends = batch.features[self.item_feature].offsets()[1:]
        labelled_items = newest_elements(item_ends, batch.num_labels, batch.num_labels_total)[labels.own]
        items = self._vectors(embeddings, batch, self.item_feature)
        positives = self._unit(items.index_select(0, labelled_items))
        drawn = None if batch.negatives.draws is None else batch.negatives.draws[labels.own]
        pool, pool_ids, repeats, draws = self._pool(items, embeddings, batch, drawn)
        negatives = Negatives(
            target_ids=batch.labels[labels.own],
            pool_ids=pool_ids,
            temperature=self.args.temperature,
            log_weights=self._log_weights(pool_ids, repeats, batch),
            seen=find_seen(pool_ids, labelled_items, batch, self.item_feature) if self.args.mask_seen else None,
            draws=draws,
        )
        kernel = self.kernels.pool_softmax_loss if draws is None else self.kernels.sampled_softmax_loss
        loss = softmax_loss(queries, positives, pool, negatives, kernel)
        if self.args.later_target_weights:
            ends = item_ends[torch.searchsorted(item_ends, labelled_items, right=True)]
            loss = loss + self._of_later_targets(queries, positives, items, labelled_items, ends)
        return self.encoder.comm.sum_over_tokens(loss)

    def _of_later_targets(
        self, queries: Tensor, positives: Tensor, items: Tensor, places: Tensor, ends: Tensor
    ) -> Tensor:
        """What RetrievalArgs.later_target_weights add to the loss, a scalar: for each label the logit of its next item
        less the weighted mean of the logits of all its targets.

        queries, positives: [M, E], normalised. places: int64 [M], rows of the next items in ``items``. ends: int64 [M],
        where their sequences end.
        """
        dtype, vectors = torch.promote_types(queries.dtype, torch.float32), self._unit(items)
        targets, total = positives.to(dtype), torch.ones(len(places), 1, dtype=dtype, device=places.device)
        for distance, weight in enumerate(self.args.later_target_weights, start=1):
            later = places + distance
            weights = weight * (later < ends).to(dtype).unsqueeze(1)
            targets = targets + weights * vectors.index_select(0, later.clamp(max=len(items) - 1))
            total = total + weights
        return ((positives - targets / total) * queries).sum() / self.args.temperature

    def _pool(
        self, items: Tensor, embeddings: Mapping[str, Tensor], batch: HSTUBatch, draws: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """The negatives: items drawn from the corpus, in-batch items, or both. ``items``: vectors of the batch's items.

        ``draws``: raw draws [m, R] of this rank's labels. Returns (normalised vectors [S, E], ids int64 [S], bool [S]:
        True for repeated entries, which do not count; pool rows [m, R] that each label draws).
        """
        parts, repeats = [], None
        if NEGATIVES in embeddings:
            drawn = self._unit(self._vectors(embeddings, batch, NEGATIVES))
            parts.append((drawn, batch.features[NEGATIVES].values()))
        if _has_batch_pool(batch):
            pool, ids = self._own_pool(items, embeddings, batch)
            largest = batch.negatives.largest_pool
            pool, ids = self.gather_pool(self._unit(pool), ids, len(ids) if largest is None else largest())
            parts.append((pool, ids))
            if draws is None:
                repeats = ~first_occurrences(ids)
            else:
                draws = choose_from_pool(draws, ids)
        if len(parts) == 1:
            return *parts[0], repeats, draws
        vectors, all_ids = (torch.cat(both) for both in zip(*parts, strict=True))
        assert repeats is not None
        return vectors, all_ids, F.pad(repeats, (len(all_ids) - len(repeats), 0)), draws

    def _log_weights(self, ids: Tensor, repeats: Tensor | None, batch: HSTUBatch) -> Tensor | None:
        """log weight of each pool entry in the loss, float32 [S]; None if all weights are equal."""
        log_weights = None
        if self.log_counts is not None:
            log_weights = -self.log_counts(ids)
            if batch.negatives.draws is not None and _has_batch_pool(batch):
                log_weights = log_weights + first_occurrences(ids).sum().log()
        if repeats is None:
            return log_weights
        counted = torch.zeros(len(ids), device=ids.device) if log_weights is None else log_weights
        return counted.masked_fill(repeats, -torch.inf)

    def _own_pool(self, items: Tensor, embeddings: Mapping[str, Tensor], batch: HSTUBatch) -> tuple[Tensor, Tensor]:
        """Vectors and ids of the distinct items of this rank's batch; ``batch`` may be a part of it."""
        positions, ids = batch.negatives.pool_positions, batch.negatives.pool_ids
        if ids is not None:
            return self._vectors(embeddings, batch, POOL), ids
        assert positions is not None
        return items.index_select(0, positions), batch.features[self.item_feature].values()[positions]

    def _vectors(self, embeddings: Mapping[str, Tensor], batch: HSTUBatch, key: str) -> Tensor:
        """Vectors of the items under ``key`` (the item feature, NEGATIVES or POOL), not normalised."""
        rows = embeddings[key]
        if self.tower is None:
            return rows
        key_of = {NEGATIVES: of_negatives, POOL: of_pool}.get(key, str)
        of_features = {name: embeddings[key_of(name)] for name in self.tower.features}
        return self.tower(rows, of_features, self.tower.list_lengths(batch, key))


def _has_batch_pool(batch: HSTUBatch) -> bool:
    return batch.negatives.pool_positions is not None or batch.negatives.pool_ids is not None


def find_seen(pool_ids: Tensor, targets: Tensor, batch: HSTUBatch, item_feature: str) -> SeenItems:
    """The pool entries in each user's history up to each target (int64 [M], indices of the batch's item values)."""
    ordered = pool_ids.sort().values
    items = batch.features[item_feature]
    sequences = torch.repeat_interleave(items.lengths(), output_size=len(items.values()))
    places = torch.arange(len(sequences), device=ordered.device) - items.offsets()[:-1][sequences]
    size = len(pool_ids) + 1  # the last column is for items outside the pool
    first = torch.full((batch.batch_size, size), NEVER_SEEN, dtype=torch.int32, device=ordered.device)
    flat, columns = first.view(-1), first_indices(items.values(), ordered)
    flat.scatter_reduce_(0, sequences * size + columns, places.int(), "amin")
    if batch.seen is not None:
        rows = torch.repeat_interleave(batch.seen.lengths, output_size=len(batch.seen.values))
        flat[rows * size + first_indices(batch.seen.values, ordered)] = _BEFORE_THE_SEQUENCE
    of_entries = first.index_select(1, torch.searchsorted(ordered, pool_ids))
    return SeenItems(of_entries, sequences[targets].int(), places[targets].int())


def first_occurrences(ids: Tensor) -> Tensor:
    """bool [S]: True at the first occurrence of each id (int64 [S]) except padding."""
    ordered, order = torch.sort(ids, stable=True)
    return torch.empty_like(ids, dtype=torch.bool).scatter_(0, order, _starts_run(ordered))


def _starts_run(ordered: Tensor) -> Tensor:
    """bool [S]: True at the first element of each run of equal ids, except padding."""
    starts = ordered != PADDING_ID
    starts[1:] &= ordered[1:] != ordered[:-1]
    return starts


def choose_from_pool(draws: Tensor, ids: Tensor) -> Tensor:
    """Pool rows that raw draws, integer [M, R] in [0, 2^31), select among ids [S]: int64 [M, R] in [0, S).

    A draw selects the ⌊draw · n / 2^31⌋-th of the n distinct ids in ascending order. The selected item therefore does
    not depend on how the pool is spread over ranks.
    """
    ordered, order = torch.sort(ids, stable=True)
    is_new = _starts_run(ordered)
    places = torch.where(is_new, is_new.cumsum(0) - 1, len(ids))  # repetitions go to an extra last element
    positions = torch.zeros(len(ids) + 1, dtype=torch.int64, device=ids.device).scatter_(0, places, order)
    return positions[(draws.long() * is_new.sum()) >> DRAW_BITS]
