"""Training on a cluster, simulated: each step draws its sequences, and its slowest rank decides.

The time of a batch is a line through its tokens and its operations, fitted to the estimate of some batches. So a rank
of thousands costs an addition, and a cluster of one rank gives the estimate itself.
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
"""Limits of what is simulated. With many ranks fewer steps show how long the slowest one takes."""
DRAWN_RANKS = 64  # random data has samples for so many ranks, from which batches of any number of ranks are drawn
COMPUTING, WAITING = "computing", "waiting for the slowest rank"
_OF_ALL = ("exchange for tables", "exchange for data parallelism")
"""Exchanges in which all ranks take part. The other ones stay within a tp_cp group."""


@dataclass(frozen=True)
class Cluster:
    """A simulated run; seconds and bytes. All of it is an estimate."""

    gpus: int
    memory: int
    """On the rank that needs the most."""
    step_s: float
    parts_s: dict[str, float]
    """Part of a step → mean seconds; they add up to the mean step, and computing is that of the mean rank."""
    tokens_per_s: float
    tflops: float

    @property
    def limit(self) -> str:
        """What most time is lost to."""
        return max((name for name in self.parts_s if name != COMPUTING), key=self.parts_s.__getitem__)


def simulate(
    config: RunConfig, gpus: int, ranks_per_host: int, machine: Machine, steps: int | None = None, seed: int = 0
) -> Cluster:
    """Simulate ``steps`` (None: as many as the limits allow) with lengths that are drawn from those of the data."""
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
    """(rows of the sample table, drawn with replacement; the tp_cp group of each) of a global batch; int64 both."""
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
    """Part of a step → seconds, seconds per token and per operation, float64 [3]."""
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
    """(Cluster.parts_s, tokens of a step over all ranks, operations of a step and rank).

    A step takes the time of the tp_cp group with the most to do, then the exchanges of all ranks.
    """
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
    """One object per cluster for JSON. Efficiency: tokens per second and GPU relative to the first one."""
    first = clusters[0].tokens_per_s / clusters[0].gpus
    return [asdict(c) | {"efficiency": c.tokens_per_s / c.gpus / first, "limit": c.limit} for c in clusters]


def as_text(clusters: Sequence[Cluster], machine: Machine) -> str:
    """The table, and what it is worth."""
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
