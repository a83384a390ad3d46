"""An estimate as text for people and as JSON for programs."""

from __future__ import annotations

from typing import Any

from hstu.train.estimate.estimate import Estimate
from hstu.train.estimate.machine import Machine
from hstu.train.estimate.situation import Situation

_ROW = "  {:<60}{:>20}"


def as_text(found: Estimate, situation: Situation, machine: Machine) -> str:
    """Tables of memory, exchange and time, then what was assumed."""
    config, tp = situation.config, situation.tp_size
    hosts = -(-situation.world_size // situation.ranks_per_host)
    lines = [
        f"{config.task}, {', '.join(config.source_files) or 'bindings'}: {_count(situation.world_size, 'rank')} on "
        f"{_count(hosts, 'host')} ({machine.name}), tensor parallel {tp}, data parallel {situation.dp_size}",
        "",
        "memory per rank" + ("" if situation.world_size == 1 else ", of the rank that has most"),
        *(_ROW.format(kind, size(number)) for kind, number in found.memory.items() if number),
        _ROW.format("together", f"{size(found.memory_total)} of {size(found.memory_limit)}"),
    ]
    lines += ["", "exchanged per rank and step" + ("" if found.transfers else ": nothing")]
    lines += [
        _ROW.format(f"{t.name}, {t.kind} over {t.ranks}", f"{size(t.payload)} in {t.calls}") for t in found.transfers
    ]
    lines += ["", "step", *(_ROW.format(op, _time(seconds)) for op, seconds in found.computing.items())]
    parts = list(found.step.items())
    lines += [_ROW.format(part, _time(seconds)) for part, seconds in parts if seconds]
    lines += [
        _ROW.format("expected step", _time(found.step_s)),
        f"  {found.samples / found.step_s:,.0f} samples/s, {found.tokens / found.step_s:,.0f} tokens/s, "
        f"{found.tflops:.3g} TFLOPS a rank, MFU {found.mfu:.1%} of {found.peak_tflops:.3g} TFLOPS",
        "",
        *(f"note: {note}" for note in found.notes),
    ]
    if found.memory_total > found.memory_limit:
        lines.append("warning: that is more memory than a rank has")
    return "\n".join(lines)


def as_json(found: Estimate, situation: Situation) -> dict[str, Any]:
    """The same; bytes and seconds."""
    return {
        "world_size": situation.world_size,
        "tensor_parallel": situation.tp_size,
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
