"""Training on a cluster, simulated: each step draws its sequences, its slowest rank decides, and failures cost time.

The time of a batch is a line through its tokens and its operations, fitted to the estimate of some batches. So a rank
of thousands costs an addition, and a cluster of one rank gives the estimate itself.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from hstu.estimate.dry_run import DryRun, DryRuns
from hstu.estimate.estimate import Times, plan_for, size
from hstu.estimate.machine import Machine
from hstu.estimate.memory import memory
from hstu.estimate.plan import LengthDraws
from hstu.estimate.tables import TableShards, replicated_bytes, table_bytes_by_rank
from hstu.estimate.workload import Workload
from hstu.ops.costs import FLOAT32

MOST_STEPS, MOST_SEQUENCES, _FAILURES = 100, 1 << 22, 20_000
"""Limits of what is simulated. With many ranks fewer steps show how long the slowest one takes."""
COMPUTING, WAITING, SAVING, LOST = "computing", "waiting for the slowest rank", "saving checkpoints", "failures"
_OF_ALL = ("exchange for tables", "exchange for data parallelism")
"""Exchanges in which all ranks take part. The other ones stay within a tp_cp group."""


@dataclass(frozen=True)
class Cluster:
    """A simulated run; seconds and bytes. All of it is an estimate."""

    gpus: int
    memory: int
    """On the rank that needs the most."""
    step_s: float
    step_s_95: float
    """Of 95 % of the steps at most."""
    steps: int
    """How many were simulated."""
    parts_s: dict[str, float]
    """Part of a step → mean seconds; they add up to the mean step, and computing is that of the mean rank."""
    fit_error: float
    """Largest relative distance of the time of a fitted batch from its line."""
    tokens_per_s: float
    tflops: float
    checkpoint: int
    stall_s: float
    """In which training stands still for a save; the rest of a save runs beside it."""
    write_s: float
    load_s: float
    save_every_steps: int
    goodput: float
    """Share of the time that trains and is kept."""
    shares: dict[str, float]
    """What the time of all ranks goes to → its share; only computing is of use."""

    @property
    def limit(self) -> tuple[str, float]:
        """What most time is lost to, and its share."""
        return max(
            ((name, share) for name, share in self.shares.items() if name != COMPUTING), key=lambda each: each[1]
        )


def simulate(
    workload: Workload, draws: LengthDraws, machine: Machine, steps: int | None = None, seed: int = 0
) -> Cluster:
    """Simulate ``steps`` (None: as many as the limits allow), then failures of a run that saves in time."""
    runs = DryRuns()
    plan, largest = plan_for(machine, workload, runs), runs.of(workload, workload.largest)
    fitted = fit_times(workload, machine, plan, runs)
    seconds, parts, tokens, flops = simulate_steps(workload, draws, fitted[0], steps, seed)
    total, stall, write, load = checkpoint_times(workload, plan, largest, machine)
    mtbf, mean = 3600 * machine.mtbf_hours / workload.world_size, float(seconds.mean())
    every = max(1, round(best_interval(stall, write, mtbf) / mean))
    kept, saving = goodput(every * mean, (stall, write, load), mtbf, machine.restart_s, seed)
    shares = {part: kept * each / mean for part, each in parts.items()} | {SAVING: saving, LOST: 1 - kept - saving}
    return Cluster(
        gpus=workload.world_size,
        memory=sum(memory(workload, plan, largest).values()),
        step_s=mean,
        step_s_95=float(np.quantile(seconds, 0.95)),
        steps=len(seconds),
        parts_s=parts,
        fit_error=fitted[1],
        tokens_per_s=tokens / mean,
        tflops=flops / mean / 1e12,
        checkpoint=total,
        stall_s=stall,
        write_s=write,
        load_s=load,
        save_every_steps=every,
        goodput=kept,
        shares=shares,
    )


def fit_times(
    workload: Workload, machine: Machine, plan: tuple[TableShards, ...], runs: DryRuns
) -> tuple[dict[str, np.ndarray], float]:
    """(part of a step → seconds, seconds per token and per operation, float64 [3]; Cluster.fit_error)."""
    loads, found = [], []
    for batch in workload.batches:
        times = Times.of(workload, machine, batch, runs.of(workload, batch), plan)
        exchanged = {f"exchange for {part}": seconds for part, seconds in times.exposed.items()}
        found.append({COMPUTING: sum(times.computing.values())} | exchanged)
        loads.append([1.0, workload.tokens(batch), workload.flops(batch)])
    scale, seconds = np.max(loads, axis=0), np.array([list(parts.values()) for parts in found])
    lines = np.linalg.lstsq(loads / scale, seconds, rcond=1e-9)[0]
    worst = float(np.abs((loads / scale @ lines).sum(axis=1) / seconds.sum(axis=1) - 1).max())
    return dict(zip(found[0], (lines / scale[:, None]).T, strict=True)), worst


def simulate_steps(
    workload: Workload, draws: LengthDraws, lines: dict[str, np.ndarray], steps: int | None, seed: int
) -> tuple[np.ndarray, dict[str, float], float, float]:
    """(seconds of each step, Cluster.parts_s, tokens of a step over all ranks, operations of a step and rank).

    A step takes the time of the tp_cp group with the most to do, then the exchanges of all ranks.
    """
    sequences = workload.config.trainer.sequences_per_iteration * workload.world_size
    count = steps or min(MOST_STEPS, max(1, MOST_SEQUENCES // sequences))
    seconds, parts, totals = [], dict.fromkeys([*lines, WAITING], 0.0), np.zeros(2)
    for step in range(count):
        lengths, groups = draws.global_batch(seed, step)
        loads = workload.loads(lengths.items, lengths.candidates)
        weights = np.ones(len(groups)) / np.bincount(groups)[groups], loads.tokens, loads.costs
        of_groups = np.array([np.bincount(groups, weights=each, minlength=workload.dp_size) for each in weights])
        times = {part: np.maximum(line @ of_groups, 0.0) for part, line in lines.items()}
        of_ranks = np.sum([each for part, each in times.items() if part not in _OF_ALL], axis=0)
        means = {part: float(each.max() if part in _OF_ALL else each.mean()) for part, each in times.items()}
        seconds.append(of_ranks.max() + sum(means[part] for part in _OF_ALL if part in means))
        for part, value in (means | {WAITING: max(0.0, float(of_ranks.max() - of_ranks.mean()))}).items():
            parts[part] += value / count
        totals += of_groups[1:].sum(axis=1) / count
    return np.array(seconds), parts, float(totals[0]), float(totals[1]) / workload.world_size


def checkpoint_times(
    workload: Workload, plan: tuple[TableShards, ...], run: DryRun, machine: Machine
) -> tuple[int, float, float, float]:
    """(bytes of a checkpoint, seconds of the stall, of the writing beside training, and of loading).

    Each rank writes its shards of the tables, and an equal part of what several ranks hold.
    """
    rows, _, states = replicated_bytes(workload, run)
    whole = sum((FLOAT32 * w.elements + w.state_bytes) * w.shares + w.step_bytes for w in run.weights.values())
    dense = rows + states + whole
    by_rank = table_bytes_by_rank(workload, plan).sum(axis=1) + dense / workload.world_size
    hosts = np.bincount(np.arange(workload.world_size) // workload.ranks_per_host, weights=by_rank)
    total = float(by_rank.sum())
    load = max(total / machine.storage_gb_s, hosts.max() / machine.host_storage_gb_s) / 1e9
    if workload.config.trainer.ckpt_async:
        return round(total), by_rank.max() / machine.host_copy_gb_s / 1e9, load + machine.save_s, load
    return round(total), load + machine.save_s, 0.0, load


def best_interval(stall_s: float, write_s: float, mtbf_s: float) -> float:
    """Seconds of training between two saves, so that saves and failures lose the least.

    Young's formula with the further terms of J. T. Daly, "A higher order estimate of the optimum checkpoint interval
    for restart dumps", FGCS 22, 2006. A save in the background ends before the next one begins.
    """
    if stall_s >= 2 * mtbf_s:
        return mtbf_s
    ratio = math.sqrt(stall_s / (2 * mtbf_s))
    return max(math.sqrt(2 * stall_s * mtbf_s) * (1 + ratio / 3 + ratio**2 / 9) - stall_s, write_s)


def goodput(
    interval_s: float, saves: tuple[float, float, float], mtbf_s: float, restart_s: float, seed: int = 0
) -> tuple[float, float]:
    """(share of the time that trains and is kept, share of saves), over many failures; the rest is lost to these.

    saves: seconds of the stall, the writing and the loading. A run restarts, loads the last committed checkpoint, and
    trains until the next failure, which may come before the restart has ended.
    """
    stall, write, load = saves
    if math.isinf(mtbf_s):
        return interval_s / (interval_s + stall), stall / (interval_s + stall)
    until = mtbf_s * np.random.default_rng(seed).exponential(size=_FAILURES)
    training = np.maximum(until - restart_s - load - write, 0.0)
    periods = float(np.floor(training / (interval_s + stall)).sum() / until.sum())
    return periods * interval_s, periods * stall


def as_objects(clusters: Sequence[Cluster]) -> list[dict[str, object]]:
    """One object per cluster for JSON. Efficiency: tokens per second and GPU relative to the first one."""
    return [asdict(each) | {"efficiency": _efficiency(each, clusters[0]), "limit": each.limit[0]} for each in clusters]


def _efficiency(each: Cluster, first: Cluster) -> float:
    return each.tokens_per_s / first.tokens_per_s / (each.gpus / first.gpus)


def as_text(clusters: Sequence[Cluster], machine: Machine, notes: Sequence[str]) -> str:
    """The table, then the assumptions."""
    return "\n".join(_lines(clusters, machine, notes))


def _lines(clusters: Sequence[Cluster], machine: Machine, notes: Sequence[str]) -> Iterator[str]:
    head = "GPUs", "step", "waiting", "exchange", "tokens/s", "efficiency", "save", "every", "goodput", "lost"
    yield "".join(f"{name:>12}" for name in head) + "  most to"
    for each in clusters:
        exchanged = sum(seconds for part, seconds in each.parts_s.items() if part.startswith("exchange"))
        shares = each.parts_s[WAITING] / each.step_s, exchanged / each.step_s
        cells = f"{each.gpus:,}", f"{1e3 * each.step_s:,.1f} ms", *(f"{share:.1%}" for share in shares)
        save, every = each.stall_s + each.write_s, each.save_every_steps * each.step_s / 60
        more = (
            f"{each.tokens_per_s:,.0f}",
            f"{_efficiency(each, clusters[0]):.1%}",
            f"{save:,.1f} s",
            f"{every:,.1f} min",
        )
        last = (*cells, *more, f"{each.goodput:.1%}", f"{each.limit[1]:.1%}")
        yield "".join(f"{cell:>12}" for cell in last) + f"  {each.limit[0]}"
    yield f"\nnote: an estimate by {machine.name}; none of it has been measured on GPUs"
    yield f"note: a failure per {machine.mtbf_hours:,.0f} GPU hours, {machine.restart_s:g} s to restart"
    yield f"note: checkpoints of {size(clusters[0].checkpoint)}; fitted times are off by at most {_worst(clusters):.1%}"
    yield from (f"note: {note}" for note in notes)
    for each in (each for each in clusters if each.memory > machine.memory_gb * 1e9):
        yield f"warning: on {each.gpus} GPUs a rank needs {size(each.memory)} and has {machine.memory_gb:g} GB"


def _worst(clusters: Sequence[Cluster]) -> float:
    return max(each.fit_error for each in clusters)
