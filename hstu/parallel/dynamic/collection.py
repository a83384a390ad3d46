"""Dynamic tables in TorchRec's sharded collections: ids become rows between the exchange of ids and the lookup.

TorchRec's managed collision is not used: it needs ``buckets``, a contiguous range of ids per rank and a module per
table, and its eviction resets only the state of rowwise_adagrad. Overriding two steps suffices: the exchange of ids,
and ``compute``, which looks rows up. Pipelines call them separately, but ``compute`` in the order of training steps, so
ids get rows in that order even if a pipeline runs ahead.
"""

from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torchrec import EmbeddingCollection, KeyedJaggedTensor
from torchrec.distributed.embedding_sharding import EmbeddingShardingInfo
from torchrec.distributed.embedding_types import KJTList
from torchrec.distributed.sharding.rw_sequence_sharding import RwSequenceEmbeddingSharding
from torchrec.distributed.sharding.rw_sharding import RwSparseFeaturesDist
from torchrec.distributed.types import QuantizedCommCodecs, ShardingEnv

from hstu.data.batches.batch import is_of_negatives
from hstu.model.embedding import DynamicEmbeddingCollection, TableSpec
from hstu.parallel.dynamic.hashing import mix, unmix
from hstu.parallel.dynamic.memory import SplitLookup, logical_name
from hstu.parallel.dynamic.rows import RowBlock, Rows, find_caches
from hstu.parallel.dynamic.table import DynamicTable
from hstu.parallel.table_kernels import CollectionSharder, DistinctIdsCollection
from hstu.parallel.table_optimizer import TableOptimizer


class DynamicFeaturesDist(RwSparseFeaturesDist):
    """Sends ids to the ranks that own them (DynamicEmbeddingArgs.dist_type).

    FBGEMM sends an id, read as unsigned, to rank ``id // block`` if that rank exists, else to ``id % ranks``. With
    hash_roundrobin it sends the hash of the id, which the owner inverts.
    """

    def __init__(self, specs: Sequence[TableSpec], pg: dist.ProcessGroup, device: torch.device | None) -> None:
        """``specs``: the table of each feature."""
        kinds = [spec.dynamic.dist_type for spec in specs if spec.dynamic is not None]
        super().__init__(
            pg=pg,
            num_features=len(specs),
            feature_hash_sizes=[
                spec.rows - pg.size() if kind == "continuous" else pg.size()  # without one default row per rank
                for spec, kind in zip(specs, kinds, strict=True)
            ],
            device=device,
            is_sequence=True,
            keep_original_indices=True,
        )
        self._hashed = [kind == "hash_roundrobin" for kind in kinds]

    def forward(self, sparse_features: KeyedJaggedTensor) -> Any:
        """See RwSparseFeaturesDist."""
        if any(self._hashed):
            by_feature = sparse_features.values().split(sparse_features.length_per_key())
            sent = [mix(own) if hashed else own for own, hashed in zip(by_feature, self._hashed, strict=True)]
            sparse_features = _with_values(sparse_features, torch.cat(sent))
        return super().forward(sparse_features)


class DynamicSharding(RwSequenceEmbeddingSharding):
    """Row-wise sharding that exchanges the real features, and looks up the features of the physical tables."""

    def looked_up(self) -> list[str]:
        """Return the features of the lookup, in order."""
        return super().feature_names()

    def feature_names(self) -> list[str]:
        """See EmbeddingSharding."""
        return [name for name in super().feature_names() if logical_name(name) == name]

    def embedding_names(self) -> list[str]:
        """See EmbeddingSharding. Tables share no feature, so results are named after their features."""
        return self.feature_names()

    def _get_num_features(self) -> int:
        return len(self.feature_names())


