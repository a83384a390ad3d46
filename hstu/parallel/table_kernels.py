"""What TorchRec's sharded tables lack: distinct ids, optimizers on the CPU, and measured or clamped gradients of rows.

On the CPU, FBGEMM 1.6 to 1.8 has no fused Adam ("not supported in CPU mode"), and DenseTableBatchedEmbeddingBags of the
DENSE compute kernel pools despite PoolingMode.NONE. tests/parallel/test_table_kernels.py fails when either is fixed.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import partial
from itertools import accumulate
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._shard.metadata import ShardMetadata
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.nn import functional
from torchrec import EmbeddingCollection, KeyedJaggedTensor
from torchrec.distributed.batched_embedding_kernel import BatchedFusedEmbedding
from torchrec.distributed.embedding import (
    EmbeddingCollectionAwaitable,
    EmbeddingCollectionSharder,
    ShardedEmbeddingCollection,
)
from torchrec.distributed.embedding_kernel import BaseEmbedding, get_state_dict
from torchrec.distributed.embedding_lookup import GroupedEmbeddingsLookup
from torchrec.distributed.embedding_types import EmbeddingComputeKernel, GroupedEmbeddingConfig, KJTList
from torchrec.distributed.fbgemm_qcomm_codec import CommType, QCommsConfig, get_qcomm_codecs
from torchrec.distributed.types import CommOp, ParameterSharding, ShardingEnv

from hstu.data.batches.batch import is_of_negatives
from hstu.model.embedding import look_up
from hstu.ops.row_update import add_rows

BFLOAT16 = {CommOp.SEQUENCE_EMBEDDINGS_ALL_TO_ALL.name: get_qcomm_codecs(QCommsConfig(CommType.BF16, CommType.BF16))}
"""TorchRec's codecs of rows and gradients. Its get_qcomm_codecs_registry would send float16 between CPUs."""

BAGS = 4096
"""Bags per key in lookups on a GPU: about the warps that are resident at a time."""
Piece = tuple[Sequence[int], Tensor]
"""A live shard of this rank: offset of its first element in the whole tensor; shard."""


def pieces_of(sharded: ShardedTensor) -> list[Piece]:
    """Return the shards of this rank."""
    return [(shard.metadata.shard_offsets, shard.tensor) for shard in sharded.local_shards()]


