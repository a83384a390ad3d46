"""Dynamic tables inside TorchRec's sharded collections: between the exchange of ids and the lookup, ids become rows.

Not on TorchRec's managed collision: its sharding demands `buckets`, a contiguous range of ids a rank and a module for
each table that is driven through dicts of JaggedTensors, and its eviction resets the state of rowwise_adagrad alone.
All that is needed is two steps of ShardedEmbeddingCollection itself: the exchange, which already sends any int64
whole to the rank that a block size determines, and ``compute``, in which rows are then looked up. Both lie behind the
calls that pipelines take apart, so that an id is given a row in the order of the steps, whatever runs ahead.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torchrec import EmbeddingCollection, KeyedJaggedTensor
from torchrec.distributed.embedding import EmbeddingCollectionSharder, ShardedEmbeddingCollection
from torchrec.distributed.embedding_sharding import EmbeddingShardingInfo
from torchrec.distributed.embedding_types import KJTList
from torchrec.distributed.sharding.rw_sharding import RwSparseFeaturesDist
from torchrec.distributed.types import ParameterSharding, QuantizedCommCodecs, ShardingEnv

from hstu.data.batch import NEGATIVES
from hstu.model.embedding import DynamicEmbeddingCollection, TableSpec
from hstu.parallel.dynamic.hashing import mix, unmix
from hstu.parallel.dynamic.split import OwnerSharding, Parting
from hstu.parallel.dynamic.table import DynamicTable
from hstu.parallel.row_sparse import RowSparseEmbeddingCollection


class OwnerDist(RwSparseFeaturesDist):
    """Sends ids, unchanged, to the ranks that own them (DynamicEmbeddingArgs.dist_type).

    FBGEMM sends an id, read as unsigned, to rank ``id // block`` where there is one, else to ``id % ranks``. A hash
    travels instead of its id, and is turned back at its owner.
    """

    def __init__(self, specs: Sequence[TableSpec], pg: dist.ProcessGroup, device: torch.device | None) -> None:
        """``specs``: the table of each feature."""
        kinds = [spec.dynamic.dist_type for spec in specs if spec.dynamic is not None]
        capacities = [spec.rows - pg.size() for spec in specs]  # without the default rows
        super().__init__(
            pg=pg,
            num_features=len(specs),
            feature_hash_sizes=[
                capacity if kind == "continuous" else pg.size()
                for kind, capacity in zip(kinds, capacities, strict=True)
            ],
            device=device,
            is_sequence=True,
            keep_original_indices=True,
        )
        self._hashed = [kind == "hash_roundrobin" for kind in kinds]

    def forward(self, sparse_features: KeyedJaggedTensor) -> Any:
        """See RwSparseFeaturesDist."""
        if any(self._hashed):
            ends, ids = sparse_features.offset_per_key(), sparse_features.values()
            parts = [ids[start:stop] for start, stop in pairwise(ends)]
            sent = [mix(part) if hashed else part for part, hashed in zip(parts, self._hashed, strict=True)]
            sparse_features = with_values(sparse_features, torch.cat(sent))
        return super().forward(sparse_features)


def with_values(features: KeyedJaggedTensor, values: Tensor) -> KeyedJaggedTensor:
    """The same features with other ids."""
    return KeyedJaggedTensor(
        keys=features.keys(),
        values=values,
        lengths=features.lengths(),
        stride=features.stride(),
        length_per_key=features.length_per_key(),
        offset_per_key=features.offset_per_key(),
    )


class DynamicLookups(ShardedEmbeddingCollection):
    """What a sharded collection of dynamic tables does besides. ``specs`` and ``tables`` are set once it is made."""

    specs: Mapping[str, TableSpec]
    """By feature."""
    tables: Mapping[str, DynamicTable]
    """By name; empty where this rank has no share, which row-wise sharding does not leave."""

    @classmethod
    def create_embedding_sharding(
        cls,
        sharding_type: str,
        sharding_infos: list[EmbeddingShardingInfo],
        env: ShardingEnv,
        device: torch.device | None = None,
        qcomm_codecs_registry: dict[str, QuantizedCommCodecs] | None = None,
    ) -> OwnerSharding:
        """See ShardedEmbeddingCollection. Always row-wise."""
        return OwnerSharding(sharding_infos, env, device, qcomm_codecs_registry=qcomm_codecs_registry)

    def _create_input_dist(self, input_feature_names: list[str], ctx: Any = None) -> None:
        super()._create_input_dist(input_feature_names, ctx)
        self._input_dists = [
            OwnerDist([self.specs[name] for name in sharding.feature_names()], sharding._pg, self._device)
            for sharding in self._sharding_type_to_sharding.values()
        ]

    def compute(self, ctx: Any, dist_input: KJTList) -> list[Tensor]:
        """See ShardedEmbeddingCollection."""
        slots = [self._remapped(features) for features in dist_input]
        if not self._partings:
            return super().compute(ctx, KJTList(slots))
        lookups = [parting(features) for features, parting in zip(slots, self._partings, strict=True)]
        looked_up = super().compute(ctx, KJTList([features for features, _ in lookups]))
        for context, features in zip(ctx.sharding_contexts, slots, strict=True):
            context.lengths_after_input_dist = features.lengths().view(-1, features.stride())
        return [rows.index_select(0, places) for rows, (_, places) in zip(looked_up, lookups, strict=True)]

    @cached_property
    def _partings(self) -> list[Parting]:
        """Of each sharding, where there is a table in two parts; else none."""
        split_at = {
            feature: len(table.rows.parts[0].weight)
            for table in self.tables.values()
            if len(table.rows.parts) > 1
            for feature in table.spec.features
        }
        shardings = self._sharding_type_to_sharding.values() if split_at else ()
        return [
            Parting(sharding.feature_names(), sharding.looked_up(), split_at, self._device) for sharding in shardings
        ]

    def compute_and_output_dist(self, ctx: Any, input: KJTList) -> Any:
        """See ShardedEmbeddingCollection."""
        return self.output_dist(ctx, self.compute(ctx, input))

    @torch.no_grad()
    def prefetch(self, dist_input: KJTList, forward_stream: Any = None, ctx: Any = None) -> None:
        """Bring rows into FBGEMM's caches, where there are any, for a lookup in the next step.

        Only of ids that have a row by now, and none gets one: that is for the step itself. ``forward_stream``: has the
        lookup of the step before, behind which this waits, but not its backward, beside which it may run.
        """
        cached = [table for table in self.tables.values() if table.rows.is_cached]
        batches = [(table, _ids_of(table, features)) for features in dist_input for table in cached]
        if batches and forward_stream is not None:
            torch.cuda.current_stream().wait_stream(forward_stream)
        for table, ids in batches:
            table.bring_near(torch.cat(list(ids.values())))

    @torch.no_grad()
    def _remapped(self, features: KeyedJaggedTensor) -> KeyedJaggedTensor:
        """This rank's features with slots for ids.

        A table's features train together, as one batch. NEGATIVES come after them and give no id a row: they were drawn
        from the corpus, and would drive out the ids that occur.
        """
        slots, part_of = features.values().clone(), _places(features)
        for table in self.tables.values():
            parts = _ids_of(table, features)
            table.clear_default_row()
            training = [key for key in parts if self.training and key != NEGATIVES]
            if training:
                trained = table.train(torch.cat([parts[key] for key in training]))
                for key, found in zip(training, trained.split([len(parts[key]) for key in training]), strict=True):
                    slots[part_of[key]] = found
            for key in parts:
                if key not in training:
                    slots[part_of[key]] = table.look_up(parts[key], training=self.training)
        return with_values(features, slots)


def _places(features: KeyedJaggedTensor) -> dict[str, slice]:
    """Where the values of each feature stand."""
    return {key: slice(*ends) for key, ends in zip(features.keys(), pairwise(features.offset_per_key()), strict=True)}


def _ids_of(table: DynamicTable, features: KeyedJaggedTensor) -> dict[str, Tensor]:
    """The ids of each of a table's features, as they were before they were sent to their owner."""
    ids, places = features.values(), _places(features)
    hashed = table.spec.dynamic is not None and table.spec.dynamic.dist_type == "hash_roundrobin"
    return {key: unmix(ids[places[key]]) if hashed else ids[places[key]] for key in table.spec.features}


