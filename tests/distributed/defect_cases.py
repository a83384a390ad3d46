"""Library defects that hstu.parallel.row_sparse works around, tried in a world of one; see test_defects.py."""

from __future__ import annotations

import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from torch import nn
from torchrec import EmbeddingCollection, EmbeddingConfig, KeyedJaggedTensor
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.planner import EmbeddingShardingPlanner, Topology
from torchrec.distributed.planner.types import ParameterConstraints
from torchrec.distributed.types import ShardingEnv

from hstu.parallel import mesh as mesh_module


class DenseKernelSharder(EmbeddingCollectionSharder):
    def compute_kernels(self, sharding_type: str, compute_device_type: str) -> list[str]:
        return ["dense"]


def _shard_and_look_up(sharder: EmbeddingCollectionSharder, planned: str, executed: str) -> str:
    mesh = mesh_module.start(timeout_s=60)
    table = EmbeddingConfig(name="t", num_embeddings=10, embedding_dim=4, feature_names=["f"])
    model = nn.ModuleDict({"tables": EmbeddingCollection(tables=[table], device=torch.device("meta"))})
    try:
        planner = EmbeddingShardingPlanner(
            topology=Topology(world_size=1, compute_device="cpu"),
            constraints={"t": ParameterConstraints(sharding_types=["row_wise"], compute_kernels=[planned])},
        )
        plan = planner.collective_plan(model, [sharder], mesh.world_group)
        for tables in plan.plan.values():
            for parameter in tables.values():
                parameter.compute_kernel = executed
        DistributedModelParallel(
            model,
            ShardingEnv.from_process_group(mesh.world_group),
            mesh.device,
            plan,
            [sharder],
            init_data_parallel=False,
            init_parameters=False,
        )
        features = KeyedJaggedTensor(["f"], torch.tensor([1, 2, 3]), lengths=torch.tensor([2, 1]))
        rows = model["tables"](features)["f"].values()
        return f"rows {tuple(rows.shape)}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    finally:
        mesh_module.finish()


def fused_adam_on_the_cpu() -> str:
    return _shard_and_look_up(
        EmbeddingCollectionSharder({"optimizer": EmbOptimType.ADAM, "learning_rate": 0.1}), "fused", "fused"
    )


def dense_kernel_without_pooling_on_the_cpu() -> str:
    return _shard_and_look_up(EmbeddingCollectionSharder(), "fused", "dense")


def planning_the_dense_kernel() -> str:
    return _shard_and_look_up(DenseKernelSharder(), "dense", "dense")


def fused_sgd_on_the_cpu() -> str:
    return _shard_and_look_up(
        EmbeddingCollectionSharder({"optimizer": EmbOptimType.EXACT_SGD, "learning_rate": 0.1}), "fused", "fused"
    )
