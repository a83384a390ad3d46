"""Which rank holds which shard of the model_parallel tables: TorchRec's planner, with the memory that a rank has."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import psutil
import torch
import torch.distributed as dist
from torch import nn
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.embedding_types import EmbeddingComputeKernel, ShardingType
from torchrec.distributed.planner import EmbeddingShardingPlanner, Topology
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.distributed.planner.types import ParameterConstraints, PlannerError
from torchrec.distributed.types import CacheParams, ShardingPlan

from hstu.base.errors import ConfigError
from hstu.model.embedding import TableSpec
from hstu.parallel.collectives import gather_objects
from hstu.parallel.dynamic.memory import MemoryPlan, bytes_per_row, physical_names
from hstu.parallel.table_optimizer import TableTraining

log = logging.getLogger(__name__)

# auto leaves out column_wise: rowwise_adagrad would have one moment per row *and shard*, which hstu/config refuses for
# tables that ask for column_wise.
_SHARDING_TYPES = {
    "auto": [ShardingType.TABLE_WISE.value, ShardingType.ROW_WISE.value],
    "row_wise": [ShardingType.ROW_WISE.value],
    "table_wise": [ShardingType.TABLE_WISE.value],
    "column_wise": [ShardingType.COLUMN_WISE.value],
}
_COLUMN_MULTIPLE = 4  # of which FBGEMM wants the width of every shard to be a multiple
_GPU_SHARE = 0.95
"""Share of the free GPU memory that is planned with. The rest is for NCCL's buffers and for fragmentation."""
_MOST_NAMED = 3
"""Tables that an error names, the largest first."""


class TablesDoNotFit(ConfigError):
    """There is no way to place the tables and their optimizer states in the memory of the ranks."""


@dataclass(frozen=True)
class TableRoom:
    """Bytes of memory that tables and their optimizer states may take on each rank."""

    gpu: int
    host: int
    beside_tables: int = 0
    """Bytes of GPU memory that are kept for the dense part and its activations. ``gpu`` is without them."""


UNLIMITED = TableRoom(1 << 60, 1 << 60)
"""More than any machine has, for plans that are only looked at."""


@dataclass(frozen=True)
class TableRanks:
    """The ranks that tables are planned for."""

    count: int
    per_host: int
    device_type: str
    """"cpu" or "cuda"."""
    room: TableRoom = UNLIMITED


def host_memory() -> int:
    """Bytes of memory of this host, swap included."""
    return int(psutil.virtual_memory().total + psutil.swap_memory().total)


def room_of_rank(device: torch.device, ranks_on_host: int, beside_tables: Callable[[], int]) -> TableRoom:
    """The room for tables on this rank, one of ``ranks_on_host``.

    beside_tables: returns the bytes that the run needs beside the tables. It is called for GPUs only.
    """
    host = host_memory() // ranks_on_host
    if device.type != "cuda":
        return TableRoom(0, host)
    free, _ = torch.cuda.mem_get_info(device)
    has = int(_GPU_SHARE * (free + torch.cuda.memory_reserved(device)))  # what torch has reserved serves this run
    needed = max(beside_tables(), torch.cuda.memory_allocated(device))
    return TableRoom(max(0, has - needed), host, needed)


def least_room(own: TableRoom, group: dist.ProcessGroup) -> TableRoom:
    """The room that every rank has. TorchRec's planner takes all ranks to be alike."""
    rooms = gather_objects(own, group)
    return TableRoom(
        min(room.gpu for room in rooms), min(room.host for room in rooms), max(room.beside_tables for room in rooms)
    )


def plan_shards(
    model: nn.Module,
    specs: Sequence[TableSpec],
    training: Mapping[str, TableTraining],
    memory: Mapping[str, MemoryPlan],
    sharders: list[EmbeddingCollectionSharder],
    ranks: TableRanks,
    prefetches: bool = False,
) -> ShardingPlan:
    """TorchRec's plan for ``model.embedding``, constrained to what ``specs`` ask for. Raises TablesDoNotFit.

    ``memory``: the plan of each dynamic table, by which the collections have been split (``split_tables``).
    ``prefetches``: whether the pipeline prefetches rows into caches.
    """
    on_gpu = ranks.device_type == "cuda"
    constraints: dict[str, ParameterConstraints] = {}
    for spec in specs:
        for name, (kernel, cache) in _gpu_kernels(spec, memory.get(spec.name), prefetches).items():
            constraints[name] = ParameterConstraints(
                sharding_types=_sharding_types(spec, ranks.count),
                compute_kernels=[(kernel if on_gpu else EmbeddingComputeKernel.FUSED).value],
                min_partition=_column_shard_width(spec.stored_dim, ranks.count),
                cache_params=cache if on_gpu else None,
            )
    topology = Topology(
        world_size=ranks.count,
        local_world_size=ranks.per_host,
        compute_device=ranks.device_type,
        hbm_cap=ranks.room.gpu,  # 32 GiB by default, whatever the device has
        ddr_cap=ranks.room.host,
    )
    # By default TorchRec keeps 15 % and six times the dense weights free. The room is already without them.
    nothing_more = FixedPercentageStorageReservation(percentage=0.0)
    planner = EmbeddingShardingPlanner(topology=topology, constraints=constraints, storage_reservation=nothing_more)
    try:
        return planner.plan(model, sharders)
    except PlannerError as error:
        raise TablesDoNotFit(_why_not(specs, training, ranks)) from error


