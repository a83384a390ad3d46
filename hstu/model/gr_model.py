"""The whole model: table lookups, then everything else.

TorchRec's pipelines trace ``GRModel.forward`` symbolically to find the sharded tables and take their communication
ahead, so it must stay a plain chain of calls; all control flow is inside ``dense``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchrec import JaggedTensor, KeyedJaggedTensor

from hstu.data.batch import POOL, HSTUBatch
from hstu.model.embedding import ReplicatedTables, TableSpec, build_collections, narrow_to_dim
from hstu.model.outputs import ModelOutput


class DenseModel(nn.Module):
    """The part of the model that every data-parallel rank holds in full: replicated tables and the task's model."""

    def __init__(
        self,
        replicated: ReplicatedTables,
        task: nn.Module,
        specs: Sequence[TableSpec],
        feature_keys: Sequence[str],
        item_feature: str,
    ) -> None:
        super().__init__()
        self.replicated = replicated
        self.task = task
        self._feature_keys = list(feature_keys)
        self._item_feature = item_feature
        dims = {feature: spec.dim for spec in specs for feature in spec.features}
        self._dim_of_feature = dims | {POOL: dims[item_feature]}

    def forward(self, looked_up: Sequence[Mapping[str, JaggedTensor]], batch: HSTUBatch) -> ModelOutput:
        """Compute loss and predictions. ``looked_up``: rows of the sharded tables, one mapping per collection."""
        if batch.features.keys() != self._feature_keys:  # TorchRec would silently look up the ids of other features
            raise ValueError(
                f"a batch has the features {batch.features.keys()}; the model was built for {self._feature_keys}"
            )
        embeddings: dict[str, JaggedTensor] = self.replicated(batch.features)
        for collection in looked_up:
            embeddings.update(narrow_to_dim(collection, self._dim_of_feature))
        if batch.pool_ids is not None and POOL not in embeddings:
            embeddings[POOL] = _as_one_sequence(self.replicated.rows(self._item_feature, batch.pool_ids))
        output: ModelOutput = self.task(embeddings, batch)
        if torch.is_grad_enabled() and batch.num_labels_total == 0:
            # All ranks take part in the collectives of backward, so every parameter and every looked-up row needs a
            # gradient even where this rank has nothing to learn from. Replicated tables get theirs through the rows.
            rows = [jagged.values() for jagged in embeddings.values()]
            output.loss_sum = output.loss_sum + _zero_that_depends_on([*rows, *self.task.parameters()])
        return output


def as_jagged(rows: Mapping[str, Tensor], batch: HSTUBatch) -> dict[str, JaggedTensor]:
    """Rows [n, dim] per feature as JaggedTensors with the lengths that the features have in ``batch``."""
    features = batch.features.to_dict()
    return {
        name: _as_one_sequence(values)
        if name == POOL
        else JaggedTensor(values, lengths=features[name].lengths(), offsets=features[name].offsets())
        for name, values in rows.items()
    }


def _as_one_sequence(rows: Tensor) -> JaggedTensor:
    return JaggedTensor(rows, lengths=torch.full((1,), len(rows), device=rows.device))


def _zero_that_depends_on(tensors: Sequence[Tensor]) -> Tensor:
    return torch.stack([tensor.float().sum() for tensor in tensors if tensor.requires_grad]).sum() * 0.0


class GRModel(nn.Module):
    """Embedding tables and the dense model of one task.

    ``feature_keys`` are the keys of every batch's ``features``, in order and the same in training and evaluation:
    TorchRec remembers their places from the first batch.
    """

    def __init__(
        self, specs: Sequence[TableSpec], task: nn.Module, feature_keys: Sequence[str], item_feature: str, seed: int
    ) -> None:
        super().__init__()
        self.specs = tuple(specs)
        self.feature_keys = tuple(feature_keys)
        self.item_feature = item_feature
        self.embedding = build_collections(self.specs)
        replicated = ReplicatedTables(self.specs, seed)
        self._dim_of_feature = {feature: spec.dim for spec in self.specs for feature in spec.features}
        self.dense: nn.Module = DenseModel(replicated, task, self.specs, self.feature_keys, item_feature)

    def forward(self, batch: HSTUBatch) -> ModelOutput:
        """Loss, and what the task's evaluation needs, of one batch."""
        looked_up = [collection(batch.features) for collection in self.embedding]
        output: ModelOutput = self.dense(looked_up, batch)
        return output

    def look_up(self, batch: HSTUBatch) -> dict[str, Tensor]:
        """Rows of the sharded tables: feature → [number of values, dim]. ``as_jagged`` gives them to ``dense``.

        A training step calls the two halves of ``forward`` by themselves, so that all gradients of the rows are known
        before any reaches a table.
        """
        rows: dict[str, Tensor] = {}
        for collection in self.embedding:
            looked_up = narrow_to_dim(collection(batch.features), self._dim_of_feature)
            rows.update((feature, jagged.values()) for feature, jagged in looked_up)
        return rows

    @torch.no_grad()
    def embed_items(self, ids: Tensor) -> Tensor:
        """Rows of the item table, float32 [n, dim], for int64 ids [n] on this rank's device.

        Collective where the table is sharded: all ranks call it equally often, each for ids of its own, of any
        number. In training, only inside ``TrainPipeline.evaluation``: pipelines replace the sharded tables' forward.
        """
        spec = next(spec for spec in self.specs if self.item_feature in spec.features)
        if spec.replicated:
            return functional.embedding(ids, self.replicated_tables.weight(spec.name))
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

    @property
    def replicated_tables(self) -> ReplicatedTables:
        """The data_parallel tables, also where ``dense`` is wrapped."""
        return next(module for module in self.dense.modules() if isinstance(module, ReplicatedTables))

    def _collection_of(self, spec: TableSpec) -> nn.Module:
        collections = list(dict.fromkeys(other.collection for other in self.specs if not other.replicated))
        return self.embedding[collections.index(spec.collection)]
