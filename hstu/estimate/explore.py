"""Searches the fastest plan of one run that fits in the memory (``--fit``).

Plans differ in the options with ``changes="speed"``, the group sizes and the number of micro-batches. All train the
same global batches, so their losses differ only by rounding and dropout.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from tabulate import tabulate

from hstu.base.errors import ConfigError
from hstu.config.args import DataParallelArgs, NetworkArgs
from hstu.config.option import Args, options_of
from hstu.config.rules import validate
from hstu.config.run_config import RunConfig
from hstu.estimate.estimate import Estimate, estimate
from hstu.estimate.machine import Machine
from hstu.estimate.workload import Workload, plan_workload

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
