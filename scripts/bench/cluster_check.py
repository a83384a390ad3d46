"""Compare simulated clusters of 1, 2 and 4 ranks with steps on this CPU; prints one JSON object.

python scripts/bench/cluster_check.py retrieval|ranking|random [--steps 6 --rounds 4 --output FILE.json]

The cases are those of scaling_cpu.py. A rank works as long as the main thread of its process uses the processor in a
step, so four ranks can be measured on two cores; a step takes as long as its slowest rank works. The simulation is that
of scripts/estimate.py --simulate, on the estimate for this CPU, with processor time, too.

What exchanges and waiting take in wall time is compared with docs/benchmarks/scaling_cpu, two ranks on two cores.
"""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from harness import ROOT, command_line, publish
from scaling_cpu import ALONE, CASES, Variant, World, start, variants_of

from hstu.config.gin_io import load
from hstu.estimate.cluster import COMPUTING, WAITING, fit_times, simulate_steps
from hstu.estimate.dry_run import DryRuns
from hstu.estimate.estimate import plan_for
from hstu.estimate.machine import batch_seconds, this_cpu
from hstu.estimate.plan import plan_cluster
from hstu.observe.logging import quiet_libraries

CORES = sorted(os.sched_getaffinity(0))[:2]
RANKS = (1, 2, 4)
FITTED = 6
"""Batches that are timed for each number of ranks."""


class Steps(NamedTuple):
    """Simulated steps."""

    seconds: np.ndarray
    parts: dict[str, float]
    tokens: float
    flops: float


def variants_for(case: str, ranks: int) -> dict[str, Variant]:
    """Name → variant that is simulated with so many ranks."""
    found = variants_of(case, ranks, tp_size=1)
    return {ALONE: found[ALONE]} if ranks == 1 else found


def measure(case: str, steps: int, rounds: int) -> dict[int, dict[str, np.ndarray]]:
    """Ranks → variant → seconds that each rank works, float64 [ranks, steps of all rounds]. Weak scaling only."""
    worlds = {}
    for ranks in RANKS:
        variants = {name: each for name, each in variants_for(case, ranks).items() if not name.startswith("strong")}
        worlds[ranks] = World(tuple(CORES[rank % len(CORES)] for rank in range(ranks)), 1, variants)
    pipes = {ranks: start(world) for ranks, world in worlds.items()}
    for pipe in (pipe for of_world in pipes.values() for pipe in of_world):
        pipe.recv()
    worked: dict[int, dict[str, list[np.ndarray]]] = {ranks: {} for ranks in RANKS}
    for count in (2, *[steps] * rounds):  # the first steps warm up
        for ranks, world in worlds.items():
            for variant in world.variants:
                for pipe in pipes[ranks]:
                    pipe.send((variant, count))
                seconds = np.array([pipe.recv().working_s for pipe in pipes[ranks]])
                worked[ranks].setdefault(variant, []).append(seconds)
    for pipe in (pipe for of_world in pipes.values() for pipe in of_world):
        pipe.send(None)
    return {ranks: {name: np.hstack(each[1:]) for name, each in of.items()} for ranks, of in worked.items()}


def simulate_here(case: str, ranks: int) -> tuple[dict[str, Steps], float]:
    """(variant → simulated steps, largest distance of a timed batch from its fitted time)."""
    variants = variants_for(case, ranks)
    planned = {
        name: plan_cluster(load([each.gin_file], list(each.bindings), each.task), ranks, ranks, "cpu")  # type: ignore[arg-type]
        for name, each in variants.items()
    }
    batches = [batch for workload, _ in planned.values() for batch in workload.batches]
    first = next(iter(planned.values()))[0]
    batches.sort(key=first.flops)
    chosen = tuple(batches[index] for index in np.linspace(0, len(batches) - 1, FITTED).astype(int))
    timed = replace(first, steps=(chosen,))
    os.sched_setaffinity(0, CORES[:ranks])  # one thread per rank, as it is measured
    with this_cpu(timed, time.process_time) as machine:
        runs = DryRuns()
        lines, worst = fit_times(timed, machine, plan_for(machine, timed, runs), runs)
        lines[COMPUTING] += np.array([batch_seconds(timed, time.process_time), 0.0, 0.0])
    found = {name: Steps(*simulate_steps(*each, lines, None, 0)) for name, each in planned.items()}
    return found, worst


