"""Tables with sharding strategy model_parallel: planned, sharded over all ranks and initialised with TorchRec."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

import psutil
import torch
from fbgemm_gpu.split_table_batched_embeddings_ops_common import BoundsCheckMode
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torchrec.distributed.embedding import EmbeddingCollectionSharder, ShardedEmbeddingCollection
from torchrec.distributed.embedding_types import EmbeddingComputeKernel, ShardingType
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.planner import EmbeddingShardingPlanner, Topology
from torchrec.distributed.planner.types import ParameterConstraints, PlannerError
from torchrec.distributed.types import CacheParams, ShardingEnv, ShardingPlan

from hstu.config.args import OptimizerArgs
from hstu.config.errors import ConfigError
from hstu.config.run_config import RunConfig
from hstu.model.embedding import TableSpec, initial_row_blocks
from hstu.model.gr_model import GRModel
from hstu.ops.costs import FLOAT32
from hstu.ops.pytorch.operators import REFERENCE_KERNELS
from hstu.ops.types import UpdateRows
from hstu.parallel.collectives import gather_objects
from hstu.parallel.dynamic.collection import DynamicSharder, RowSparseDynamicCollection, ShardedDynamicCollection
from hstu.parallel.dynamic.memory import MemoryPlan, physical_names, plan_memory, split_tables
from hstu.parallel.dynamic.table import DynamicTable
from hstu.parallel.mesh import Heartbeat, Mesh
from hstu.parallel.table_kernels import CollectionSharder, RowSparseEmbeddingCollection
from hstu.parallel.table_optimizer import TableOptimizer, TableTraining

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


def shard(
    model: GRModel, config: RunConfig, mesh: Mesh, update_rows: UpdateRows = REFERENCE_KERNELS.update_rows
) -> tuple[GRModel, TableOptimizer]:
    """Shard the model's EmbeddingCollections in place and write their initial rows. Collective.

    Returns the model and the optimizer of its tables. Raises ConfigError if the ranks have no room for the tables.
    """
    args, device = config.optimizer, mesh.device.type
    training = {spec.name: TableTraining.of(spec, args) for spec in model.specs}
    sharders = table_sharders(args, device, model.specs)
    check_kernels(model.specs, training, device)
    if len(model.embedding):
        memory = memory_plans(model.specs, args, mesh.world_size)
        for name, table_memory in memory.items():
            log.info("dynamic table %s: %s", name, table_memory.describe(device))
            training |= {physical: training[name] for physical in physical_names(name, table_memory)}
        model.embedding = split_tables(model.embedding, memory)
        prefetches = config.trainer.pipeline_type == "prefetch"
        planner = table_planner(model.specs, mesh.world_size, mesh.local_world_size, device, memory, prefetches)
        plan = _collective_plan(planner, model, sharders, config, mesh)
        planned = {name: table for tables in plan.plan.values() for name, table in tables.items()}
        log.info("tables: %s", {name: table.sharding_type for name, table in planned.items()})
        for name, table in planned.items():
            if training[name].is_row_sparse(device):  # the planner refuses the dense kernel
                table.compute_kernel = EmbeddingComputeKernel.DENSE.value
        _attach_training(model, training, args)
        DistributedModelParallel(
            model,
            env=ShardingEnv.from_process_group(mesh.world_group),
            device=mesh.device,
            plan=plan,
            sharders=sharders,
            init_data_parallel=False,
            init_parameters=False,
        )
    write_initial_rows(model, config.trainer.seed, mesh.heartbeat)
    optimizer = TableOptimizer(
        sharded_collections(model), training, args, model.replicated_tables.weights(), update_rows
    )
    weights = sharded_weights(model)
    for collection in sharded_collections(model):
        if isinstance(collection, ShardedDynamicCollection):
            collection.create_tables(model.specs, weights, optimizer, config.trainer.seed)
    return model, optimizer


def _collective_plan(
    planner: EmbeddingShardingPlanner,
    model: GRModel,
    sharders: list[EmbeddingCollectionSharder],
    config: RunConfig,
    mesh: Mesh,
) -> ShardingPlan:
    """The plan of rank 0 on every rank. An error of the planner, too: the other ranks would wait for the plan."""
    made: ShardingPlan | ConfigError | None = None
    if mesh.is_main:
        try:
            made = planner.plan(model, sharders)
        except PlannerError:
            made = no_room_for_tables(model.specs, config, mesh.world_size)
    made = gather_objects(made, mesh.world_group)[0]
    if isinstance(made, ConfigError):
        raise made
    assert made is not None
    return made


def no_room_for_tables(specs: Sequence[TableSpec], config: RunConfig, world_size: int) -> ConfigError:
    """What it means that TorchRec's planner finds no plan, at the place of the largest model_parallel table."""
    sharded = [spec for spec in specs if not spec.replicated]
    text = (
        f"the rows of the model_parallel tables have {_gigabytes(sum(map(_bytes, sharded)))}, for which there is no "
        f"room on {world_size} rank{'s'[: world_size > 1]}; start more ranks, or make the tables smaller"
    )
    return _at_the_largest(sharded, config, text)


