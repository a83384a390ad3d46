"""Compares many estimates of one run: the fastest plan within the memory (``--fit``), and clusters (``--simulate``).

Plans differ in the options with ``changes="speed"``, the group sizes and the number of micro-batches. All train the
same global batches, so their losses differ only by rounding and dropout.

A cluster is simulated step by step: a step lasts as long as its slowest rank. The time of a batch is a linear function
of its tokens and FLOPs, fitted to the estimates of some batches.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from typing import Any

import numpy as np
from tabulate import tabulate

from hstu.base.errors import ConfigError
from hstu.config.args import DataParallelArgs, NetworkArgs
from hstu.config.option import Args, options_of
from hstu.config.rules import validate
from hstu.config.run_config import RunConfig
from hstu.data.sampling.sampler import TrainSampler
from hstu.estimate.estimate import (
    COMPUTING,
    WAITING,
    Estimate,
    estimate,
    memory,
    plan_for,
    size,
    step_parts,
    step_times,
)
from hstu.estimate.machine import Machine
from hstu.estimate.sharding import TableShards
from hstu.estimate.workload import MOST_GROUPS, Batch, Workload, batches_of_groups, plan_workload
from hstu.train.batch_source import SampleLengths, choose_partition
from hstu.train.sources import open_source

USED = 0.9
"""Share of the memory that a plan may use. CUDA's context, NCCL's buffers and fragmentation need the rest."""
NOT_ESTIMATED = ("kernel_backend", "strict_kernel_backend", "compile")
"""Options whose effect on speed is not estimated."""


@dataclass(frozen=True)
class Plan:
    """One way to train, and its estimate."""

    config: RunConfig
    found: Estimate

    @property
    def fits(self) -> bool:
        """Whether it needs at most the share ``USED`` of a rank's memory."""
        return self.found.memory_total <= USED * self.found.memory_limit

    def bindings(self, file: RunConfig) -> list[str]:
        """The gin bindings that turn ``file`` into this plan; empty if both are equal."""
        return [
            f"{type(own).__name__}.{option.name} = {getattr(own, option.name)!r}"
            for own, other in zip(self.config.all_args(), file.all_args(), strict=True)
            for option in options_of(type(own))
            if getattr(own, option.name) != getattr(other, option.name)
        ]


def search(config: RunConfig, world_size: int, ranks_per_host: int, machine: Machine) -> list[Plan]:
    """All plans, each with as few micro-batches as fit: fitting plans by step time, then the others by memory."""
    plans, tried = list[Plan](), list[RunConfig]()
    allowed = set(validate(config, world_size))
    for tp, cp in product(range(1, ranks_per_host + 1), repeat=2):
        is_divided = all(number % (tp * cp) == 0 for number in (world_size, ranks_per_host))
        if not is_divided or config.network.num_attention_heads % tp:
            continue
        planned: Workload | None = None
        for network, sharding in product(_ways(NetworkArgs), _ways(DataParallelArgs)):
            changed = replace(
                config,
                network=replace(config.network, **network),
                tensor_parallel=replace(config.tensor_parallel, tensor_model_parallel_size=tp),
                context_parallel=replace(config.context_parallel, context_parallel_size=cp),
                data_parallel=replace(config.data_parallel, **sharding),
            )
            if changed in tried:  # an option without effect has its default in a RunConfig
                continue
            tried.append(changed)
            try:
                if not allowed.issuperset(validate(changed, world_size)):
                    continue
            except ConfigError:
                continue
            # Lengths and tables depend only on the group sizes.
            planned = planned or plan_workload(changed, world_size, ranks_per_host, "cuda")
            plans.append(_with_fewest_micro_batches(replace(planned, config=changed), machine))
    fitting = sorted((plan for plan in plans if plan.fits), key=lambda plan: plan.found.step_s)
    return fitting + sorted((plan for plan in plans if not plan.fits), key=lambda plan: plan.found.memory_total)


def _ways(cls: type[Args]) -> list[dict[str, Any]]:
    """All combinations of values of the switches and choices of ``cls`` that change only the speed."""
    options = [option for option in options_of(cls) if option.metadata["changes"] == "speed"]
    values = {
        option.name: option.metadata["choices"] or (False, True)
        for option in options
        if option.name not in NOT_ESTIMATED and (option.metadata["choices"] or option.type == "bool")
    }
    return [dict(zip(values, chosen, strict=True)) for chosen in product(*values.values())]


