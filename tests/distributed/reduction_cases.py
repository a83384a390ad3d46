"""What runs on each rank in test_reduction.py: steps of a model with several buckets, and what they wait for."""

from __future__ import annotations

import time
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from hstu.data.sampler import SamplerPosition
from hstu.model.outputs import ModelOutput
from hstu.parallel import mesh as mesh_module
from hstu.parallel.dense import ReplicatedDense, own_gradients_finite
from scripts.bench.collective_clock import CollectiveClock, Times, split
from tests.distributed.pipeline_cases import assemble, make_config, start

LARGE = [
    "NetworkArgs.num_layers = 6",
    "NetworkArgs.hidden_size = 128",
    "NetworkArgs.num_attention_heads = 4",
    "NetworkArgs.kv_channels = 32",
]
LATE_S = 1.0


def run(store: str) -> dict[str, Any]:
    """All in one launch; the clock, which changes torch's classes, comes last."""
    mesh = start()
    sent = {str(dtype): sent_as(dtype, mesh) for dtype in (torch.float32, torch.bfloat16, torch.float16)}
    results = {
        "sent": sent,
        "asked": trained_with(store, mesh),
        "order": order_of_backward(store, mesh),
        "waits": waits(store, mesh),
    }
    mesh_module.finish()
    return results


GRADIENTS = ((1 + 2**-9, 3.0, 60000.0), (1.0, 3 + 2**-20, 62000.0))
"""Of three weights, on each rank. One has 9 bits behind the point, of which bfloat16 holds 7; the last are large."""
TOO_LARGE = 2**17


def sent_as(dtype: torch.dtype, mesh: mesh_module.Mesh) -> dict[str, Any]:
    """What DDP makes of GRADIENTS, and whether a rank notices a gradient that this type has no number for."""
    dense = ReplicatedDense(torch.nn.Linear(3, 1, bias=False), mesh.dp_group, dtype)
    weight = dense.module.weight
    (dense(torch.tensor([GRADIENTS[mesh.rank]])).sum()).backward()
    averaged = [weight.grad.dtype == torch.float32, weight.grad.flatten().tolist()]
    finite = [bool(own_gradients_finite(dense))]
    weight.grad = None
    (dense(torch.full((1, 3), float(TOO_LARGE if mesh.rank else 1))).sum()).backward()
    return {"averaged": averaged, "finite": [*finite, bool(own_gradients_finite(dense))]}


def trained_with(store: str, mesh: mesh_module.Mesh) -> dict[str, list[Any]]:
    """What a run sends its gradients as, in bfloat16, and its losses: by PrecisionArgs.fp32_master_grads."""
    told = {}
    for exact in (True, False):
        lines = ["NetworkArgs.dtype_str = 'bfloat16'", f"PrecisionArgs.fp32_master_grads = {exact}"]
        pipeline, source, _, _ = assemble(make_config(store, "none", lines=lines), mesh)
        batches = source.train_batches(SamplerPosition())
        losses = [float(pipeline.progress(batches).loss) for _ in range(3)]
        told[str(exact)] = [str(pipeline.model.dense.sent_as), losses]
    return told


def order_of_backward(store: str, mesh: mesh_module.Mesh) -> list[str]:
    """Of the third step's backward: "bucket" where an all-reduce begins, "gradient" where a parameter's is ready."""
    pipeline, source, _, _ = assemble(make_config(store, "none", lines=LARGE), mesh)
    events: list[str] = []

    dense = pipeline.model.dense
    assert isinstance(dense, ReplicatedDense)
    average = dense.average_bucket

    def average_bucket(bucket: dist.GradBucket) -> Any:
        events.append("bucket")
        return average(bucket)

    dense.average_bucket = average_bucket  # type: ignore[method-assign]
    for parameter in dense.parameters():
        parameter.register_post_accumulate_grad_hook(lambda _: events.append("gradient"))
    batches = source.train_batches(SamplerPosition())
    for _ in range(3):  # DDP cuts the buckets after the first step, by the order of that
        events.clear()
        pipeline.progress(batches)
    return events


def waits(store: str, mesh: mesh_module.Mesh) -> dict[str, list[float]]:
    """Where rank 1 comes late → this rank's (communication, waiting) seconds by the benchmarks' clock."""
    clock = CollectiveClock()
    pipeline, source, _, _ = assemble(make_config(store, "none", lines=LARGE), mesh)
    dense = pipeline.model.dense
    clock.watch(dense)
    batches = source.train_batches(SamplerPosition())
    late = LATE_S if mesh.rank == 1 else 0.0
    pipeline.progress(batches)

    def step(before: float, in_backward: float) -> list[float]:
        dist.barrier()
        clock.restart()
        time.sleep(before)
        batch = next(batches)
        hook = dense.register_forward_hook(partial(_sleep_in_backward, in_backward))
        loss, _ = pipeline.forward(batch)
        loss.backward()
        hook.remove()
        return _measured(clock.restart(), mesh)

    return {"nowhere": step(0, 0), "before the step": step(late, 0), "in backward": step(0, late)}


def _sleep_in_backward(seconds: float, module: Any, args: Any, output: ModelOutput) -> None:
    output.loss_sum.register_hook(lambda _: time.sleep(seconds))


def _measured(times: Times, mesh: mesh_module.Mesh) -> list[float]:
    begun: list[Any] = [None] * mesh.world_size
    dist.all_gather_object(begun, times.begun)
    return list(split(times, begun))
