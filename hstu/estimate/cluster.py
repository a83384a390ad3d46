"""Simulates training on a cluster: each step draws its sequences and lasts as long as its slowest rank.

The time of a batch is a linear function of its tokens and FLOPs, fitted to the estimates of some batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np
from tabulate import tabulate

from hstu.config.run_config import RunConfig
from hstu.data.sampling.sampler import TrainSampler
from hstu.estimate.dry_run import DryRuns
from hstu.estimate.estimate import memory, plan_for, size, step_times
from hstu.estimate.machine import Machine
from hstu.estimate.sharding import TableShards
from hstu.estimate.workload import MOST_GROUPS, Batch, Workload, batches_of_groups
from hstu.train.batch_source import SampleLengths, choose_partition
from hstu.train.sources import open_source

MOST_STEPS, MOST_SEQUENCES = 100, 1 << 22
"""Limits of a simulation. With many ranks fewer steps suffice to find the time of the slowest rank."""
DRAWN_RANKS = 64  # ranks for which random data has samples; clusters of any size draw from them
COMPUTING, WAITING = "computing", "waiting for the slowest rank"
_OF_ALL = ("exchange for tables", "exchange for data parallelism")
"""Exchanges among all ranks. The others stay within a tp_cp group."""


@dataclass(frozen=True)
class Cluster:
    """The estimate of a simulated run, in seconds and bytes."""

    gpus: int
    memory: int
    """Bytes on the rank that needs the most."""
    step_s: float
    parts_s: dict[str, float]
    """Part of a step → mean seconds. They add up to ``step_s``. Computing is averaged over the ranks."""
    tokens_per_s: float
    tflops: float

    @property
    def limit(self) -> str:
        """The part of a step, other than computing, that takes the most time."""
        return max((name for name in self.parts_s if name != COMPUTING), key=self.parts_s.__getitem__)


def simulate(
    config: RunConfig, gpus: int, ranks_per_host: int, machine: Machine, steps: int | None = None, seed: int = 0
) -> Cluster:
    """Simulates ``steps`` (None: as many as the limits allow) with lengths drawn from the data."""
    source = open_source(config, world_size=DRAWN_RANKS)
    workload, runs = Workload(config, gpus, ranks_per_host, "cuda", source, (), ""), DryRuns()
    batches: list[Batch] = []
    while len(batches) < MOST_GROUPS:
        batches += batches_of_groups(source.train_lengths, *draw_step(workload, len(batches)), workload.dp_size)
    batches.sort(key=workload.flops)
    spread = np.linspace(0, len(batches) - 1, MOST_GROUPS).astype(int)
    workload = replace(workload, steps=(tuple(batches[index] for index in spread),))
    plan = plan_for(machine, workload, runs)
    parts, tokens, flops = simulate_steps(workload, fit_times(workload, machine, plan, runs), steps, seed)
    step_s = sum(parts.values())
    return Cluster(
        gpus=gpus,
        memory=sum(memory(workload, plan, runs.of(workload, workload.largest)).values()),
        step_s=step_s,
        parts_s=parts,
        tokens_per_s=tokens / step_s,
        tflops=flops / step_s / 1e12,
    )


def draw_step(workload: Workload, *seed: int) -> tuple[np.ndarray, np.ndarray]:
    """A global batch, int64: (rows of the sample table, drawn with replacement; the tp_cp group of each row)."""
    config, source, world_size = workload.config, workload.source, workload.world_size
    batch_size = config.trainer.sequences_per_iteration
    count = batch_size * world_size
    chosen = np.random.default_rng(seed).integers(len(source.train_lengths.items), size=count)
    drawn = SampleLengths(*(values[chosen] for values in source.train_lengths))
    partition = choose_partition(config, source.roles, source.max_items, drawn)
    sampler = TrainSampler(count, batch_size, 0, world_size, seed=0, shuffle=False, partition=partition)
    samples, ranks = next(sampler.global_batches())
    return chosen[samples], ranks // workload.group_size


def fit_times(
    workload: Workload, machine: Machine, plan: tuple[TableShards, ...], runs: DryRuns
) -> dict[str, np.ndarray]:
    """Fits each part of a step → float64 [3]: (constant seconds, seconds per token, seconds per FLOP)."""
    loads, found = [], []
    for batch in workload.batches:
        computing, exposed = step_times(workload, machine, runs.of(workload, batch), plan)
        exchanged = {f"exchange for {part}": seconds for part, seconds in exposed.items()}
        found.append({COMPUTING: sum(computing.values())} | exchanged)
        loads.append([1.0, workload.tokens(batch), workload.flops(batch)])
    scale, seconds = np.max(loads, axis=0), np.array([list(parts.values()) for parts in found])
    lines = np.linalg.lstsq(loads / scale, seconds, rcond=1e-9)[0]
    return dict(zip(found[0], (lines / scale[:, None]).T, strict=True))


def simulate_steps(
    workload: Workload, lines: dict[str, np.ndarray], steps: int | None, seed: int
) -> tuple[dict[str, float], float, float]:
    """Returns (Cluster.parts_s, tokens per step over all ranks, FLOPs per step and rank).
    A step takes the time of its slowest tp_cp group, plus the exchanges among all ranks."""
    sequences = workload.config.trainer.sequences_per_iteration * workload.world_size
    count = steps or min(MOST_STEPS, max(1, MOST_SEQUENCES // sequences))
    parts, totals, loads = (
        dict.fromkeys([*lines, WAITING], 0.0),
        np.zeros(2),
        workload.loads(workload.source.train_lengths),
    )
    for step in range(count):
        samples, groups = draw_step(workload, seed, step)
        weights = np.ones(len(groups)) / np.bincount(groups)[groups], loads.tokens[samples], loads.costs[samples]
        of_groups = np.array([np.bincount(groups, weights=each, minlength=workload.dp_size) for each in weights])
        times = {part: np.maximum(line @ of_groups, 0.0) for part, line in lines.items()}
        of_ranks = np.sum([each for part, each in times.items() if part not in _OF_ALL], axis=0)
        for part, each in times.items():
            parts[part] += float(each.max() if part in _OF_ALL else each.mean()) / count
        parts[WAITING] += float(of_ranks.max() - of_ranks.mean()) / count
        totals += of_groups[1:].sum(axis=1) / count
    return parts, float(totals[0]), float(totals[1]) / workload.world_size


def as_objects(clusters: Sequence[Cluster]) -> list[dict[str, object]]:
    """One JSON object per cluster. Efficiency is tokens per second and GPU relative to the first cluster."""
    first = clusters[0].tokens_per_s / clusters[0].gpus
    return [asdict(c) | {"efficiency": c.tokens_per_s / c.gpus / first, "limit": c.limit} for c in clusters]


def as_text(clusters: Sequence[Cluster], machine: Machine) -> str:
    """One table row per cluster, then a note and warnings."""
    head = "GPUs", "step", "waiting", "exchange", "tokens/s", "efficiency", "memory", "lost", "most to"
    rows = []
    for each, found in zip(clusters, as_objects(clusters), strict=True):
        exchanged = sum(seconds for part, seconds in each.parts_s.items() if part.startswith("exchange"))
        shares = [seconds / each.step_s for seconds in (each.parts_s[WAITING], exchanged, each.parts_s[each.limit])]
        waiting, exchange, lost = (f"{share:.1%}" for share in shares)
        rates = f"{each.tokens_per_s:,.0f}", f"{found['efficiency']:.1%}", size(each.memory)
        rows.append((f"{each.gpus:,}", f"{1e3 * each.step_s:,.1f} ms", waiting, exchange, *rates, lost, each.limit))
    aligned = ["right"] * (len(head) - 1) + ["left"]
    table = tabulate(rows, head, tablefmt="plain", disable_numparse=True, colalign=aligned)
    lines = [table, f"\nnote: an estimate by {machine.name}; none of it has been measured on GPUs"]
    for each in (each for each in clusters if each.memory > machine.memory_gb * 1e9):
        lines.append(f"warning: on {each.gpus} GPUs a rank needs {size(each.memory)} and has {machine.memory_gb:g} GB")
    return "\n".join(lines)
