"""Which rank holds which shard of the model_parallel tables: TorchRec's planner, with the memory that a rank has."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from torchrec.distributed.utils import emb_opt_type_to_optimizer_class

from hstu.base.errors import ConfigError
from hstu.config.args import OptimizerArgs
from hstu.model.embedding import TableSpec
from hstu.parallel.collectives import gather_objects, on_all_ranks
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
_HOST_KERNELS = {EmbeddingComputeKernel.FUSED_UVM, EmbeddingComputeKernel.FUSED_UVM_CACHING}
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
    """The room for tables on this rank, which shares the memory of its host with ``ranks_on_host`` - 1 others.

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


def attach_training(embedding: nn.Module, training: Mapping[str, TableTraining], args: OptimizerArgs) -> None:
    """Attach optimizers and FBGEMM's parameters to the weights.

    By the optimizers, the planner counts the states. By the parameters, TorchRec groups the tables of a collection into
    kernels. They go where torch's apply_optimizer_in_backward puts them, which would also run an optimizer of its own.
    """
    for name, weight in embedding.named_parameters():
        table = name.removesuffix(".weight").rpartition(".")[2]  # <collection>.embeddings.<table>.weight
        params = training[table].fused_params(args)
        weight._optimizer_kwargs = [params]  # type: ignore[attr-defined]
        weight._optimizer_classes = [emb_opt_type_to_optimizer_class(params["optimizer"])]  # type: ignore[attr-defined]


def plan_shards(
    model: nn.Module,
    specs: Sequence[TableSpec],
    training: Mapping[str, TableTraining],
    memory: Mapping[str, MemoryPlan],
    sharders: list[EmbeddingCollectionSharder],
    ranks: TableRanks,
    prefetches: bool = False,
) -> ShardingPlan:
    """TorchRec's plan for ``model.embedding``, constrained to what ``specs`` ask for. It needs no process group.

    ``memory``: the memory plan of each dynamic table, which matters on GPUs; the collections to plan have been split
    by it (``split_tables``). ``prefetches``: whether the pipeline prefetches rows into caches.

    Raises TablesDoNotFit.
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
        needs = [
            _TableNeed.of(spec, training[spec.name].optimizer, memory.get(spec.name), on_gpu)
            for spec in specs
            if not spec.replicated
        ]
        raise TablesDoNotFit(_why_not(needs, ranks)) from error


def plan_on_first_rank(plan: Callable[[], ShardingPlan], group: dist.ProcessGroup) -> ShardingPlan:
    """The result of ``plan`` on rank 0, on all ranks; or its error, on all ranks."""
    own = on_all_ranks(lambda: plan() if dist.get_rank(group) == 0 else None, group)
    planned: ShardingPlan = gather_objects(own, group)[0]
    return planned


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


@dataclass(frozen=True)
class _TableNeed:
    """What one table takes, over all ranks."""

    spec: TableSpec
    optimizer: str
    rows: int
    """Bytes of the rows."""
    states: int
    """Bytes of their optimizer states."""
    in_gpu_memory: bool
    """All of them, some, or a cache of them."""
    in_host_memory: bool
    """All of them, or some."""

    @classmethod
    def of(cls, spec: TableSpec, optimizer: str, memory: MemoryPlan | None, on_gpu: bool) -> _TableNeed:
        kernels = {kernel for kernel, _ in _gpu_kernels(spec, memory, False).values()}
        rows = spec.rows * bytes_per_row(spec.stored_dim, "sgd")  # which has no states
        return cls(
            spec,
            optimizer,
            rows,
            spec.rows * bytes_per_row(spec.stored_dim, optimizer) - rows,
            in_gpu_memory=on_gpu and kernels != {EmbeddingComputeKernel.FUSED_UVM},
            in_host_memory=not on_gpu or bool(kernels & _HOST_KERNELS),
        )

    def __str__(self) -> str:
        parts = f" ({_gb(self.rows)} of rows, {_gb(self.states)} of {self.optimizer} states)" if self.states else ""
        return f"{self.spec.name} needs {_gb(self.rows + self.states)}{parts}"


def _why_not(needs: Sequence[_TableNeed], ranks: TableRanks) -> str:
    """The error of tables that do not fit, with what each takes, the largest first, and what to do."""
    room, where = ranks.room, []
    if any(need.in_gpu_memory for need in needs):
        beside = f" beside the {_gb(room.beside_tables)} of a training step" if room.beside_tables else ""
        where.append(f"{_gb(room.gpu)} of GPU memory{beside}")
    if any(need.in_host_memory for need in needs):
        where.append(f"{_gb(room.host)} of host memory")
    largest = sorted(needs, key=lambda need: -need.rows - need.states)[:_MOST_NAMED]
    return (
        f"the model_parallel tables do not fit on {ranks.count} rank{'s'[: ranks.count > 1]}: "
        f"{'; '.join(map(str, largest))}. A rank has {' and '.join(where)} for them. What helps: "
        f"{'; '.join(_what_helps(needs))}"
    )


def _what_helps(needs: Sequence[_TableNeed]) -> Iterator[str]:
    yield 'more ranks (EmbeddingArgs.sharding = "row_wise" cuts a table over all of them)'
    if any(need.states > need.rows / 2 for need in needs):
        yield 'OptimizerArgs.sparse_optimizer_str = "rowwise_adagrad" (one number per row)'
    on_gpu = [need for need in needs if need.in_gpu_memory]
    if any(need.spec.dynamic is None and not need.in_host_memory for need in on_gpu):
        yield 'EmbeddingArgs.compute_kernel = "fused_uvm_caching" (rows in host memory)'
    if any(need.spec.dynamic is not None for need in on_gpu):
        yield "a smaller DynamicEmbeddingArgs.item_vocab_gpu_capacity (the other rows in host memory)"
    if on_gpu:
        yield "a smaller TrainerArgs.train_batch_size"
    yield "smaller tables"


def _gb(number: int) -> str:
    return f"{number / 1e9:.2f} GB"
