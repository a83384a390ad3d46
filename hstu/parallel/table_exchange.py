"""What ranks send each other for sharded tables: each id once per rank and batch, and rows in one of two types."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torchrec import EmbeddingCollection, KeyedJaggedTensor
from torchrec.distributed.embedding import (
    EmbeddingCollectionAwaitable,
    EmbeddingCollectionSharder,
    ShardedEmbeddingCollection,
)
from torchrec.distributed.embedding_types import KJTList
from torchrec.distributed.fbgemm_qcomm_codec import CommType, QCommsConfig, get_qcomm_codecs
from torchrec.distributed.types import CommOp, ParameterSharding, ShardingEnv

from hstu.data.batches.batch import is_of_negatives
from hstu.parallel.table_kernels import RowSparseLookup

BFLOAT16 = {CommOp.SEQUENCE_EMBEDDINGS_ALL_TO_ALL.name: get_qcomm_codecs(QCommsConfig(CommType.BF16, CommType.BF16))}
"""TorchRec's codecs of rows and gradients. Its get_qcomm_codecs_registry would send float16 between CPUs."""


class DistinctIdsCollection(ShardedEmbeddingCollection):
    """TorchRec's collection with RowSparseLookup. With ``use_index_dedup`` a rank looks up an id of a table once.

    Rows are repeated after their exchange, and gradients of repeated ids are added before theirs. TorchRec's own
    implementation needs fbgemm.jagged_unique_indices, which exists only for CUDA, takes an id beyond its table for one
    of the next table, and spreads the ids over all sequences, whose lengths are sent as well.
    """

    counts_ids = False
    """Whether the exchanged ids have weights: how often they occur, not counting negatives, float32."""

    def _create_hash_size_info(self, feature_names: list[str], ctx: Any = None) -> None:
        self._features_per_table = [
            [len(table.feature_names) for table in sharding.embedding_tables() if table.feature_names[0] in names]
            for sharding in self._sharding_type_to_sharding.values()
            for names in [sharding.feature_names()]  # without those of a dynamic table's second part
        ]

    def _dedup_indices(self, ctx: Any, input_feature_splits: list[KeyedJaggedTensor]) -> list[KeyedJaggedTensor]:
        distinct = []
        for features, sizes in zip(input_feature_splits, self._features_per_table, strict=True):
            ends, key, first = features.offset_per_key(), 0, 0
            ids, positions, counts, lengths = [], [], [], []
            for size in sizes:
                found, place = torch.unique(features.values()[ends[key] : ends[key + size]], return_inverse=True)
                ids.append(found)
                positions.append(place + first)
                counts.append(place.new_zeros(len(found), dtype=torch.float32))
                for k in range(key, key + size) if self.counts_ids else ():
                    if not is_of_negatives(features.keys()[k]):
                        occurs = place[ends[k] - ends[key] : ends[k + 1] - ends[key]]
                        counts[-1].index_add_(0, occurs, torch.ones_like(occurs, dtype=torch.float32))
                lengths += [len(found)] + [0] * (size - 1)
                key, first = key + size, first + len(found)
            ctx.input_features.append(features)
            ctx.reverse_indices.append(torch.cat(positions))
            distinct.append(
                KeyedJaggedTensor(
                    keys=features.keys(),
                    values=torch.cat(ids),
                    weights=torch.cat(counts) if self.counts_ids else None,
                    lengths=torch.tensor(lengths, dtype=features.lengths().dtype, device=features.device()),
                    stride=1,
                    length_per_key=lengths,
                )
            )
        return distinct

    def output_dist(self, ctx: Any, output: list[Tensor]) -> EmbeddingCollectionAwaitable:
        """See ShardedEmbeddingCollection. Its index_select would add gradients in any order on GPUs."""
        positions, ctx.reverse_indices = ctx.reverse_indices, []
        result = super().output_dist(ctx, output)
        for rows, of_rows in zip(result._awaitables_per_sharding, positions, strict=False):
            rows.callbacks.append(partial(functional.embedding, of_rows))
        return result

    def compute_and_output_dist(self, ctx: Any, input: KJTList) -> EmbeddingCollectionAwaitable:
        """See ShardedEmbeddingCollection."""
        return self.output_dist(ctx, self.compute(ctx, input))

    def _create_lookups(self) -> None:
        for sharding in self._sharding_type_to_sharding.values():
            configs = sharding._grouped_embedding_configs
            self._lookups.append(RowSparseLookup(configs, pg=sharding._pg, device=self._device))


class CollectionSharder(EmbeddingCollectionSharder):
    """Shards EmbeddingCollections into ``kind``."""

    kind: type[DistinctIdsCollection] = DistinctIdsCollection

    def shard(
        self,
        module: EmbeddingCollection,
        params: dict[str, ParameterSharding],
        env: ShardingEnv,
        device: torch.device | None = None,
        module_fqn: str | None = None,
    ) -> DistinctIdsCollection:
        """See EmbeddingCollectionSharder."""
        options = self.qcomm_codecs_registry, self._use_index_dedup, module_fqn
        return self.kind(module, params, env, self.fused_params, device, *options)
