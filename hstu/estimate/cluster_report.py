"""Simulated clusters of several sizes as a table and as JSON."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from tabulate import tabulate

from hstu.estimate.estimate import size
from hstu.estimate.machine import Machine
from hstu.estimate.simulate import WAITING, Simulated

_HEAD = ("GPUs", "step", "waiting", "exchange", "tokens/s", "efficiency", "save", "every", "goodput", "most is lost to")


def as_json(clusters: Sequence[Simulated]) -> list[dict[str, Any]]:
    """One object per size; seconds, bytes and shares in [0, 1]. Efficiency is relative to the first size."""
    return [_object(each, clusters[0]) for each in clusters]


def _object(each: Simulated, first: Simulated) -> dict[str, Any]:
    workload, steps = each.workload, each.steps
    return {
        "gpus": workload.world_size,
        "gpus_per_host": workload.ranks_per_host,
        "tensor_parallel": workload.tp_size,
        "context_parallel": workload.cp_size,
        "sharding": workload.dense_sharding,
        "shard_group_size": workload.shard_group_size,
        "memory": each.memory,
        "sequences": workload.config.trainer.sequences_per_iteration * workload.world_size,
        "step_s": steps.mean_s,
        "step_s_95": float(np.quantile(steps.seconds, 0.95)),
        "steps": len(steps.seconds),
        "parts_s": steps.parts,
        "fit_error": each.fit_error,
        "tokens_per_s": each.tokens_per_s,
        "tflops": steps.flops / steps.mean_s / 1e12,
        "efficiency": each.efficiency(first),
        "checkpoint": each.saves.size,
        "stall_s": each.saves.stall_s,
        "write_s": each.saves.write_s,
        "load_s": each.saves.load_s,
        "save_every_steps": each.interval_steps,
        "save_every_s": each.interval_steps * steps.mean_s,
        "goodput": each.time.kept,
        "shares": each.shares,
        "limit": each.limit[0],
    }


def as_text(clusters: Sequence[Simulated], machine: Machine) -> str:
    """The table, then the assumptions."""
    return "\n".join(_lines(clusters, machine))


def _lines(clusters: Sequence[Simulated], machine: Machine) -> Iterator[str]:
    workload = clusters[0].workload
    config = workload.config
    files = ", ".join(config.source_files) or "bindings"
    in_groups, sharding = config.data_parallel.shard_group_size, config.data_parallel.sharding
    sharding += f" over groups of {in_groups}" if in_groups else ""
    yield (
        f"{config.task}, {files}: {machine.name}, {workload.ranks_per_host} GPUs per host, tensor parallel "
        f"{workload.tp_size}, context parallel {workload.cp_size}, dense sharding {sharding}, "
        f"{config.trainer.sequences_per_iteration} sequences per GPU\n"
    )
    rows = [_HEAD, *(_row(each, clusters[0]) for each in clusters)]
    yield tabulate(rows, tablefmt="plain", disable_numparse=True, colalign=["right"] * (len(_HEAD) - 1) + ["left"])
    yield "\nnote: an estimate; none of it has been measured on GPUs"
    fewest = min(len(each.steps.seconds) for each in clusters)
    yield f"note: at least {fewest} steps are simulated; waiting and exchange are shares of them"
    yield "note: goodput is the share of the time that trains and is kept; the last column is a share of all time"
    yield f"note: a failure per {machine.mtbf_hours:,.0f} GPU hours, {machine.restart_s:g} s to restart"
    yield (
        f"note: checkpoints of {size(clusters[0].saves.size)} on storage of {machine.storage_gb_s:g} GB/s, "
        f"{machine.host_storage_gb_s:g} GB/s per host"
    )
    yield f"note: fitted times of batches are off by at most {max(each.fit_error for each in clusters):.1%}"
    yield from (f"note: {note}" for note in workload.notes)
    for each in clusters:
        if each.memory > machine.memory_gb * 1e9:
            yield (
                f"warning: on {each.workload.world_size} GPUs a rank needs {size(each.memory)} of memory and has "
                f"{machine.memory_gb:g} GB"
            )


def _row(each: Simulated, first: Simulated) -> tuple[str, ...]:
    steps, saves = each.steps, each.saves
    exchanged = sum(seconds for part, seconds in steps.parts.items() if part.startswith("exchange"))
    limit, share = each.limit
    return (
        f"{each.workload.world_size:,}",
        f"{1e3 * steps.mean_s:,.1f} ms",
        f"{steps.parts[WAITING] / steps.mean_s:.1%}",
        f"{exchanged / steps.mean_s:.1%}",
        f"{each.tokens_per_s:,.0f}",
        f"{each.efficiency(first):.1%}",
        f"{saves.stall_s + saves.write_s:,.1f} s",
        f"{each.interval_steps * steps.mean_s / 60:,.1f} min",
        f"{each.time.kept:.1%}",
        f"{limit} {share:.1%}",
    )
