"""What a rank and its links can do: a GPU by its data sheet and assumptions, this CPU by measurement."""

from __future__ import annotations

import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any

import psutil
import torch

from hstu.base.errors import ConfigError
from hstu.config.args import ContextParallelArgs, DataParallelArgs, TensorModelParallelArgs
from hstu.config.problems import did_you_mean
from hstu.data.sampling.sampler import SamplerPosition
from hstu.estimate.record import ATTENTION
from hstu.estimate.sharding import Transfer
from hstu.estimate.workload import Workload
from hstu.observe.throughput import data_sheet_tflops, peak_tflops
from hstu.ops.costs import Cost
from hstu.parallel import mesh as meshes
from hstu.train.builder import build_loss_scale, build_model, build_pipeline
from hstu.train.sources import open_source

Clock = Callable[[], float]
"""Seconds."""


@dataclass(frozen=True, kw_only=True)
class Machine:
    """The device of one rank and its links.

    Efficiencies and latencies are assumptions, the same for every GPU. None has been measured with this trainer.
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
    changed: dict[str, Any] = {}
    for name, text in settings.items():
        if name not in names:
            raise ConfigError(
                f"--set {name}: no number of a machine{did_you_mean(name, names)}; choose one of {', '.join(names)}"
            )
        try:
            changed[name] = float(text)
        except ValueError:
            changed[name] = 0.0
        if not 0 < changed[name] < math.inf:
            raise ConfigError(f"--set {name}={text}: expected a number above 0")
    return replace(machine, **changed)


# --- this CPU ------------------------------------------------------------------------------------------------------

_MOST_FLOPS = 4e10
"""Operations of a step that is measured."""
_BUDGET_S, _LEAST_STEPS = 2.0, 5


@dataclass(frozen=True, kw_only=True)
class ThisCpu(Machine):
    """A rank's share of the cores of this host, measured."""

    clock: Clock = time.perf_counter

    def step_seconds(self, workload: Workload) -> float:
        """Median seconds in which a rank makes a batch and trains on it if it is alone, measured.

        A long step is measured with fewer sequences.
        """
        config, trainer = workload.config, workload.config.trainer
        operations = workload.flops(workload.typical) / workload.group_size
        sequences = max(1, round(trainer.train_batch_size * min(1.0, _MOST_FLOPS / operations)))
        alone = replace(
            config,
            trainer=replace(trainer, train_batch_size=sequences),
            tensor_parallel=TensorModelParallelArgs(),
            context_parallel=ContextParallelArgs(),
            data_parallel=DataParallelArgs(),
        )
        threads, mesh = torch.get_num_threads(), meshes.start()
        torch.set_num_threads(threads)  # start gives this rank all cores
        try:
            source = open_source(alone, mesh)
            model, optimizers = build_model(alone, source, mesh)
            pipeline = build_pipeline(alone.trainer, model, optimizers, mesh, build_loss_scale(alone))
            batches = source.train_batches(SamplerPosition())
            pipeline.progress(batches)
            times: list[float] = []
            while len(times) < _LEAST_STEPS or sum(times) < _BUDGET_S:
                begun = self.clock()
                pipeline.progress(batches)
                times.append(self.clock() - begun)
        finally:
            meshes.finish()
        return statistics.median(times) * trainer.train_batch_size / sequences

    def transfer_seconds(self, transfer: Transfer, on_host: int) -> float:
        """As Machine, but gloo reduces whole tensors for a reduce-scatter."""
        if transfer.kind == "reduce_scatter":
            transfer = replace(transfer, kind="all_reduce")
        return super().transfer_seconds(transfer, on_host)


@contextmanager
def this_cpu(workload: Workload, clock: Clock = time.perf_counter) -> Iterator[ThisCpu]:
    """The share of this host that one of ``ranks_per_host`` ranks has, with the other cores busy meanwhile.

    The numbers of its links are assumptions.
    clock: wall time, or process time for one thread on a machine with other work.
    """
    cores, threads = len(os.sched_getaffinity(0)), torch.get_num_threads()
    torch.set_num_threads(max(1, cores // workload.ranks_per_host))
    dtype = torch.float32 if workload.config.network.dtype_str == "float32" else torch.bfloat16
    try:
        with _busy_cores(min(workload.ranks_per_host, cores) - 1):
            yield ThisCpu(
                name="this CPU",
                memory_gb=psutil.virtual_memory().total / 1e9 / workload.ranks_per_host,
                peak_tflops=peak_tflops(torch.device("cpu"), dtype).value,
                memory_gb_s=10.0,  # steps are measured, so nothing depends on it
                link_gb_s=1.0,
                network_gb_s=1.0,
                link_latency_us=100.0,
                network_latency_us=100.0,
                link_efficiency=1.0,
                overlaps=False,
                clock=clock,
            )
    finally:
        torch.set_num_threads(threads)


_WORK_OF_A_RANK = """
import numpy as np
matrix, array = np.ones((384, 384), np.float32), np.ones(1 << 19, np.float32)
print(flush=True)
while True:
    matrix @ matrix
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
