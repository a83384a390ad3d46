"""The memory of a dynamic table's rows: GPU memory up to the table's budget, host memory for the rest.

Rows in host memory are behind a cache, or the table is split into two physical tables, because FBGEMM keeps each table
in one memory: ``<name>`` with slots [0, n) of each rank, and ``<name>/host`` with the others, looked up under the
features ``<feature>/host``. Ids are exchanged under the real features. SplitLookup sorts their slots into the features
of both tables, and the rows return to the order of the ids. On a CPU both tables are in host memory.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchrec import EmbeddingConfig, KeyedJaggedTensor
from torchrec.distributed.embedding_types import EmbeddingComputeKernel

from hstu.base.errors import ConfigError
from hstu.model.embedding import DynamicEmbeddingCollection, TableSpec
from hstu.parallel.table_optimizer import TableTraining

_HOST = "/host"


@dataclass(frozen=True)
class MemoryPlan:
    """Memory of one dynamic table over all ranks."""

    rows: int
    ranks: int
    row_bytes: int
    """Including optimizer states."""
    budget_bytes: int
    given_by: str
    """Option that sets the budget."""
    caching: bool

    @property
    def gpu_rows(self) -> int:
        """Rows that fit in the budget."""
        return min(self.rows, self.budget_bytes // self.row_bytes)

    @property
    def kernels(self) -> tuple[EmbeddingComputeKernel, ...]:
        """TorchRec's compute kernel of each physical table on a GPU: two if the table is split, else one."""
        if self.gpu_rows == self.rows:
            return (EmbeddingComputeKernel.FUSED,)
        if self.caching and self.gpu_rows:
            return (EmbeddingComputeKernel.FUSED_UVM_CACHING,)
        if self.gpu_rows // self.ranks:
            return (EmbeddingComputeKernel.FUSED, EmbeddingComputeKernel.FUSED_UVM)
        return (EmbeddingComputeKernel.FUSED_UVM,)

    @property
    def split_at(self) -> int | None:
        """Rows in GPU memory on each rank if the table is split, else None."""
        return self.gpu_rows // self.ranks if len(self.kernels) == 2 else None

    def describe(self, device_type: str) -> str:
        """Return the plan as a log line."""
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


def plan_memory(spec: TableSpec, training: TableTraining, ranks: int) -> MemoryPlan:
    """Plan the memory of a dynamic table over ``ranks``.

    The first given option sets the budget: global_hbm_for_values, item_vocab_gpu_capacity (rows),
    item_vocab_gpu_capacity_ratio (share of the capacity). By default the budget holds all rows.
    """
    args = spec.dynamic
    assert args is not None
    capacity = args.item_vocab_size_or_capacity
    row_bytes = training.bytes_per_row(spec.stored_dim)
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


def physical_names(table: str, memory: MemoryPlan) -> list[str]:
    """Return the physical tables of a dynamic table, in slot order."""
    return [table] if memory.split_at is None else [table, table + _HOST]


def logical_name(name: str) -> str:
    """Return the table of a physical table, or the real feature of a feature."""
    return name.removesuffix(_HOST)


def split_tables(collections: nn.ModuleList, memory: Mapping[str, MemoryPlan]) -> nn.ModuleList:
    """Replace dynamic collections by (meta) collections of physical tables. Raises ConfigError for reserved names."""
    dynamic = [collection for collection in collections if isinstance(collection, DynamicEmbeddingCollection)]
    tables = [table for collection in dynamic for table in collection.embedding_configs()]
    names = [name for table in tables for name in (table.name, *table.feature_names)]
    if taken := sorted({name for name in names if name.endswith(_HOST)}):
        raise ConfigError([f"names of dynamic tables and their features may not end in {_HOST!r}: {', '.join(taken)}"])
    return nn.ModuleList(
        DynamicEmbeddingCollection(
            tables=[
                physical
                for table in collection.embedding_configs()
                for physical in _physical_tables(table, memory[table.name])
            ],
            device=torch.device("meta"),
        )
        if isinstance(collection, DynamicEmbeddingCollection)
        else collection
        for collection in collections
    )


def _physical_tables(table: EmbeddingConfig, memory: MemoryPlan) -> list[EmbeddingConfig]:
    if memory.split_at is None:
        return [table]
    rows = memory.split_at * memory.ranks
    return [
        replace(table, num_embeddings=rows),
        replace(
            table,
            name=table.name + _HOST,
            num_embeddings=table.num_embeddings - rows,
            feature_names=[name + _HOST for name in table.feature_names],
        ),
    ]


class SplitLookup:
    """Turns slots of tables into rows of physical tables. Creates constant tensors once."""

    def __init__(
        self, keys: Sequence[str], looked_up: Sequence[str], split_at: Mapping[str, int], device: torch.device
    ) -> None:
        """``looked_up``: features of the physical tables; ``split_at``: feature → slots in the first physical table."""
        names = [key + suffix for suffix in ("", _HOST) for key in keys]
        positions = [looked_up.index(name) if name in looked_up else -1 for name in names]
        first_rows = [split_at.get(key, torch.iinfo(torch.int64).max) for key in keys]
        self._looked_up = list(looked_up)
        self._keys = torch.arange(len(keys), device=device)
        self._first_rows = torch.tensor(first_rows, device=device)
        self._position_of_name = torch.tensor(positions, device=device)
        self._name_at_position = torch.tensor([names.index(name) for name in looked_up], device=device)

    def __call__(self, features: KeyedJaggedTensor) -> tuple[KeyedJaggedTensor, Tensor]:
        """Return the features of the physical tables, and the position of each slot's row among their values.

        ``features``: n slots under ``keys``. Positions: int64 [n]. Values of a bag keep their order.
        """
        slots, lengths = features.values(), features.lengths()
        key_of = self._keys.repeat_interleave(features.stride()).repeat_interleave(lengths, output_size=len(slots))
        first_rows = self._first_rows[key_of]
        second = slots >= first_rows
        order = self._position_of_name[key_of + len(self._keys) * second].argsort(stable=True)
        counted = functional.pad(second.cumsum(0), (1, 0))[features.offsets()]
        in_second = counted.diff().to(lengths.dtype)
        by_name = torch.cat([lengths - in_second, in_second]).view(2 * len(self._keys), -1)
        rows = KeyedJaggedTensor(
            keys=self._looked_up,
            values=torch.where(second, slots - first_rows, slots)[order],
            lengths=by_name[self._name_at_position].flatten(),
            stride=features.stride(),
        )
        positions = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
        return rows, positions