def compare(case: str, steps: int, rounds: int) -> dict[str, Any]:
    """Measured and simulated, in milliseconds and shares, for each number of ranks and variant."""
    measured = measure(case, steps, rounds)
    rows: list[dict[str, Any]] = []
    simulated: dict[str, Steps] = {}
    for ranks in RANKS:
        of_ranks, worst = simulate_here(case, ranks)
        simulated |= of_ranks if ranks < 4 else {}
        for variant, worked in measured[ranks].items():
            slowest, mean = worked.max(axis=0), worked.mean(axis=0)
            parts = of_ranks[variant].parts
            expected = parts[COMPUTING]
            rows.append({
                "ranks": ranks,
                "variant": variant,
                "steps": worked.shape[1],
                "mean_rank_ms": 1e3 * float(mean.mean()),
                "slowest_rank_ms": 1e3 * float(slowest.mean()),
                "waiting_share": 1 - float(mean.mean() / slowest.mean()),
                "simulated_mean_rank_ms": 1e3 * expected,
                "simulated_slowest_rank_ms": 1e3 * (expected + parts[WAITING]),
                "simulated_waiting_share": parts[WAITING] / (expected + parts[WAITING]),
                "fit_error": worst,
            })  # fmt: skip
    return {"case": case, "work": rows, "wall": wall(case, simulated)}


def wall(case: str, simulated: dict[str, Steps]) -> list[dict[str, Any]]:
    """Speed-ups and shares of a step, simulated and as measured in docs/benchmarks/scaling_cpu."""
    medians = json.loads((ROOT / f"docs/benchmarks/scaling_cpu/{case}.json").read_text())["medians"]
    one = simulated[ALONE]
    rows = []
    for variant, steps in simulated.items():
        exchanged = sum(seconds for part, seconds in steps.parts.items() if part.startswith("exchange"))
        row = medians[variant]
        rows.append({
            "variant": variant,
            "speed_up": row["speed_up"],
            "waiting_share": row["waiting_share"],
            "communication_share": row["communication_share"],
            "simulated_speed_up": steps.tokens / steps.seconds.mean() / (one.tokens / one.seconds.mean()),
            "simulated_waiting_share": steps.parts[WAITING] / float(steps.seconds.mean()),
            "simulated_communication_share": exchanged / float(steps.seconds.mean()),
        })  # fmt: skip
    return rows


def table(report: dict[str, Any]) -> str:
    """The rows as Markdown."""
    lines = ["| ranks | slowest rank works, ms | simulated | waiting | simulated |", "|---|" + "---:|" * 4]
    for row in report["work"]:
        work = f"{row['slowest_rank_ms']:.0f} | {row['simulated_slowest_rank_ms']:.0f}"
        shares = f"{row['waiting_share']:.1%} | {row['simulated_waiting_share']:.1%}"
        lines.append(f"| {row['ranks']}, {row['variant']} | {work} | {shares} |")
    lines += ["", "| two ranks | speed-up | simulated | waiting | simulated | communication | simulated |"]
    lines.append("|---|" + "---:|" * 6)
    for row in report["wall"]:
        shares = " | ".join(
            f"{row[name]:.1%} | {row[f'simulated_{name}']:.1%}" for name in ("waiting_share", "communication_share")
        )
        lines.append(f"| {row['variant']} | {row['speed_up']:.2f} | {row['simulated_speed_up']:.2f} | {shares} |")
    return "\n".join(lines)


def main() -> None:
    """Compare one case."""
    parser = command_line(__doc__, rounds=4, output=True)
    parser.add_argument("case", choices=tuple(CASES))
    parser.add_argument("--steps", type=int, default=6, help="steps per round")
    options = parser.parse_args()
    quiet_libraries()
    os.chdir(ROOT)  # preprocessed data is named relative to it
    report = compare(options.case, options.steps, options.rounds)
    print(table(report), file=sys.stderr)
    publish(report, options.output)


if __name__ == "__main__":
    main()
