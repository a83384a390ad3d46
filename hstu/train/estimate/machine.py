"""What a device and its links can do, by data sheet, and how much of it we count on.

The efficiencies are assumptions, the same for every GPU: no number of this table has been measured with this trainer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace

import torch

from hstu.config.errors import ConfigError
from hstu.config.problems import did_you_mean
from hstu.observe.peak import data_sheet_tflops
from hstu.train.estimate.traffic import Transfer
from hstu.train.estimate.work import Attention, Op


@dataclass(frozen=True, kw_only=True)
class Machine:
    """One device of a run and its links."""

    name: str
    memory_gb: float
    """10^9 bytes of memory a rank."""
    peak_tflops: float
    """Matrix products in the compute type."""
    memory_gb_s: float
    """Memory bandwidth."""
    link_gb_s: float
    """From one rank to others of its host, one way."""
    network_gb_s: float
    """From one rank to other hosts, one way."""
    link_latency_us: float = 20.0
    """Of one collective within a host."""
    network_latency_us: float = 50.0
    """Of one collective over hosts."""
    launch_us: float = 4.0
    """Of one kernel, where the host has nothing else to do."""
    matmul_efficiency: float = 0.6
    """Share of the peak that matrix products reach."""
    attention_efficiency: float = 0.3
    """Share of the peak that the attention reaches, by the operations that hstu/observe/flops.py counts."""
    memory_efficiency: float = 0.75
    link_efficiency: float = 0.7
    overlaps: bool = True
    """Exchanges and copies run beside computation."""

    def seconds(self, op: Op) -> float:
        """Of all of ``op``: the larger of arithmetic and memory traffic, and the launches."""
        efficiency = self.attention_efficiency if isinstance(op, Attention) else self.matmul_efficiency
        arithmetic = op.flops / (self.peak_tflops * 1e12 * efficiency)
        memory = op.moved / (self.memory_gb_s * 1e9 * self.memory_efficiency)
        once = max(arithmetic, memory) + op.launches * self.launch_us * 1e-6
        return op.times * once * (1 + op.extra_forwards / 3)  # backward is two thirds

    def transfer_seconds(self, transfer: Transfer, over_hosts: bool) -> float:
        """Of all calls of ``transfer``."""
        rate = self.network_gb_s if over_hosts else self.link_gb_s
        latency = self.network_latency_us if over_hosts else self.link_latency_us
        return transfer.wire / (rate * 1e9 * self.link_efficiency) + transfer.calls * latency * 1e-6


# Name → (as torch names it, memory GB, memory GB/s, NVLink or PCIe GB/s one way, network GB/s a GPU): the makers' data
# sheets; the network as in the makers' own systems: NDR 400 Gb/s a GPU, HDR 200 Gb/s with A100, one 100 Gb/s else.
_GPUS = {
    "b200": ("B200", 180, 8000, 900, 50),
    "h200": ("H200", 141, 4800, 450, 50),
    "h100": ("H100 80GB HBM3", 80, 3350, 450, 50),
    "a100": ("A100-SXM4-80GB", 80, 2039, 300, 25),
    "l40s": ("L40S", 48, 864, 32, 12.5),
    "a10": ("A10", 24, 600, 32, 12.5),
}


def gpu(name: str, dtype: torch.dtype) -> Machine:
    """The machine called ``name`` in this table, computing in ``dtype``."""
    torch_name, memory, bandwidth, link, network = _GPUS[name]
    peak = data_sheet_tflops(torch_name, dtype)
    assert peak is not None, f"{torch_name} has no {dtype} peak in observe/peak.py"
    return Machine(
        name=name,
        memory_gb=memory,
        peak_tflops=peak,
        memory_gb_s=bandwidth,
        link_gb_s=link,
        network_gb_s=network,
    )


def with_settings(machine: Machine, settings: Mapping[str, str]) -> Machine:
    """``machine`` with numbers of one's own, by name. Raises ConfigError for a name or a number that is none."""
    names = [field.name for field in fields(Machine) if field.type == "float"]
    changed: dict[str, float] = {}
    for name, text in settings.items():
        if name not in names:
            raise ConfigError(f"--set {name}: no number of a machine{did_you_mean(name, names)} ({', '.join(names)})")
        try:
            changed[name] = float(text)
        except ValueError:
            changed[name] = 0.0
        if not 0 < changed[name] < float("inf"):
            raise ConfigError(f"--set {name}={text}: expected a number above 0")
    return replace(machine, **changed)  # type: ignore[arg-type]
