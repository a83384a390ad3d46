"""Sharding of the model_parallel tables over all ranks with TorchRec."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from fbgemm_gpu.split_table_batched_embeddings_ops_common import BoundsCheckMode
from torch import Tensor
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torchrec.distributed.embedding import EmbeddingCollectionSharder, ShardedEmbeddingCollection
from torchrec.distributed.embedding_types import EmbeddingComputeKernel, ShardingType
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.planner import EmbeddingShardingPlanner, Topology
from torchrec.distributed.planner.types import ParameterConstraints
from torchrec.distributed.types import CacheParams, ShardingEnv, ShardingPlan

from hstu.config.args import OptimizerArgs
from hstu.config.errors import ConfigError
from hstu.config.run_config import RunConfig
from hstu.model.embedding import TableSpec, initial_row_blocks
from hstu.model.gr_model import GRModel
from hstu.parallel.dynamic.budget import MemoryPlan, plan_memory
from hstu.parallel.dynamic.cache import CachedPart, caches
from hstu.parallel.dynamic.collection import DynamicLookups, DynamicSharder
from hstu.parallel.dynamic.rows import Part, Rows
from hstu.parallel.dynamic.split import in_parts, part_names, table_of
from hstu.parallel.dynamic.table import DynamicTable
from hstu.parallel.mesh import Mesh
from hstu.parallel.progress import Progress
from hstu.parallel.row_sparse import RowSparseSharder
from hstu.parallel.table_optimizer import TableOptimizer
from hstu.parallel.table_training import TableTraining

log = logging.getLogger(__name__)

# auto leaves out column_wise: rowwise_adagrad would have one moment a row *and shard*, for which it is refused by hand
# (hstu/config/rules.py).
_SHARDING_TYPES = {
    "auto": [ShardingType.TABLE_WISE.value, ShardingType.ROW_WISE.value],
    "row_wise": [ShardingType.ROW_WISE.value],
    "table_wise": [ShardingType.TABLE_WISE.value],
    "column_wise": [ShardingType.COLUMN_WISE.value],
}
_COLUMN_MULTIPLE = 4  # FBGEMM: every shard's width


def shard(model: GRModel, config: RunConfig, mesh: Mesh) -> tuple[GRModel, TableOptimizer]:
    """Replace the model's EmbeddingCollections, in place, by sharded ones with their initial rows.

    Collective. Returns the model and the optimizer of its tables.
    """
    args, device = config.optimizer, mesh.device.type
    training = table_training(model.specs, args)
    sharders = table_sharders(args, device, model.specs)
    check_kernels(model.specs, training, device)
    if len(model.embedding):
        memory = memory_plans(model.specs, args, mesh.world_size)
        for name, of_table in memory.items():
            log.info("dynamic table %s: %s", name, of_table.describe(device))
            training |= {part: training[name] for part in part_names(name, of_table)}
        model.embedding = in_parts(model.embedding, memory)
        plan = _plan(model, sharders, mesh, memory, config.trainer.pipeline_type == "prefetch")
        for _, name, table in _named_planned_tables(plan):
            if training[name].is_row_sparse(device):  # the planner refuses gradients that leave the lookup
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
    write_initial_rows(model, config.trainer.seed, mesh.progress)
    optimizer = TableOptimizer(sharded_collections(model), training, args)
    _open_dynamic_tables(model, optimizer, config.trainer.seed)
    return model, optimizer


def memory_plans(specs: Sequence[TableSpec], args: OptimizerArgs, world_size: int) -> dict[str, MemoryPlan]:
    """Where the rows of the dynamic tables of ``specs`` lie, by table."""
    return {
        spec.name: plan_memory(spec, TableTraining.of(spec, args).optimizer, world_size)
        for spec in specs
        if spec.dynamic is not None
    }


def check_kernels(specs: Sequence[TableSpec], training: Mapping[str, TableTraining], device_type: str) -> None:
    """Say which kernels that tables ask for this device does not have, and what runs instead.

    Raises ConfigError for a dense one on a GPU: TorchRec's planner knows none, on no device, and our own is the CPU's.
    """
    refused = []
    for spec in (spec for spec in specs if spec.compute_kernel is not None):
        asked = f"EmbeddingArgs.compute_kernel = {spec.compute_kernel!r} of table {spec.name!r}"
        row_sparse = training[spec.name].is_row_sparse(device_type)
        if device_type != "cpu" and spec.compute_kernel == "dense":
            refused.append(f"{asked}: only on a CPU, where FBGEMM has no Adam; use 'fused' on a GPU")
        elif device_type == "cpu" and spec.compute_kernel != ("dense" if row_sparse else "fused"):
            why = "FBGEMM has no Adam on a CPU" if spec.compute_kernel == "fused" else "a CPU has host memory only"
            instead = "dense, whose Adam is the same" if row_sparse else "fused"
            log.warning("%s is ignored: %s; it is %s", asked, why, instead)
    if refused:
        raise ConfigError(refused)


def table_training(specs: Sequence[TableSpec], args: OptimizerArgs) -> dict[str, TableTraining]:
    """How each sharded table is trained, by name."""
    return {spec.name: TableTraining.of(spec, args) for spec in specs if not spec.replicated}


def _attach_training(model: GRModel, training: Mapping[str, TableTraining], args: OptimizerArgs) -> None:
    """Tell TorchRec, which groups the tables of a collection into kernels by it.

    Where torch.distributed.optim's apply_optimizer_in_backward does; that one would run an optimizer, too.
    """
    for name, weight in model.embedding.named_parameters():
        table = name.removesuffix(".weight").rpartition(".")[2]  # <collection>.embeddings.<table>.weight
        weight._optimizer_kwargs = [training[table].fused_params(args)]  # type: ignore[attr-defined]


def table_sharders(
    args: OptimizerArgs, device_type: str, specs: Sequence[TableSpec]
) -> list[EmbeddingCollectionSharder]:
    """What turns the collections, static and dynamic, into sharded ones that are trained as ``args`` says."""
    own_kernels = any(training.needs_own_kernel(device_type) for training in table_training(specs, args).values())
    # FBGEMM's default looks up row 0 for an id outside the table and goes on
    common = {"bounds_check_mode": BoundsCheckMode.FATAL}
    sharder = RowSparseSharder(common) if own_kernels else EmbeddingCollectionSharder(common)
    return [sharder, DynamicSharder(specs, sharder, own_kernels)]


def sharded_collections(model: GRModel) -> list[ShardedEmbeddingCollection]:
    """The model's sharded collections, in order."""
    return [collection for collection in model.embedding if isinstance(collection, ShardedEmbeddingCollection)]


