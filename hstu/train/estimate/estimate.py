"""A run's memory, traffic and step time, put together from what the other files of this folder know."""

from __future__ import annotations

from dataclasses import dataclass

from hstu.train.estimate import activations, parameters, traffic, work
from hstu.train.estimate.machine import Machine
from hstu.train.estimate.parameters import NUMBER
from hstu.train.estimate.situation import Situation
from hstu.train.estimate.traffic import Transfer


@dataclass(frozen=True)
class Estimate:
    """What is expected of a rank (the busiest, where they differ) and of the run. Bytes, seconds."""

    memory: dict[str, int]
    """Kind → bytes a rank; of the largest batch."""
    transfers: tuple[Transfer, ...]
    """Of a typical batch."""
    computing: dict[str, float]
    """Operator → seconds of a step."""
    step: dict[str, float]
    """Part → seconds; together they are the step."""
    tokens: float
    """A step, all ranks together."""
    samples: float
    flops: float
    """A step's on the mean rank, as the training log counts them."""
    peak_tflops: float
    memory_limit: float
    """Bytes that a rank has."""
    notes: tuple[str, ...]

    @property
    def memory_total(self) -> int:
        """Bytes a rank."""
        return sum(self.memory.values())

    @property
    def step_s(self) -> float:
        """Seconds of a step."""
        return sum(self.step.values())

    @property
    def tflops(self) -> float:
        """Of the mean rank."""
        return self.flops / self.step_s / 1e12

    @property
    def mfu(self) -> float:
        """Share of the peak."""
        return self.tflops / self.peak_tflops


def estimate(situation: Situation, machine: Machine, batch_s: float = 0.0) -> Estimate:
    """Reckon with ``machine``. batch_s: seconds in which the host makes a batch."""
    plan = parameters.plan_tables(situation)
    batch = situation.typical
    exchanged = traffic.transfers(situation, batch, plan)
    computing: dict[str, float] = {}
    for op in work.operators(situation, batch, plan):
        computing[op.name] = computing.get(op.name, 0.0) + machine.seconds(op)
    batches = [one for step in situation.steps for one in step]
    groups = situation.dp_size
    return Estimate(
        memory=memory(situation, plan),
        transfers=exchanged,
        computing=computing,
        step=_step(situation, machine, computing, exchanged, batch_s),
        tokens=sum(map(situation.tokens, batches)) / len(batches) * groups,
        samples=sum(one.sequences for one in batches) / len(batches) * groups,
        flops=sum(map(situation.flops, batches)) / len(batches) / situation.tp_size,
        peak_tflops=machine.peak_tflops,
        memory_limit=machine.memory_gb * 1e9,
        notes=situation.notes,
    )


def memory(situation: Situation, plan: tuple[parameters.TableShards, ...]) -> dict[str, int]:
    """Kind → bytes on the rank that has the most."""
    config, batch = situation.config, situation.largest
    part, layers = situation.micro(batch), config.network.num_layers
    tokens = situation.tokens(part)
    counts, replicated = parameters.dense_parameters(situation), parameters.replicated_elements(situation)
    dense = sum(counts.values())
    rows, states = parameters.table_bytes(situation, plan)
    kept, alive = activations.layer_bytes(situation, tokens)
    kept_of_task, working_of_task = activations.task_bytes(situation, part, situation.pool(batch))
    working = max(working_of_task, alive - kept + activations.backward_bytes(situation, tokens))
    activated = layers * kept + activations.input_bytes(situation, part, tokens) + kept_of_task
    gradients = (dense + replicated) * NUMBER
    if situation.dp_size == 1:  # no buckets of DDP
        gradients = _beyond_activations(counts, layers, kept, gradients - activated - working)
    return {
        "dense weights": dense * NUMBER,
        "replicated tables": replicated * NUMBER,
        "gradients of both": gradients,
        "optimizer states of both": parameters.dense_state_bytes(situation),
        "sharded tables": rows,
        "optimizer states of sharded tables": states,
        "activations": activated,
        "looked-up rows": activations.looked_up_bytes(situation, batch),
        "working memory": working,
        "batches": activations.batch_bytes(situation, batch),
    }


def _beyond_activations(counts: dict[str, int], layers: int, kept: int, at_the_end: int) -> int:
    """Bytes that gradients add to a step's peak where each comes into being as backward lets activations go.

    counts: elements of the parameters. kept: activations of a layer. at_the_end: what all gradients take beyond them.
    """
    layer = sum(count for name, count in counts.items() if name.startswith(f"{parameters.LAYERS}.0."))
    after = sum(count for name, count in counts.items() if name.startswith(("task.head", "task.query")))
    passed = (NUMBER * (after + (done + 1) * layer) - done * kept for done in range(layers))
    return max(0, at_the_end, *passed)


def _step(
    situation: Situation,
    machine: Machine,
    computing: dict[str, float],
    exchanged: tuple[Transfer, ...],
    batch_s: float,
) -> dict[str, float]:
    compute = sum(computing.values())
    exposed: dict[str, float] = {"tables": 0.0, "tensor parallelism": 0.0, "data parallelism": 0.0}
    parts = {"world": "tables", "tensor": "tensor parallelism", "data": "data parallelism"}
    over_hosts = {
        "world": situation.world_size > situation.ranks_per_host,
        "data": situation.world_size > situation.ranks_per_host,
        "tensor": situation.tp_size > situation.ranks_per_host,
    }
    for transfer in exchanged:
        seconds = machine.transfer_seconds(transfer, over_hosts[transfer.group])
        exposed[parts[transfer.group]] += max(0.0, seconds - _cover(transfer, situation, machine, computing, seconds))
    asynchronous = situation.config.trainer.data_workers > 0 or machine.overlaps
    return {
        "computing": compute,
        "waiting for the slowest rank": compute * (situation.straggling - 1),
        **{f"exchange for {part}": seconds for part, seconds in exposed.items()},
        "making batches": max(0.0, batch_s - compute) if asynchronous else batch_s,
    }


def _cover(
    transfer: Transfer, situation: Situation, machine: Machine, computing: dict[str, float], seconds: float
) -> float:
    """Seconds of computation that ``transfer`` can hide behind."""
    compute = sum(computing.values())
    if not machine.overlaps:
        return 0.0
    match transfer.behind:
        case "backward":  # all but the last bucket, which nothing follows
            return min(compute * 2 / 3, seconds * (1 - 1 / transfer.calls))
        case "weights":
            return (computing.get("W_uvqk", 0.0) + computing.get("W_o", 0.0)) / 3
        case "pipeline":
            return 0.0 if situation.config.trainer.pipeline_type == "none" else compute
    return 0.0
