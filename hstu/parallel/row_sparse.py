"""Sharded tables whose gradients reach an ordinary optimizer, as sparse rows.

Needed for Adam on the CPU, for two defects of fbgemm-gpu 1.8.0 and torchrec 1.8.0 (tests/parallel/test_defects.py
tells when one is fixed): the fused CPU tables know only SGD, Adagrad and row-wise Adagrad ("not supported in CPU
mode"), and the DENSE compute kernel's DenseTableBatchedEmbeddingBags ignores PoolingMode.NONE on the CPU and pools.
Everything around the lookup (input and output exchange, sharding, state) stays TorchRec's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.nn import functional
from torchrec import EmbeddingCollection, KeyedJaggedTensor
from torchrec.distributed.embedding import EmbeddingCollectionSharder, ShardedEmbeddingCollection
from torchrec.distributed.embedding_kernel import BaseEmbedding, get_state_dict
from torchrec.distributed.embedding_lookup import GroupedEmbeddingsLookup
from torchrec.distributed.embedding_types import EmbeddingComputeKernel, GroupedEmbeddingConfig
from torchrec.distributed.types import ParameterSharding, ShardingEnv

from hstu.parallel.clamped import ClampedFusedEmbedding


class RowSparseEmbedding(BaseEmbedding):
    """This rank's shards of a group of tables, looked up with F.embedding(sparse=True).

    A table may have several shards here (column-wise); they lie under one another in one parameter, as TorchRec
    expects of its own kernels.
    """

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
        """Rows of all features, one table after the other, flattened [tokens · columns]."""
        ids, ends = features.values(), features.offset_per_key()[1:]
        looked_up, key, start = [], 0, 0
        for table, first_row in zip(self._config.embedding_tables, self._first_rows, strict=True):
            key += table.num_features()
            stop = ends[key - 1]
            rows = ids[start:stop] + first_row if first_row else ids[start:stop]
            looked_up.append(functional.embedding(rows, self._weights[table.name], sparse=True).flatten())
            start = stop
        return torch.cat(looked_up)

    def named_parameters_by_table(self) -> Iterator[tuple[str, nn.Parameter]]:
        """(table name, its parameter), which the sharded collection registers as its own."""
        yield from self._weights.items()

    def as_sharded_tensors(self, tensors: Mapping[str, Tensor], suffix: str = "weight") -> dict[str, ShardedTensor]:
        """Tensors shaped like the parameters (table → tensor) as live ShardedTensors ``<table>.<suffix>``."""
        shards = [
            tensors[table.name].detach()[first_row : first_row + table.local_rows]
            for table, first_row in zip(self._config.embedding_tables, self._first_rows, strict=True)
        ]
        sharded = get_state_dict(self._config.embedding_tables, shards, self._pg)
        return {f"{key.removesuffix('.weight')}.{suffix}": tensor for key, tensor in sharded.items()}

    def state_dict(self, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> dict[str, Any]:
        """The shards as ShardedTensors, as TorchRec's kernels give them."""
        state = {} if destination is None else destination
        state.update({f"{prefix}{key}": tensor for key, tensor in self.as_sharded_tensors(self._weights).items()})
        return state

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """(``<prefix>.<table>.weight``, parameter)."""
        for name, weight in self._weights.items():
            yield f"{prefix}.{name}.weight" if prefix else f"{name}.weight", weight

    def flush(self) -> None:
        """No cache to write back."""

    def purge(self) -> None:
        """No cache to forget."""


class RowSparseLookup(GroupedEmbeddingsLookup):
    """TorchRec's lookup with RowSparseEmbedding for the groups of tables that it would give a dense kernel.

    Fused ones with a limit to their gradients get ClampedFusedEmbedding.
    """

    def _create_embedding_kernel(
        self,
        config: GroupedEmbeddingConfig,
        pg: dist.ProcessGroup | None,
        device: torch.device | None,
        env: ShardingEnv | None = None,
    ) -> BaseEmbedding:
        if config.compute_kernel is EmbeddingComputeKernel.DENSE:
            return RowSparseEmbedding(config, pg, device)
        if "max_gradient" in (config.fused_params or {}):
            caching = EmbeddingComputeKernel.FUSED_UVM_CACHING
            self._need_prefetch |= any(table.compute_kernel is caching for table in config.embedding_tables)
            return ClampedFusedEmbedding(config, pg, device)
        return super()._create_embedding_kernel(config, pg, device, env)


class RowSparseEmbeddingCollection(ShardedEmbeddingCollection):
    """TorchRec's sharded collection with RowSparseLookup."""

    def _create_lookups(self) -> None:
        for sharding in self._sharding_type_to_sharding.values():
            self._lookups.append(
                RowSparseLookup(sharding._grouped_embedding_configs, pg=sharding._pg, device=self._device)
            )


class RowSparseSharder(EmbeddingCollectionSharder):
    """Shards EmbeddingCollections into RowSparseEmbeddingCollections."""

    def shard(
        self,
        module: EmbeddingCollection,
        params: dict[str, ParameterSharding],
        env: ShardingEnv,
        device: torch.device | None = None,
        module_fqn: str | None = None,
    ) -> ShardedEmbeddingCollection:
        """See EmbeddingCollectionSharder."""
        return RowSparseEmbeddingCollection(module, params, env, self.fused_params, device, module_fqn=module_fqn)
