"""The rows of one rank's shard of a dynamic table and their optimizer states, by slot, in whichever memory they are.

This file relies on how FBGEMM 1.6 to 1.8 caches host memory in GPU memory (FUSED_UVM_CACHING). It caches weights, never
optimizer states. A cached row is valid in its cache line; its copy in host memory is stale until the
line is evicted or flushed. A lookup gives its batch a time stamp, stamps the lines that it hits, loads missing rows
into lines with older stamps only, and remembers for its backward where each row was. FBGEMM itself looks up in several
passes, so loads at one stamp never evict each other.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any

import torch
from fbgemm_gpu.split_table_batched_embeddings_ops_training import SplitTableBatchedEmbeddingBagsCodegen
from torch import Tensor, nn
from torchrec.distributed.batched_embedding_kernel import BatchedFusedEmbedding
from torchrec.distributed.embedding_types import EmbeddingComputeKernel

from hstu.parallel.dynamic.hashing import normal_quantiles


class RowBlock:
    """Live rows of consecutive slots in one memory, which may be behind a cache. Row 0 is that of the first slot."""

    def __init__(self, weight: Tensor, states: Mapping[str, Tensor], cache: FbgemmCache | None = None) -> None:
        """``weight`` [rows, stored_dim]; ``states`` by name: [rows, stored_dim], or [rows] if rowwise."""
        self.weight = weight
        self.states = dict(states)
        self.cache = cache

    def initialize(self, rows: Tensor, weight: Tensor) -> None:
        """Write ``weight``, float32 [n, dim], to distinct ``rows``, int64 [n], and zeros to their states.

        Rows that are cached stay cached.
        """
        self.weight[rows, : weight.shape[1]] = weight
        for state in self.states.values():
            state.index_fill_(0, rows, 0)
        if self.cache is not None:
            lines = self.cache.lines_of(rows)
            cached = lines >= 0
            self.cache.lines[lines[cached].long(), : weight.shape[1]] = weight[cached]


class Rows:
    """All blocks of a shard, one after the other: slot s is row s of them all."""

    def __init__(self, blocks: Sequence[RowBlock], dim: int) -> None:
        """``dim``: columns of a row that are in use."""
        self.blocks = list(blocks)
        self.dim = dim

    def __len__(self) -> int:
        return sum(len(block.weight) for block in self.blocks)

    @property
    def device(self) -> torch.device:
        """The device on which slots are looked up."""
        return self.blocks[0].weight.device

    @property
    def is_cached(self) -> bool:
        """Whether there is a cache to prefetch rows into."""
        return any(block.cache is not None for block in self.blocks)

    @torch.no_grad()
    def initialize(self, slots: Tensor, weight: Tensor) -> None:
        """Write ``weight``, float32 [n, dim], to distinct ``slots``, int64 [n], and zeros to their states."""
        if len(self.blocks) == 1:
            self.blocks[0].initialize(slots, weight)
            return
        for block, used in self._ranges(len(self)):
            here = (slots >= used.start) & (slots < used.stop)
            block.initialize(slots[here] - used.start, weight[here])

    @torch.no_grad()
    def start(
        self, slots: Tensor, number: Tensor, kernels: ModuleType, ids: Tensor | None = None, **initial: float
    ) -> None:
        """Write initial rows, or zeros, to the first ``number``, int64 [1], of ``slots``, and zeros to their states.

        Does what ``initialize`` does, by the ``kernels`` of hstu/ops/triton/slots.py, and the host does not wait.
        ``initial``: ``table_key`` and ``init_std`` of ``initial_rows`` of hashing.py, which defines the rows.
        """
        options: dict[str, Any] = {} if ids is None else {"quantiles": normal_quantiles(ids.device), **initial}
        columns = None if ids is None else self.dim
        start = 0
        for block in self.blocks:
            kernels.start_rows(block.weight, slots, number, ids, first_row=start, columns=columns, **options)
            for state in block.states.values():
                kernels.start_rows(state, slots, number, first_row=start)
            if block.cache is not None:
                places = torch.arange(len(slots), device=slots.device)
                here = (places < number) & (slots >= start) & (slots < start + len(block.weight))
                lines = block.cache.lines_of(torch.where(here, slots - start, -1))
                kernels.start_rows(block.cache.lines, lines, number, ids, columns=columns, **options)
            start += len(block.weight)

    @torch.no_grad()
    def prefetch(self, slots: Tensor) -> None:
        """Load ``slots``, int64 [n], into the caches, ignoring negative ones. The host does not wait.

        May run beside the backward of the last lookup. It loads at the time stamp of that lookup, so it evicts none of
        its lines, and the locations that backward remembers stay valid. Nor does it load a row that the lookup left in
        host memory, where backward updates it: a row is left there only if every line that could hold it has that
        stamp.
        """
        start = 0
        for block in self.blocks:
            if block.cache is not None:
                block.cache.load(torch.where(slots - start < len(block.weight), slots - start, -1))
            start += len(block.weight)

    def read(self, number: int) -> tuple[Tensor, dict[str, Tensor]]:
        """(rows, states) of the slots [0, ``number``): [number, dim], or [number] if rowwise.

        Views if there is one block. Several blocks are copied together in host memory: GPU memory has no room for all.
        """
        rows, states = zip(*(self._used(block, len(used)) for block, used in self._ranges(number)), strict=True)
        return _joined(rows), {name: _joined([of_block[name] for of_block in states]) for name in states[0]}

    @torch.no_grad()
    def write(self, rows: Tensor, states: Mapping[str, Tensor]) -> None:
        """Write what ``read`` returned to the slots [0, n)."""
        for block, used in self._ranges(len(rows)):
            here = slice(used.start, used.stop)
            if block.cache is not None:
                block.cache.invalidate()
            own_rows, own_states = self._used(block, len(used))
            own_rows.copy_(rows[here])
            for name, state in own_states.items():
                state.copy_(states[name][here])

    def zero_states(self, number: int) -> dict[str, Tensor]:
        """The states of ``number`` untrained rows, in host memory: zeros [number, dim], or [number] if rowwise."""
        states = self.blocks[0].states.items()
        sizes = {name: (number, self.dim) if state.dim() > 1 else (number,) for name, state in states}
        return {name: torch.zeros(sizes[name], dtype=state.dtype) for name, state in states}

    def _ranges(self, number: int) -> Iterator[tuple[RowBlock, range]]:
        """Each block with those of the slots [0, ``number``) that are in it."""
        start = 0
        for block in self.blocks:
            stop = start + len(block.weight)
            yield block, range(min(start, number), min(stop, number))
            start = stop

    def _used(self, block: RowBlock, number: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The first ``number`` rows of a block, up to date, and their states; views."""
        if block.cache is not None:
            block.cache.flush()
        states = block.states.items()
        return block.weight[:number, : self.dim], {
            name: state[:number, : self.dim] if state.dim() > 1 else state[:number] for name, state in states
        }


