"""Estimates memory, communication and step time of a run, and reports them as text and as JSON."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from hstu.config.run_config import RunConfig
from hstu.estimate import sharding
from hstu.estimate.dry_run import BACKWARD, FORWARD, ROWS, UPDATE, DryRun, dry_run
from hstu.estimate.machine import Machine
from hstu.estimate.record import GRADIENTS, Exchange, Operator
from hstu.estimate.sharding import TableShards, Transfer
from hstu.estimate.workload import Workload, plan_workload
from hstu.ops.costs import FLOAT32
from hstu.parallel.mesh import Mesh
from hstu.parallel.tables import UNLIMITED, TableRoom, TablesDoNotFit

COMPUTING, WAITING = "computing", "waiting for the slowest rank"
_BATCHES_IN_FLIGHT = {"none": 1, "native": 3, "prefetch": 4}
PURPOSES = {
    "tp_group": "tensor parallelism of the layers",
    "cp_group": "context parallelism",
    "tp_cp_group": "rows and check of the group's samples",
    "dp_group": "loss, counts and negatives",
}
"""``Exchange.group`` → what its ranks exchange in a step."""


@dataclass(frozen=True)
class Estimate:
    """Expected memory and traffic in bytes, time in seconds. Where ranks differ, the busiest rank counts."""

    memory: dict[str, int]
    """Kind of memory → bytes per rank, for the largest batch."""
    transfers: tuple[Transfer, ...]
    """The collectives of a step with the typical batch."""
    computing: dict[str, float]
    """Operator → seconds per step."""
    step: dict[str, float]
    """Part of a step → seconds. The sum is the step time."""
    tokens: float
    """Tokens per step, summed over all ranks."""
    samples: float
    """Samples per step, summed over all ranks."""
    flops: float
    """FLOPs per step and rank, averaged over the ranks and counted as in the training log."""
    peak_tflops: float
    memory_limit: float
    """Bytes of memory available to a rank."""

    @property
    def memory_total(self) -> int:
        """The sum of ``memory``."""
        return sum(self.memory.values())

    @property
    def step_s(self) -> float:
        """Seconds per step."""
        return sum(self.step.values())

    @property
    def tflops(self) -> float:
        """TFLOPS per rank, averaged over the ranks."""
        return self.flops / self.step_s / 1e12

    @property
    def mfu(self) -> float:
        """Model FLOPs utilisation: ``tflops`` divided by ``peak_tflops``."""
        return self.tflops / self.peak_tflops


def estimate(workload: Workload, machine: Machine) -> Estimate:
    """Estimates ``workload`` on ``machine``."""
    plan, batches = plan_for(machine, workload), workload.batches
    run = dry_run(workload, workload.typical)
    computing, exposed = step_times(workload, machine, run, plan)
    waiting = sum(computing.values()) * (workload.straggling - 1)
    step = {COMPUTING: sum(computing.values())} | {f"exchange for {part}": each for part, each in exposed.items()}
    return Estimate(
        memory=memory(workload, plan),
        transfers=transfers(workload, run, plan),
        computing=computing,
        step=step | {WAITING: waiting},
        tokens=sum(map(workload.tokens, batches)) / len(batches) * workload.dp_size,
        samples=sum(len(one.samples) for one in batches) / len(batches) * workload.dp_size,
        flops=sum(map(workload.flops, batches)) / len(batches) / workload.config.ranks_per_group,
        peak_tflops=machine.peak_tflops,
        memory_limit=machine.memory_gb * 1e9,
    )


def memory(workload: Workload, plan: tuple[TableShards, ...]) -> dict[str, int]:
    """Kind of memory → bytes on the rank that needs the most, with the largest batch."""
    run = dry_run(workload, workload.largest)
    rows, states = sharding.table_bytes(workload, plan)
    replicated, gradients_of_rows, states_of_rows = sharding.replicated_bytes(workload, run)
    gathered, gradients = sharding.gathered_and_gradients(workload, run)
    recording, has_buckets = run.recording, workload.dp_cp_size > 1
    # A single rank has no DDP buckets: a gradient exists only from its backward to the end of the step.
    peak = recording.peak_without_gradients if has_buckets else recording.peak
    of_dense = FLOAT32 * gradients if has_buckets else peak.get(GRADIENTS, 0)
    return {
        "dense weights": FLOAT32 * sum(sharding.held_weights(workload, run).values()) + run.buffers,
        "gathered weights": FLOAT32 * gathered,
        "replicated tables": replicated,
        "gradients of both": of_dense + gradients_of_rows,
        "optimizer states of both": sharding.state_bytes(workload, run) + states_of_rows,
        "sharded tables": rows,
        "optimizer states of sharded tables": states,
        "activations": peak.get(FORWARD, 0),
        "looked-up rows": peak.get(ROWS, 0),
        "working memory": peak.get(BACKWARD, 0) + peak.get(UPDATE, 0),
        "batches": run.batch_bytes * _BATCHES_IN_FLIGHT[workload.config.trainer.pipeline_type],
    }


def beside_tables(workload: Workload) -> int:
    """Bytes that a step needs on a rank in addition to the sharded tables and their optimizer states."""
    return sum(memory(workload, ()).values())


def beside_tables_of_run(config: RunConfig, mesh: Mesh) -> int:
    """``beside_tables`` of a run that is about to start. The planner gives the rest of the GPU to the tables."""
    return beside_tables(plan_workload(config, mesh.world_size, mesh.local_world_size, mesh.device.type))


def plan_for(machine: Machine, workload: Workload) -> tuple[TableShards, ...]:
    """The table shards of a run on ``machine``. If the tables do not fit, the plan ignores the memory limit."""
    has = int(machine.memory_gb * 1e9)
    room = TableRoom(0, has)
    if workload.device_type == "cuda":  # the host memory is unknown
        beside = beside_tables(workload)
        room = TableRoom(max(0, has - beside), UNLIMITED.host, beside)
    try:
        return sharding.plan_tables(workload, room)
    except TablesDoNotFit:
        return sharding.plan_tables(workload)


def step_times(
    workload: Workload, machine: Machine, run: DryRun, plan: tuple[TableShards, ...]
) -> tuple[dict[str, float], dict[str, float]]:
    """Two dicts for one rank: operator → seconds, and purpose of exchanges → seconds that no computation hides."""
    shared = "tensor parallelism" if workload.cp_size == 1 else "context parallelism"
    parts = {"world_group": "tables", "tp_group": "tensor parallelism", "cp_group": "context parallelism"}
    parts |= {"tp_cp_group": shared} | dict.fromkeys(("dp_group", "dp_cp_group"), "data parallelism")
    exposed = dict.fromkeys(parts.values(), 0.0)
    computing, waits = _follow(workload, machine, run)
    computing |= {name: machine.seconds(name, cost) for name, cost in sharding.table_costs(workload, run, plan).items()}
    for group, seconds in waits.items():
        exposed[parts[group]] += seconds
    for transfer in (each for each in transfers(workload, run, plan) if each.behind != "operators"):
        seconds = machine.transfer_seconds(transfer, workload.ranks_on_host(transfer.group, transfer.ranks))
        hidden = _hidden_seconds(transfer, seconds, workload, sum(computing.values())) if machine.overlaps else 0.0
        exposed[parts[transfer.group]] += max(0.0, seconds - hidden)
    return computing, exposed


def transfers(workload: Workload, run: DryRun, plan: tuple[TableShards, ...]) -> tuple[Transfer, ...]:
    """All collectives of a step that involve at least two ranks."""
    calls: dict[tuple[str, int, str], list[int]] = {}
    group_size, negatives = workload.config.ranks_per_group, workload.source.negatives
    sharing = workload.dp_size if negatives is not None and negatives.has_batch_pool else 1
    for event in run.recording.events:
        if isinstance(event, Exchange):
            calls.setdefault((event.group, event.ranks, event.kind), []).append(event.payload)
    found = [
        *sharding.table_transfers(workload, dry_run(workload, workload.typical), plan),
        Transfer("samples of the group, on hosts", "all_gather", "tp_cp_group", group_size, 2, run.sent_bytes),
        Transfer("size of the largest pool", "all_reduce", "dp_group", sharing, 1, sharding.INT64, "pipeline"),
        *(
            Transfer(PURPOSES[group], kind, group, ranks, len(each), sum(each), "operators")
            for (group, ranks, kind), each in calls.items()
        ),
        *sharding.data_parallel_transfers(workload, run),
    ]
    return tuple(transfer for transfer in found if transfer.ranks > 1)


def _follow(workload: Workload, machine: Machine, run: DryRun) -> tuple[dict[str, float], dict[str, float]]:
    """Replays the recorded events: operator → seconds, and group → seconds that a rank waits for its exchanges.
    Compute and communication streams run in parallel. An operator waits for the exchanges whose results it reads."""
    computing: dict[str, float] = {}
    waits: dict[str, float] = {}
    ready, events = dict[int, float](), run.recording.events
    now = link_is_free = 0.0
    for index, event in enumerate(events):
        if isinstance(event, Operator):
            needed = event.needs
        else:
            one = Transfer("", event.kind, event.group, event.ranks, 1, event.payload)
            on_host = workload.ranks_on_host(one.group, one.ranks)
            seconds = machine.transfer_seconds(one, on_host) if one.ranks > 1 else 0.0
            link_is_free = ready[index] = max(now, link_is_free) + seconds
            needed = () if machine.overlaps else (index,)
        for other in needed:
            group = events[other].group  # type: ignore[union-attr]
            waits[group] = waits.get(group, 0.0) + max(0.0, ready[other] - now)
            now = max(now, ready[other])
        if isinstance(event, Operator):
            name = UPDATE if event.phase == UPDATE else event.name
            seconds = machine.seconds(name, event.cost)
            seconds /= workload.shard_group_size if event.phase == UPDATE else 1
            computing[name] = computing.get(name, 0.0) + seconds
            now += seconds
    return computing, waits


def _hidden_seconds(transfer: Transfer, seconds: float, workload: Workload, compute: float) -> float:
    """Upper bound on the seconds of ``transfer`` that computation hides."""
    if transfer.behind == "backward":  # no computation follows the last bucket
        return min(compute * 2 / 3, seconds * (1 - 1 / transfer.calls))
    has_pipeline = workload.config.trainer.pipeline_type != "none"
    return compute if transfer.behind == "pipeline" and has_pipeline else 0.0


def as_json(found: Estimate, workload: Workload) -> dict[str, Any]:
    """The estimate as a JSON object, in bytes and seconds."""
    keys = {"name": "name", "kind": "collective"} | {name: name for name in ("ranks", "calls", "payload")}
    transfers = [{key: getattr(each, name) for name, key in keys.items()} for each in found.transfers]
    sizes = {"world_size": workload.world_size}
    sizes |= {"tensor_parallel": workload.tp_size, "context_parallel": workload.cp_size}
    computed = {name: getattr(found, name) for name in ("memory_total", "step_s", "tflops", "mfu")}
    rates = {"samples_per_s": found.samples / found.step_s, "tokens_per_s": found.tokens / found.step_s}
    return sizes | asdict(found) | {"transfers": transfers} | computed | rates | {"notes": [workload.note]}


def report(found: Estimate, workload: Workload, machine: Machine) -> Iterator[str]:
    """Lines of tables of memory, communication and time, followed by the assumptions."""
    config, ranks = workload.config, workload.world_size
    hosts = -(-ranks // workload.ranks_per_host)
    yield (
        f"{config.task}, {', '.join(config.source_files) or 'bindings'}: {ranks} rank{'s'[: ranks > 1]} on "
        f"{hosts} host{'s'[: hosts > 1]} ({machine.name}), tensor parallel {workload.tp_size}, "
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
        f"{found.tflops:.3g} TFLOPS per rank, MFU {found.mfu:.1%} of {found.peak_tflops:.3g} TFLOPS"
    )
    yield f"\nnote: {workload.note}"
    yield f"note: times are what {machine.name} should need (a roofline, checked on one H100)"
    if found.memory_total > found.memory_limit:
        yield "warning: this is more memory than a rank has"


def _row(name: str, value: str) -> str:
    return f"  {name:<60}{value:>20}"


def size(number: float) -> str:
    """Formats bytes in decimal units, such as "1.50 GB"."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if number >= factor:
            return f"{number / factor:.2f} {unit}"
    return f"{number:.0f} B"


def _time(seconds: float) -> str:
    return f"{1e3 * seconds:.2f} ms"
