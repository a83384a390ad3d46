"""Whether tables and their optimizer states fit the memory that ranks have, and what is said where they do not.

EmbeddingArgs.compute_kernel: what TorchRec's planner chooses, and what happens where a device lacks the kernel.
"""

import logging
from types import SimpleNamespace
from typing import Any, cast

import psutil
import pytest
import torch
from torch import nn
from torchrec.distributed.planner.shard_estimators import EmbeddingPerfEstimator
from torchrec.distributed.types import ShardingPlan

from hstu.base.errors import ConfigError
from hstu.config.args import OptimizerArgs, PrecisionArgs
from hstu.model.embedding import TableSpec, build_collections
from hstu.parallel import tables
from hstu.parallel.dynamic.memory import MemoryPlan
from hstu.parallel.mesh import Mesh
from hstu.parallel.table_optimizer import TableTraining
from hstu.parallel.tables import (
    TableRanks,
    TableRoom,
    TablesDoNotFit,
    check_kernels,
    describe_plan,
    least_room,
    plan_sharding,
    prepare_tables,
    room_of_rank,
)
from tests.distributed.launch import Launch, run_cases
from tests.distributed.toy import build, make_config
from tests.helpers import error_of

GB = 10**9
A40, A80 = TableRoom(40 * GB, 100 * GB), TableRoom(80 * GB, 100 * GB)
"""What is left for tables on GPUs of 40 and 80 GB."""


def plan_of(
    specs: tuple[TableSpec, ...], memory: dict[str, MemoryPlan], ranks: TableRanks, pipeline: str = "native"
) -> ShardingPlan:
    """The plan of tables whose own options say how they are trained."""
    model = nn.Module()
    model.embedding = build_collections(specs)
    config: Any = SimpleNamespace(
        optimizer=OptimizerArgs(optimizer_str="adagrad", learning_rate=0.1),
        precision=PrecisionArgs(),
        trainer=SimpleNamespace(pipeline_type=pipeline),
        embeddings=(),
    )
    prepare_tables(model, specs, config.optimizer, memory)
    return plan_sharding(model, specs, memory, config, ranks)


def plan(rows: int, optimizer: str, room: TableRoom, kernel: str | None = None, ranks: int = 1) -> ShardingPlan:
    spec = TableSpec("item", rows, 256, ("item",), False, "auto", 0.02, optimizer=optimizer, compute_kernel=kernel)
    return plan_of((spec,), {}, TableRanks(ranks, ranks, "cuda", room))


def fits(rows: int, optimizer: str, room: TableRoom, kernel: str | None = None, ranks: int = 1) -> bool:
    try:
        return bool(plan(rows, optimizer, room, kernel, ranks))
    except TablesDoNotFit:
        return False


