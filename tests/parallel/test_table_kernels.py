"""Kernels of tables that FBGEMM lacks, and canaries that fail when a library defect they work around is fixed."""

from functools import partial

import pytest
import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation, PoolingMode
from fbgemm_gpu.split_table_batched_embeddings_ops_training import ComputeDevice, SplitTableBatchedEmbeddingBagsCodegen
from torch import nn
from torchrec import EmbeddingCollection, EmbeddingConfig, KeyedJaggedTensor
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.planner import EmbeddingShardingPlanner, Topology
from torchrec.distributed.planner.types import ParameterConstraints
from torchrec.distributed.types import ShardingEnv

from hstu.config.args import OptimizerArgs
from hstu.parallel.mesh import Mesh
from hstu.parallel.table_kernels import BAGS, in_even_bags, sum_rows
from hstu.parallel.table_optimizer import TableOptimizer, TableTraining
from tests.distributed.launch import run_cases
from tests.helpers import Allocations
from tests.ops.test_row_update import sparse

LR, BETAS, EPS = 0.01, (0.9, 0.99), 1e-6
ADAM_TRAINING = {"table": TableTraining("adam", LR)}
ARGS = OptimizerArgs(optimizer_str="adam", learning_rate=LR, adam_beta1=BETAS[0], adam_beta2=BETAS[1], adam_eps=EPS)


def test_a_step_without_looked_up_rows_only_counts() -> None:
    weight = nn.Parameter(torch.ones(3, 2))
    optimizer = TableOptimizer([], ADAM_TRAINING, ARGS, {"table": weight})
    weight.grad = sparse(torch.tensor([], dtype=torch.int64), torch.ones(0, 2), (3, 2))
    optimizer.step()
    weight.grad = None
    optimizer.step()
    assert torch.equal(weight, torch.ones(3, 2))
    assert optimizer.steps == 2


@pytest.mark.parametrize("rows", [1_000, 1_000_000])
def test_the_cost_of_lookup_and_step_depends_on_the_rows_touched_not_on_the_table(rows: int) -> None:
    weight = nn.Parameter(torch.zeros(rows, 8))
    optimizer = TableOptimizer([], ADAM_TRAINING, ARGS, {"table": weight})
    ids = torch.arange(0, rows, rows // 100)
    with Allocations([weight, *optimizer.states["table"].values()]) as allocations:
        nn.functional.embedding(ids, weight, sparse=True).sum().backward()
        optimizer.step()
    assert allocations.largest == 100 * 8
    assert (weight.detach()[ids] != 0).all()


def test_even_bags_hold_the_ids_of_their_key_in_the_same_order() -> None:
    lengths = torch.tensor([[3, 9_000, 0], [0, 0, 0], [1, 1, 1]])
    features = KeyedJaggedTensor(["a", "b", "c"], torch.arange(int(lengths.sum())), lengths=lengths.flatten())
    for key, even in in_even_bags(features).to_dict().items():
        assert torch.equal(even.values(), features[key].values())
        assert len(even.lengths()) == BAGS
        assert even.lengths().max() - even.lengths().min() <= 1


@pytest.mark.parametrize("count", [0, 1, 200])
def test_the_sum_of_a_row_is_stored_at_its_first_occurrence(count: int) -> None:
    generator = torch.Generator().manual_seed(count)
    rows = torch.randint(0, 50, (count,), generator=generator)
    gradients = torch.randn((count, 4), generator=generator)
    found = sum_rows(gradients, rows)
    expected = torch.zeros((count, 4), dtype=torch.float64)
    for row in rows.unique().tolist():
        places = (rows == row).nonzero()[:, 0]
        expected[places[0]] = gradients[places].double().sum(0)
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-6)


def test_fbgemm_clips_the_contribution_of_each_lookup_not_the_row() -> None:
    """If this changes, gradient_clipping can replace FusedEmbedding."""
    table = SplitTableBatchedEmbeddingBagsCodegen(
        [(2, 4, EmbeddingLocation.HOST, ComputeDevice.CPU)],
        optimizer=EmbOptimType.EXACT_SGD,
        learning_rate=1.0,
        gradient_clipping=True,
        max_gradient=1.0,
        pooling_mode=PoolingMode.NONE,
    )
    (weight,) = table.split_embedding_weights()
    weight.zero_()
    gradients = torch.tensor([[0.75] * 4, [0.75] * 4, [3.0] * 4])
    table(torch.tensor([0, 0, 1]), torch.tensor([0, 1, 2, 3])).backward(gradients)
    assert weight[:, 0].tolist() == [-1.5, -1.0]


class DenseKernelSharder(EmbeddingCollectionSharder):
    def compute_kernels(self, sharding_type: str, compute_device_type: str) -> list[str]:
        return ["dense"]


def shard_and_look_up(mesh: Mesh, sharder: EmbeddingCollectionSharder, planned: str, executed: str) -> str:
    """What looking up in a table that is sharded so gives, or what it raises."""
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


SGD = EmbeddingCollectionSharder({"optimizer": EmbOptimType.EXACT_SGD, "learning_rate": 0.1})
ADAM = EmbeddingCollectionSharder({"optimizer": EmbOptimType.ADAM, "learning_rate": 0.1})
PROBES = {
    "fused SGD": partial(shard_and_look_up, sharder=SGD, planned="fused", executed="fused"),
    "fused Adam": partial(shard_and_look_up, sharder=ADAM, planned="fused", executed="fused"),
    "the dense kernel without pooling": partial(
        shard_and_look_up, sharder=EmbeddingCollectionSharder(), planned="fused", executed="dense"
    ),
    "planning the dense kernel": partial(
        shard_and_look_up, sharder=DenseKernelSharder(), planned="dense", executed="dense"
    ),
}


def test_torchrec_still_has_no_hierarchical_sharding_without_pooling() -> None:
    """If this changes, EmbeddingArgs.sharding may offer table_row_wise and grid."""
    assert not {"table_row_wise", "grid_shard"} & {*EmbeddingCollectionSharder().sharding_types("cuda")}


@pytest.fixture(scope="module")
def found() -> dict[str, str]:
    return {probe: run_cases(1, {probe: call})[0][probe] for probe, call in PROBES.items()}


def test_the_probe_itself_works(found: dict[str, str]) -> None:
    assert found["fused SGD"] == "rows (3, 4)"


@pytest.mark.parametrize(
    ("probe", "symptom"),
    [
        ("fused Adam", "not supported in CPU mode"),
        ("the dense kernel without pooling", "Error: "),
        ("planning the dense kernel", "Error: "),  # torchrec 1.6.1 plans it, and it pools; later planners refuse it
    ],
)
def test_defect_is_still_there(found: dict[str, str], probe: str, symptom: str) -> None:
    result = found[probe]
    assert symptom in result, f"{probe} now gives {result!r}: hstu/parallel/table_kernels.py may be simplified"
