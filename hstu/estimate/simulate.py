"""Training on a cluster, simulated step by step: each step draws its sequences, and its slowest rank decides.

The time of a batch is a line through its tokens and its operations, fitted to the estimate of some batches. So a rank
of thousands costs an addition, and a cluster of one rank gives the estimate itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hstu.estimate.estimate import batch_wait_s, computing_seconds, exchange_seconds, plan_for
from hstu.estimate.failures import Checkpoints, Goodput, checkpoints, goodput
from hstu.estimate.machine import Machine
from hstu.estimate.memory import TableShards, memory
from hstu.estimate.plan import LengthDraws
from hstu.estimate.traffic import transfers
from hstu.estimate.workload import Batch, Workload

MOST_STEPS, MOST_SEQUENCES = 100, 1 << 22
"""Limits of what is simulated. With many ranks fewer steps show how long the slowest one takes."""
COMPUTING, MAKING, WAITING = "computing", "making batches", "waiting for the slowest rank"
SAVING, LOST = "saving checkpoints", "failures"
_OF_ALL = ("exchange for tables", "exchange for data parallelism")
"""Exchanges in which all ranks take part. The other ones stay within a tp_cp group."""


@dataclass(frozen=True)
class BatchTimes:
    """Seconds of each part of a step, as lines through the tokens and the operations of a batch."""

    lines: dict[str, np.ndarray]
    """Part → float64 [3]: seconds, seconds per token, seconds per operation."""
    worst: float
    """Largest relative distance of the time of a fitted batch from its line."""

    @classmethod
    def fit(cls, loads: np.ndarray, parts: Sequence[dict[str, float]]) -> BatchTimes:
        """``loads``: float64 [batches, 2], tokens and operations. ``parts``: part → seconds of each batch."""
        scale = np.maximum(loads.max(axis=0), 1.0)
        columns = np.column_stack([np.ones(len(loads)), loads / scale])
        seconds = np.array([list(part.values()) for part in parts])
        fitted = np.linalg.lstsq(columns, seconds, rcond=1e-9)[0]
        total = seconds.sum(axis=1)
        worst = float(np.abs((columns @ fitted).sum(axis=1) / total - 1).max())
        lines = fitted / np.array([1.0, *scale])[:, None]
        return cls(dict(zip(parts[0], lines.T, strict=True)), worst)

    def of(self, part: str, tokens: np.ndarray, flops: np.ndarray) -> np.ndarray:
        """Seconds of a part for batches of so many tokens and operations, float64 like them."""
        fixed, per_token, per_flop = self.lines[part]
        return np.maximum(fixed + per_token * tokens + per_flop * flops, 0.0)


def batch_times(
    workload: Workload, machine: Machine, plan: tuple[TableShards, ...], batch_s: float = 0.0
) -> BatchTimes:
    """Fit the batches of ``workload``. batch_s: see ``estimate``."""

    def parts_of(batch: Batch) -> dict[str, float]:
        computing = computing_seconds(workload, machine, batch, plan)
        exchanged = exchange_seconds(workload, machine, transfers(workload, batch, plan), computing)
        compute_s = sum(computing.values())
        return {
            COMPUTING: compute_s,
            MAKING: batch_wait_s(workload, machine, batch_s, compute_s),
            **{f"exchange for {part}": seconds for part, seconds in exchanged.items()},
        }

    loads = np.array([[workload.tokens(batch), workload.flops(batch)] for batch in workload.batches])
    return BatchTimes.fit(loads, [parts_of(batch) for batch in workload.batches])


@dataclass(frozen=True)
class Steps:
    """The simulated steps of a cluster."""

    seconds: np.ndarray
    """float64 [steps]."""
    parts: dict[str, float]
    """Part of a step → mean seconds. They add up to the mean step; computing is that of the mean rank."""
    tokens: float
    """Per step, over all ranks."""
    flops: float
    """Per step and rank, as the training log counts them."""

    @property
    def mean_s(self) -> float:
        """Seconds of a step."""
        return float(self.seconds.mean())


def simulate_steps(
    workload: Workload, draws: LengthDraws, times: BatchTimes, steps: int | None = None, seed: int = 0
) -> Steps:
    """Each step begins when all ranks have ended the one before.

    It takes the time of the tp_cp group with the most to do, then the exchanges of all ranks, for the busiest of them.
    ``steps``: None for as many as the limits above allow.
    """
    sequences = workload.config.trainer.sequences_per_iteration * workload.world_size
    steps = steps or min(MOST_STEPS, max(1, MOST_SEQUENCES // sequences))
    own = [part for part in times.lines if part not in _OF_ALL]
    shared = [part for part in times.lines if part in _OF_ALL]
    seconds, parts, tokens, flops = [], dict.fromkeys([*times.lines, WAITING], 0.0), 0.0, 0.0
    for step in range(steps):
        lengths, groups = draws.global_batch(seed, step)
        loads = workload.loads(lengths.items, lengths.candidates)
        of_groups = [
            np.bincount(groups, weights=weights, minlength=workload.dp_size) for weights in (loads.tokens, loads.costs)
        ]
        by_part = {part: times.of(part, *of_groups) for part in own}
        of_ranks = np.sum(list(by_part.values()), axis=0)
        exchanged = {part: float(times.of(part, *of_groups).max()) for part in shared}
        seconds.append(of_ranks.max() + sum(exchanged.values()))
        means = {part: float(each.mean()) for part, each in by_part.items()}
        for part, value in (means | exchanged | {WAITING: max(0.0, float(of_ranks.max() - of_ranks.mean()))}).items():
            parts[part] += value / steps
        tokens += float(loads.tokens.sum()) / steps
        flops += float(loads.costs.sum()) / steps / workload.world_size
    return Steps(np.array(seconds), parts, tokens, flops)


@dataclass(frozen=True)
class Simulated:
    """A run on a cluster of one size. All of it is an estimate."""

    workload: Workload
    memory: int
    """Bytes on the rank that needs the most."""
    steps: Steps
    fit_error: float
    """See ``BatchTimes.worst``."""
    saves: Checkpoints
    interval_steps: int
    """Steps between two saves."""
    time: Goodput

    @property
    def tokens_per_s(self) -> float:
        """Over all ranks, while the run trains."""
        return self.steps.tokens / self.steps.mean_s

    def efficiency(self, smallest: Simulated) -> float:
        """Tokens per second and rank, relative to a smaller cluster."""
        ranks = self.workload.world_size / smallest.workload.world_size
        return self.tokens_per_s / smallest.tokens_per_s / ranks

    @property
    def shares(self) -> dict[str, float]:
        """What the time of all ranks goes to → its share, in [0, 1]; only computing is of use."""
        of_steps = {part: self.time.kept * seconds / self.steps.mean_s for part, seconds in self.steps.parts.items()}
        return of_steps | {SAVING: self.time.saving, LOST: self.time.lost}

    @property
    def limit(self) -> tuple[str, float]:
        """What most time is lost to, and its share."""
        losses = {name: share for name, share in self.shares.items() if name != COMPUTING}
        return max(losses.items(), key=lambda each: each[1])


def simulate(
    workload: Workload, draws: LengthDraws, machine: Machine, steps: int | None = None, seed: int = 0
) -> Simulated:
    """Simulate steps, then the failures of a run of such steps that saves at the best interval.

    ``steps``: see ``simulate_steps``.
    """
    plan = plan_for(machine, workload)
    times = batch_times(workload, machine, plan)
    simulated = simulate_steps(workload, draws, times, steps, seed)
    saves, mtbf_s = checkpoints(workload, plan, machine), 3600 * machine.mtbf_hours / workload.world_size
    interval_steps = max(1, round(saves.best_interval_s(mtbf_s) / simulated.mean_s))
    time = goodput(interval_steps * simulated.mean_s, saves, mtbf_s, machine.restart_s, seed)
    return Simulated(
        workload, sum(memory(workload, plan).values()), simulated, times.worst, saves, interval_steps, time
    )
