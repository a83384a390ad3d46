"""Tables with sharding strategy model_parallel: planning by available memory, sharding and initialisation."""

import logging
import lzma
import pickle
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import psutil
import torch
import torch.distributed as dist
from fbgemm_gpu.split_table_batched_embeddings_ops_common import BoundsCheckMode
from tabulate import tabulate
from torch import nn
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.distributed._shard.sharding_spec import EnumerableShardingSpec
from torchrec.distributed.embedding import EmbeddingCollectionSharder, ShardedEmbeddingCollection
from torchrec.distributed.embedding_types import EmbeddingComputeKernel, ShardingType
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.planner import EmbeddingShardingPlanner, Topology
from torchrec.distributed.planner.constants import BATCH_SIZE
from torchrec.distributed.planner.enumerators import EmbeddingEnumerator
from torchrec.distributed.planner.shard_estimators import EmbeddingPerfEstimator, EmbeddingStorageEstimator
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.distributed.planner.types import ParameterConstraints, PlannerError, ShardingOption
from torchrec.distributed.types import CacheParams, ParameterSharding, ShardingEnv, ShardingPlan
from torchrec.distributed.utils import emb_opt_type_to_optimizer_class

from hstu.base.errors import ConfigError
from hstu.config.args import OptimizerArgs
from hstu.config.option import located
from hstu.config.run_config import RunConfig
from hstu.model.embedding import TableSpec, initial_row_blocks
from hstu.model.gr_model import GRModel
from hstu.ops.costs import FLOAT32
from hstu.ops.pytorch.operators import REFERENCE_KERNELS
from hstu.ops.row_update import UpdateRows
from hstu.parallel.collectives import on_rank_0
from hstu.parallel.dynamic.collection import DynamicSharder, ShardedDynamicCollection
from hstu.parallel.dynamic.memory import MemoryPlan, physical_names, plan_memory, split_tables
from hstu.parallel.dynamic.table import DynamicTable
from hstu.parallel.mesh import Heartbeat, Mesh
from hstu.parallel.table_kernels import BFLOAT16, CollectionSharder
from hstu.parallel.table_optimizer import TableOptimizer, TableTraining

log = logging.getLogger(__name__)

# auto excludes column_wise, which hstu/config rejects for rowwise_adagrad: it would keep one moment per row and shard.
_AUTO = [ShardingType.TABLE_WISE.value, ShardingType.ROW_WISE.value]
_COLUMN_MULTIPLE = 4  # FBGEMM needs shard widths that are multiples of this
_GPU_SHARE = 0.95
"""Share of the free GPU memory to plan with. The rest is for NCCL's buffers and fragmentation."""
_MOST_NAMED = 3
"""How many tables an error lists, the largest first."""


class TablesDoNotFit(ConfigError):
    """The tables and their optimizer states do not fit in the memory of the ranks."""


@dataclass(frozen=True)
class TableRoom:
    """Bytes of memory for tables and their optimizer states on each rank."""

    gpu: int
    host: int
    beside_tables: int = 0
    """Bytes of GPU memory for the dense part and its activations, not included in ``gpu``."""


UNLIMITED = TableRoom(1 << 60, 1 << 60)
"""More memory than any machine has, for plans that are only displayed."""


@dataclass(frozen=True)
class TableRanks:
    """The ranks to plan tables for."""

    count: int
    per_host: int
    device_type: str
    """"cpu" or "cuda"."""
    room: TableRoom = UNLIMITED