class ShardedDynamicCollection(DistinctIdsCollection):
    """A sharded collection of dynamic tables. Call ``create_tables`` before the first use."""

    tables: Mapping[str, DynamicTable]
    counts_ids = True

    def create_tables(
        self, specs: Sequence[TableSpec], weights: Mapping[str, ShardedTensor], optimizer: TableOptimizer, seed: int
    ) -> None:
        """Create empty ``tables`` that write into this rank's live ``weights`` (by table name) and states."""
        spec_of = {spec.name: spec for spec in specs}
        states, caches = optimizer.state_tensors(), find_caches(self._lookups)
        blocks: dict[str, list[RowBlock]] = {}
        for name in self.embeddings:
            training = optimizer.training[name]
            own_states = {state: states[f"{name}.{state}"][0][1] for state in training.states}
            block = RowBlock(weights[name].local_shards()[0].tensor, own_states, caches.get(name))
            blocks.setdefault(logical_name(name), []).append(block)
        self.tables = {
            name: DynamicTable(spec_of[name], seed, Rows(own, spec_of[name].dim)) for name, own in blocks.items()
        }

    @classmethod
    def create_embedding_sharding(
        cls,
        sharding_type: str,
        sharding_infos: list[EmbeddingShardingInfo],
        env: ShardingEnv,
        device: torch.device | None = None,
        qcomm_codecs_registry: dict[str, QuantizedCommCodecs] | None = None,
    ) -> DynamicSharding:
        """See ShardedEmbeddingCollection. Always row-wise."""
        return DynamicSharding(sharding_infos, env, device, qcomm_codecs_registry=qcomm_codecs_registry)

    def _create_input_dist(self, input_feature_names: list[str], ctx: Any = None) -> None:
        super()._create_input_dist(input_feature_names, ctx)
        specs = {feature: table.spec for table in self.tables.values() for feature in table.spec.features}
        self._input_dists = [
            DynamicFeaturesDist([specs[name] for name in sharding.feature_names()], sharding._pg, self._device)
            for sharding in self._sharding_type_to_sharding.values()
        ]

    def compute(self, ctx: Any, dist_input: KJTList) -> list[Tensor]:
        """See ShardedEmbeddingCollection."""
        slots = [self._remap(features) for features in dist_input]
        if not self._split_lookups:
            return super().compute(ctx, KJTList(slots))
        lookups = [split(features) for features, split in zip(slots, self._split_lookups, strict=True)]
        looked_up = super().compute(ctx, KJTList([features for features, _ in lookups]))
        for context, features in zip(ctx.sharding_contexts, slots, strict=True):
            context.lengths_after_input_dist = features.lengths().view(-1, features.stride())
        return [rows.index_select(0, positions) for rows, (_, positions) in zip(looked_up, lookups, strict=True)]

    @cached_property
    def _split_lookups(self) -> list[SplitLookup]:
        """Return one SplitLookup per sharding, or an empty list if no table is split."""
        split_at = {
            feature: len(table.rows.blocks[0].weight)
            for table in self.tables.values()
            if len(table.rows.blocks) > 1
            for feature in table.spec.features
        }
        shardings = self._sharding_type_to_sharding.values() if split_at else ()
        return [
            SplitLookup(sharding.feature_names(), sharding.looked_up(), split_at, self._device)
            for sharding in shardings
        ]

    @torch.no_grad()
    def prefetch(self, dist_input: KJTList, forward_stream: Any = None, ctx: Any = None) -> None:
        """Load rows of ids that already have one into FBGEMM's caches, if any, for the lookup of the next step.

        ``forward_stream`` already holds the lookup of the current step, which this waits for, but not yet its backward,
        which may run at the same time.
        """
        cached = [table for table in self.tables.values() if any(block.cache for block in table.rows.blocks)]
        batches = [(table, _ids_of(table, features)) for features in dist_input for table in cached]
        if batches and forward_stream is not None:
            torch.cuda.current_stream().wait_stream(forward_stream)
        for table, ids in batches:
            table.prefetch(torch.cat(list(ids.values())))

    @torch.no_grad()
    def _remap(self, features: KeyedJaggedTensor) -> KeyedJaggedTensor:
        """Replace ids by slots in this rank's features.

        All features of a table train as one batch. NEGATIVES get no new rows: they are sampled from the corpus, and
        would evict ids that occur in the data.
        """
        slots, slice_of, counts = features.values().clone(), _slices(features), features.weights_or_none()
        for table in self.tables.values():
            ids = _ids_of(table, features)
            table.clear_default_row()
            training = [key for key in ids if self.training and not is_of_negatives(key)]
            if training and counts is not None:  # a negative may be another occurrence of an id
                table.assign_rows(torch.cat(list(ids.values())), torch.cat([counts[slice_of[key]] for key in ids]))
                training = []
            elif training:
                assigned = table.assign_rows(torch.cat([ids[key] for key in training]))
                for key, found in zip(training, assigned.split([len(ids[key]) for key in training]), strict=True):
                    slots[slice_of[key]] = found
            for key in ids:
                if key not in training:
                    slots[slice_of[key]] = table.look_up(ids[key])
        return _with_values(features, slots)


def _with_values(features: KeyedJaggedTensor, values: Tensor) -> KeyedJaggedTensor:
    return KeyedJaggedTensor(
        keys=features.keys(),
        values=values,
        weights=features.weights_or_none(),
        lengths=features.lengths(),
        stride=features.stride(),
        length_per_key=features.length_per_key(),
        offset_per_key=features.offset_per_key(),
    )


def _slices(features: KeyedJaggedTensor) -> dict[str, slice]:
    return {key: slice(*ends) for key, ends in zip(features.keys(), pairwise(features.offset_per_key()), strict=True)}


def _ids_of(table: DynamicTable, features: KeyedJaggedTensor) -> dict[str, Tensor]:
    """Return feature → original ids, for the features of a table."""
    ids, slice_of = features.values(), _slices(features)
    hashed = table.args.dist_type == "hash_roundrobin"
    return {key: unmix(ids[slice_of[key]]) if hashed else ids[slice_of[key]] for key in table.spec.features}


class DynamicSharder(CollectionSharder):
    """Shards DynamicEmbeddingCollections. The planner must be constrained to row-wise sharding."""

    kind = ShardedDynamicCollection

    @property
    def module_type(self) -> type[EmbeddingCollection]:
        """See EmbeddingCollectionSharder."""
        return DynamicEmbeddingCollection