def check_memory(specs: Sequence[TableSpec], config: RunConfig, ranks_here: int, world_size: int) -> None:
    """Raise ConfigError if the rows alone need more memory than this host and its GPUs have."""
    needed = sum(_bytes(spec) * (ranks_here if spec.replicated else ranks_here / world_size) for spec in specs)
    has = psutil.virtual_memory().total + psutil.swap_memory().total
    has += sum(torch.cuda.get_device_properties(index).total_memory for index in range(torch.cuda.device_count()))
    if needed > has:
        text = (
            f"the rows of the tables need {_gigabytes(needed)} on this host, which has {_gigabytes(has)} of memory; "
            "make the tables smaller, or shard them over more hosts (model_parallel)"
        )
        raise _at_the_largest(specs, config, text)


def _at_the_largest(specs: Sequence[TableSpec], config: RunConfig, text: str) -> ConfigError:
    largest = max(specs, key=_bytes).name
    table = next((table for table in config.embeddings if table.table_name == largest), None)
    if table is None:  # a predefined one
        return ConfigError(config.located(config.dataset, "dataset_name", f"table {largest!r}: {text}"))
    return ConfigError(config.located(table, "item_vocab_size_or_capacity", text))


def _bytes(spec: TableSpec) -> int:
    return FLOAT32 * spec.rows * spec.dim


def _gigabytes(number: float) -> str:
    return f"{number / 1e9:,.2f} GB"


def memory_plans(specs: Sequence[TableSpec], args: OptimizerArgs, world_size: int) -> dict[str, MemoryPlan]:
    """The memory plan of each dynamic table, by name."""
    return {
        spec.name: plan_memory(spec, TableTraining.of(spec, args).optimizer, world_size)
        for spec in specs
        if spec.dynamic is not None
    }


def check_kernels(specs: Sequence[TableSpec], training: Mapping[str, TableTraining], device_type: str) -> None:
    """Log a warning for each EmbeddingArgs.compute_kernel that the device lacks; it names the kernel that runs instead.

    Raises ConfigError for a dense kernel on a GPU: TorchRec's planner supports none, and RowSparseEmbedding exists for
    the CPU only.
    """
    refused = []
    for spec in (spec for spec in specs if spec.compute_kernel is not None):
        option = f"EmbeddingArgs.compute_kernel = {spec.compute_kernel!r} of table {spec.name!r}"
        row_sparse = training[spec.name].is_row_sparse(device_type)
        if device_type != "cpu" and spec.compute_kernel == "dense":
            refused.append(f"{option}: it exists only on a CPU, where FBGEMM has no Adam; use 'fused' on a GPU")
        elif device_type == "cpu" and spec.compute_kernel != ("dense" if row_sparse else "fused"):
            why = "FBGEMM has no Adam on a CPU" if spec.compute_kernel == "fused" else "a CPU has host memory only"
            instead = "dense, whose Adam is equal," if row_sparse else "fused"
            log.warning("%s is ignored: %s; %s is used", option, why, instead)
    if refused:
        raise ConfigError(refused)


