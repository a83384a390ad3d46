"""The whole model: table lookups, then everything else.

TorchRec's pipelines trace ``GRModel.forward`` symbolically to find the sharded tables and take their communication
ahead, so it must stay a plain chain of calls; all control flow is inside ``dense``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchrec import JaggedTensor, KeyedJaggedTensor

from hstu.data.batch import POOL, GroupBatch, HSTUBatch
from hstu.model.embedding import ReplicatedTables, TableSpec, build_collections, narrow_to_dim
from hstu.model.outputs import ModelOutput

GatherRows = Callable[[Mapping[str, JaggedTensor], GroupBatch], dict[str, JaggedTensor]]
"""Rows that this rank has looked up for its own batch → those of its tensor-parallel group. Differentiable,
collective over the group."""


class DenseModel(nn.Module):
    """What every data-parallel rank holds a copy of: the replicated tables and the task's dense model.

    ``gather_rows``: for batches with a group, which are computed by the ranks of the group together.
    """

    def __init__(
        self,
        replicated: ReplicatedTables,
        task: nn.Module,
        specs: Sequence[TableSpec],
        feature_keys: Sequence[str],
        item_feature: str,
        gather_rows: GatherRows | None = None,
    ) -> None:
        super().__init__()
        self.replicated = replicated
        self.task = task
        self._gather_rows = gather_rows
        self._feature_keys = list(feature_keys)
        self._item_feature = item_feature
        dims = {feature: spec.dim for spec in specs for feature in spec.features}
        self._dim_of_feature = dims | {POOL: dims[item_feature]}

    def forward(self, looked_up: Sequence[Mapping[str, JaggedTensor]], batch: HSTUBatch) -> ModelOutput:
        """``looked_up``: the sharded tables' rows of this rank's batch, one mapping a collection.

        Where the batch has a group, the loss and the count are the group's, the predictions this rank's own.
        """
        if batch.features.keys() != self._feature_keys:  # TorchRec would look up other features' ids without a word
            raise ValueError(
                f"a batch has the features {batch.features.keys()}; the model was built for {self._feature_keys}"
            )
        sharded: dict[str, JaggedTensor] = {}
        for part in looked_up:
            sharded.update(narrow_to_dim(part, self._dim_of_feature))
        if batch.group is None:
            return self._compute(sharded, batch)
        assert self._gather_rows is not None, "only under tensor parallelism do batches have a group"
        output = self._compute(self._gather_rows(sharded, batch.group), batch.group.batch)
        return _own_part(output, batch, batch.group)

    def _compute(self, sharded: Mapping[str, JaggedTensor], batch: HSTUBatch) -> ModelOutput:
        embeddings = self.replicated(batch.features) | sharded
        if batch.pool_ids is not None and POOL not in embeddings:
            embeddings[POOL] = as_jagged(self.replicated.rows(self._item_feature, batch.pool_ids))
        output: ModelOutput = self.task(embeddings, batch)
        if torch.is_grad_enabled() and batch.num_labels_total == 0:
            # All ranks take part in the collectives of backward, so every parameter and every looked-up row needs a
            # gradient even where this rank has nothing to learn from.
            rows = [jagged.values() for jagged in embeddings.values()]
            output.loss_sum = output.loss_sum + _zero_that_depends_on([*rows, *self.parameters()])
        return output


def _own_part(output: ModelOutput, batch: HSTUBatch, group: GroupBatch) -> ModelOutput:
    """The output of a group with the predictions for this rank's own samples alone."""
    logits, queries = output.logits, output.queries
    if queries is not None:
        padding = batch.batch_size - batch.real_batch_size
        queries = functional.pad(queries[group.sequences], (0, 0, 0, padding))
    return replace(output, logits=None if logits is None else logits[group.labels], queries=queries)


def as_jagged(rows: Tensor) -> JaggedTensor:
    """Rows [n, dim] that belong to the batch as a whole, as one sequence."""
    return JaggedTensor(rows, lengths=torch.full((1,), len(rows), device=rows.device))


def _zero_that_depends_on(tensors: Sequence[Tensor]) -> Tensor:
    return torch.stack([tensor.float().sum() for tensor in tensors if tensor.requires_grad]).sum() * 0.0


class GRModel(nn.Module):
    """Embedding tables and the dense model of one task.

    ``feature_keys`` are the keys of every batch's ``features``, in order and the same in training and evaluation:
    TorchRec remembers their places from the first batch.
    """

    def __init__(
        self,
        specs: Sequence[TableSpec],
        task: nn.Module,
        feature_keys: Sequence[str],
        item_feature: str,
        seed: int,
        gather_rows: GatherRows | None = None,
    ) -> None:
        super().__init__()
        self.specs = tuple(specs)
        self.feature_keys = tuple(feature_keys)
        self.item_feature = item_feature
        self.embedding = build_collections(self.specs)
        replicated = ReplicatedTables(self.specs, seed)
        self._gather_rows = gather_rows
        self._dim_of_feature = {feature: spec.dim for spec in self.specs for feature in spec.features}
        self.dense: nn.Module = DenseModel(replicated, task, self.specs, self.feature_keys, item_feature, gather_rows)

    def forward(self, batch: HSTUBatch) -> ModelOutput:
        """Loss, and what the task's evaluation needs, of one batch."""
        looked_up = [collection(batch.features) for collection in self.embedding]
        output: ModelOutput = self.dense(looked_up, batch)
        return output

    def look_up(self, batch: HSTUBatch) -> dict[str, JaggedTensor]:
        """Rows of the sharded tables, by feature, for ``dense`` to compute ``batch.computed`` from, whole or in parts.

        The first half of ``forward``, for a training step that lets gradients reach the tables when all are known.
        """
        looked_up: dict[str, JaggedTensor] = {}
        for collection in self.embedding:
            looked_up.update(narrow_to_dim(collection(batch.features), self._dim_of_feature))
        if batch.group is not None:
            assert self._gather_rows is not None, "only under tensor parallelism do batches have a group"
            looked_up = self._gather_rows(looked_up, batch.group)
        pool = batch.computed.pool_positions if batch.computed.micro else None
        if pool is not None and self.item_feature in looked_up:
            looked_up[POOL] = as_jagged(looked_up[self.item_feature].values().index_select(0, pool))
        return looked_up

    @torch.no_grad()
    def embed_items(self, ids: Tensor) -> Tensor:
        """Rows of the item table, float32 [n, dim], for int64 ids [n] on this rank's device.

        Collective where the table is sharded: all ranks call it equally often, each for ids of its own, of any
        number. In training, only inside ``TrainPipeline.evaluation``: pipelines replace the sharded tables' forward.
        """
        spec = next(spec for spec in self.specs if self.item_feature in spec.features)
        if spec.replicated:
            return functional.embedding(ids, self._replicated_tables().weight(spec.name))
        lengths = [len(ids) if key == self.item_feature else 0 for key in self.feature_keys]
        features = KeyedJaggedTensor(
            keys=list(self.feature_keys),
            values=ids,
            lengths=torch.tensor(lengths, device=ids.device),
            stride=1,
            length_per_key=lengths,
        )
        looked_up = self._collection_of(spec)(features)[self.item_feature].values()
        rows: Tensor = looked_up[:, : spec.dim]
        return rows

    def _replicated_tables(self) -> ReplicatedTables:
        return next(module for module in self.dense.modules() if isinstance(module, ReplicatedTables))

    def _collection_of(self, spec: TableSpec) -> nn.Module:
        collections = list(dict.fromkeys(other.collection for other in self.specs if not other.replicated))
        return self.embedding[collections.index(spec.collection)]
