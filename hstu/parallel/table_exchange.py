"""What ranks send each other for sharded tables: each id once per rank and batch, and rows in one of two types."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torchrec import KeyedJaggedTensor
from torchrec.distributed.embedding import EmbeddingCollectionAwaitable, ShardedEmbeddingCollection
from torchrec.distributed.embedding_types import KJTList
from torchrec.distributed.fbgemm_qcomm_codec import CommType, QCommsConfig, get_qcomm_codecs
from torchrec.distributed.types import CommOp, QuantizedCommCodecs

from hstu.data.batches.batch import is_of_negatives


def exchange_codecs(dtype: str) -> dict[str, QuantizedCommCodecs] | None:
    """Return TorchRec's codecs for rows and their gradients, for PrecisionArgs.table_exchange_dtype.

    get_qcomm_codecs_registry would send float16 between CPUs, where gloo once lacked bfloat16.
    """
    if dtype == "float32":
        return None
    precision = CommType.BF16
    return {CommOp.SEQUENCE_EMBEDDINGS_ALL_TO_ALL.name: get_qcomm_codecs(QCommsConfig(precision, precision))}


class DistinctIdsCollection(ShardedEmbeddingCollection):
    """TorchRec's sharded collection. With ``use_index_dedup`` a rank looks up each id of a table once per batch.

    Rows are repeated after their exchange, and gradients of repeated ids are added before theirs. TorchRec's own
    implementation needs fbgemm.jagged_unique_indices, which exists only for CUDA, takes an id beyond its table for one
    of the next table, and spreads the ids over all sequences, whose lengths are sent as well.
    """

    counts_ids = False
    """Whether the exchanged ids have weights: how often they occur, not counting negatives, float32."""

    def exchanged_together(self, sharding: Any) -> list[Sequence[str]]:
        """Return groups of consecutive features, in order. An id that occurs several times in a group is sent once."""
        return [table.feature_names for table in sharding.embedding_tables()]

    def _create_hash_size_info(self, feature_names: list[str], ctx: Any = None) -> None:
        shardings = self._sharding_type_to_sharding.values()
        self._group_sizes = [[len(group) for group in self.exchanged_together(sharding)] for sharding in shardings]

    def _dedup_indices(self, ctx: Any, input_feature_splits: list[KeyedJaggedTensor]) -> list[KeyedJaggedTensor]:
        distinct = []
        for features, sizes in zip(input_feature_splits, self._group_sizes, strict=True):
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
        """See ShardedEmbeddingCollection."""
        return _repeat_rows(ctx, super().output_dist(ctx, output))

    def compute_and_output_dist(self, ctx: Any, input: KJTList) -> EmbeddingCollectionAwaitable:
        """See ShardedEmbeddingCollection."""
        return _repeat_rows(ctx, super().compute_and_output_dist(ctx, input))


def _repeat_rows(ctx: Any, result: Any) -> EmbeddingCollectionAwaitable:
    """Give each occurrence of an id its row once the rows have arrived, in place of TorchRec, which reads ``ctx``."""
    for rows, positions in zip(result._awaitables_per_sharding, ctx.reverse_indices, strict=False):
        rows.callbacks.append(partial(_rows_at, positions))
    ctx.reverse_indices = []
    return result


def _rows_at(positions: Tensor, rows: Tensor) -> Tensor:
    if rows.is_cuda:  # index_select adds gradients by atomics; embedding sorts them, which repeats bit for bit
        return functional.embedding(positions, rows)
    return rows.index_select(0, positions)
