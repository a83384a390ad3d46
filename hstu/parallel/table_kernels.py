"""Table kernels that FBGEMM lacks, for TorchRec's sharding: Adam on the CPU, and clamped row gradients.

On the CPU, FBGEMM 1.6 to 1.8 has no fused Adam ("not supported in CPU mode"), and DenseTableBatchedEmbeddingBags of the
DENSE compute kernel pools despite PoolingMode.NONE. tests/parallel/test_table_kernels.py fails when either is fixed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.nn import functional
from torchrec import KeyedJaggedTensor
from torchrec.distributed.batched_embedding_kernel import BatchedFusedEmbedding
from torchrec.distributed.embedding_kernel import BaseEmbedding, get_state_dict
from torchrec.distributed.embedding_lookup import GroupedEmbeddingsLookup
from torchrec.distributed.embedding_types import EmbeddingComputeKernel, GroupedEmbeddingConfig
from torchrec.distributed.types import ShardingEnv


class RowSparseEmbedding(BaseEmbedding):
    """Shards of a group of tables, looked up with F.embedding(sparse=True). Column-wise shards are stacked by rows."""

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
        """Look up all features, table after table: rows flattened to [tokens · columns]."""
        ids, ends = features.values(), features.offset_per_key()[1:]
        looked_up, key, start = [], 0, 0
        for table, first_row in zip(self._config.embedding_tables, self._first_rows, strict=True):
            key += table.num_features()
            stop = ends[key - 1]
            rows = ids[start:stop] + first_row if first_row else ids[start:stop]
            looked_up.append(functional.embedding(rows, self._weights[table.name], sparse=True).flatten())
            start = stop
        return looked_up[0] if len(looked_up) == 1 else torch.cat(looked_up)

    def named_parameters_by_table(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield (table name, parameter) pairs, which the sharded collection registers."""
        yield from self._weights.items()

    def as_sharded_tensors(self, tensors: Mapping[str, Tensor], suffix: str = "weight") -> dict[str, ShardedTensor]:
        """Wrap ``tensors`` (table → tensor shaped like its parameter) as live ShardedTensors ``<table>.<suffix>``."""
        shards = [
            tensors[table.name].detach()[first_row : first_row + table.local_rows]
            for table, first_row in zip(self._config.embedding_tables, self._first_rows, strict=True)
        ]
        sharded = get_state_dict(self._config.embedding_tables, shards, self._pg)
        return {f"{key.removesuffix('.weight')}.{suffix}": tensor for key, tensor in sharded.items()}

    def state_dict(self, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> dict[str, Any]:
        """Return the shards as ShardedTensors, as TorchRec's kernels do."""
        state = {} if destination is None else destination
        state.update({f"{prefix}{key}": tensor for key, tensor in self.as_sharded_tensors(self._weights).items()})
        return state

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield (``<prefix>.<table>.weight``, parameter) pairs."""
        for name, weight in self._weights.items():
            yield f"{prefix}.{name}.weight" if prefix else f"{name}.weight", weight

    def flush(self) -> None:
        """Do nothing: there is no cache."""

    def purge(self) -> None:
        """Do nothing: there is no cache."""


class ClampedFusedEmbedding(BatchedFusedEmbedding):
    """TorchRec's fused kernel with the gradient of each row clamped to ±``max_gradient`` (in the group's fused_params).

    It clamps the sum over all lookups of the global batch; FBGEMM's gradient_clipping clamps each lookup separately.
    """

    def forward(self, features: KeyedJaggedTensor) -> Tensor:
        """Look up rows: float32 [tokens, columns]."""
        rows: Tensor = super().forward(features)
        if rows.requires_grad:
            rows = _ClampRowGradients.apply(rows, self._row_indices(features), self.config.fused_params["max_gradient"])
        return rows

    def _row_indices(self, features: KeyedJaggedTensor) -> Tensor:
        """Return the row of each token, int64 [tokens], numbered through all tables of the group."""
        ids, ends, rows, key, first_row = features.values(), [0, *features.offset_per_key()[1:]], [], 0, 0
        for table in self.config.embedding_tables:
            start, stop = ends[key], ends[key + table.num_features()]
            rows.append(ids[start:stop] + first_row)
            key, first_row = key + table.num_features(), first_row + table.local_rows
        return torch.cat(rows)


class _ClampRowGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, looked_up: Tensor, rows: Tensor, limit: float) -> Tensor:
        ctx.rows, ctx.limit = rows, limit  # type: ignore[attr-defined]
        return looked_up.view_as(looked_up)

    @staticmethod
    def backward(ctx: FunctionCtx, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return clamp_row_sums(gradients[0], ctx.rows, ctx.limit), None, None  # type: ignore[attr-defined]


def clamp_row_sums(gradients: Tensor, rows: Tensor, limit: float) -> Tensor:
    """Move the clamped sum of each row's gradients [n, D] to the row's first occurrence; zero all others.

    ``rows``: int64 [n]. Adds in the order of occurrence. The host does not wait for the device.
    """
    ordered, order = rows.sort(stable=True)
    starts_run = torch.ones_like(ordered, dtype=torch.bool)
    starts_run[1:] = ordered[1:] != ordered[:-1]
    positions = torch.arange(len(rows), device=rows.device)
    run_start = torch.where(starts_run, positions, 0).cummax(0).values if len(rows) else positions
    first = torch.empty_like(order)
    first[order] = order[run_start]
    sums = torch.zeros_like(gradients)
    if sums.device.type == "cpu":
        sums.index_add_(0, first, gradients)
    else:  # index_add_ uses atomics on GPUs; index_put_ sorts, which is deterministic
        sums.index_put_((first,), gradients, accumulate=True)
    return sums.clamp_(-limit, limit)


class RowSparseLookup(GroupedEmbeddingsLookup):
    """TorchRec's lookup with the kernels above, for groups with the DENSE compute kernel or ``max_gradient``."""

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