def table_training(specs: Sequence[TableSpec], args: OptimizerArgs) -> dict[str, TableTraining]:
    """The training of each sharded table, by name."""
    return {spec.name: TableTraining.of(spec, args) for spec in specs if not spec.replicated}


def _attach_training(model: GRModel, training: Mapping[str, TableTraining], args: OptimizerArgs) -> None:
    """Attach FBGEMM's parameters to the weights, by which TorchRec groups the tables of a collection into kernels.

    They go where torch's apply_optimizer_in_backward puts them, which would also run an optimizer of its own.
    """
    for name, weight in model.embedding.named_parameters():
        table = name.removesuffix(".weight").rpartition(".")[2]  # <collection>.embeddings.<table>.weight
        weight._optimizer_kwargs = [training[table].fused_params(args)]  # type: ignore[attr-defined]


def table_sharders(
    args: OptimizerArgs, device_type: str, specs: Sequence[TableSpec]
) -> list[EmbeddingCollectionSharder]:
    """The sharders of static and dynamic collections whose tables are trained as ``args`` says."""
    static: type[ShardedEmbeddingCollection] = ShardedEmbeddingCollection
    dynamic: type[ShardedDynamicCollection] = ShardedDynamicCollection
    if any(training.needs_own_kernel(device_type) for training in table_training(specs, args).values()):
        static, dynamic = RowSparseEmbeddingCollection, RowSparseDynamicCollection
    # by default FBGEMM looks up row 0 for an id outside the table
    fused_params = {"bounds_check_mode": BoundsCheckMode.FATAL}
    return [CollectionSharder(static, fused_params), DynamicSharder(dynamic, fused_params)]


def sharded_collections(model: GRModel) -> list[ShardedEmbeddingCollection]:
    """The model's sharded collections in order."""
    return [collection for collection in model.embedding if isinstance(collection, ShardedEmbeddingCollection)]


def sharded_weights(model: GRModel) -> dict[str, ShardedTensor]:
    """Live weights of the sharded tables: name → ShardedTensor [rows, stored_dim] over all ranks."""
    weights: dict[str, ShardedTensor] = {}
    for collection in sharded_collections(model):
        for key, weight in collection.state_dict().items():
            weights[key.removeprefix("embeddings.").removesuffix(".weight")] = weight
    return weights


def dynamic_tables(model: GRModel) -> dict[str, DynamicTable]:
    """The model's dynamic tables by name."""
    tables: dict[str, DynamicTable] = {}
    for collection in sharded_collections(model):
        if isinstance(collection, ShardedDynamicCollection):
            tables.update(collection.tables)
    return tables


@torch.no_grad()
def write_initial_rows(model: GRModel, seed: int, heartbeat: Heartbeat) -> None:
    """Fill this rank's shards block by block. The rows do not depend on the number of ranks or the sharding.

    Dynamic tables stay zero: the row of an id is written when the id gets one.
    """
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


def table_planner(
    specs: Sequence[TableSpec],
    world_size: int,
    local_world_size: int,
    device_type: str,
    memory: Mapping[str, MemoryPlan],
    prefetches: bool = False,
) -> EmbeddingShardingPlanner:
    """TorchRec's planner, constrained to what ``specs`` ask for. It needs no process group to plan.

    ``memory``: the memory plan of each dynamic table, which matters on GPUs; the collections to plan have been split
    by it (``split_tables``). ``prefetches``: whether the pipeline prefetches rows into caches.
    """
    constraints: dict[str, ParameterConstraints] = {}
    for spec in specs:
        for name, (kernel, cache) in _gpu_kernels(spec, memory.get(spec.name), prefetches).items():
            on_gpu = device_type == "cuda"
            constraints[name] = ParameterConstraints(
                sharding_types=_sharding_types(spec, world_size),
                compute_kernels=[(kernel if on_gpu else EmbeddingComputeKernel.FUSED).value],
                min_partition=_column_shard_width(spec.stored_dim, world_size),
                cache_params=cache if on_gpu else None,
            )
    topology = Topology(world_size=world_size, local_world_size=local_world_size, compute_device=device_type)
    return EmbeddingShardingPlanner(topology=topology, constraints=constraints)


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
