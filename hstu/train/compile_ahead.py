"""The kernels that a run launches, to compile them ahead of it (scripts/bench/compile_ahead.py). No GPU is needed."""

import importlib
from dataclasses import replace

import torch

from hstu.config.args import BenchmarkDatasetArgs, DynamicEmbeddingArgs
from hstu.config.run_config import RunConfig
from hstu.data.batches.batch import HSTUBatch
from hstu.data.sampling.sampler import SamplerPosition
from hstu.model.embedding import table_specs
from hstu.model.stack import kernel_shapes
from hstu.ops.compile_ahead import Job
from hstu.ops.kernels import OPERATORS, Backend
from hstu.ops.select import FALLBACKS, resolve_kernels
from hstu.ops.triton.compile_ahead import jobs_of
from hstu.ops.triton.launch import recorded_launches
from hstu.train.builder import task_module
from hstu.train.sources import open_source

SEQUENCES, ITEMS = 2, 32
"""Size of the recorded step: number of sequences, and items of their histories. No kernel depends on them."""


def jobs_of_run(config: RunConfig, capability: int) -> list[Job]:
    """Compile jobs for the kernels of a step and for the self checks of the run's backends."""
    backends = FALLBACKS[Backend(config.network.kernel_backend)]
    if not backends:
        return []
    with recorded_launches(divmod(capability, 10)) as launches:
        _run_step(config)
    jobs = jobs_of(launches, capability)
    tp, cp = config.tensor_parallel, config.context_parallel
    shapes = kernel_shapes(config.network, tp.tensor_model_parallel_size, cp.context_parallel_size)
    has_slots = any(isinstance(table, DynamicEmbeddingArgs) for table in config.embeddings)
    for backend in backends:
        module = importlib.import_module(f"hstu.ops.{backend.value}.compile_ahead")
        for checked in [shapes, None] if has_slots else [shapes]:
            jobs += module.jobs(checked, capability, OPERATORS)
    return jobs


def _run_step(config: RunConfig) -> None:
    """Run the dense part on Triton kernels: forward and backward in training, forward in evaluation."""
    source = open_source(_shortened(config))
    batch = next(iter(source.train_batches(SamplerPosition())))
    specs = table_specs(source.tables, config.network, source.roles, config.looks_up_negatives, 1)
    widths = {feature: spec.dim for spec in specs for feature in spec.features}
    task = task_module(
        config,
        source.roles,
        resolve_kernels(Backend.TRITON, kernel_shapes(config.network)),
        log_counts=source.log_counts(),
    )
    task(_rows(batch, widths), batch).loss_sum.backward()
    with torch.no_grad():
        task.eval()(_rows(batch, widths), batch)


def _rows(batch: HSTUBatch, widths: dict[str, int]) -> dict[str, torch.Tensor]:
    """Zeros instead of the table rows of a batch."""
    lengths = zip(batch.features.keys(), batch.features.length_per_key(), strict=True)
    return {name: torch.zeros(length, widths[name], requires_grad=True) for name, length in lengths}


def _shortened(config: RunConfig) -> RunConfig:
    dataset, longest = config.dataset, ITEMS + config.dataset.max_num_candidates
    if isinstance(dataset, BenchmarkDatasetArgs):
        groups = [
            replace(group, max_sequence_length=min(group.max_sequence_length, longest))
            for group in dataset.feature_args
        ]
        dataset = replace(dataset, feature_args=groups)
    else:
        dataset = replace(dataset, max_sequence_length=min(dataset.max_sequence_length, longest))
    return replace(config, dataset=dataset, trainer=replace(config.trainer, train_batch_size=SEQUENCES))
