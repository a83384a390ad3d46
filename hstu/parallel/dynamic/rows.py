"""Rows and optimizer states of one rank's shard of a dynamic table, by slot, in any memory.

This relies on how FBGEMM 1.6 to 1.8 caches host memory in GPU memory (FUSED_UVM_CACHING): it caches weights, never
states. A cached row is valid in its cache line; its host copy is stale until the line is evicted or flushed. Each
lookup increments a time stamp, stamps the lines that it hits, loads missing rows only into lines with older stamps, and
saves the location of each row for backward. FBGEMM also looks up in several passes: loads at one stamp never evict each
other.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from fbgemm_gpu.split_table_batched_embeddings_ops_training import SplitTableBatchedEmbeddingBagsCodegen
from torch import Tensor, nn
from torchrec.distributed.batched_embedding_kernel import BatchedFusedEmbedding
from torchrec.distributed.embedding_types import EmbeddingComputeKernel

from hstu.parallel.dynamic.hashing import initial_rows


@dataclass(frozen=True)
class RowBlock:
    """Live rows of consecutive slots in one memory, optionally behind a cache."""

    weight: Tensor
    """[rows, stored_dim]."""
    states: Mapping[str, Tensor]
    """By name: [rows, stored_dim], or [rows] if rowwise."""
    cache: "FbgemmCache | None" = None


@dataclass(frozen=True, eq=False)
class Rows:
    """All blocks of a shard, concatenated: slot s is row s."""

    blocks: Sequence[RowBlock]
    dim: int

    def __len__(self) -> int:
        return sum(len(block.weight) for block in self.blocks)

    @property
    def device(self) -> torch.device:
        """Device for looking up slots."""
        return self.blocks[0].weight.device

    @torch.no_grad()
    def initialize(self, slots: Tensor, weight: Tensor, states: Mapping[str, Tensor] | None = None) -> None:
        """Write ``weight``, [n, dim], and ``states`` (None: zeros) to distinct ``slots``, int64 [n]."""
        for block, used in self._ranges(len(self)):
            here = (slots >= used.start) & (slots < used.stop) if len(self.blocks) > 1 else slice(None)
            rows, own = slots[here] - used.start, weight[here]
            block.weight[rows, : self.dim] = own
            for name, state in block.states.items():
                state.index_fill_(0, rows, 0)
                if states is not None:
                    state[(rows, slice(self.dim))[: state.dim()]] = states[name][here]
            if block.cache is not None:
                lines = block.cache.lines_of(rows)
                cached = lines >= 0
                block.cache.lines[lines[cached].long(), : self.dim] = own[cached]

    @torch.no_grad()
    def move(self, source: Tensor, target: Tensor) -> None:
        """Move rows with their states from the slots ``source`` to ``target``, int64 [n], which share none."""
        for block, used in self._ranges(len(self)):
            here = (source >= used.start) & (source < used.stop)
            rows, states = self._used(block, len(used))
            slots = (source[here] - used.start).to(rows.device)
            moved = {name: state[slots].to(self.device) for name, state in states.items()}
            self.initialize(target[here], rows[slots].to(self.device), moved)

    @torch.no_grad()
    def start(
        self, slots: Tensor, number: Tensor, kernels: ModuleType | None, ids: Tensor | None = None, **initial: Any
    ) -> None:
        """Write initial rows, or zeros without ``ids``, and states to the first ``number``, int64 [1], of ``slots``.

        ``kernels``: hstu/ops/triton/slots.py, which does not wait for the device. None: ``initialize``.
        ``initial``: ``table_key``, ``init_std`` and ``quantiles`` of hashing.py's ``initial_rows``.
        """
        if kernels is None:
            slots = slots[: int(number)]
            if len(slots):
                zeros = self.blocks[0].weight.new_zeros((len(slots), self.dim))
                self.initialize(slots, zeros if ids is None else initial_rows(ids[: len(slots)], self.dim, **initial))
            return
        columns = None if ids is None else self.dim
        for block, held in self._ranges(len(self)):
            kernels.start_rows(block.weight, slots, number, ids, first_row=held.start, columns=columns, **initial)
            for state in block.states.values():
                kernels.start_rows(state, slots, number, first_row=held.start)
            if block.cache is not None:
                places = torch.arange(len(slots), device=slots.device)
                here = (places < number) & (slots >= held.start) & (slots < held.stop)
                lines = block.cache.lines_of(torch.where(here, slots - held.start, -1))
                kernels.start_rows(block.cache.lines, lines, number, ids, columns=columns, **initial)

    @torch.no_grad()
    def prefetch(self, slots: Tensor) -> None:
        """Load ``slots``, int64 [n], into the caches, ignoring negative ones. The host does not wait.

        May run during the backward of the last lookup. It loads at the time stamp of that lookup, so it never evicts
        its lines. It never loads a row that this backward updates in host memory: such a row was left there because all
        lines that could hold it have that stamp.
        """
        for block, held in self._ranges(len(self)):
            if block.cache is not None:
                block.cache.load(torch.where(slots < held.stop, slots - held.start, -1))

    def read(self, number: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Return (rows [number, dim], states) of slots [0, ``number``): views of one block, or host copies."""
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

    def initial_states(self, number: int) -> dict[str, Tensor]:
        """Return states of ``number`` untrained rows, on the host: [number, dim], or [number] if rowwise."""
        states = self.blocks[0].states.items()
        sizes = {name: (number, self.dim) if state.dim() > 1 else (number,) for name, state in states}
        return {name: torch.zeros(sizes[name], dtype=state.dtype) for name, state in states}

    def _ranges(self, number: int) -> Iterator[tuple[RowBlock, range]]:
        start = 0
        for block in self.blocks:
            stop = start + len(block.weight)
            yield block, range(min(start, number), min(stop, number))
            start = stop

    def _used(self, block: RowBlock, number: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Return views of the first ``number`` rows of a block, flushed from the cache, and of their states."""
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
    """The cache of one table in an FBGEMM kernel. On a CPU, FBGEMM's cache operators do nothing."""

    def __init__(self, kernel: SplitTableBatchedEmbeddingBagsCodegen, table: int) -> None:
        self._kernel = kernel
        self._first_index = int(kernel.cache_hash_size_cumsum[kernel.feature_table_map.index(table)])

    @property
    def lines(self) -> Tensor:
        """[lines, columns or more], live."""
        return self._kernel.lxu_cache_weights

    def lines_of(self, rows: Tensor) -> Tensor:
        """Return the cache line of each of ``rows``, int [n]; negative if it is not cached."""
        kernel = self._kernel
        return torch.ops.fbgemm.lxu_cache_lookup(
            self._indices(rows), kernel.lxu_cache_state, kernel.total_cache_hash_size
        )

    def load(self, rows: Tensor) -> None:
        """Cache ``rows``, int64 [n], except negative ones, without evicting lines of the last lookup or counting it."""
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
        """Empty the cache, after writing back its rows, because other tables of the kernel share it."""
        self._kernel.flush()
        self._kernel.reset_cache_states()

    def _indices(self, rows: Tensor) -> Tensor:
        """Number rows through all cached tables of the kernel. Negative rows become their total, which it skips."""
        return torch.where(rows >= 0, rows + self._first_index, self._kernel.total_cache_hash_size)


def find_caches(lookups: Iterable[nn.Module]) -> dict[str, FbgemmCache]:
    """Return table → cache for the cached tables in TorchRec's lookups."""
    return {
        table.name: FbgemmCache(module.emb_module, index)
        for lookup in lookups
        for module in lookup.modules()
        if isinstance(module, BatchedFusedEmbedding) and module.emb_module.lxu_cache_weights.numel()
        for index, table in enumerate(module.config.embedding_tables)
        if table.compute_kernel is EmbeddingComputeKernel.FUSED_UVM_CACHING
    }
