"""This CPU as a machine: each operator of a step is timed, by itself (timed_ops.py); so are copies and gloo."""

from __future__ import annotations

import dataclasses
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import psutil
import torch
import torch.distributed as dist

from hstu.config.args import BenchmarkDatasetArgs
from hstu.data.sampler import SamplerPosition
from hstu.observe.peak import peak_tflops
from hstu.parallel.mesh import planned
from hstu.train.estimate.machine import Machine
from hstu.train.estimate.situation import Situation
from hstu.train.estimate.timed_ops import prepare
from hstu.train.estimate.traffic import Transfer
from hstu.train.estimate.work import Op
from hstu.train.sources import open_source

_NEIGHBOUR = """
import numpy as np
matrix, array = np.ones((384, 384), np.float32), np.ones(1 << 21, np.float32)
print(flush=True)
while True:
    for _ in range(20):
        matrix @ matrix
    for _ in range(4):
        array += 1
"""
_BUDGET_S = 0.15
_CACHE_BYTES = 1 << 25
"""What other operators of a step have touched since an operator's inputs were written: as large as a common cache."""


Clock = Callable[[], float]


@dataclass(frozen=True, kw_only=True)
class ThisCpu(Machine):
    """A rank's share of this host's cores, measured."""

    clock: Clock = time.perf_counter

    def seconds(self, op: Op) -> float:
        """Measured."""
        timed = prepare(op)
        once = seconds_of(timed.run, self.clock)
        more = max(0.0, seconds_of(timed.first, self.clock) - once) if timed.first else 0.0
        return timed.scale * (op.times * once * (1 + op.extra_forwards / 3) + more)

    def transfer_seconds(self, transfer: Transfer, over_hosts: bool) -> float:
        """As Machine, but gloo sums whole tensors where a part would do."""
        if transfer.kind == "reduce_scatter":
            transfer = dataclasses.replace(transfer, kind="all_reduce")
        return super().transfer_seconds(transfer, over_hosts)


@contextmanager
def this_cpu(situation: Situation, clock: Clock = time.perf_counter) -> Iterator[ThisCpu]:
    """The machine that a rank has where ``ranks_per_host`` of them share this host, whose other cores work meanwhile.

    clock: seconds; that of the process where others disturb it and it has one thread.
    """
    cores = len(os.sched_getaffinity(0))
    torch.set_num_threads(max(1, cores // situation.ranks_per_host))
    dtype = torch.float32 if situation.compute_bytes == 4 else torch.bfloat16
    latency_s, rate = _gloo() if situation.world_size > 1 else (1e-4, 1e9)
    with _neighbours(min(situation.ranks_per_host, cores) - 1):
        yield ThisCpu(
            name="this CPU",
            memory_gb=psutil.virtual_memory().total / 1e9 / situation.ranks_per_host,
            peak_tflops=peak_tflops(torch.device("cpu"), dtype).value,
            memory_gb_s=_copy_rate() / 1e9,
            link_gb_s=rate / 1e9,
            network_gb_s=rate / 1e9,
            link_latency_us=latency_s * 1e6,
            network_latency_us=latency_s * 1e6,
            link_efficiency=1.0,
            overlaps=False,
            clock=clock,
        )


@contextmanager
def _neighbours(count: int) -> Iterator[None]:
    """``count`` processes that do what ranks do, products and sums of arrays, for as long as this is open.

    Cores share caches, memory and power: each is slower when all are busy.
    """
    alone = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    command = [sys.executable, "-c", _NEIGHBOUR]
    processes = [subprocess.Popen(command, env=alone, stdout=subprocess.PIPE) for _ in range(count)]
    try:
        for process in processes:
            assert process.stdout is not None
            process.stdout.readline()  # it has begun
        yield
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def batch_seconds(situation: Situation, clock: Clock = time.perf_counter) -> float:
    """Median time in which a host makes a rank's batch; 0 for random data, which is made once."""
    config = situation.config
    if situation.source is None or isinstance(config.dataset, BenchmarkDatasetArgs):
        return 0.0
    alone = planned(situation.world_size, situation.ranks_per_host, 1, "cpu", config.trainer.seed)
    trainer = dataclasses.replace(config.trainer, data_workers=0)
    batches = open_source(dataclasses.replace(config, trainer=trainer), alone).train_batches(SamplerPosition())
    next(batches)
    times = []
    for _ in range(5):
        begun = clock()
        next(batches)
        times.append(clock() - begun)
    return statistics.median(times)


def seconds_of(run: Callable[[], object], clock: Clock = time.perf_counter) -> float:
    """Median duration of ``run``, its inputs no longer in a cache, after one that is not counted."""
    run()
    forgotten = torch.zeros(_CACHE_BYTES // 4)
    times: list[float] = []
    while len(times) < 3 or (sum(times) < _BUDGET_S and len(times) < 9):
        forgotten.add_(1)
        begun = clock()
        run()
        times.append(clock() - begun)
    return statistics.median(times)


def _copy_rate() -> float:
    source = torch.zeros(1 << 24)
    target = torch.empty_like(source)
    return 2 * source.nbytes / seconds_of(lambda: target.copy_(source))


def _gloo() -> tuple[float, float]:
    """(seconds of a small collective, bytes a second that a rank sends) between two ranks of this host."""
    store, results = dist.HashStore(), [(0.0, 0.0)] * 2

    def rank(number: int) -> None:
        group: Any = dist.ProcessGroupGloo(store, number, 2, timedelta(seconds=60))
        small, large = torch.zeros(1), torch.zeros(1 << 20)
        group.allreduce([small]).wait()
        durations = []
        for tensor, repeats in ((small, 20), (large, 5)):
            begun = time.perf_counter()
            for _ in range(repeats):
                group.allreduce([tensor]).wait()
            durations.append((time.perf_counter() - begun) / repeats)
        results[number] = durations[0], large.nbytes / max(durations[1] - durations[0], 1e-6)

    threads = [threading.Thread(target=rank, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results[0]
