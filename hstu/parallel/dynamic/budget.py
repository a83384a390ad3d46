"""Where the rows of a dynamic table lie: in GPU memory as far as its budget goes, the rest in host memory."""

from __future__ import annotations

from dataclasses import dataclass

from torchrec.distributed.embedding_types import EmbeddingComputeKernel

from hstu.model.embedding import TableSpec
from hstu.parallel.table_training import STATES, is_of_rows

_NUMBER = 4
"""Bytes of a float32: rows and states have no other type."""


def bytes_of_row(stored_dim: int, optimizer: str) -> int:
    """A row and its optimizer's states."""
    numbers = [1 if is_of_rows(state) else stored_dim for state in STATES[optimizer]]
    return (stored_dim + sum(numbers)) * _NUMBER


@dataclass(frozen=True)
class MemoryPlan:
    """The memory of one dynamic table, over all ranks."""

    rows: int
    ranks: int
    row_bytes: int
    """With the states of the optimizer."""
    budget_bytes: int
    """GPU memory that it may take: global_hbm_for_values, or that of item_vocab_gpu_capacity rows, or of
    item_vocab_gpu_capacity_ratio of the capacity, or of all rows: the first of these that is given."""
    given_by: str
    """The option that decided."""
    caching: bool

    @property
    def gpu_rows(self) -> int:
        """Rows that the budget has room for."""
        return min(self.rows, self.budget_bytes // self.row_bytes)

    @property
    def kernels(self) -> tuple[EmbeddingComputeKernel, ...]:
        """What TorchRec runs on a GPU for the table, or for each of the two parts of a table that is split."""
        if self.gpu_rows == self.rows:
            return (EmbeddingComputeKernel.FUSED,)
        if self.caching and self.gpu_rows:
            return (EmbeddingComputeKernel.FUSED_UVM_CACHING,)
        if self.gpu_rows // self.ranks:
            return (EmbeddingComputeKernel.FUSED, EmbeddingComputeKernel.FUSED_UVM)
        return (EmbeddingComputeKernel.FUSED_UVM,)

    @property
    def split_at(self) -> int | None:
        """The rows of a rank that lie in GPU memory where the table is split; else None."""
        return self.gpu_rows // self.ranks if len(self.kernels) == 2 else None

    @property
    def cached_share(self) -> float:
        """Share of the rows that the cache holds."""
        return self.gpu_rows / self.rows

    def describe(self, device_type: str) -> str:
        """For the log."""
        whole, budget = (f"{amount / 2**20:,.1f} MiB" for amount in (self.rows * self.row_bytes, self.budget_bytes))
        if self.split_at is not None:
            where = f"{self.split_at * self.ranks:,} rows in GPU memory, the others in host memory"
        else:
            where = {
                EmbeddingComputeKernel.FUSED: "all in GPU memory",
                EmbeddingComputeKernel.FUSED_UVM: "in host memory",
                EmbeddingComputeKernel.FUSED_UVM_CACHING: f"in host memory, {self.gpu_rows:,} rows cached in GPU "
                "memory",
            }[self.kernels[0]]
        if device_type == "cpu":
            where = f"all in host memory (on GPUs: {where})"
        given = f"{budget} of GPU memory by {self.given_by}"
        return f"{self.rows:,} rows of {self.row_bytes:,} bytes with their states, {whole}; {given}: {where}"


def plan_memory(spec: TableSpec, optimizer: str, ranks: int) -> MemoryPlan:
    """The plan of a dynamic table that ``ranks`` share and ``optimizer`` (OptimizerArgs) trains."""
    args = spec.dynamic
    assert args is not None
    capacity = args.item_vocab_size_or_capacity
    row_bytes = bytes_of_row(spec.stored_dim, optimizer)
    if args.global_hbm_for_values is not None:
        given_by, budget = "global_hbm_for_values", args.global_hbm_for_values
    elif args.item_vocab_gpu_capacity is not None:
        given_by, budget = "item_vocab_gpu_capacity", int(args.item_vocab_gpu_capacity) * row_bytes
    elif args.item_vocab_gpu_capacity_ratio is not None:
        rows = int(args.item_vocab_gpu_capacity_ratio * capacity)
        given_by, budget = "item_vocab_gpu_capacity_ratio", rows * row_bytes
    else:
        given_by, budget = "default", capacity * row_bytes
    return MemoryPlan(capacity, ranks, row_bytes, budget, given_by, args.caching)
