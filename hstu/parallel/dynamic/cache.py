"""Rows in host memory behind FBGEMM's cache in GPU memory (FUSED_UVM_CACHING).

What fbgemm-gpu 1.8.0 does, of which all here makes use: only weights are cached, optimizer states never. A row that is
in a line of the cache counts there; its copy in host memory is old until the line is evicted or flushed. A lookup
gives its batch a time stamp, stamps the lines that it finds, loads rows that it does not find into lines of older
stamps alone, and remembers for its backward where each row was. Its own lookups in several passes rest on that: loads
at one stamp never displace each other.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Protocol

import torch
from fbgemm_gpu.split_table_batched_embeddings_ops_training import SplitTableBatchedEmbeddingBagsCodegen
from torch import Tensor, nn
from torchrec.distributed.batched_embedding_kernel import BatchedFusedEmbedding
from torchrec.distributed.embedding_types import EmbeddingComputeKernel

from hstu.parallel.dynamic.rows import Part


class Cache(Protocol):
    """The cache of one table."""

    @property
    def lines(self) -> Tensor:
        """[lines, columns or more], live."""

    def lines_of(self, rows: Tensor) -> Tensor:
        """The line of each of ``rows``, int [n]; negative for those that are not cached."""

    def load(self, rows: Tensor) -> None:
        """Cache ``rows``, int64 [n], where no line of the last lookup gives way; negative ones are ignored."""

    def write_back(self) -> None:
        """Bring the rows in host memory up to date."""

    def forget(self) -> None:
        """Cache nothing."""


class CachedPart(Part):
    """A table behind a cache."""

    is_cached = True

    def __init__(self, weight: Tensor, states: Mapping[str, Tensor], cache: Cache) -> None:
        super().__init__(weight, states)
        self._cache = cache

    def begin(self, places: Tensor, weight: Tensor) -> None:
        """See Part: into host memory, and into the lines of rows that are cached, which stay so."""
        super().begin(places, weight)
        lines = self._cache.lines_of(places)
        cached = lines >= 0
        self._cache.lines[lines[cached].long(), : weight.shape[1]] = weight[cached]

    def bring_near(self, places: Tensor) -> None:
        """See Part.

        May run beside the backward of the last lookup: at its time stamp none of its lines gives way, so what backward
        remembers stays true. And no row of it is loaded that it left in host memory, where backward changes it: it
        left one there only if all lines that could hold it have its stamp.
        """
        self._cache.load(places)

    def write_back(self) -> None:
        """See Part."""
        self._cache.write_back()

    def forget(self) -> None:
        """See Part."""
        self._cache.forget()


class FbgemmCache:
    """See Cache: that of one table of an FBGEMM kernel. On GPUs alone; on the CPU its operators do nothing."""

    def __init__(self, kernel: SplitTableBatchedEmbeddingBagsCodegen, table: int) -> None:
        """``table``: its place among those of the kernel."""
        self._kernel = kernel
        self._first_index = int(kernel.cache_hash_size_cumsum[kernel.feature_table_map.index(table)])

    @property
    def lines(self) -> Tensor:
        """See Cache."""
        lines: Tensor = self._kernel.lxu_cache_weights
        return lines

    def lines_of(self, rows: Tensor) -> Tensor:
        """See Cache."""
        kernel = self._kernel
        lines: Tensor = torch.ops.fbgemm.lxu_cache_lookup(
            self._indices(rows), kernel.lxu_cache_state, kernel.total_cache_hash_size
        )
        return lines

    def load(self, rows: Tensor) -> None:
        """See Cache. As the kernel does it in a lookup, without counting a batch and remembering its lines."""
        kernel = self._kernel
        torch.ops.fbgemm.lru_cache_populate(
            kernel.weights_uvm,
            kernel.cache_hash_size_cumsum,
            kernel.total_cache_hash_size,
            kernel.cache_index_table_map,
            kernel.weights_offsets,
            kernel.D_offsets,
            self._indices(rows),
            kernel.lxu_cache_state,
            kernel.lxu_cache_weights,
            kernel.timestep,
            kernel.lxu_state,
            kernel.stochastic_rounding,
        )

    def write_back(self) -> None:
        """See Cache."""
        self._kernel.flush()

    def forget(self) -> None:
        """See Cache. The kernel's other tables keep what is cached of them."""
        self._kernel.flush()
        self._kernel.reset_cache_states()

    def _indices(self, rows: Tensor) -> Tensor:
        """What the kernel calls rows of all its cached tables; the number of those, which it skips, for no row."""
        return torch.where(rows >= 0, rows + self._first_index, self._kernel.total_cache_hash_size)


def caches(lookups: Iterable[nn.Module]) -> dict[str, FbgemmCache]:
    """Table → its cache, of the tables of TorchRec's lookups that have one."""
    return {
        table.name: FbgemmCache(module.emb_module, place)
        for lookup in lookups
        for module in lookup.modules()
        if isinstance(module, BatchedFusedEmbedding) and module.emb_module.lxu_cache_weights.numel()
        for place, table in enumerate(module.config.embedding_tables)
        if table.compute_kernel is EmbeddingComputeKernel.FUSED_UVM_CACHING
    }
