"""Compile the kernels of a run ahead of it, on all cores. No GPU is needed.

    python -m hstu.train.compile_ahead ranking --gin-config-file configs/benchmark_ranking.gin --capability 90 \
        --cache caches

compiles what one step launches and what the self check launches, for one rank. ``caches`` may be copied to a machine
with the same Python packages. A run finds it there with ``XDG_CACHE_HOME=caches TRITON_CACHE_DIR=caches/triton``.
Without ``--cache`` the user's own caches are filled.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

from hstu.config.args import BenchmarkDatasetArgs, DynamicEmbeddingArgs
from hstu.config.gin_io import load
from hstu.config.run_config import RunConfig
from hstu.data.batches.batch import HSTUBatch
from hstu.data.sampling.sampler import SamplerPosition
from hstu.model.embedding import table_specs
from hstu.model.stack import kernel_shapes
from hstu.observe.logging import quiet_libraries
from hstu.ops.compile_ahead import Job, adopt_triton_cache, compile_all, num_cores, strip_triton_cache
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


def main() -> int:
    """Compile, and print failures, time and size. Returns 1 if a kernel does not compile."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=("ranking", "retrieval"))
    parser.add_argument("--gin-config-file", action="extend", nargs="+", required=True)
    parser.add_argument("--gin-bindings", action="extend", nargs="+", default=[])
    parser.add_argument("--capability", type=int, required=True, help="of the GPU: 90 for 9.0")
    parser.add_argument("--processes", type=int, default=num_cores(), help="(default: one per core)")
    parser.add_argument("--cache", type=Path, help="directory to fill instead of the user's caches")
    options = parser.parse_args()
    quiet_libraries()
    if options.cache is not None:
        triton_cache = options.cache.absolute() / "triton"
        os.environ |= {"XDG_CACHE_HOME": str(options.cache.absolute()), "TRITON_CACHE_DIR": str(triton_cache)}
        adopt_triton_cache(triton_cache)
    begun = time.monotonic()
    jobs = jobs_of_run(load(options.gin_config_file, options.gin_bindings, options.task), options.capability)
    recorded_s = time.monotonic() - begun
    results = []
    for result in compile_all(jobs, options.processes):
        results.append(result)
        if result.error is not None:
            print(f"FAILED {result.name}: {result.error}", file=sys.stderr)
    failed = sum(result.error is not None for result in results)
    print(
        f"kernels={len(results)} failed={failed} record={recorded_s:.1f}s wall={time.monotonic() - begun:.1f}s "
        f"processes={options.processes} cpu={sum(result.cpu_s for result in results):.0f}s"
    )
    if options.cache is not None:
        strip_triton_cache(triton_cache)
        size = sum(file.stat().st_size for file in options.cache.rglob("*") if file.is_file())
        print(f"{options.cache}: {size / 2**20:.1f} MiB")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