def shard(
    model: GRModel,
    config: RunConfig,
    mesh: Mesh,
    update_rows: UpdateRows = REFERENCE_KERNELS.update_rows,
    beside_tables: Callable[[], int] = int,
) -> tuple[GRModel, TableOptimizer]:
    """Shard the model's EmbeddingCollections in place and write their initial rows. Collective.

    ``beside_tables`` returns the bytes of GPU memory that a rank needs beside the sharded tables.
    Returns the model and the optimizer of its tables. Raises TablesDoNotFit on all ranks.
    """
    args, device, seed = config.optimizer, mesh.device.type, config.trainer.seed
    sharders = table_sharders(config, mesh.world_size)
    check_kernels(model.specs, args, device)
    memory = memory_plans(model.specs, args, mesh.world_size)
    training = prepare_tables(model, model.specs, args, memory)
    if len(model.embedding):
        for name, table_memory in memory.items():
            log.info("dynamic table %s: %s", name, table_memory.describe(device))
        room = least_room(room_of_rank(mesh.device, mesh.local_world_size, beside_tables), mesh.world_group)
        ranks = TableRanks(mesh.world_size, mesh.local_world_size, device, room)
        packed = on_rank_0(
            lambda: pack_plan(plan_sharding(model, model.specs, memory, config, ranks)), mesh.world_group
        )
        plan: ShardingPlan = pickle.loads(lzma.decompress(packed))
        planned = {name: table for tables in plan.plan.values() for name, table in tables.items()}
        for name, table in planned.items():
            if training[name].is_row_sparse(device):  # set here, as the planner rejects the dense kernel
                table.compute_kernel = EmbeddingComputeKernel.DENSE.value
        log.info("tables:\n%s", describe_plan(planned, training))
        DistributedModelParallel(
            model,
            env=ShardingEnv.from_process_group(mesh.world_group),
            device=mesh.device,
            plan=plan,
            sharders=sharders,
            init_data_parallel=False,
            init_parameters=False,
        )
    write_initial_rows(model, seed, mesh.heartbeat)
    default_rows = [physical_names(name, table_memory)[-1] for name, table_memory in memory.items()]
    replicated = model.replicated_tables.weights()
    optimizer = TableOptimizer(sharded_collections(model), training, args, replicated, update_rows, default_rows)
    weights = sharded_weights(model)
    for collection in sharded_collections(model):
        if isinstance(collection, ShardedDynamicCollection):
            collection.create_tables(model.specs, weights, optimizer, seed)
    return model, optimizer


def host_memory() -> int:
    """Bytes of memory of this host, including swap."""
    return int(psutil.virtual_memory().total + psutil.swap_memory().total)


def room_of_rank(device: torch.device, ranks_on_host: int, beside_tables: Callable[[], int]) -> TableRoom:
    """Return the memory for tables on this rank. ``beside_tables``: see ``shard``; called for GPUs only."""
    host = host_memory() // ranks_on_host
    if device.type != "cuda":
        return TableRoom(0, host)
    free, _ = torch.cuda.mem_get_info(device)
    has = int(_GPU_SHARE * (free + torch.cuda.memory_reserved(device)))  # memory that torch has reserved is usable
    needed = max(beside_tables(), torch.cuda.memory_allocated(device))
    return TableRoom(max(0, has - needed), host, needed)


def least_room(own: TableRoom, group: dist.ProcessGroup) -> TableRoom:
    """Return the least memory of all ranks, because TorchRec's planner assumes equal ranks."""
    least = torch.tensor([own.gpu, own.host, -own.beside_tables])
    dist.all_reduce(least, op=dist.ReduceOp.MIN, group=group)
    gpu, host, beside_tables = least.tolist()
    return TableRoom(gpu, host, -beside_tables)


def plan_sharding(
    model: nn.Module, specs: Sequence[TableSpec], memory: Mapping[str, MemoryPlan], config: RunConfig, ranks: TableRanks
) -> ShardingPlan:
    """Return TorchRec's plan for ``model.embedding`` after ``prepare_tables``. Raises TablesDoNotFit."""
    on_gpu, prefetches = ranks.device_type == "cuda", config.trainer.pipeline_type == "prefetch"
    constraints: dict[str, ParameterConstraints] = {}
    for spec in specs:
        column_shards = next(n for n in range(ranks.count, 0, -1) if spec.stored_dim % (n * _COLUMN_MULTIPLE) == 0)
        for name, (kernel, cache) in _gpu_kernels(spec, memory.get(spec.name), prefetches).items():
            constraints[name] = ParameterConstraints(
                sharding_types=_sharding_types(spec, ranks),
                compute_kernels=[(kernel if on_gpu else EmbeddingComputeKernel.FUSED).value],
                min_partition=spec.stored_dim // column_shards,
                cache_params=cache if on_gpu else None,
            )
    topology = Topology(
        world_size=ranks.count,
        local_world_size=ranks.per_host,
        compute_device=ranks.device_type,
        hbm_cap=ranks.room.gpu,  # the default is 32 GiB for any device
        ddr_cap=ranks.room.host,
    )
    estimators = [_EstimateOfSizes(topology, constraints), EmbeddingStorageEstimator(topology, constraints)]
    planner = EmbeddingShardingPlanner(
        topology=topology,
        constraints=constraints,
        enumerator=EmbeddingEnumerator(topology, BATCH_SIZE, constraints, estimators),
        # By default TorchRec reserves 15 % and six times the dense weights. The topology's memory is free of those.
        storage_reservation=FixedPercentageStorageReservation(percentage=0.0),
    )
    try:
        return planner.plan(model, table_sharders(config, ranks.count))
    except PlannerError as error:
        sharded = [spec for spec in specs if not spec.replicated]
        raise _at_the_largest(sharded, config, _why_not(sharded, config.optimizer, ranks)) from error