def _joined(tensors: Sequence[Tensor]) -> Tensor:
    if len(tensors) == 1:
        return tensors[0]
    joined = torch.empty(sum(map(len, tensors)), *tensors[0].shape[1:], dtype=tensors[0].dtype)
    for target, tensor in zip(joined.split([*map(len, tensors)]), tensors, strict=True):
        target.copy_(tensor)
    return joined


class FbgemmCache:
    """The cache of one table in an FBGEMM kernel. On GPUs only: on the CPU its operators do nothing."""

    def __init__(self, kernel: SplitTableBatchedEmbeddingBagsCodegen, table: int) -> None:
        """``table``: index of the table in the kernel."""
        self._kernel = kernel
        self._first_index = int(kernel.cache_hash_size_cumsum[kernel.feature_table_map.index(table)])

    @property
    def lines(self) -> Tensor:
        """[lines, columns or more], live."""
        lines: Tensor = self._kernel.lxu_cache_weights
        return lines

    def lines_of(self, rows: Tensor) -> Tensor:
        """The line of each of ``rows``, int [n]; negative if it is not cached."""
        kernel = self._kernel
        lines: Tensor = torch.ops.fbgemm.lxu_cache_lookup(
            self._indices(rows), kernel.lxu_cache_state, kernel.total_cache_hash_size
        )
        return lines

    def load(self, rows: Tensor) -> None:
        """Cache ``rows``, int64 [n], without evicting a line of the last lookup; negative rows are ignored.

        Does what a lookup of the kernel does, but does not count a batch or remember its lines.
        """
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

    def flush(self) -> None:
        """Write cached rows to host memory."""
        self._kernel.flush()

    def invalidate(self) -> None:
        """Empty the cache; the other tables of the kernel share it, so their rows are written back first."""
        self._kernel.flush()
        self._kernel.reset_cache_states()

    def _indices(self, rows: Tensor) -> Tensor:
        """Row numbers through all cached tables of the kernel; for a negative row their total, which it skips."""
        return torch.where(rows >= 0, rows + self._first_index, self._kernel.total_cache_hash_size)


def find_caches(lookups: Iterable[nn.Module]) -> dict[str, FbgemmCache]:
    """Table → cache, of the cached tables in TorchRec's lookups."""
    return {
        table.name: FbgemmCache(module.emb_module, index)
        for lookup in lookups
        for module in lookup.modules()
        if isinstance(module, BatchedFusedEmbedding) and module.emb_module.lxu_cache_weights.numel()
        for index, table in enumerate(module.config.embedding_tables)
        if table.compute_kernel is EmbeddingComputeKernel.FUSED_UVM_CACHING
    }
