"""EmbeddingArgs.compute_kernel: what TorchRec's planner chooses, and what happens where a device lacks the kernel."""

import logging
from dataclasses import replace
from typing import Any

import pytest
import torch

from hstu.base.errors import ConfigError
from hstu.config.args import OptimizerArgs
from hstu.model.embedding import TableSpec
from hstu.parallel.tables import TableRanks, check_kernels
from tests.parallel.test_table_plan import plan_of

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
    args = OptimizerArgs(optimizer_str="sgd", learning_rate=0.1, sparse_weight_decay=0.1)
    check_kernels([spec(None)], args, "cpu")
    check_kernels([spec(None, "partial_rowwise_adam")], args, "cuda")
    with pytest.raises(ConfigError, match=r"'item' has a weight decay of 0\.1, but FBGEMM's adagrad on GPUs has none"):
        check_kernels([spec(None)], args, "cuda")
    with pytest.raises(ConfigError, match="of table 'item': it exists only on a CPU, where FBGEMM has no Adam"):
        messages("dense", "adam", "cuda", caplog)
    half, args = replace(spec(None), dtype=torch.bfloat16), replace(args, sparse_weight_decay=0.0)
    check_kernels([half], args, "cuda")
    for other in (replace(half, replicated=True), replace(half, compute_kernel="fused_uvm")):
        with pytest.raises(ConfigError, match="table 'item': FBGEMM has no bfloat16 rows"):
            check_kernels([other], args, "cuda")
