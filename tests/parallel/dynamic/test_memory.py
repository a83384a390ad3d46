"""Which memory a dynamic table gets, and how slots of a split table find their rows."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torchrec import KeyedJaggedTensor
from torchrec.distributed.embedding_types import EmbeddingComputeKernel

from hstu.base.errors import ConfigError
from hstu.config.args import DynamicEmbeddingArgs, NetworkArgs
from hstu.data.features.roles import FeatureRoles
from hstu.model.embedding import TableSpec, build_collections, table_specs
from hstu.parallel.dynamic.memory import MemoryPlan, SplitLookup, plan_memory, split_tables
from hstu.parallel.table_optimizer import TableTraining
from hstu.parallel.tables import TableRanks
from tests.parallel.test_table_plan import plan_of

CAPACITY, DIM = 1000, 30
ROW = 32 * 4 * 3
"""Bytes of a row of 30 numbers, which is stored as 32, with the two moments of Adam."""


def spec_of(**options: Any) -> TableSpec:
    args = DynamicEmbeddingArgs(
        feature_names=["item"], table_name="item", item_vocab_size_or_capacity=CAPACITY, **options
    )
    network = NetworkArgs(num_layers=1, hidden_size=DIM, num_attention_heads=1, kv_channels=4)
    return table_specs([args], network, FeatureRoles("item", None, ()), world_size=4)[0]


def plan(**options: Any) -> MemoryPlan:
    return plan_memory(spec_of(**options), TableTraining("adam", 0.1), ranks=4)


@pytest.mark.parametrize(
    ("optimizer", "expected"), [("sgd", 128), ("adagrad", 256), ("rowwise_adagrad", 132), ("adam", 384)]
)
def test_a_row_counts_with_the_states_of_its_optimizer(optimizer: str, expected: int) -> None:
    assert TableTraining(optimizer, 0.1).bytes_per_row(32) == expected


def test_bytes_come_before_rows_and_rows_before_their_share() -> None:
    everything = {"global_hbm_for_values": 7 * ROW + 5, "item_vocab_gpu_capacity": 20.0}
    ratio = {"item_vocab_gpu_capacity_ratio": 0.5}
    assert (plan(**everything, **ratio).gpu_rows, plan(**everything, **ratio).given_by) == (7, "global_hbm_for_values")
    assert plan(item_vocab_gpu_capacity=20.0, **ratio).gpu_rows == 20
    assert plan(**ratio).gpu_rows == 500
    assert plan().gpu_rows == CAPACITY and plan(item_vocab_gpu_capacity_ratio=1.0).gpu_rows == CAPACITY
    for nothing in ("global_hbm_for_values", "item_vocab_gpu_capacity", "item_vocab_gpu_capacity_ratio"):
        assert plan(**{nothing: 0}).gpu_rows == 0
        assert plan(**{nothing: 0}, caching=True).kernels == (EmbeddingComputeKernel.FUSED_UVM,)


def test_rows_beyond_the_budget_are_in_host_memory_behind_a_cache_if_one_is_asked_for() -> None:
    device, host, cache = (
        getattr(EmbeddingComputeKernel, name) for name in ("FUSED", "FUSED_UVM", "FUSED_UVM_CACHING")
    )
    assert plan().kernels == (device,)
    split = plan(item_vocab_gpu_capacity=999.0)
    assert split.kernels == (device, host) and split.split_at == 249
    cached = plan(item_vocab_gpu_capacity=250.0, caching=True)
    assert cached.kernels == (cache,) and (cached.gpu_rows / cached.rows, cached.split_at) == (0.25, None)
    for nothing in (plan(global_hbm_for_values=0, caching=True), plan(item_vocab_gpu_capacity=3.0)):
        assert nothing.kernels == (host,) and nothing.split_at is None


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, {"item": ("fused", 251)}),
        ({"item_vocab_gpu_capacity": 10.0}, {"item": ("fused", 2), "item/host": ("fused_uvm", 249)}),
        ({"item_vocab_gpu_capacity": 10.0, "caching": True}, {"item": ("fused_uvm_caching", 251)}),
    ],
)
def test_the_planner_of_gpus_follows_and_cuts_by_rows(options: dict[str, Any], expected: dict[str, Any]) -> None:
    specs, memory = (spec_of(**options),), {"item": plan(**options)}
    tables = plan_of(specs, memory, TableRanks(4, 4, "cuda")).plan["embedding.0"]
    assert tables.keys() == expected.keys()
    for name, (kernel, rows) in expected.items():
        assert (tables[name].compute_kernel, tables[name].sharding_type) == (kernel, "row_wise")
        assert [shard.shard_sizes for shard in tables[name].sharding_spec.shards] == [[rows, 32]] * 4
        assert (tables[name].cache_params is not None) == (kernel == "fused_uvm_caching")


def test_a_name_that_a_second_physical_table_could_have_is_refused() -> None:
    specs = (replace(spec_of(item_vocab_gpu_capacity=10.0), name="a/host"),)
    with pytest.raises(ConfigError, match="may not end in '/host': a/host"):
        split_tables(build_collections(specs), {"a/host": plan(item_vocab_gpu_capacity=10.0)})


FEATURES = ["user", "item", "negatives"]
FIRST = {"item": 3, "negatives": 3}
"""Slots in the first physical table of items; the user table is not split."""
LOOKED_UP = ["item", "negatives", "user", "item/host", "negatives/host"]


def features(most: int) -> KeyedJaggedTensor:
    """Three bags per feature, of slots below ``most``."""
    lengths = torch.tensor([2, 0, 3, 1, 1, 0, 0, 4, 2], dtype=torch.int32)
    slots = torch.randint(most, (13,), generator=torch.Generator().manual_seed(most))
    return KeyedJaggedTensor(keys=FEATURES, values=slots, lengths=lengths, stride=3)


@pytest.mark.parametrize("most", [8, 3, 1], ids=["both tables", "first table", "one row"])
def test_each_slot_finds_its_row_and_bags_stay_together(most: int) -> None:
    whole, tables = features(most), {"user": torch.arange(8.0), "item": 10 + torch.arange(8.0)}
    lookup, positions = SplitLookup(FEATURES, LOOKED_UP, FIRST, torch.device("cpu"))(whole)
    assert lookup.keys() == LOOKED_UP
    rows_of = {"item": tables["item"][:3], "item/host": tables["item"][3:], "user": tables["user"]}
    rows_of |= {"negatives": rows_of["item"], "negatives/host": rows_of["item/host"]}
    found = torch.cat([rows_of[key][lookup[key].values()] for key in LOOKED_UP])[positions]
    expected = [
        tables[key][whole[feature].values()] for feature, key in zip(FEATURES, ("user", "item", "item"), strict=True)
    ]
    assert torch.equal(found, torch.cat(expected))
    for key in ("item", "negatives"):
        assert torch.equal(lookup[key].lengths() + lookup[f"{key}/host"].lengths(), whole[key].lengths())
        in_host = [int((bag >= 3).sum()) for bag in whole[key].to_dense()]
        assert lookup[f"{key}/host"].lengths().tolist() == in_host
    assert torch.equal(lookup["user"].lengths(), whole["user"].lengths())
