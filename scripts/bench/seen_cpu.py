"""Time training steps with and without RetrievalArgs.mask_seen, in turn, for the kinds of negatives.

    python scripts/bench/seen_cpu.py [--gin-config-file configs/ml_1m_retrieval.gin] [--kinds "full"] \
        [--output docs/benchmarks/step_cpu/seen.json]

A step is a whole one, with the making of its batch in the same process. Prints one JSON object: milliseconds of the
processor, which other work on the machine changes less than the clock. The ratio is the median of those of the rounds.
The data of the configuration must exist.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from harness import WARM_UP, command_line, publish
from pipeline_cpu import prepare, train

from hstu.observe.logging import quiet_libraries
from hstu.parallel import mesh as meshes

KINDS = {
    "uniform, 128": ("negatives = 'uniform'", "num_negatives = 128"),
    "uniform, 768 shared": ("negatives = 'uniform'", "num_negatives = 768", "shared_negatives = True"),
    "in_batch": ("negatives = 'in_batch'", "num_negatives = -1"),
    "full": ("negatives = 'full'", "num_negatives = -1"),
}
"""Kind of negatives → options of RetrievalArgs."""


def processor_times(steps: dict[str, Callable[[int], object]], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of the processor that each step takes in each round; every other round in the reverse order."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(WARM_UP + rounds):
        for name in sorted(steps, reverse=bool(number % 2)):
            begun = time.process_time()
            steps[name](number)
            if number >= WARM_UP:
                times[name].append((time.process_time() - begun) * 1e3)
    return times


def main() -> None:
    """Measure and print."""
    add = (parser := command_line(__doc__, threads=1, rounds=20, output=True)).add_argument
    add("--gin-config-file", default="configs/ml_1m_retrieval.gin")
    add("--gin-bindings", nargs="*", default=[])
    add("--kinds", nargs="*", choices=KINDS, default=[*KINDS])
    options = parser.parse_args()
    quiet_libraries()
    mesh = meshes.start()
    torch.set_num_threads(options.threads)
    report = {}
    for kind in options.kinds:
        steps: dict[str, Callable[[int], object]] = {}
        for masks in (False, True):
            given = [f"RetrievalArgs.{option}" for option in (*KINDS[kind], f"mask_seen = {masks}")]
            run = prepare(options.gin_config_file, [*options.gin_bindings, *given], "retrieval", mesh)
            steps[f"mask_seen = {masks}"] = partial(train, run.pipeline, run.batches())
        times = processor_times(steps, options.rounds)
        ratios = [with_it / without for without, with_it in zip(*times.values(), strict=True)]
        report[kind] = {
            "median_ms": {name: round(statistics.median(taken), 2) for name, taken in times.items()},
            "fastest_ms": {name: round(min(taken), 2) for name, taken in times.items()},
            "ratio": round(statistics.median(ratios), 3),
        }
    told = {"rounds": options.rounds, "threads": options.threads, "gin_config_file": options.gin_config_file}
    publish({"options": told, "torch": torch.__version__, "processor_ms_per_step": report}, options.output)
    meshes.finish()


if __name__ == "__main__":
    main()
