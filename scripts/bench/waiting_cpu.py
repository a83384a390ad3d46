"""Time CPU steps by how idle threads wait, alone and beside other work; prints one JSON object.

    python scripts/bench/waiting_cpu.py [--output docs/benchmarks/items_cpu/waiting.json]

All ways take their turn in every round, each in a process of its own. The other work is processes that compute all the
time, as many as there are cores and one more.
"""

from __future__ import annotations

import multiprocessing
import os
import statistics
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from harness import Row, publish, time_in_turn
from step_cpu import Trainer, parser_of

WAYS = {
    "OpenMP's default": {},
    "GOMP_SPINCOUNT=30000": {"GOMP_SPINCOUNT": "30000"},
    "GOMP_SPINCOUNT=10000": {"GOMP_SPINCOUNT": "10000"},
    "OMP_WAIT_POLICY=passive": {"OMP_WAIT_POLICY": "passive"},
}
"""How a thread waits → environment."""


def compute() -> None:
    """Until it is killed."""
    while True:
        pass


@contextmanager
def beside(processes: int) -> Iterator[None]:
    """Within the context, so many processes compute."""
    others = [multiprocessing.get_context("spawn").Process(target=compute, daemon=True) for _ in range(processes)]
    for other in others:
        other.start()
    try:
        yield
    finally:
        for other in others:
            other.kill()


def main() -> None:
    """Measure and print."""
    options = parser_of(__doc__).parse_args()
    trainers = {name: Trainer(options, "cpp_float32", env) for name, env in WAYS.items()}
    rows: list[Row] = []
    for processes in (0, len(os.sched_getaffinity(0)) + 1):
        with beside(processes):
            turns = {name: each.train for name, each in trainers.items()}
            time_in_turn(turns, torch.device("cpu"), options.rounds)
        for name, each in trainers.items():
            wall, processor = each.wall_ms[-options.rounds :], each.processor_ms[-options.rounds :]
            rows.append(
                {
                    "processes_beside": processes,
                    "waiting": name,
                    "ms_median": round(statistics.median(wall), 1),
                    "ms_fastest": round(min(wall), 1),
                    "processor_ms_median": round(statistics.median(processor), 1),
                }
            )
    for each in trainers.values():
        each.end()
    publish(rows, options.output)


if __name__ == "__main__":
    main()
