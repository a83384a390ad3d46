"""The estimate of a run: memory, communication and step time, and its report as text and as JSON."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from hstu.estimate.machine import Machine
from hstu.estimate.memory import TableShards, beside_tables, memory, plan_tables
from hstu.estimate.operators import operators
from hstu.estimate.traffic import Transfer, transfers
from hstu.estimate.workload import Batch, Workload
from hstu.parallel.table_plan import UNLIMITED, TableRoom, TablesDoNotFit


@dataclass(frozen=True)
class Estimate:
    """Expected memory (bytes), traffic (bytes) and time (seconds). Where ranks differ, those of the busiest rank."""

    memory: dict[str, int]
    """Kind → bytes on a rank, for the largest batch."""
    transfers: tuple[Transfer, ...]
    """The collectives of a step on a typical batch."""
    computing: dict[str, float]
    """Operator → seconds of a step."""
    step: dict[str, float]
    """Part of a step → seconds. The parts add up to the step."""
    tokens: float
    """Per step, over all ranks."""
    samples: float
    """Per step, over all ranks."""
    flops: float
    """Per step on the mean rank, as the training log counts them."""
    peak_tflops: float
    memory_limit: float
    """Bytes of memory that a rank has."""
    notes: tuple[str, ...]

    @property
    def memory_total(self) -> int:
        """Bytes on a rank."""
        return sum(self.memory.values())

    @property
    def step_s(self) -> float:
        """Seconds of a step."""
        return sum(self.step.values())

    @property
    def tflops(self) -> float:
        """TFLOPS of the mean rank."""
        return self.flops / self.step_s / 1e12

    @property
    def mfu(self) -> float:
        """Model FLOPs utilisation: the share of the peak, in [0, 1]."""
        return self.tflops / self.peak_tflops


def estimate(workload: Workload, machine: Machine, batch_s: float = 0.0) -> Estimate:
    """The estimate for ``machine``. batch_s: seconds in which the host makes a batch."""
    plan, batches = plan_for(machine, workload), workload.batches
    exchanged = transfers(workload, workload.typical, plan)
    computing = computing_seconds(workload, machine, workload.typical, plan)
    compute = sum(computing.values())
    exposed = exchange_seconds(workload, machine, exchanged, computing)
    return Estimate(
        memory=memory(workload, plan),
        transfers=exchanged,
        computing=computing,
        step={
            "computing": compute,
            "waiting for the slowest rank": compute * (workload.straggling - 1),
            **{f"exchange for {part}": seconds for part, seconds in exposed.items()},
            "making batches": batch_wait_s(workload, machine, batch_s, compute),
        },
        tokens=sum(map(workload.tokens, batches)) / len(batches) * workload.dp_size,
        samples=sum(one.sequences for one in batches) / len(batches) * workload.dp_size,
        flops=sum(map(workload.flops, batches)) / len(batches) / workload.group_size,
        peak_tflops=machine.peak_tflops,
        memory_limit=machine.memory_gb * 1e9,
        notes=workload.notes,
    )


def computing_seconds(
    workload: Workload, machine: Machine, batch: Batch, plan: tuple[TableShards, ...]
) -> dict[str, float]:
    """Operator → seconds on a rank of the group that trains on ``batch``."""
    computing: dict[str, float] = {}
    for op in operators(workload, batch, plan):
        computing[op.name] = computing.get(op.name, 0.0) + machine.seconds(op)
    return computing


def exchange_seconds(
    workload: Workload, machine: Machine, exchanged: tuple[Transfer, ...], computing: dict[str, float]
) -> dict[str, float]:
    """What ranks exchange for → seconds that the operators of ``computing`` do not hide."""
    shared = "tensor parallelism" if workload.cp_size == 1 else "context parallelism"
    parts = {"world": "tables", "tensor": "tensor parallelism", "context": "context parallelism"}
    parts |= {"samples": shared} | dict.fromkeys(("data", "shards", "replicas"), "data parallelism")
    exposed = dict.fromkeys(parts.values(), 0.0)
    for transfer in exchanged:
        seconds = machine.transfer_seconds(transfer, workload.ranks_on_host(transfer.group, transfer.ranks))
        hidden = _hidden_seconds(transfer, seconds, workload, computing) if machine.overlaps else 0.0
        exposed[parts[transfer.group]] += max(0.0, seconds - hidden)
    return exposed


def plan_for(machine: Machine, workload: Workload) -> tuple[TableShards, ...]:
    """The plan of a run on ``machine``; where the tables do not fit, one that shows by how much."""
    has = int(machine.memory_gb * 1e9)
    if workload.device_type == "cuda":  # how much memory its host has is not known
        beside = beside_tables(workload)
        room = TableRoom(max(0, has - beside), UNLIMITED.host, beside)
    else:
        room = TableRoom(0, has)
    try:
        return plan_tables(workload, room)
    except TablesDoNotFit:
        return plan_tables(workload)


def _hidden_seconds(transfer: Transfer, seconds: float, workload: Workload, computing: dict[str, float]) -> float:
    """Seconds of computation that can hide ``transfer``."""
    compute = sum(computing.values())
    match transfer.behind:
        case "backward":  # all but the last bucket, which nothing follows
            return min(compute * 2 / 3, seconds * (1 - 1 / transfer.calls))
        case "weights":
            return (computing.get("W_uvqk", 0.0) + computing.get("W_o", 0.0)) / 3
        case "pipeline":
            return 0.0 if workload.config.trainer.pipeline_type == "none" else compute
    return 0.0


def batch_wait_s(workload: Workload, machine: Machine, batch_s: float, compute_s: float) -> float:
    """Seconds of a step that its computation does not hide of the ``batch_s`` in which the host makes a batch."""
    asynchronous = workload.config.trainer.data_workers > 0 or machine.overlaps
    return max(0.0, batch_s - compute_s) if asynchronous else batch_s


def as_json(found: Estimate, workload: Workload) -> dict[str, Any]:
    """The estimate for programs; bytes and seconds."""
    return {
        "world_size": workload.world_size,
        "tensor_parallel": workload.tp_size,
        "context_parallel": workload.cp_size,
        "memory": found.memory,
        "memory_total": found.memory_total,
        "transfers": [
            {
                "name": t.name,
                "collective": t.kind,
                "ranks": t.ranks,
                "calls": t.calls,
                "payload": t.payload,
                "wire": t.wire,
            }
            for t in found.transfers
        ],
        "computing": found.computing,
        "step": found.step,
        "step_s": found.step_s,
        "samples_per_s": found.samples / found.step_s,
        "tokens_per_s": found.tokens / found.step_s,
        "tflops": found.tflops,
        "mfu": found.mfu,
        "notes": list(found.notes),
    }


def as_text(found: Estimate, workload: Workload, machine: Machine) -> str:
    """The estimate for people: tables of memory, communication and time, then the assumptions."""
    return "\n".join(_lines(found, workload, machine))


def _lines(found: Estimate, workload: Workload, machine: Machine) -> Iterator[str]:
    config, ranks = workload.config, workload.world_size
    hosts = -(-ranks // workload.ranks_per_host)
    yield (
        f"{config.task}, {', '.join(config.source_files) or 'bindings'}: {_count(ranks, 'rank')} on "
        f"{_count(hosts, 'host')} ({machine.name}), tensor parallel {workload.tp_size}, "
        f"context parallel {workload.cp_size}, data parallel {workload.dp_size}"
    )
    yield "\nmemory per rank" + ("" if ranks == 1 else " (of the rank that needs the most)")
    yield from (_row(kind, size(number)) for kind, number in found.memory.items() if number)
    yield _row("total", f"{size(found.memory_total)} of {size(found.memory_limit)}")
    yield "\nexchanged per rank and step" + ("" if found.transfers else ": nothing")
    for t in found.transfers:
        yield _row(f"{t.name}, {t.kind} over {t.ranks}", f"{size(t.payload)} in {t.calls}")
    yield "\nstep"
    yield from (_row(op, _time(seconds)) for op, seconds in found.computing.items())
    yield from (_row(part, _time(seconds)) for part, seconds in found.step.items() if seconds)
    yield _row("expected step", _time(found.step_s))
    yield (
        f"  {found.samples / found.step_s:,.0f} samples/s, {found.tokens / found.step_s:,.0f} tokens/s, "
        f"{found.tflops:.3g} TFLOPS per rank, MFU {found.mfu:.1%} of {found.peak_tflops:.3g} TFLOPS\n"
    )
    yield from (f"note: {note}" for note in found.notes)
    if found.memory_total > found.memory_limit:
        yield "warning: this is more memory than a rank has"


def _row(name: str, value: str) -> str:
    return f"  {name:<60}{value:>20}"


def size(number: float) -> str:
    """Bytes in decimal units: "1.50 GB"."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if number >= factor:
            return f"{number / factor:.2f} {unit}"
    return f"{number:.0f} B"


def _time(seconds: float) -> str:
    return f"{1e3 * seconds:.2f} ms"


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' if number != 1 else ''}"