def sharded_weights(model: GRModel) -> dict[str, ShardedTensor]:
    """Live rows of the sharded tables, table → ShardedTensor [rows, stored_dim] over all ranks."""
    weights: dict[str, ShardedTensor] = {}
    for collection in sharded_collections(model):
        for key, weight in collection.state_dict().items():
            weights[key.removeprefix("embeddings.").removesuffix(".weight")] = weight
    return weights


def dynamic_tables(model: GRModel) -> dict[str, DynamicTable]:
    """The model's dynamic tables by name."""
    tables: dict[str, DynamicTable] = {}
    for collection in sharded_collections(model):
        if isinstance(collection, DynamicLookups):
            tables.update(collection.tables)
    return tables


def _open_dynamic_tables(model: GRModel, optimizer: TableOptimizer, seed: int) -> None:
    """Give the dynamic collections their tables, empty: they write into the live rows and optimizer states."""
    states = optimizer.state_tensors()
    weights = sharded_weights(model)
    for collection in sharded_collections(model):
        if isinstance(collection, DynamicLookups):
            cache_of, parts = caches(collection._lookups), dict[str, list[Part]]()
            for name in collection.embeddings:
                own_states = {state: _local(states[f"{name}.{state}"]) for state in optimizer.training[name].states}
                weight, cache = _local(weights[name]), cache_of.get(name)
                part = Part(weight, own_states) if cache is None else CachedPart(weight, own_states, cache)
                parts.setdefault(table_of(name), []).append(part)
            specs = {spec.name: spec for spec in collection.specs.values()}
            collection.tables = {
                name: DynamicTable(specs[name], seed, Rows(of_table, specs[name].dim))
                for name, of_table in parts.items()
            }


def _local(tensor: ShardedTensor) -> Tensor:
    """This rank's share of a tensor that is cut by rows."""
    local: Tensor = tensor.local_shards()[0].tensor
    return local


@torch.no_grad()
def write_initial_rows(model: GRModel, seed: int, progress: Progress) -> None:
    """Fill this rank's shards block by block; the rows do not depend on the number of ranks or the sharding.

    Those of dynamic tables stay zero: an id's are written when it gets a row.
    """
    specs = {spec.name: spec for spec in model.specs}
    for table, weight in sharded_weights(model).items():
        for local in weight.local_shards():
            (first_row, first_col), (rows, cols) = local.metadata.shard_offsets, local.metadata.shard_sizes
            local.tensor.zero_()  # columns beyond spec.dim stay zero
            if table not in specs or specs[table].dynamic is not None:  # a part of one that is split; a whole one
                continue
            for row, block in initial_row_blocks(specs[table], seed, first_row, first_row + rows):
                progress.alive()
                part = block[:, first_col : first_col + cols]
                local.tensor[row - first_row : row - first_row + len(part), : part.shape[1]].copy_(part)


