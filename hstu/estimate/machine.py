"""What a rank, its links and its storage can do: a GPU by its data sheet and assumptions, this CPU by measurement."""

from __future__ import annotations

import dataclasses
import math
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from datetime import timedelta
from typing import Any

import psutil
import torch
import torch.distributed as dist

from hstu.base.errors import ConfigError
from hstu.config.args import BenchmarkDatasetArgs
from hstu.config.problems import did_you_mean
from hstu.data.sampling.sampler import SamplerPosition
from hstu.estimate.dry_run import UPDATE, DryRun, real_step
from hstu.estimate.record import ATTENTION
from hstu.estimate.tables import TableShards, table_steps
from hstu.estimate.transfer import Transfer
from hstu.estimate.workload import Batch, Workload
from hstu.observe.throughput import data_sheet_tflops, peak_tflops
from hstu.ops.costs import Cost
from hstu.parallel import mesh as meshes
from hstu.train.sources import open_source

Clock = Callable[[], float]
"""Seconds."""


@dataclass(frozen=True, kw_only=True)
class Machine:
    """The device of one rank, its links, and the cluster around it.

    Efficiencies, latencies, storage and failures are assumptions, the same for every GPU. None of them has been
    measured with this trainer. mtbf_hours is that of the training of Llama 3 (arXiv 2407.21783): 419 unexpected
    interruptions of 16,384 GPUs in 54 days.
    """

    name: str
    memory_gb: float
    """Memory of a rank in 10^9 bytes."""
    peak_tflops: float
    """Matrix products in the compute type."""
    memory_gb_s: float
    """Memory bandwidth."""
    link_gb_s: float
    """Bandwidth from one rank to the others of its host, one way."""
    network_gb_s: float
    """Bandwidth from one rank to other hosts, one way."""
    link_latency_us: float = 20.0
    """Latency of one collective within a host."""
    network_latency_us: float = 50.0
    """Latency of one collective across hosts, beside that of its messages."""
    hop_us: float = 5.0
    """Latency of each message that waits for another one: a tree of hosts for all_reduce, else a ring of hosts."""
    message_us: float = 1.0
    """Time of a rank to send one of the messages of an all_to_all, beside its bytes."""
    launch_us: float = 4.0
    """Time to launch one kernel, if the host does nothing else."""
    matmul_efficiency: float = 0.6
    """Share of the peak that matrix products reach."""
    attention_efficiency: float = 0.3
    """Share of the peak that the attention reaches, by the operations that hstu/ops/costs.py counts."""
    memory_efficiency: float = 0.75
    link_efficiency: float = 0.7
    mtbf_hours: float = 50_000.0
    """Mean time between failures that end the run, of one rank with its part of host and network."""
    restart_s: float = 300.0
    """From a failure to the start of loading: it is noticed, the host is replaced, and the processes start."""
    storage_gb_s: float = 100.0
    """Bandwidth of the shared storage, for all hosts together."""
    host_storage_gb_s: float = 5.0
    """Bandwidth of one host to the shared storage."""
    save_s: float = 5.0
    """Time of a save beside its bytes: ranks agree on who writes what, sync and commit."""
    host_copy_gb_s: float = 10.0
    """Bandwidth from the memory of a rank to that of its host, for a checkpoint in the background."""
    overlaps: bool = True
    """Whether communication and copies run beside computation."""

    def seconds(self, name: str, cost: Cost) -> float:
        """Seconds of an operator by roofline: the longer of arithmetic and traffic, plus launches."""
        efficiency = self.attention_efficiency if name == ATTENTION else self.matmul_efficiency
        arithmetic = cost.flops / (self.peak_tflops * 1e12 * efficiency)
        memory = cost.bytes / (self.memory_gb_s * 1e9 * self.memory_efficiency)
        return max(arithmetic, memory) + cost.launches * self.launch_us * 1e-6

    def transfer_seconds(self, transfer: Transfer, on_host: int) -> float:
        """Seconds of all calls of ``transfer``, of whose ranks a host has ``on_host``.

        Links within hosts and between them work at the same time.
        """
        within, between = transfer.sent(on_host)
        moving = max(within / self.link_gb_s, between / self.network_gb_s) / (1e9 * self.link_efficiency)
        return moving + transfer.calls * self._latency_us(transfer, on_host) * 1e-6

    def _latency_us(self, transfer: Transfer, on_host: int) -> float:
        """Of one call."""
        hosts = -(-transfer.ranks // on_host)
        if hosts == 1:
            return self.link_latency_us
        match transfer.kind:
            case "all_reduce":
                messages = 2 * math.ceil(math.log2(hosts)) * self.hop_us
            case "all_to_all":
                messages = (transfer.ranks - on_host) * self.message_us
            case _:
                messages = (hosts - 1) * self.hop_us
        return self.network_latency_us + messages


# Name → (name in torch, memory GB, memory GB/s, NVLink or PCIe GB/s one way, network GB/s per GPU), by the makers' data
# sheets. The network is that of the makers' own systems: NDR 400 Gb/s per GPU, HDR 200 Gb/s with A100, else 100 Gb/s.
# PCIe x16 is half of the data sheets' sum of both ways: 64 GB/s for Gen4.
_GPUS = {
    "b200": ("B200", 180, 8000, 900, 50),
    "h200": ("H200", 141, 4800, 450, 50),
    "h100": ("H100 80GB HBM3", 80, 3350, 450, 50),
    "a100": ("A100-SXM4-80GB", 80, 2039, 300, 25),
    "l40s": ("L40S", 48, 864, 32, 12.5),
    "a10": ("A10", 24, 600, 32, 12.5),
}


def gpu(name: str, dtype: torch.dtype) -> Machine:
    """The GPU called ``name`` in this table, computing in ``dtype``. Raises ConfigError if its peak is not known."""
    torch_name, memory, bandwidth, link, network = _GPUS[name]
    peak = data_sheet_tflops(torch_name, dtype)
    if peak is None:
        compute = str(dtype).removeprefix("torch.")
        others = [other for other, (name_in_torch, *_) in _GPUS.items() if data_sheet_tflops(name_in_torch, dtype)]
        raise ConfigError(
            f'NetworkArgs.dtype_str = "{compute}": the peak of {name} in this type is not known; use "bfloat16" or '
            f'"float16", or a device for which it is known: {", ".join(others)}'
        )
    return Machine(
        name=name,
        memory_gb=memory,
        peak_tflops=peak,
        memory_gb_s=bandwidth,
        link_gb_s=link,
        network_gb_s=network,
    )


def with_settings(machine: Machine, settings: Mapping[str, str]) -> Machine:
    """``machine`` with some numbers replaced by name. Raises ConfigError for unknown names and impossible numbers."""
    names = [field.name for field in fields(Machine) if field.type == "float"]
    changed: dict[str, float] = {}
    for name, text in settings.items():
        if name not in names:
            raise ConfigError(
                f"--set {name}: no number of a machine{did_you_mean(name, names)}; choose one of {', '.join(names)}"
            )
        try:
            changed[name] = float(text)
        except ValueError:
            changed[name] = 0.0
        if not 0 < changed[name] < float("inf"):
            raise ConfigError(f"--set {name}={text}: expected a number above 0")
    return replace(machine, **changed)  # type: ignore[arg-type]


@dataclass(frozen=True, kw_only=True)
class ThisCpu(Machine):
    """A rank's share of the cores of this host, measured."""

    clock: Clock = time.perf_counter

    def step_seconds(
        self, workload: Workload, batch: Batch, run: DryRun, plan: tuple[TableShards, ...]
    ) -> dict[str, float]:
        """Part of a step → seconds, measured: the step of a rank without its tables and exchanges, and its tables.

        A long step is measured with fewer sequences.
        """
        share = max(1, round(batch.sequences * min(1.0, _MOST_FLOPS / workload.flops(batch))))
        size = workload.group_size
        part = batch.part(0, -(-batch.sequences // max(size, share)))
        more = workload.flops(batch) / workload.flops(part)
        with real_step(workload, part) as (step, optimizers):
            updates: list[float] = []
            update = optimizers.step

            def timed(*args: Any) -> None:
                begun = self.clock()
                update(*args)
                updates.append(self.clock() - begun)

            optimizers.step = timed  # type: ignore[method-assign, assignment]
            whole = seconds_of(step, self.clock)
        updating = statistics.median(updates)
        found = {"forward and backward": more * (whole - updating), UPDATE: updating / workload.shard_group_size}
        mesh = meshes.start()
        try:
            steps = table_steps(workload, run, plan, mesh)
            return found | {name: seconds_of(table, self.clock) for name, table in steps.items()}
        finally:
            meshes.finish()

    def transfer_seconds(self, transfer: Transfer, on_host: int) -> float:
        """As Machine, but gloo reduces whole tensors for a reduce-scatter."""
        if transfer.kind == "reduce_scatter":
            transfer = replace(transfer, kind="all_reduce")
        return super().transfer_seconds(transfer, on_host)


@contextmanager
def this_cpu(workload: Workload, clock: Clock = time.perf_counter) -> Iterator[ThisCpu]:
    """The share of this host that one of ``ranks_per_host`` ranks has, with the other cores busy meanwhile.

    clock: wall time, or process time for one thread on a machine with other work.
    """
    cores, threads = len(os.sched_getaffinity(0)), torch.get_num_threads()
    dtype = torch.float32 if workload.element_size == 4 else torch.bfloat16
    latency_s, rate = _gloo() if workload.world_size > 1 else (1e-4, 1e9)
    torch.set_num_threads(max(1, cores // workload.ranks_per_host))
    try:
        with _busy_cores(min(workload.ranks_per_host, cores) - 1):
            yield ThisCpu(
                name="this CPU",
                memory_gb=psutil.virtual_memory().total / 1e9 / workload.ranks_per_host,
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
    finally:
        torch.set_num_threads(threads)


_WORK_OF_A_RANK = """
import numpy as np
matrix, array = np.ones((384, 384), np.float32), np.ones(1 << 21, np.float32)
print(flush=True)
while True:
    for _ in range(20):
        matrix @ matrix
    for _ in range(4):
        array += 1
"""


@contextmanager
def _busy_cores(count: int) -> Iterator[None]:
    """Inside, ``count`` processes work as ranks do: cores share caches, memory and power, so each is then slower."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    command = [sys.executable, "-c", _WORK_OF_A_RANK]
    processes = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE) for _ in range(count)]
    try:
        for process in processes:
            assert process.stdout is not None
            process.stdout.readline()  # its first line shows that it works
        yield
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def batch_seconds(workload: Workload, clock: Clock = time.perf_counter) -> float:
    """Median time in which a host makes the batch of a rank; 0 for random data, which is made once, and for no data."""
    config = workload.config
    if not workload.has_data or isinstance(config.dataset, BenchmarkDatasetArgs):
        return 0.0
    trainer = dataclasses.replace(config.trainer, data_workers=0)
    source = open_source(dataclasses.replace(config, trainer=trainer), world_size=workload.world_size)
    batches = source.train_batches(SamplerPosition())
    next(batches)
    times = []
    for _ in range(5):
        begun = clock()
        next(batches)
        times.append(clock() - begun)
    return statistics.median(times)


_MOST_FLOPS = 4e10
"""Operations of a step that is measured."""
_BUDGET_S = 0.5
_CACHE_BYTES = 1 << 25
"""As large as a common cache: what the other operators of a step touch between two runs of one."""


def seconds_of(run: Callable[[], object], clock: Clock = time.perf_counter) -> float:
    """Median duration of ``run`` with its inputs no longer in a cache, after a first run that is not counted."""
    run()
    evicting = torch.zeros(_CACHE_BYTES // 4)
    times: list[float] = []
    while len(times) < 3 or (sum(times) < _BUDGET_S and len(times) < 9):
        evicting.add_(1)
        begun = clock()
        run()
        times.append(clock() - begun)
    return statistics.median(times)


def _copy_rate() -> float:
    """Bytes per second, read and written."""
    source = torch.zeros(1 << 24)
    target = torch.empty_like(source)
    return 2 * source.nbytes / seconds_of(lambda: target.copy_(source))


def _gloo() -> tuple[float, float]:
    """(seconds of a small collective, bytes per second that a rank sends) between two ranks of this host."""
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