def _with_fewest_micro_batches(workload: Workload, machine: Machine) -> Plan:
    """The fitting plan with the fewest micro-batches; if none fits, the plan with the most."""
    config, trainer = workload.config, workload.config.trainer
    sequences = trainer.sequences_per_iteration
    if trainer.tokens_per_rank is not None:  # cannot be divided
        return Plan(config, estimate(workload, machine))
    for count in (count for count in range(1, sequences + 1) if sequences % count == 0):
        divided = replace(trainer, train_batch_size=sequences // count, gradient_accumulation_steps=count)
        changed = replace(config, trainer=divided)
        plan = Plan(changed, estimate(replace(workload, config=changed), machine))
        if plan.fits:
            break
    return plan


def plans_as_text(plans: Sequence[Plan], file: RunConfig) -> str:
    """A table of the Pareto-optimal plans in speed and memory, then the gin lines of the fastest plan."""
    best = plans[0]
    limit = f"within {USED * best.found.memory_limit / 1e9:.1f} GB, {USED:.0%} of a rank's memory"
    rows = [["tokens/s", "step", "memory", "differs from the file in"]]
    smallest = float("inf")
    for plan in plans if best.fits else [best]:
        found = plan.found
        if found.memory_total >= smallest:
            continue
        smallest = found.memory_total
        differs = ", ".join(line.partition(".")[2].replace(" = ", "=") for line in plan.bindings(file)) or "nothing"
        memory_gb = f"{found.memory_total / 1e9:.1f} GB"
        rows.append([f"{found.tokens / found.step_s:,.0f}", f"{1e3 * found.step_s:.1f} ms", memory_gb, differs])
    table = tabulate(rows, tablefmt="plain", disable_numparse=True, colalign=["right", "right", "right", "left"])
    last = ["# the fastest:", *(best.bindings(file) or ["# the file as it is"])]
    if not best.fits:
        last = ["no plan fits, and this one is the smallest: use more ranks, shorter sequences, or a smaller model"]
    return "\n".join([f"{limit}; all plans train the global batches of the file", "", table, "", *last])


MOST_STEPS, MOST_SEQUENCES = 100, 1 << 22
"""Limits of a simulation. With many ranks fewer steps suffice to find the time of the slowest rank."""
DRAWN_RANKS = 64  # ranks for which random data has samples; clusters of any size draw from them
_OF_ALL = ("exchange for tables", "exchange for data parallelism")
"""Exchanges among all ranks. The others stay within a tp_cp group."""


@dataclass(frozen=True)
class Cluster:
    """The estimate of a simulated run, in seconds and bytes."""

    gpus: int
    memory: int
    """Bytes on the rank that needs the most."""
    step_s: float
    parts_s: dict[str, float]
    """Part of a step → mean seconds. They add up to ``step_s``. Computing is averaged over the ranks."""
    tokens_per_s: float
    tflops: float

    @property
    def limit(self) -> str:
        """The part of a step, other than computing, that takes the most time."""
        return max((name for name in self.parts_s if name != COMPUTING), key=self.parts_s.__getitem__)


def simulate(config: RunConfig, gpus: int, ranks_per_host: int, machine: Machine, steps: int | None = None) -> Cluster:
    """Simulates ``steps`` (None: as many as the limits allow) with lengths drawn from the data."""
    source = open_source(config, world_size=DRAWN_RANKS)
    workload = Workload(config, gpus, ranks_per_host, "cuda", source, ())
    batches: list[Batch] = []
    while len(batches) < MOST_GROUPS:
        batches += batches_of_groups(source.train_lengths, *draw_step(workload, len(batches)), workload.dp_size)
    batches.sort(key=workload.flops)
    spread = np.linspace(0, len(batches) - 1, MOST_GROUPS).astype(int)
    workload = replace(workload, steps=(tuple(batches[index] for index in spread),))
    plan = plan_for(machine, workload)
    parts, tokens, flops = simulate_steps(workload, fit_times(workload, machine, plan), steps, seed=0)
    step_s = sum(parts.values())
    needed = sum(memory(workload, plan).values())
    return Cluster(gpus, needed, step_s, parts, tokens_per_s=tokens / step_s, tflops=flops / step_s / 1e12)


def draw_step(workload: Workload, *seed: int) -> tuple[np.ndarray, np.ndarray]:
    """A global batch, int64: (rows of the sample table, drawn with replacement; the tp_cp group of each row)."""
    config, source, world_size = workload.config, workload.source, workload.world_size
    batch_size = config.trainer.sequences_per_iteration
    count = batch_size * world_size
    chosen = np.random.default_rng(seed).integers(len(source.train_lengths.items), size=count)
    drawn = SampleLengths(*(values[chosen] for values in source.train_lengths))
    partition = choose_partition(config, source.roles, drawn)
    sampler = TrainSampler(count, batch_size, 0, world_size, seed=0, shuffle=False, partition=partition)
    samples, ranks = next(sampler.global_batches())
    return chosen[samples], ranks // config.ranks_per_group


def fit_times(workload: Workload, machine: Machine, plan: tuple[TableShards, ...]) -> dict[str, np.ndarray]:
    """Fits each part of a step → float64 [3]: (constant seconds, seconds per token, seconds per FLOP)."""
    loads = [[1.0, workload.tokens(batch), workload.flops(batch)] for batch in workload.batches]
    found = [step_parts(*step_times(workload, machine, batch, plan)) for batch in workload.batches]
    scale, seconds = np.max(loads, axis=0), np.array([list(parts.values()) for parts in found])
    lines = np.linalg.lstsq(loads / scale, seconds, rcond=1e-9)[0]
    return dict(zip(found[0], (lines / scale[:, None]).T, strict=True))


def simulate_steps(
    workload: Workload, lines: dict[str, np.ndarray], steps: int | None, seed: int
) -> tuple[dict[str, float], float, float]:
    """Returns (Cluster.parts_s, tokens per step over all ranks, FLOPs per step and rank).
    A step takes the time of its slowest tp_cp group, plus the exchanges among all ranks."""
    sequences = workload.config.trainer.sequences_per_iteration * workload.world_size
    count = steps or min(MOST_STEPS, max(1, MOST_SEQUENCES // sequences))
    parts, totals = dict.fromkeys([*lines, WAITING], 0.0), np.zeros(2)
    loads = workload.loads(workload.source.train_lengths)
    for step in range(count):
        samples, groups = draw_step(workload, seed, step)
        weights = np.ones(len(groups)) / np.bincount(groups)[groups], loads.tokens[samples], loads.costs[samples]
        of_groups = np.array([np.bincount(groups, weights=each, minlength=workload.dp_size) for each in weights])
        times = {part: np.maximum(line @ of_groups, 0.0) for part, line in lines.items()}
        of_ranks = np.sum([each for part, each in times.items() if part not in _OF_ALL], axis=0)
        for part, each in times.items():
            parts[part] += float(each.max() if part in _OF_ALL else each.mean()) / count
        parts[WAITING] += float(of_ranks.max() - of_ranks.mean()) / count
        totals += of_groups[1:].sum(axis=1) / count
    return parts, float(totals[0]), float(totals[1]) / workload.world_size


def clusters_as_objects(clusters: Sequence[Cluster]) -> list[dict[str, object]]:
    """One JSON object per cluster. Efficiency is tokens per second and GPU relative to the first cluster."""
    first = clusters[0].tokens_per_s / clusters[0].gpus
    return [asdict(c) | {"efficiency": c.tokens_per_s / c.gpus / first, "limit": c.limit} for c in clusters]


def clusters_as_text(clusters: Sequence[Cluster], machine: Machine) -> str:
    """One table row per cluster, then a note and warnings."""
    head = "GPUs", "step", "waiting", "exchange", "tokens/s", "efficiency", "memory", "lost", "most to"
    rows = []
    for each, found in zip(clusters, clusters_as_objects(clusters), strict=True):
        exchanged = sum(seconds for part, seconds in each.parts_s.items() if part.startswith("exchange"))
        shares = [seconds / each.step_s for seconds in (each.parts_s[WAITING], exchanged, each.parts_s[each.limit])]
        waiting, exchange, lost = (f"{share:.1%}" for share in shares)
        rates = f"{each.tokens_per_s:,.0f}", f"{found['efficiency']:.1%}", size(each.memory)
        rows.append((f"{each.gpus:,}", f"{1e3 * each.step_s:,.1f} ms", waiting, exchange, *rates, lost, each.limit))
    aligned = ["right"] * (len(head) - 1) + ["left"]
    table = tabulate(rows, head, tablefmt="plain", disable_numparse=True, colalign=aligned)
    lines = [table, f"\nnote: an estimate by {machine.name}; none of it has been measured on GPUs"]
    for each in (each for each in clusters if each.memory > machine.memory_gb * 1e9):
        lines.append(f"warning: on {each.gpus} GPUs a rank needs {size(each.memory)} and has {machine.memory_gb:g} GB")
    return "\n".join(lines)
