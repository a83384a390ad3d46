"""Speed and memory of a rank and its links: data sheets, one H100 and assumptions; the peak of this CPU is measured."""

import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from typing import Any

import psutil
import torch

from hstu.base.errors import ConfigError
from hstu.config.problems import did_you_mean
from hstu.estimate.record import ATTENTION
from hstu.estimate.sharding import Transfer
from hstu.observe.throughput import data_sheet_tflops, peak_tflops
from hstu.ops.costs import Cost


@dataclass(frozen=True)
class Machine:
    """The device of one rank and its links.

    The efficiencies of matrix products, attention (CUTLASS) and memory are those of an H100 in bfloat16
    (docs/benchmarks/h100), assumed for all GPUs. Those of links, and all latencies, are unmeasured assumptions.
    """

    name: str
    memory_gb: float
    """Memory of a rank in 10^9 bytes."""
    peak_tflops: float
    """Peak of matrix products in the compute type."""
    memory_gb_s: float
    link_gb_s: float
    """One-way bandwidth from one rank to the others of its host."""
    network_gb_s: float
    """One-way bandwidth from one rank to other hosts."""
    link_latency_us: float = 20.0
    """Latency of one collective within a host."""
    network_latency_us: float = 50.0
    """Latency of one collective across hosts, without its messages."""
    hop_us: float = 5.0
    """Latency per sequential message between hosts, which form a tree for all_reduce and otherwise a ring."""
    message_us: float = 1.0
    """Fixed time per message that a rank sends in an all_to_all, in addition to the time for its bytes."""
    launch_us: float = 4.0
    """Time to launch one kernel on an otherwise idle host."""
    matmul_efficiency: float = 0.65
    """Share of the peak that matrix products reach."""
    attention_efficiency: float = 0.42
    """Share of the peak that attention reaches, by the FLOPs that hstu/ops/costs.py counts."""
    memory_efficiency: float = 0.75
    link_efficiency: float = 0.7
    overlaps: bool = True
    """Whether communication and copies run beside computation."""

    def seconds(self, name: str, cost: Cost) -> float:
        """Roofline time of an operator: the maximum of arithmetic and memory traffic, plus kernel launches."""
        efficiency = self.attention_efficiency if name == ATTENTION else self.matmul_efficiency
        arithmetic = cost.flops / (self.peak_tflops * 1e12 * efficiency)
        memory = cost.bytes / (self.memory_gb_s * 1e9 * self.memory_efficiency)
        return max(arithmetic, memory) + cost.launches * self.launch_us * 1e-6

    def transfer_seconds(self, transfer: Transfer, on_host: int) -> float:
        """Seconds of all calls of ``transfer`` with ``on_host`` ranks per host. Intra- and inter-host links overlap."""
        within, between = transfer.sent(on_host)
        moving = max(within / self.link_gb_s, between / self.network_gb_s) / (1e9 * self.link_efficiency)
        return moving + transfer.calls * self._latency_us(transfer, on_host) * 1e-6

    def _latency_us(self, transfer: Transfer, on_host: int) -> float:
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


# Name → (name in torch, memory GB, memory GB/s, one-way NVLink or PCIe GB/s, network GB/s per GPU), by the data sheets.
# The network is that of NVIDIA's own systems: NDR 400 Gb/s per GPU, HDR 200 Gb/s with A100, otherwise 100 Gb/s.
# Data sheets add both directions of PCIe x16 (64 GB/s for Gen4); the table has half of it.
_GPUS = {
    "b200": ("B200", 180, 8000, 900, 50),
    "h200": ("H200", 141, 4800, 450, 50),
    "h100": ("H100 80GB HBM3", 80, 3350, 450, 50),
    "a100": ("A100-SXM4-80GB", 80, 2039, 300, 25),
    "l40s": ("L40S", 48, 864, 32, 12.5),
    "a10": ("A10", 24, 600, 32, 12.5),
}


def gpu(name: str, dtype: torch.dtype) -> Machine:
    """The GPU ``name`` of the table ``_GPUS``, computing in ``dtype``. Raises ConfigError if its peak is unknown."""
    torch_name, memory, bandwidth, link, network = _GPUS[name]
    peak = data_sheet_tflops(torch_name, dtype)
    if peak is None:
        compute = str(dtype).removeprefix("torch.")
        others = [other for other, (name_in_torch, *_) in _GPUS.items() if data_sheet_tflops(name_in_torch, dtype)]
        raise ConfigError(
            f'NetworkArgs.dtype_str = "{compute}": the peak of {name} in this type is not known; use "bfloat16" or '
            f'"float16", or a device for which it is known: {", ".join(others)}'
        )
    return Machine(name, memory, peak, bandwidth, link, network)


def with_settings(machine: Machine, settings: Mapping[str, str]) -> Machine:
    """A copy of ``machine`` with some numbers replaced. Raises ConfigError for unknown names and impossible numbers."""
    names = [field.name for field in fields(Machine) if field.type is float]
    changed: dict[str, Any] = {}
    for name, text in settings.items():
        if name not in names:
            raise ConfigError(
                f"--set {name}: no number of a machine{did_you_mean(name, names)}; choose one of {', '.join(names)}"
            )
        with suppress(ValueError):
            changed[name] = float(text)
        if not 0 < changed.get(name, 0.0) < math.inf:
            raise ConfigError(f"--set {name}={text}: expected a number above 0")
    return replace(machine, **changed)


def this_cpu(ranks: int, dtype: torch.dtype) -> Machine:
    """A share of one of ``ranks`` ranks of this host. The peak is measured, and all else but the memory assumed."""
    peak, _ = peak_tflops(torch.device("cpu"), torch.float32 if dtype is torch.float32 else torch.bfloat16)
    return Machine(
        "this CPU",
        memory_gb=psutil.virtual_memory().total / 1e9 / ranks,
        peak_tflops=peak / ranks,
        memory_gb_s=10.0,
        link_gb_s=1.0,
        network_gb_s=1.0,
        link_latency_us=100.0,
        network_latency_us=100.0,
        matmul_efficiency=0.6,
        attention_efficiency=0.3,
        link_efficiency=1.0,
        overlaps=False,
    )
