"""Bytes on one rank: what stays from step to step, which is exact, and what a step needs in addition."""

from __future__ import annotations

from hstu.config.run_config import RunConfig
from hstu.estimate import dry_run as dry
from hstu.estimate.data_parallel import gathered_and_gradients, held_weights, state_bytes
from hstu.estimate.dry_run import DryRun, dry_run
from hstu.estimate.plan import plan_workload
from hstu.estimate.record import GRADIENTS
from hstu.estimate.tables import TableShards, replicated_bytes, table_bytes
from hstu.estimate.workload import Workload
from hstu.ops.costs import FLOAT32
from hstu.parallel.mesh import Mesh

_BATCHES_IN_FLIGHT = {"none": 1, "native": 3, "prefetch": 4}


def beside_tables(workload: Workload) -> int:
    """Bytes that a step needs on a rank beside the sharded tables and their optimizer states."""
    return sum(memory(workload, (), dry_run(workload, workload.largest)).values())


def beside_tables_of_run(config: RunConfig, mesh: Mesh) -> int:
    """``beside_tables`` for the ranks of a run that is starting."""
    return beside_tables(plan_workload(config, mesh.world_size, mesh.local_world_size, mesh.device.type))


def memory(workload: Workload, plan: tuple[TableShards, ...], run: DryRun) -> dict[str, int]:
    """Kind of memory → bytes on the rank that needs the most. ``run``: of the largest batch."""
    rows, states = table_bytes(workload, plan)
    replicated, gradients_of_rows, states_of_rows = replicated_bytes(workload, run)
    gathered, gradients = gathered_and_gradients(workload, run)
    recording, has_buckets = run.recording, workload.dp_cp_size > 1
    # With one rank there are no buckets, and a gradient exists from its backward to the end of the step.
    peak = recording.peak_without_gradients if has_buckets else recording.peak
    of_dense = FLOAT32 * gradients if has_buckets else peak.get(GRADIENTS, 0)
    return {
        "dense weights": FLOAT32 * sum(held_weights(workload, run).values()) + run.buffers,
        "gathered weights": FLOAT32 * gathered,
        "replicated tables": replicated,
        "gradients of both": of_dense + gradients_of_rows,
        "optimizer states of both": state_bytes(workload, run) + states_of_rows,
        "sharded tables": rows,
        "optimizer states of sharded tables": states,
        "activations": peak.get(dry.FORWARD, 0),
        "looked-up rows": peak.get(dry.ROWS, 0),
        "working memory": peak.get(dry.BACKWARD, 0) + peak.get(dry.UPDATE, 0),
        "batches": run.batch_bytes * _BATCHES_IN_FLIGHT[workload.config.trainer.pipeline_type],
    }