class DynamicFusedCollection(DynamicLookups):
    """Trained by FBGEMM's fused optimizers."""


class DynamicRowSparseCollection(DynamicLookups, RowSparseEmbeddingCollection):
    """Trained by RowLazyAdam, those with another optimizer by FBGEMM's."""


class DynamicSharder(EmbeddingCollectionSharder):
    """Shards DynamicEmbeddingCollections, row-wise, as the planner must have been told."""

    def __init__(self, specs: Sequence[TableSpec], sharder: EmbeddingCollectionSharder, row_sparse: bool) -> None:
        """``sharder``: that of the other tables; ``row_sparse``: it leaves some gradients to RowLazyAdam."""
        super().__init__(sharder.fused_params)
        self._specs = {feature: spec for spec in specs if spec.dynamic is not None for feature in spec.features}
        self._row_sparse = row_sparse

    def shard(
        self,
        module: EmbeddingCollection,
        params: dict[str, ParameterSharding],
        env: ShardingEnv,
        device: torch.device | None = None,
        module_fqn: str | None = None,
    ) -> DynamicLookups:
        """See EmbeddingCollectionSharder."""
        kind = DynamicRowSparseCollection if self._row_sparse else DynamicFusedCollection
        collection = kind(module, params, env, self.fused_params, device, module_fqn=module_fqn)
        collection.specs = self._specs
        return collection

    @property
    def module_type(self) -> type[EmbeddingCollection]:
        """See EmbeddingCollectionSharder."""
        return DynamicEmbeddingCollection
