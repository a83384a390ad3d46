"""Checkpoints and failures of a long run: how long a save takes, how often to save, and what share of time is kept."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from hstu.estimate.machine import Machine
from hstu.estimate.memory import TableShards, dense_state_bytes, table_bytes_by_rank
from hstu.estimate.workload import Workload
from hstu.ops.costs import FLOAT32

_FAILURES = 20_000
"""Failures that are simulated: the standard error of the goodput is below .002."""


@dataclass(frozen=True)
class Checkpoints:
    """What saving and loading costs."""

    size: int
    """Bytes of a checkpoint."""
    stall_s: float
    """Seconds in which training stands still for a save."""
    write_s: float
    """Seconds after the stall until the checkpoint is committed; 0 unless it is written in the background."""
    load_s: float

    def best_interval_s(self, mtbf_s: float) -> float:
        """Seconds of training between two saves, so that saves and failures lose the least.

        Young's formula with the further terms of J. T. Daly, "A higher order estimate of the optimum checkpoint
        interval for restart dumps", FGCS 22, 2006. A save in the background ends before the next one begins.
        """
        if self.stall_s >= 2 * mtbf_s:
            return mtbf_s
        ratio = math.sqrt(self.stall_s / (2 * mtbf_s))
        interval = math.sqrt(2 * self.stall_s * mtbf_s) * (1 + ratio / 3 + ratio**2 / 9) - self.stall_s
        return max(interval, self.write_s)


def checkpoints(workload: Workload, plan: tuple[TableShards, ...], machine: Machine) -> Checkpoints:
    """Those of a run: each rank writes its shards of the tables, and an equal part of what all ranks hold."""
    one = replace(
        workload.config,
        tensor_parallel=replace(workload.config.tensor_parallel, tensor_model_parallel_size=1),
        context_parallel=replace(workload.config.context_parallel, context_parallel_size=1),
    )
    whole = replace(workload, config=one, world_size=1, ranks_per_host=1)
    dense = FLOAT32 * (sum(whole.dense_parameters.values()) + whole.replicated_elements) + dense_state_bytes(whole)
    by_rank = table_bytes_by_rank(workload, plan).sum(axis=1) + dense / workload.world_size
    hosts = np.arange(workload.world_size) // workload.ranks_per_host
    busiest_host = np.bincount(hosts, weights=by_rank).max()
    size = by_rank.sum()
    moving_s = max(size / machine.storage_gb_s, busiest_host / machine.host_storage_gb_s) / 1e9
    writing_s = moving_s + machine.save_s
    if workload.config.trainer.ckpt_async:
        return Checkpoints(round(size), by_rank.max() / machine.host_copy_gb_s / 1e9, writing_s, moving_s)
    return Checkpoints(round(size), writing_s, 0.0, moving_s)


@dataclass(frozen=True)
class Goodput:
    """Shares of the time of a run, which add up to 1."""

    kept: float
    """Training whose result is kept."""
    saving: float
    """Training stands still for saves."""
    lost: float
    """Training that a failure undoes, and restarts."""


def goodput(interval_s: float, saves: Checkpoints, mtbf_s: float, restart_s: float, seed: int = 0) -> Goodput:
    """Simulate a run that saves after every ``interval_s`` seconds of training, over many failures.

    ``mtbf_s``: mean time between failures of the run, exponentially distributed; infinite without failures. After a
    failure, the run restarts, loads the last committed checkpoint, and trains until the next failure. A failure may
    also come before the restart has ended.
    """
    period = interval_s + saves.stall_s
    if math.isinf(mtbf_s):
        return Goodput(interval_s / period, saves.stall_s / period, 0.0)
    until_failure = mtbf_s * np.random.default_rng(seed).exponential(size=_FAILURES)
    training = np.maximum(until_failure - restart_s - saves.load_s - saves.write_s, 0.0)
    periods = np.floor(training / period).sum() / until_failure.sum()
    kept, saving = periods * interval_s, periods * saves.stall_s
    return Goodput(float(kept), float(saving), float(1 - kept - saving))
