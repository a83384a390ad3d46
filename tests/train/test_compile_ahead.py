"""The kernels that the steps of a run launch do not depend on the batch, and those that are compiled ahead of it."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from compile_ahead import jobs_of_run

from hstu.data.sampling.sampler import SamplerPosition
from hstu.data.store.sequence_store import SequenceStore
from tests.ops.backends import INTERPRETED
from tests.train.tiny import tables_with_dynamic, tiny_config

if INTERPRETED:
    pytest.skip("interpreted kernels are not compiled", allow_module_level=True)
pytest.importorskip("triton", reason="NEEDS TRITON: pip install -e '.[cpu,dev]'")

from hstu.model.embedding import table_specs
from hstu.model.stack import kernel_shapes
from hstu.ops.kernels import Backend
from hstu.ops.select import resolve_kernels
from hstu.ops.triton.compile_ahead import specialized_kernel
from hstu.ops.triton.launch import recorded_launches
from hstu.train.builder import task_module
from hstu.train.sources import open_source

Config = Callable[..., Any]


@pytest.fixture
def config(store: SequenceStore, tmp_path: Path) -> Config:
    """A tiny run by Triton kernels."""

    def of(task: str, **options: Any) -> Any:
        network = {"kernel_backend": "triton", "hidden_dropout": 0.2, **options.pop("network", {})}
        return tiny_config(task, store, tmp_path, network=network, **options)

    return of


def kernels_of_step(config: Any, sequences: int) -> set[str]:
    """The kernels of the dense part: forward and backward in training, forward in evaluation."""
    source = open_source(replace(config, trainer=replace(config.trainer, train_batch_size=sequences)))
    batch = next(iter(source.train_batches(SamplerPosition())))
    specs = table_specs(source.tables, config.network, source.roles, config.looks_up_negatives, 1)
    widths = {feature: spec.dim for spec in specs for feature in spec.features}
    lengths = dict(zip(batch.features.keys(), batch.features.length_per_key(), strict=True))
    kernels = resolve_kernels(Backend.TRITON, kernel_shapes(config.network))
    with recorded_launches((9, 0)) as launches:
        task = task_module(config, source.roles, kernels, log_counts=source.log_counts())
        for is_training in (True, False):
            rows = {name: torch.zeros(lengths[name], widths[name], requires_grad=is_training) for name in lengths}
            with torch.set_grad_enabled(is_training):
                loss = task.train(is_training)(rows, batch).loss_sum
            if is_training:
                loss.backward()
    return {specialized_kernel(launch, launch.configs[0], 90) for launch in launches}


@pytest.mark.parametrize(
    ("task", "options"),
    [
        ("ranking", {"network": {"dtype_str": "bfloat16"}, "dataset": {"max_num_candidates": 2}}),
        ("retrieval", {"task_args": {"negatives": "uniform", "num_negatives": 7, "mask_seen": True}}),
        ("retrieval", {"task_args": {"negatives": "in_batch"}}),
        ("retrieval", {"task_args": {"negatives": "mixed", "num_negatives": 7}, "network": {"item_embedding_dim": 8}}),
    ],
)
def test_the_kernels_of_a_step_do_not_depend_on_its_batch(config: Config, task: str, options: dict[str, Any]) -> None:
    few, *more = (kernels_of_step(config(task, **options), number) for number in (2, 3, 5, 6))
    for other in more:
        assert {kernel.partition(" ")[0] for kernel in few ^ other} == set()
    names = {kernel.partition(" ")[0] for kernel in few}
    assert {"attention_forward", "attention_backward_keys", "linear_silu", "permute_rows"} <= names


def test_a_run_compiles_what_its_backends_check(config: Config, store: SequenceStore) -> None:
    pytest.importorskip("cutlass", reason="nvidia-cutlass-dsl is not installed")
    network = {"kv_channels": 32, "dtype_str": "bfloat16"}
    plain = [job.name for job in jobs_of_run(config("ranking", network=network), 90)]
    assert any(name.startswith("attention_forward") for name in plain) and "insert_slots" not in str(plain)
    options = {"network": network | {"kernel_backend": "cutlass"}, "tables": tables_with_dynamic(store, rows=9)}
    names = [job.name for job in jobs_of_run(config("ranking", **options), 90)]
    assert {"forward_sm90 (32 channels)", "keys_sm90 (32 channels)", "queries_sm90 (32 channels)"} <= {*names}
    assert "insert_slots" in str(names) and {*plain} <= {*names}
    assert jobs_of_run(config("ranking", network={"kernel_backend": "pytorch"}), 90) == []