def table_planner(
    specs: Sequence[TableSpec],
    world_size: int,
    local_world_size: int,
    device_type: str,
    memory: Mapping[str, MemoryPlan],
    prefetches: bool = False,
) -> EmbeddingShardingPlanner:
    """TorchRec's planner for the tables of ``specs`` that are not replicated. It needs no process group to plan.

    ``memory``: where the rows of dynamic tables lie, which matters on GPUs; their collections are ``in_parts``.
    ``prefetches``: a pipeline fills caches.
    """
    on_cpu = (EmbeddingComputeKernel.FUSED, None)
    constraints: dict[str, ParameterConstraints] = {}
    for spec in specs:
        for part, kernel in _kernels(spec, memory.get(spec.name), prefetches).items():
            constraints[part] = _constraints(spec, world_size, *(kernel if device_type == "cuda" else on_cpu))
    topology = Topology(world_size=world_size, local_world_size=local_world_size, compute_device=device_type)
    return EmbeddingShardingPlanner(topology=topology, constraints=constraints)


def _plan(
    model: GRModel,
    sharders: list[EmbeddingCollectionSharder],
    mesh: Mesh,
    memory: Mapping[str, MemoryPlan],
    prefetches: bool,
) -> ShardingPlan:
    planner = table_planner(model.specs, mesh.world_size, mesh.local_world_size, mesh.device.type, memory, prefetches)
    plan = planner.collective_plan(model, sharders, mesh.world_group)
    log.info("tables: %s", {name: table.sharding_type for _, name, table in _named_planned_tables(plan)})
    return plan


def _kernels(
    spec: TableSpec, memory: MemoryPlan | None, prefetches: bool
) -> dict[str, tuple[EmbeddingComputeKernel, CacheParams | None]]:
    """What a table's parts, mostly one, are called; on a GPU their kernels and caches."""
    if spec.replicated:
        return {}
    if memory is not None:
        cache = {EmbeddingComputeKernel.FUSED_UVM_CACHING: CacheParams(load_factor=memory.cached_share)}
        parts = zip(part_names(spec.name, memory), memory.kernels, strict=True)
        return {part: (kernel, cache.get(kernel)) for part, kernel in parts}
    kernel = EmbeddingComputeKernel(spec.compute_kernel or "fused")
    # without it FBGEMM forgets, in the step that runs meanwhile, where prefetched rows are
    needs_locks = kernel is EmbeddingComputeKernel.FUSED_UVM_CACHING and prefetches
    return {spec.name: (kernel, CacheParams(prefetch_pipeline=True) if needs_locks else None)}


def _constraints(
    spec: TableSpec, world_size: int, kernel: EmbeddingComputeKernel, cache: CacheParams | None
) -> ParameterConstraints:
    return ParameterConstraints(
        sharding_types=_sharding_types(spec, world_size),
        compute_kernels=[kernel.value],
        min_partition=_column_shard_width(spec.stored_dim, world_size),
        cache_params=cache,
    )


def _sharding_types(spec: TableSpec, world_size: int) -> list[str]:
    """What the planner may choose from.

    A table with too few rows for every rank to get some lies on one rank: fbgemm-gpu 1.8.0 cannot look up in a shard
    without rows on a CPU ("weights[0] must be a GPU or MTIA tensor").
    """
    if spec.dynamic is not None:
        return [ShardingType.ROW_WISE.value]
    rows_a_rank = -(-spec.rows // world_size)
    if rows_a_rank * (world_size - 1) < spec.rows or spec.sharding not in ("auto", "row_wise"):
        return _SHARDING_TYPES[spec.sharding]
    if spec.sharding == "row_wise":
        log.info("table %s: %d rows are too few to cut over %d ranks; table_wise", spec.name, spec.rows, world_size)
    return [ShardingType.TABLE_WISE.value]


def _column_shard_width(dim: int, world_size: int) -> int:
    """Width of equal column shards: as many as there are ranks, or fewer where the width does not divide so."""
    parts = next(n for n in range(world_size, 0, -1) if dim % (n * _COLUMN_MULTIPLE) == 0)
    return dim // parts


def _named_planned_tables(plan: ShardingPlan) -> Iterator[tuple[str, str, Any]]:
    for module, tables in plan.plan.items():
        for name, table in tables.items():
            yield module, name, table
