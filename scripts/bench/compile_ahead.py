"""Compile the kernels of a run ahead of it, on all cores. No GPU is needed.

    python scripts/bench/compile_ahead.py ranking --gin-config-file configs/benchmark_ranking.gin --capability 90 \
        --cache caches

compiles what the self check launches for the shapes of the run: most kernels of its steps, of which the first step
compiles the rest. ``caches`` may be copied to a machine with the same Python packages. A run finds it there with
``XDG_CACHE_HOME=caches TRITON_CACHE_DIR=caches/triton``. Without ``--cache`` the user's own caches are filled.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from harness import command_line

from hstu.config.args import DynamicEmbeddingArgs
from hstu.config.gin_io import load
from hstu.config.run_config import RunConfig
from hstu.model.stack import kernel_shapes
from hstu.observe.logging import quiet_libraries
from hstu.ops.compile_ahead import Job, adopt_triton_cache, compile_all, num_cores, strip_triton_cache
from hstu.ops.kernels import OPERATORS, Backend
from hstu.ops.select import FALLBACKS
from hstu.ops.self_check import jobs


def jobs_of_run(config: RunConfig, capability: int) -> list[Job]:
    """Compile jobs for the self checks of the run's backends."""
    tp, cp = config.tensor_parallel.tensor_model_parallel_size, config.context_parallel.context_parallel_size
    has_slots = any(isinstance(table, DynamicEmbeddingArgs) for table in config.embeddings)
    checked = [kernel_shapes(config.network, tp, cp), *([None] if has_slots else [])]
    backends = FALLBACKS[Backend(config.network.kernel_backend)]
    return [job for each in backends for shapes in checked for job in jobs(each.value, shapes, capability, OPERATORS)]


def main() -> int:
    """Compile, and print failures, time and size. Returns 1 if a kernel does not compile."""
    parser = command_line(__doc__)
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
    to_compile = jobs_of_run(load(options.gin_config_file, options.gin_bindings, options.task), options.capability)
    recorded_s = time.monotonic() - begun
    results = []
    for result in compile_all(to_compile, options.processes):
        results.append(result)
        if result.error is not None:
            print(f"FAILED {result.name}: {result.error}", file=sys.stderr)
    failed = sum(result.error is not None for result in results)
    wall_s, cpu_s = time.monotonic() - begun, sum(result.cpu_s for result in results)
    print(f"kernels={len(results)} failed={failed} record={recorded_s:.1f}s wall={wall_s:.1f}s cpu={cpu_s:.0f}s")
    if options.cache is not None:
        strip_triton_cache(triton_cache)
        size = sum(file.stat().st_size for file in options.cache.rglob("*") if file.is_file())
        print(f"{options.cache}: {size / 2**20:.1f} MiB")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
