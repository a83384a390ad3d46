"""The whole model: table lookups, then the dense model.

TorchRec's pipelines trace ``GRModel.forward`` symbolically to find the sharded tables and start their communication
early. It must therefore stay a plain chain of calls; all control flow is inside ``dense`` and ``_rows``.
"""

from collections.abc import Mapping, Sequence

import torch
import torch.fx
from torch import Tensor, nn
from torchrec import JaggedTensor, KeyedJaggedTensor

from hstu.data.batches.batch import HSTUBatch, ItemFeatures
from hstu.data.features.roles import FeatureRoles
from hstu.model.embedding import ReplicatedTables, TableSpec, build_collections, look_up
from hstu.model.inputs import ItemTower, join_rows
from hstu.model.stack import ModelOutput


class DenseModel(nn.Module):
    """Everything except the sharded tables: replicated tables and the task's model."""

    def __init__(self, replicated: ReplicatedTables, task: nn.Module, feature_keys: Sequence[str]) -> None:
        super().__init__()
        self.replicated = replicated
        self.task = task
        self._feature_keys = list(feature_keys)
        self.filled = [name for name, _ in task.named_parameters()]
        """Names of the weights that get a gradient of zeros from a batch without labels."""

    def forward(self, looked_up: Mapping[str, Tensor], batch: HSTUBatch) -> ModelOutput:
        """Compute loss and predictions. ``looked_up``: feature of a sharded table → rows [n, dim]."""
        if batch.features.keys() != self._feature_keys:  # TorchRec would silently look up the ids of other features
            raise ValueError(
                f"a batch has the features {batch.features.keys()}; the model was built for {self._feature_keys}"
            )
        embeddings = {**self.replicated(batch), **looked_up}
        output: ModelOutput = self.task(embeddings, batch)
        if torch.is_grad_enabled() and batch.num_labels_total == 0:
            # Backward has collectives, so every parameter and every looked-up row needs a gradient on every rank, even
            # without labels. Replicated tables get theirs through the rows.
            tensors = [*embeddings.values(), *map(self.task.get_parameter, self.filled)]
            zero = torch.stack([tensor.float().sum() for tensor in tensors if tensor.requires_grad]).sum() * 0.0
            output.loss_sum = output.loss_sum + zero
        return output


@torch.fx.wrap
def _rows(looked_up: Sequence[Mapping[str, JaggedTensor]], dims: Mapping[str, int]) -> dict[str, Tensor]:
    """Rows of all collections by feature, without the columns that pad sharded tables to FBGEMM's multiple."""
    return {
        feature: rows if (rows := jagged.values()).shape[1] == dims[feature] else rows[:, : dims[feature]]
        for collection in looked_up
        for feature, jagged in collection.items()
    }


class GRModel(nn.Module):
    """Embedding tables and the dense model of one task.

    All batches have ``feature_keys`` as keys, in this order: TorchRec caches their positions from the first batch.
    """

    def __init__(
        self, specs: Sequence[TableSpec], task: nn.Module, feature_keys: Sequence[str], roles: FeatureRoles, seed: int
    ) -> None:
        super().__init__()
        self.specs = tuple(specs)
        self.feature_keys = tuple(feature_keys)
        self.roles = roles
        self.embedding = build_collections(self.specs)
        self._dim_of_feature = {feature: spec.dim for spec in self.specs for feature in spec.features}
        replicated = ReplicatedTables(self.specs, seed, roles.item)
        self.dense: nn.Module = DenseModel(replicated, task, self.feature_keys)

    def forward(self, batch: HSTUBatch) -> ModelOutput:
        """Compute the loss and the predictions of one batch."""
        return self.dense(self.look_up(batch), batch)

    def look_up(self, batch: HSTUBatch) -> dict[str, Tensor]:
        """Rows of sharded tables: feature → [number of values, dim], the first argument of ``dense``.

        A training step calls this and ``dense`` separately, so that it has all gradients before it updates any table.
        """
        return _rows([collection(batch.features) for collection in self.embedding], self._dim_of_feature)

    @torch.no_grad()
    def embed_items(self, ids: Tensor, features: ItemFeatures | None = None) -> Tensor:
        """Item vectors, float32 [n, dim], not normalised, for int64 ids [n] on this device; zeros for unknown items.

        A vector is a row of the item table, or the output of the item tower for this row and ``features``. Collective
        if a table is sharded: all ranks call it equally often, each with any number of ids. In training, call it inside
        ``TrainPipeline.evaluation``, because pipelines replace the forward of sharded tables.
        """
        tower, item = self.item_tower, self.roles.item
        if tower is None:
            return self.rows_of({item: ids})[item]
        assert features is not None
        values, lengths = (
            {name: torch.from_numpy(array).to(ids.device) for name, array in arrays.items()}
            for arrays in (features.values, features.list_lengths)
        )
        rows = self.rows_of({item: ids} | values)
        is_known = rows[item].any(dim=1) | join_rows(tower.features, rows, lengths).any(dim=1)
        return tower(rows[item], rows, lengths) * is_known[:, None]

    def rows_of(self, ids: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Rows [n, dim] for ids [n] per feature. Collective if a table is sharded."""
        lengths = [len(ids.get(key, ())) for key in self.feature_keys]
        device = next(iter(ids.values())).device
        features = KeyedJaggedTensor(
            keys=list(self.feature_keys),
            values=torch.cat([ids[key] for key in self.feature_keys if key in ids]),
            lengths=torch.tensor(lengths, device=device),
            stride=1,
            length_per_key=lengths,
        )
        sharded = [spec for spec in self.specs if not spec.replicated]
        needed = {spec.collection for spec in sharded if not ids.keys().isdisjoint(spec.features)}
        kinds = zip(dict.fromkeys(spec.collection for spec in sharded), self.embedding, strict=True)
        rows = _rows([collection(features) for kind, collection in kinds if kind in needed], self._dim_of_feature)
        for spec in self.specs:
            if spec.replicated:
                weight = self.replicated_tables.weight(spec.name)
                rows |= {name: look_up(ids[name], weight) for name in spec.features if name in ids}
        return {name: rows[name] for name in ids}

    @property
    def item_tower(self) -> ItemTower | None:
        """The item tower or None. Works also if ``dense`` is wrapped."""
        return next((module for module in self.dense.modules() if isinstance(module, ItemTower)), None)

    @property
    def replicated_tables(self) -> ReplicatedTables:
        """The data_parallel tables. Works also if ``dense`` is wrapped."""
        return next(module for module in self.dense.modules() if isinstance(module, ReplicatedTables))