class _EstimateOfSizes(EmbeddingPerfEstimator):
    """Estimates one shard of each size, for speed with thousands of ranks: a row-wise table has two sizes at most."""

    def estimate(self, sharding_options: list[ShardingOption], *args: Any, **kwargs: Any) -> None:
        """Set ``perf`` of all shards."""
        shards = [option.shards for option in sharding_options]
        for option in sharding_options:
            option.shards = [*{tuple(shard.size): shard for shard in option.shards}.values()]
        super().estimate(sharding_options, *args, **kwargs)
        for option, of_option in zip(sharding_options, shards, strict=True):
            estimated = {tuple(shard.size): shard.perf for shard in option.shards}
            for shard in of_option:
                shard.perf = estimated[tuple(shard.size)]
            option.shards = of_option


def pack_plan(plan: ShardingPlan) -> bytes:
    """Return ``plan`` as bytes. It repeats itself for every shard: lzma turns 6 MB into 20 kB."""
    return lzma.compress(pickle.dumps(plan), preset=1)


def describe_plan(tables: Mapping[str, ParameterSharding], training: Mapping[str, TableTraining]) -> str:
    """Return a line per physical table. The last columns have the bytes of all ranks, and those of the fullest rank."""
    lines = []
    for name, table in tables.items():
        trained, of_rows = training[name], 0
        held: Counter[int | None] = Counter()
        for shard in cast(EnumerableShardingSpec, table.sharding_spec).shards:
            rows, columns = shard.shard_sizes
            of_rows += rows * columns * FLOAT32
            held[cast(Any, shard.placement).rank()] += rows * trained.bytes_per_row(columns)
        ends = (shard.shard_offsets[0] + rows, shard.shard_offsets[1] + columns)  # of the last shard
        holders, sizes = sum(size > 0 for size in held.values()), (of_rows, held.total() - of_rows, max(held.values()))
        shown = [f"{size / 1e6:,.2f} MB" for size in sizes]
        lines.append((name, *ends, table.sharding_type, holders, table.compute_kernel, trained.optimizer, *shown))
    head = ("table", "rows", "width", "sharding", "ranks", "kernel", "optimizer", "weights", "states", "fullest rank")
    return tabulate(lines, head, tablefmt="plain", intfmt=",", colalign=("left", *["right"] * 9))


def _gpu_kernels(
    spec: TableSpec, memory: MemoryPlan | None, prefetches: bool
) -> dict[str, tuple[EmbeddingComputeKernel, CacheParams | None]]:
    """Return the compute kernel and cache of each physical table on a GPU; a split dynamic table has two."""
    if spec.replicated:
        return {}
    if memory is not None:
        cache = {EmbeddingComputeKernel.FUSED_UVM_CACHING: CacheParams(load_factor=memory.gpu_rows / memory.rows)}
        kernels = zip(physical_names(spec.name, memory), memory.kernels, strict=True)
        return {name: (kernel, cache.get(kernel)) for name, kernel in kernels}
    kernel = EmbeddingComputeKernel(spec.compute_kernel or "fused")
    # Without locks, prefetching the next batch makes FBGEMM lose track of the cached rows of the current step.
    needs_locks = kernel is EmbeddingComputeKernel.FUSED_UVM_CACHING and prefetches
    return {spec.name: (kernel, CacheParams(prefetch_pipeline=True) if needs_locks else None)}


