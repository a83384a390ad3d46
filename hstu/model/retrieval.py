"""RetrievalGR: predict the next item by nearest neighbours; sampled or full softmax over items."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchrec import JaggedTensor

from hstu.config.args import RetrievalArgs
from hstu.data.batch import NEGATIVES, POOL, HSTUBatch
from hstu.model.negatives import GatherPool, choose_from_pool, first_occurrences, own_pool
from hstu.model.outputs import ModelOutput
from hstu.ops.backends import Backend
from hstu.ops.layout import JaggedLayout
from hstu.ops.normalise import l2_normalise
from hstu.ops.softmax_loss import pool_softmax_loss, sampled_softmax_loss


class RetrievalDense(nn.Module):
    """The dense part of retrieval: a sequence encoder, and a softmax over items.

    The output at the newest token of each step is the query for the next item. Queries and items are compared by the
    cosine of their angle, over a temperature.

    Args:
        encoder: (embeddings, batch) → (tokens [T, hidden_size], their JaggedLayout).
        item_feature: key of the item ids in a batch.
        hidden_size: width of the tokens.
        item_dim: width of the item table; where it is not hidden_size, queries are projected to it.
        args: temperature and l2_norm_eps; the negatives themselves come with the batch.
        gather_pool: collects the in-batch pool over data-parallel ranks.
        backend: kernels of the loss and of normalising.
    """

    def __init__(
        self,
        encoder: nn.Module,
        *,
        item_feature: str,
        hidden_size: int,
        item_dim: int,
        args: RetrievalArgs,
        gather_pool: GatherPool = own_pool,
        backend: Backend = Backend.PYTORCH,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.query_projection = nn.Linear(hidden_size, item_dim) if item_dim != hidden_size else nn.Identity()
        self.item_feature = item_feature
        self.temperature = args.temperature
        self.l2_norm_eps = args.l2_norm_eps
        self.gather_pool = gather_pool
        self.backend = backend

    def forward(self, embeddings: dict[str, JaggedTensor], batch: HSTUBatch) -> ModelOutput:
        """In training mode the loss of the batch's labels, in evaluation mode the queries at the newest tokens.

        ``embeddings``: table rows of the item feature and, where the batch has them, of NEGATIVES. Collective in
        training with in-batch negatives.
        """
        tokens, layout = self.encoder(embeddings, batch)
        num_labels = batch.num_labels.sum()
        if self.training:
            return ModelOutput(self._loss(tokens, layout, embeddings, batch), num_labels)
        no_loss = tokens.new_zeros((), dtype=torch.float32)
        return ModelOutput(no_loss, num_labels, queries=self._newest_queries(tokens, layout))

    def _queries(self, tokens: Tensor) -> Tensor:
        return l2_normalise(self.query_projection(tokens), self.l2_norm_eps, self.backend)

    def _newest_queries(self, tokens: Tensor, layout: JaggedLayout) -> Tensor:
        """[B, item_dim], zero for empty sequences."""
        with_filler = F.pad(tokens, (0, 0, 0, 1))  # so that there is a row to take for a batch of padding only
        is_real = layout.seqlen_offsets.diff() > 0
        return self._queries(with_filler[layout.newest_tokens()]) * is_real[:, None]

    def _loss(
        self, tokens: Tensor, layout: JaggedLayout, embeddings: dict[str, JaggedTensor], batch: HSTUBatch
    ) -> Tensor:
        """Sum over the labelled items of −log softmax, each predicted from the newest token before it."""
        _check_labels_have_history(batch)
        labelled_tokens = layout.newest_item_tokens(batch.num_labels, total=batch.num_labels_total)
        queries = self._queries(tokens.index_select(0, labelled_tokens - 1))
        item_ends = embeddings[self.item_feature].offsets()[1:]
        labelled_items = newest_elements(item_ends, batch.num_labels, batch.num_labels_total)
        positives = self._item_vectors(embeddings, labelled_items)
        if NEGATIVES in embeddings:
            pool = l2_normalise(embeddings[NEGATIVES].values(), self.l2_norm_eps, self.backend)
            pool_ids, draws, valid = batch.features[NEGATIVES].values(), batch.draws, None
        else:
            pool, pool_ids = self.gather_pool(*self._own_pool(embeddings, batch))
            draws = None if batch.draws is None else choose_from_pool(batch.draws, pool_ids)
            valid = first_occurrences(pool_ids) if draws is None else None
        if draws is None:
            return pool_softmax_loss(
                queries, positives, pool, batch.labels, pool_ids, valid, self.temperature, self.backend
            )
        return sampled_softmax_loss(
            queries, positives, pool, draws, batch.labels, pool_ids, self.temperature, self.backend
        )

    def _own_pool(self, embeddings: dict[str, JaggedTensor], batch: HSTUBatch) -> tuple[Tensor, Tensor]:
        """Normalised rows and ids of the distinct items of this rank's batch, of which ``batch`` may be a part."""
        if batch.pool_ids is not None:
            return l2_normalise(embeddings[POOL].values(), self.l2_norm_eps, self.backend), batch.pool_ids
        assert batch.pool_positions is not None
        ids = batch.features[self.item_feature].values()[batch.pool_positions]
        return self._item_vectors(embeddings, batch.pool_positions), ids

    def _item_vectors(self, embeddings: dict[str, JaggedTensor], positions: Tensor) -> Tensor:
        """Normalised table rows of the items at ``positions`` among all items of the batch."""
        rows = embeddings[self.item_feature].values().index_select(0, positions)
        return l2_normalise(rows, self.l2_norm_eps, self.backend)


def newest_elements(ends: Tensor, count: Tensor, total: int) -> Tensor:
    """Positions of the newest ``count[s]`` elements of runs that end at ``ends[s]``, in order: int64 [total].

    ends, count: int64 [B]. ``total`` is the sum of ``count``, which the device is not asked for.
    """
    run = torch.repeat_interleave(count, output_size=total)
    shift = ends - count.cumsum(0)
    return torch.arange(total, device=count.device) + shift[run]


def _check_labels_have_history(batch: HSTUBatch) -> None:
    most = int(np.maximum(batch.item_lengths - 1, 0).sum())
    if batch.num_labels_total > most:
        raise ValueError(f"{batch.num_labels_total} labels in a batch in which only {most} items follow another")
