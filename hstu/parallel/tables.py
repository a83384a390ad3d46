"""Tables with sharding strategy model_parallel: planned, sharded over all ranks and initialised with TorchRec."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import cast

import torch
from fbgemm_gpu.split_table_batched_embeddings_ops_common import BoundsCheckMode
from torch import nn
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torchrec.distributed.embedding import EmbeddingCollectionSharder, ShardedEmbeddingCollection
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.types import ShardingEnv, ShardingPlan
from torchrec.distributed.utils import emb_opt_type_to_optimizer_class

from hstu.base.errors import ConfigError
from hstu.config.args import OptimizerArgs
from hstu.config.run_config import RunConfig
from hstu.model.embedding import TableSpec, initial_row_blocks
from hstu.model.gr_model import GRModel
from hstu.ops.costs import FLOAT32
from hstu.ops.pytorch.operators import REFERENCE_KERNELS
from hstu.ops.row_update import UpdateRows
from hstu.parallel.collectives import gather_objects, on_all_ranks
from hstu.parallel.dynamic.collection import DynamicSharder, RowSparseDynamicCollection, ShardedDynamicCollection
from hstu.parallel.dynamic.memory import MemoryPlan, physical_names, plan_memory, split_tables
from hstu.parallel.dynamic.table import DynamicTable
from hstu.parallel.mesh import Heartbeat, Mesh
from hstu.parallel.table_kernels import CollectionSharder, RowSparseEmbeddingCollection
from hstu.parallel.table_optimizer import TableOptimizer, TableTraining
from hstu.parallel.table_plan import (
    TableRanks,
    TablesDoNotFit,
    gigabytes,
    host_memory,
    least_room,
    plan_shards,
    room_of_rank,
)

log = logging.getLogger(__name__)


def shard(
    model: GRModel,
    config: RunConfig,
    mesh: Mesh,
    update_rows: UpdateRows = REFERENCE_KERNELS.update_rows,
    beside_tables: Callable[[], int] = int,
) -> tuple[GRModel, TableOptimizer]:
    """Shard the model's EmbeddingCollections in place and write their initial rows. Collective.

    beside_tables: returns the bytes of GPU memory that a rank needs beside the sharded tables.

    Returns the model and the optimizer of its tables. Raises TablesDoNotFit on all ranks.
    """
    args, device = config.optimizer, mesh.device.type
    training = {spec.name: TableTraining.of(spec, args) for spec in model.specs}
    sharders = table_sharders(args, device, model.specs)
    check_kernels(model.specs, args, device)
    if len(model.embedding):
        memory = memory_plans(model.specs, args, mesh.world_size)
        for name, table_memory in memory.items():
            log.info("dynamic table %s: %s", name, table_memory.describe(device))
        training |= prepare_tables(model, model.specs, args, memory)
        room = least_room(room_of_rank(mesh.device, mesh.local_world_size, beside_tables), mesh.world_group)
        ranks = TableRanks(mesh.world_size, mesh.local_world_size, device, room)
        own = on_all_ranks(
            lambda: plan_sharding(model, model.specs, training, memory, config, ranks) if mesh.is_main else None,
            mesh.world_group,
        )
        plan = gather_objects(own, mesh.world_group)[0]
        planned = {name: table for tables in plan.plan.values() for name, table in tables.items()}
        log.info("tables: %s", {name: table.sharding_type for name, table in planned.items()})
        for name, table in planned.items():
            if training[name].is_row_sparse(device):  # the planner refuses the dense kernel
                table.compute_kernel = EmbeddingComputeKernel.DENSE.value
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


def plan_sharding(
    model: nn.Module,
    specs: Sequence[TableSpec],
    training: Mapping[str, TableTraining],
    memory: Mapping[str, MemoryPlan],
    config: RunConfig,
    ranks: TableRanks,
) -> ShardingPlan:
    """The plan of a run for the tables of ``model`` (see ``prepare_tables``). Raises TablesDoNotFit."""
    sharders = table_sharders(config.optimizer, ranks.device_type, specs)
    prefetches = config.trainer.pipeline_type == "prefetch"
    try:
        return plan_shards(model, specs, training, memory, sharders, ranks, prefetches)
    except TablesDoNotFit as error:
        raise _at_the_largest([spec for spec in specs if not spec.replicated], config, str(error)) from error


def check_memory(specs: Sequence[TableSpec], config: RunConfig, ranks_here: int, world_size: int) -> None:
    """Raise TablesDoNotFit if the rows alone need more memory than this host and its GPUs have."""
    needed = sum(
        FLOAT32 * spec.rows * spec.dim * (ranks_here if spec.replicated else ranks_here / world_size) for spec in specs
    )
    has = host_memory()
    has += sum(torch.cuda.get_device_properties(index).total_memory for index in range(torch.cuda.device_count()))
    if needed > has:
        text = (
            f"the rows of the tables need {gigabytes(needed)} on this host, which has {gigabytes(has)} of memory; "
            "make the tables smaller, or shard them over more hosts (model_parallel)"
        )
        raise _at_the_largest(specs, config, text)


def _at_the_largest(specs: Sequence[TableSpec], config: RunConfig, text: str) -> TablesDoNotFit:
    largest = max(specs, key=lambda spec: spec.rows * spec.dim).name
    for table in config.embeddings:
        if table.table_name == largest:
            return TablesDoNotFit(config.located(table, "item_vocab_size_or_capacity", text))
    return TablesDoNotFit(text)  # a predefined table


def memory_plans(specs: Sequence[TableSpec], args: OptimizerArgs, world_size: int) -> dict[str, MemoryPlan]:
    """The memory plan of each dynamic table, by name."""
    return {
        spec.name: plan_memory(spec, TableTraining.of(spec, args).optimizer, world_size)
        for spec in specs
        if spec.dynamic is not None
    }


def prepare_tables(
    model: nn.Module, specs: Sequence[TableSpec], args: OptimizerArgs, memory: Mapping[str, MemoryPlan]
) -> dict[str, TableTraining]:
    """Split the dynamic tables of ``model.embedding`` in place, and attach its training to each physical table.

    Returns the training of the physical tables, and of ``specs``, by name.
    """
    training = {spec.name: TableTraining.of(spec, args) for spec in specs}
    for name, table_memory in memory.items():
        training |= {physical: training[name] for physical in physical_names(name, table_memory)}
    model.embedding = split_tables(cast(nn.ModuleList, model.embedding), memory)
    # By the optimizers, the planner counts the states. By the parameters, TorchRec groups the tables of a collection
    # into kernels. apply_optimizer_in_backward puts them there, too, but would also run an optimizer of its own.
    for name, weight in model.embedding.named_parameters():
        table = name.removesuffix(".weight").rpartition(".")[2]  # <collection>.embeddings.<table>.weight
        params = training[table].fused_params(args)
        weight._optimizer_kwargs = [params]  # type: ignore[attr-defined]
        weight._optimizer_classes = [emb_opt_type_to_optimizer_class(params["optimizer"])]  # type: ignore[attr-defined]
    return training


def check_kernels(specs: Sequence[TableSpec], args: OptimizerArgs, device_type: str) -> None:
    """Log which kernel runs in place of an EmbeddingArgs.compute_kernel that a CPU lacks.

    Raises ConfigError for a dense kernel on a GPU, which TorchRec's planner does not support.
    """
    for spec in specs:
        option = f"EmbeddingArgs.compute_kernel = {spec.compute_kernel!r} of table {spec.name!r}"
        used = "dense" if TableTraining.of(spec, args).is_row_sparse(device_type) else "fused"
        if device_type == "cpu" and spec.compute_kernel not in (None, used):
            log.warning("%s is ignored on a CPU: %s is used, which trains the same", option, used)
        elif device_type != "cpu" and spec.compute_kernel == "dense":
            raise ConfigError(f"{option}: it exists only on a CPU, where FBGEMM has no Adam; use 'fused' on a GPU")


def table_sharders(
    args: OptimizerArgs, device_type: str, specs: Sequence[TableSpec]
) -> list[EmbeddingCollectionSharder]:
    """The sharders of static and dynamic collections whose tables are trained as ``args`` says."""
    static: type[ShardedEmbeddingCollection] = ShardedEmbeddingCollection
    dynamic: type[ShardedDynamicCollection] = ShardedDynamicCollection
    training = [TableTraining.of(spec, args) for spec in specs if not spec.replicated]
    if any(each.is_row_sparse(device_type) or each.max_gradient is not None for each in training):
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