def _sharding_types(spec: TableSpec, ranks: TableRanks) -> list[str]:
    if spec.dynamic is not None:
        return [ShardingType.ROW_WISE.value]
    if ranks.count == 1:  # row-wise sharding would needlessly reorder ids and rows by rank
        return [ShardingType.TABLE_WISE.value]
    rows_per_rank = -(-spec.rows // ranks.count)
    fills_all = rows_per_rank * (ranks.count - 1) < spec.rows
    if ranks.device_type != "cpu" or fills_all or spec.sharding not in ("auto", "row_wise"):
        return _AUTO if spec.sharding == "auto" else [spec.sharding]
    # On a CPU, fbgemm-gpu 1.8.0 cannot look up in an empty row-wise shard ("weights[0] must be a GPU or MTIA tensor").
    if spec.sharding == "row_wise":
        text = "table %s: table_wise instead of row_wise: with %d rows per rank some of %d ranks would have none, and"
        log.warning(text + " FBGEMM cannot look up in such shards on CPUs", spec.name, rows_per_rank, ranks.count)
    return [ShardingType.TABLE_WISE.value]


def _gigabytes(number: float) -> str:
    return f"{number / 1e9:,.2f} GB"


def _why_not(specs: Sequence[TableSpec], args: OptimizerArgs, ranks: TableRanks) -> str:
    needed = {spec.name: spec.rows * TableTraining.of(spec, args).bytes_per_row(spec.stored_dim) for spec in specs}
    largest = sorted(needed, key=lambda name: -needed[name])[:_MOST_NAMED]
    has = f"{_gigabytes(ranks.room.host)} of host memory"
    if ranks.device_type == "cuda":
        beside = f" beside the {_gigabytes(ranks.room.beside_tables)} of a training step"
        has = f"{_gigabytes(ranks.room.gpu)} of GPU memory{beside} and {has}"
    return (
        f"the model_parallel tables do not fit on {ranks.count} rank{'s'[: ranks.count > 1]}: "
        f"{', '.join(f'{name} needs {_gigabytes(needed[name])}' for name in largest)}, optimizer states included. A "
        f"rank has {has} for them. What helps: more ranks; OptimizerArgs.sparse_optimizer_str = "
        '"rowwise_adagrad" (one number per row); on GPUs EmbeddingArgs.compute_kernel = "fused_uvm_caching", a smaller '
        "DynamicEmbeddingArgs.item_vocab_gpu_capacity or a smaller TrainerArgs.train_batch_size; smaller tables"
    )


def check_memory(specs: Sequence[TableSpec], config: RunConfig, ranks_here: int, world_size: int) -> None:
    """Raise TablesDoNotFit if the rows alone need more memory than this host and its GPUs have."""
    needed = sum(
        FLOAT32 * spec.rows * spec.dim * (ranks_here if spec.replicated else ranks_here / world_size) for spec in specs
    )
    has = host_memory()
    has += sum(torch.cuda.get_device_properties(index).total_memory for index in range(torch.cuda.device_count()))
    if needed > has:
        text = (
            f"the rows of the tables need {_gigabytes(needed)} on this host, which has {_gigabytes(has)} of memory; "
            "make the tables smaller, or shard them over more hosts (model_parallel)"
        )
        raise _at_the_largest(specs, config, text)


def _at_the_largest(specs: Sequence[TableSpec], config: RunConfig, text: str) -> TablesDoNotFit:
    largest = max(specs, key=lambda spec: spec.rows * spec.dim).name
    for table in config.embeddings:
        if table.table_name == largest:
            return TablesDoNotFit(located(table, "item_vocab_size_or_capacity", text))
    return TablesDoNotFit(text)  # a predefined table


def memory_plans(specs: Sequence[TableSpec], args: OptimizerArgs, world_size: int) -> dict[str, MemoryPlan]:
    """Return table name → memory plan of each dynamic table."""
    return {
        spec.name: plan_memory(spec, TableTraining.of(spec, args), world_size)
        for spec in specs
        if spec.dynamic is not None
    }


def prepare_tables(
    model: nn.Module, specs: Sequence[TableSpec], args: OptimizerArgs, memory: Mapping[str, MemoryPlan]
) -> dict[str, TableTraining]:
    """Split dynamic tables in place and attach the training of each physical table. Returns name → training of all."""
    training = {spec.name: TableTraining.of(spec, args) for spec in specs}
    for name, table_memory in memory.items():
        training |= {physical: training[name] for physical in physical_names(name, table_memory)}
    model.embedding = split_tables(cast(nn.ModuleList, model.embedding), memory)
    # The planner counts states by the optimizer classes, and TorchRec groups tables into kernels by the kwargs.
    # apply_optimizer_in_backward sets both, but would also run an optimizer of its own.
    for name, weight in model.embedding.named_parameters():
        table = name.removesuffix(".weight").rpartition(".")[2]  # <collection>.embeddings.<table>.weight
        params = training[table].fused_params(args)
        weight._optimizer_kwargs = [params]  # type: ignore[attr-defined]
        weight._optimizer_classes = [emb_opt_type_to_optimizer_class(params["optimizer"])]  # type: ignore[attr-defined]
    return training


def check_kernels(specs: Sequence[TableSpec], args: OptimizerArgs, device_type: str) -> None:
    """Warn where a CPU replaces EmbeddingArgs.compute_kernel. Raises ConfigError for what FBGEMM lacks on a GPU."""
    for spec in specs:
        option, training = f"EmbeddingArgs.compute_kernel = {spec.compute_kernel!r}", TableTraining.of(spec, args)
        option += f" of table {spec.name!r}"
        used = "dense" if training.is_row_sparse(device_type) else "fused"
        if device_type == "cpu" and spec.compute_kernel not in (None, used):
            log.warning("%s is ignored on a CPU: %s is used, which trains the same", option, used)
        elif device_type != "cpu" and spec.compute_kernel == "dense":
            raise ConfigError(f"{option}: it exists only on a CPU, where FBGEMM has no Adam; use 'fused' on a GPU")


def table_sharders(config: RunConfig, world_size: int) -> list[EmbeddingCollectionSharder]:
    """Return the sharders of static and dynamic collections."""
    options: dict[str, Any] = {
        # By default FBGEMM looks up row 0 for an id outside the table.
        "fused_params": {"bounds_check_mode": BoundsCheckMode.FATAL},
        "use_index_dedup": world_size > 1,
        "qcomm_codecs_registry": BFLOAT16 if config.precision.table_exchange_dtype == "bfloat16" else None,
    }
    return [CollectionSharder(**options), DynamicSharder(**options)]


def sharded_collections(model: GRModel) -> list[ShardedEmbeddingCollection]:
    """Return the model's sharded collections in order."""
    return [collection for collection in model.embedding if isinstance(collection, ShardedEmbeddingCollection)]


def sharded_weights(model: GRModel) -> dict[str, ShardedTensor]:
    """Return name → live weight of each sharded table: ShardedTensor [rows, stored_dim] over all ranks."""
    weights: dict[str, ShardedTensor] = {}
    for collection in sharded_collections(model):
        for key, weight in collection.state_dict().items():
            weights[key.removeprefix("embeddings.").removesuffix(".weight")] = weight
    return weights


def dynamic_tables(model: GRModel) -> dict[str, DynamicTable]:
    """Return the model's dynamic tables by name."""
    tables: dict[str, DynamicTable] = {}
    for collection in sharded_collections(model):
        if isinstance(collection, ShardedDynamicCollection):
            tables.update(collection.tables)
    return tables


@torch.no_grad()
def write_initial_rows(model: GRModel, seed: int, heartbeat: Heartbeat) -> None:
    """Fill this rank's shards with rows that are independent of the sharding. Dynamic tables stay zero."""
    specs = {spec.name: spec for spec in model.specs}
    for table, weight in sharded_weights(model).items():
        for local in weight.local_shards():
            (first_row, first_col), (rows, cols) = local.metadata.shard_offsets, local.metadata.shard_sizes
            local.tensor.zero_()  # columns beyond spec.dim stay zero
            if table not in specs or specs[table].dynamic is not None:
                continue
            for row, block in initial_row_blocks(specs[table], seed, first_row, first_row + rows):
                heartbeat.beat()
                own = block[:, first_col : first_col + cols]
                local.tensor[row - first_row : row - first_row + len(own), : own.shape[1]].copy_(own)