def _gpu_kernels(
    spec: TableSpec, memory: MemoryPlan | None, prefetches: bool
) -> dict[str, tuple[EmbeddingComputeKernel, CacheParams | None]]:
    """Compute kernel and cache on a GPU of a table; of both physical tables where a dynamic table is split."""
    if spec.replicated:
        return {}
    if memory is not None:
        cache = {EmbeddingComputeKernel.FUSED_UVM_CACHING: CacheParams(load_factor=memory.cached_share)}
        kernels = zip(physical_names(spec.name, memory), memory.kernels, strict=True)
        return {name: (kernel, cache.get(kernel)) for name, kernel in kernels}
    kernel = EmbeddingComputeKernel(spec.compute_kernel or "fused")
    # Without locks, prefetching the next batch makes FBGEMM lose track of the cached rows of the current step.
    needs_locks = kernel is EmbeddingComputeKernel.FUSED_UVM_CACHING and prefetches
    return {spec.name: (kernel, CacheParams(prefetch_pipeline=True) if needs_locks else None)}


def _sharding_types(spec: TableSpec, world_size: int) -> list[str]:
    """Sharding types that the planner may choose from.

    Row-wise sharding is left out where a rank would get no rows: on a CPU fbgemm-gpu 1.8.0 cannot look up in an empty
    shard ("weights[0] must be a GPU or MTIA tensor").
    """
    if spec.dynamic is not None:
        return [ShardingType.ROW_WISE.value]
    if world_size == 1:  # row-wise sharding would bring ids and rows into the order of the ranks and back
        return [ShardingType.TABLE_WISE.value]
    rows_per_rank = -(-spec.rows // world_size)
    if rows_per_rank * (world_size - 1) < spec.rows or spec.sharding not in ("auto", "row_wise"):
        return _SHARDING_TYPES[spec.sharding]
    if spec.sharding == "row_wise":
        log.info("table %s: %d rows are too few to cut over %d ranks; table_wise", spec.name, spec.rows, world_size)
    return [ShardingType.TABLE_WISE.value]


def _column_shard_width(dim: int, world_size: int) -> int:
    """Width of equal column shards, one per rank, or fewer and wider ones where ``dim`` does not divide evenly."""
    shards = next(n for n in range(world_size, 0, -1) if dim % (n * _COLUMN_MULTIPLE) == 0)
    return dim // shards


def gigabytes(number: float) -> str:
    """Bytes as text."""
    return f"{number / 1e9:,.2f} GB"


def _why_not(specs: Sequence[TableSpec], training: Mapping[str, TableTraining], ranks: TableRanks) -> str:
    needed = {
        spec.name: spec.rows * bytes_per_row(spec.stored_dim, training[spec.name].optimizer)
        for spec in specs
        if not spec.replicated
    }
    largest = sorted(needed, key=lambda name: -needed[name])[:_MOST_NAMED]
    has = f"{gigabytes(ranks.room.host)} of host memory"
    if ranks.device_type == "cuda":
        beside = f" beside the {gigabytes(ranks.room.beside_tables)} of a training step"
        has = f"{gigabytes(ranks.room.gpu)} of GPU memory{beside} and {has}"
    return (
        f"the model_parallel tables do not fit on {ranks.count} rank{'s'[: ranks.count > 1]}: "
        f"{', '.join(f'{name} needs {gigabytes(needed[name])}' for name in largest)}, optimizer states included. A "
        f"rank has {has} for them. What helps: more ranks; OptimizerArgs.sparse_optimizer_str = "
        '"rowwise_adagrad" (one number per row); on GPUs EmbeddingArgs.compute_kernel = "fused_uvm_caching", a smaller '
        "DynamicEmbeddingArgs.item_vocab_gpu_capacity or a smaller TrainerArgs.train_batch_size; smaller tables"
    )