def plan_over(ranks: int, sharding: str) -> ShardingPlan:
    """The plan of five tables of which the last is a quarter as wide."""
    specs = (
        TableSpec(f"t{each}", 10**6 + each, 256 >> each // 4 * 2, (f"f{each}",), False, sharding, 0.02)
        for each in range(5)
    )
    return plan_of(tuple(specs), {}, TableRanks(ranks, 8, "cuda", A80))


@pytest.mark.parametrize("sharding", ["row_wise", "table_wise", "column_wise", "auto"])
def test_shards_of_one_size_are_estimated_once(sharding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    planned = plan_over(64, sharding)
    monkeypatch.setattr(tables._EstimateOfSizes, "estimate", EmbeddingPerfEstimator.estimate)
    assert planned.plan == plan_over(64, sharding).plan, "as TorchRec plans"


def test_a_plan_is_sent_in_few_bytes() -> None:
    size = len(tables.pack_plan(plan_over(512, "row_wise")))
    assert size < 6000, f"{size}; pickled: 197 kB"


@pytest.mark.parametrize(("optimizer", "states"), [("sgd", 0), ("rowwise_adagrad", 1), ("adagrad", 256), ("adam", 512)])
def test_states_of_the_optimizer_need_memory_too(optimizer: str, states: int) -> None:
    rows, slack = 20_000_000, 2_000_000  # for the ids and rows of a batch, which the planner adds
    needed = 4 * rows * (256 + states)
    assert not fits(rows, optimizer, TableRoom(needed - slack, 100 * GB))
    assert fits(rows, optimizer, TableRoom(needed + slack, 100 * GB))
    assert fits(32_038_725, optimizer, A80) == (optimizer != "adam"), "33 GB of rows, a GPU of 80 GB"


def test_what_does_not_fit_is_told_with_its_size_and_what_to_do() -> None:
    room = TableRoom(33_100_000_000, 100 * GB, beside_tables=5_000_000_000)
    with pytest.raises(TablesDoNotFit) as error:
        plan(20_000_000, "adam", room)
    assert str(error.value).startswith(
        "the model_parallel tables do not fit on 1 rank: item needs 61.44 GB, optimizer states included. A rank has "
        "33.10 GB of GPU memory beside the 5.00 GB of a training step and 100.00 GB of host memory for them."
    )
    assert fits(20_000_000, "adam", A80) and not fits(20_000_000, "adam", A40)
    assert fits(20_000_000, "adam", A40, ranks=2)


def test_rows_in_host_memory_need_none_of_the_gpu_but_must_fit_the_host() -> None:
    small = TableRoom(1 * GB, 61 * GB)
    assert fits(19_000_000, "adam", small, kernel="fused_uvm")
    assert not fits(20_000_000, "adam", small, kernel="fused_uvm")
    assert not fits(10_000_000, "sgd", TableRoom(1 * GB, 50 * GB), kernel="fused_uvm_caching")
    assert fits(10_000_000, "sgd", TableRoom(3 * GB, 50 * GB), kernel="fused_uvm_caching"), "a cache of 20 %"


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_row_wise_table_with_fewer_rows_than_ranks_is_whole_on_cpus_only(
    device: str, caplog: pytest.LogCaptureFixture
) -> None:
    spec = TableSpec("item", 5, 8, ("item",), False, "row_wise", 0.02, optimizer="adagrad")
    plan = plan_of((spec,), {}, TableRanks(4, 4, device))
    (tables,) = plan.plan.values()
    text = describe_plan(cast(Any, tables), {"item": TableTraining("adagrad", 0.1)})
    is_cpu = device == "cpu"
    assert text.splitlines()[1].split() == [
        *("item", "5", "8", "table_wise" if is_cpu else "row_wise", "1" if is_cpu else "3", "fused", "adagrad"),
        *("0.00", "MB") * 3,
    ]
    assert ("table_wise instead of row_wise: with 2 rows per rank" in caplog.text) == is_cpu


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU of 80 GB, of which others use 2; torch has reserved 4 and filled 3 of them."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (74 * GB, 80 * GB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 4 * GB)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 3 * GB)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=152 * GB))
    monkeypatch.setattr(psutil, "swap_memory", lambda: SimpleNamespace(total=8 * GB))


@pytest.mark.usefixtures("gpu")
def test_a_rank_has_its_gpu_and_its_part_of_the_host() -> None:
    device = torch.device("cuda", 0)
    assert room_of_rank(device, 8, lambda: 20 * GB) == TableRoom(int(0.95 * 78 * GB) - 20 * GB, 20 * GB, 20 * GB)
    loaded = room_of_rank(device, 1, int)
    assert loaded == TableRoom(int(0.95 * 78 * GB) - 3 * GB, 160 * GB, 3 * GB), "what is there already counts"
    assert room_of_rank(device, 1, lambda: 200 * GB).gpu == 0
    assert room_of_rank(torch.device("cpu"), 4, lambda: 200 * GB) == TableRoom(0, 40 * GB), "nothing is estimated"


def least_of_two(mesh: Mesh) -> TableRoom:
    return least_room(TableRoom(10 + mesh.rank, 20 - mesh.rank, 30 + mesh.rank), mesh.world_group)


def refusal(mesh: Mesh) -> str:
    tables.room_of_rank = lambda *_: TableRoom(0, 100 if mesh.rank else 10**9)
    config = make_config()
    return error_of(lambda: build(config, mesh), TablesDoNotFit)


def test_the_rank_with_the_least_memory_decides_and_all_ranks_raise_alike() -> None:
    first, second = run_cases(Launch(2), {"room": least_of_two, "refusal": refusal})
    assert first == second
    assert first["room"] == TableRoom(10, 19, 31)
    where = "EmbeddingArgs.item_vocab_size_or_capacity = 41"
    assert first["refusal"].startswith(f"{where}: the model_parallel tables do not fit on 2 ranks: item_table needs")
    assert "A rank has 0.00 GB of host memory for them." in first["refusal"]


KERNELS = ("dense", "fused", "fused_uvm", "fused_uvm_caching")


def spec(kernel: str | None, optimizer: str = "adagrad") -> TableSpec:
    return TableSpec("item", 1000, 8, ("item",), False, "row_wise", 0.02, optimizer=optimizer, compute_kernel=kernel)


def planned(kernel: str | None, device_type: str, pipeline: str = "native") -> Any:
    plan = plan_of((spec(kernel),), {}, TableRanks(2, 2, device_type), pipeline)
    (table,) = [table for tables in plan.plan.values() for table in tables.values()]
    return table


@pytest.mark.parametrize("kernel", [None, *KERNELS[1:]])
def test_the_planner_uses_the_kernel_on_a_gpu_and_fused_on_a_cpu(kernel: str | None) -> None:
    assert planned(kernel, "cuda").compute_kernel == (kernel or "fused")
    assert planned(kernel, "cpu").compute_kernel == "fused"


def test_a_cache_that_a_pipeline_fills_keeps_the_rows_of_the_step_that_runs_meanwhile() -> None:
    assert planned("fused_uvm_caching", "cuda", pipeline="prefetch").cache_params.prefetch_pipeline is True
    assert planned("fused_uvm_caching", "cuda").cache_params is None
    assert planned("fused_uvm", "cuda", pipeline="prefetch").cache_params is None


def messages(kernel: str, optimizer: str, device_type: str, caplog: pytest.LogCaptureFixture) -> list[str]:
    specs = [spec(kernel, optimizer)]
    with caplog.at_level(logging.WARNING, logger="hstu.parallel.tables"):
        check_kernels(specs, OptimizerArgs(optimizer_str="sgd", learning_rate=0.1), device_type)
    return [record.getMessage() for record in caplog.records]


@pytest.mark.parametrize(
    ("kernel", "optimizer", "device_type", "instead"),
    [
        ("fused", "adam", "cpu", "dense"),
        ("fused_uvm", "adamw", "cpu", "dense"),
        ("fused_uvm_caching", "rowwise_adagrad", "cpu", "fused"),
        ("dense", "adam", "cpu", None),
        ("fused", "sgd", "cpu", None),
        *((kernel, "adam", "cuda", None) for kernel in KERNELS[1:]),
    ],
)
def test_a_kernel_that_a_device_lacks_is_logged_with_its_replacement(
    kernel: str, optimizer: str, device_type: str, instead: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    found = messages(kernel, optimizer, device_type, caplog)
    assert len(found) == (instead is not None)
    assert all(f"'{kernel}' of table 'item' is ignored on a CPU: {instead} is used" in message for message in found)


def test_what_fbgemm_lacks_is_refused_on_a_gpu(caplog: pytest.LogCaptureFixture) -> None:
    args = OptimizerArgs(optimizer_str="sgd", learning_rate=0.1)
    check_kernels([spec(None, "partial_rowwise_adam")], args, "cuda")
    with pytest.raises(ConfigError, match="of table 'item': it exists only on a CPU, where FBGEMM has no Adam"):
        messages("dense", "adam", "cuda", caplog)