class RowSparseEmbedding(BaseEmbedding):
    """Shards of a group of tables, with sparse gradients. Column-wise shards are stacked by rows."""

    def __init__(self, config: GroupedEmbeddingConfig, pg: dist.ProcessGroup | None, device: torch.device | None):
        super().__init__()
        self._config = config
        self._pg = pg
        shards: dict[str, list[int]] = {}
        self._first_rows: list[int] = []
        for table in config.embedding_tables:
            rows = shards.setdefault(table.name, [])
            self._first_rows.append(sum(rows))
            rows.append(table.local_rows)
        cols = {table.name: table.local_cols for table in config.embedding_tables}
        self._weights = {
            name: nn.Parameter(torch.zeros((sum(rows), cols[name]), device=device)) for name, rows in shards.items()
        }

    @property
    def config(self) -> GroupedEmbeddingConfig:
        """The tables of this group."""
        return self._config

    def forward(self, features: KeyedJaggedTensor) -> Tensor:
        """Look up all features, table after table: float32 rows flattened to [tokens · columns]."""
        ids, ends = features.values(), features.offset_per_key()[1:]
        looked_up, key, start = [], 0, 0
        for table, first_row in zip(self._config.embedding_tables, self._first_rows, strict=True):
            key += table.num_features()
            stop = ends[key - 1]
            rows = ids[start:stop] + first_row if first_row else ids[start:stop]
            looked_up.append(look_up(rows, self._weights[table.name]).flatten())
            start = stop
        return looked_up[0] if len(looked_up) == 1 else torch.cat(looked_up)

    def named_parameters_by_table(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield (table name, parameter) pairs, which the sharded collection registers."""
        yield from self._weights.items()

    def pieces(self, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Piece]]:
        """Yield (table, live shard) pairs of ``tensors``: table → tensor with the rows of its parameter."""
        for table, first_row in zip(self._config.embedding_tables, self._first_rows, strict=True):
            rows = tensors[table.name].detach()[first_row : first_row + table.local_rows]
            yield table.name, (cast(ShardMetadata, table.local_metadata).shard_offsets[: rows.dim()], rows)

    def state_dict(self, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> dict[str, Any]:
        """Return the shards as ShardedTensors, as TorchRec's kernels do."""
        state = {} if destination is None else destination
        shards = [rows for _, (_, rows) in self.pieces(self._weights)]
        state.update(get_state_dict(self._config.embedding_tables, shards, self._pg, prefix=prefix))
        return state

    def flush(self) -> None:
        """Do nothing: there is no cache."""

    def purge(self) -> None:
        """Do nothing: there is no cache."""


class FusedEmbedding(BatchedFusedEmbedding):
    """TorchRec's fused kernel, which can measure and clamp the gradient of each row.

    Both are of the sum over all lookups of the global batch; FBGEMM's gradient_clipping clamps each lookup separately.
    Elements are clamped to ±``max_gradient``, if the group's fused_params have it.
    """

    measures = False
    """Whether backward adds the squares of the gradients, before clamping, to ``square``."""
    square: Tensor | float = 0.0
    unmeasured: Collection[str] = ()
    """Tables whose last row is not measured."""

    def forward(self, features: KeyedJaggedTensor) -> Tensor:
        """Look up rows: float32 [tokens, columns]."""
        rows: Tensor = super().forward(in_even_bags(features) if features.device().type == "cuda" else features)
        limit = (self.config.fused_params or {}).get("max_gradient")
        if rows.requires_grad and (self.measures or limit is not None):
            rows.register_hook(partial(self._sum_gradients, self._row_indices(features), limit))
        return rows

    def _sum_gradients(self, rows: Tensor, limit: float | None, gradients: Tensor) -> Tensor:
        sums = sum_rows(gradients, rows)
        if self.measures:
            squares, tables = sums.square().sum(1), self.config.embedding_tables
            for table, end in zip(tables, accumulate(table.local_rows for table in tables), strict=True):
                if table.name in self.unmeasured:
                    squares = squares.masked_fill(rows == end - 1, 0.0)
            self.square = self.square + squares.sum()
        return gradients if limit is None else sums.clamp_(-limit, limit)

    def _row_indices(self, features: KeyedJaggedTensor) -> Tensor:
        """Return the row of each token, int64 [tokens], numbered through all tables of the group."""
        ids, ends, rows, key, first_row = features.values(), [0, *features.offset_per_key()[1:]], [], 0, 0
        for table in self.config.embedding_tables:
            start, stop = ends[key], ends[key + table.num_features()]
            rows.append(ids[start:stop] + first_row)
            key, first_row = key + table.num_features(), first_row + table.local_rows
        return torch.cat(rows)


def sum_rows(gradients: Tensor, rows: Tensor) -> Tensor:
    """Move the sum of each row's gradients [n, D] to the row's first occurrence; zero all others.

    ``rows``: int64 [n]. Adds in the order of occurrence. The host does not wait for the device.
    """
    ordered, order = rows.sort(stable=True)
    starts_run = torch.ones_like(ordered, dtype=torch.bool)
    starts_run[1:] = ordered[1:] != ordered[:-1]
    positions = torch.arange(len(rows), device=rows.device)
    run_start = torch.where(starts_run, positions, 0).cummax(0).values if len(rows) else positions
    first = torch.empty_like(order)
    first[order] = order[run_start]
    return add_rows(torch.zeros_like(gradients), first, gradients)


def in_even_bags(features: KeyedJaggedTensor) -> KeyedJaggedTensor:
    """The same ids per key in BAGS bags of almost equal sizes. Rows without pooling do not depend on the bags.

    FBGEMM has a warp look up the ids of a bag one after another, and the distinct ids of a table are one bag: 60,000
    rows of 1,024 channels took 5 ms on an H100. The host does not wait for the device.
    """
    ends = features.offsets()[:: features.stride()]  # [keys + 1]
    bag = torch.arange(BAGS, device=ends.device)
    begins = ends[:-1, None] + ends.diff()[:, None] * bag // BAGS
    return KeyedJaggedTensor(
        keys=features.keys(),
        values=features.values(),
        weights=features.weights_or_none(),
        offsets=torch.cat([begins.flatten(), ends[-1:]]),
        stride=BAGS,
    )


class RowSparseLookup(GroupedEmbeddingsLookup):
    """TorchRec's lookup with the kernels above."""

    def _create_embedding_kernel(
        self,
        config: GroupedEmbeddingConfig,
        pg: dist.ProcessGroup | None,
        device: torch.device | None,
        env: ShardingEnv | None = None,
    ) -> BaseEmbedding:
        if config.compute_kernel is EmbeddingComputeKernel.DENSE:
            return RowSparseEmbedding(config, pg, device)
        caching = EmbeddingComputeKernel.FUSED_UVM_CACHING
        self._need_prefetch |= any(table.compute_kernel is caching for table in config.embedding_tables)
        return FusedEmbedding(config, pg, device)


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
