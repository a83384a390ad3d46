"""What runs on each rank in test_reduction.py: steps of a model with several buckets, and what they wait for."""

from __future__ import annotations

import time
from typing import Any

import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from hstu.data.sampler import SamplerPosition
from hstu.parallel import mesh as mesh_module
from scripts.bench.collective_clock import CollectiveClock, Times, split
from tests.distributed.pipeline_cases import assemble, make_config, start

LARGE = [
    "NetworkArgs.num_layers = 6",
    "NetworkArgs.hidden_size = 128",
    "NetworkArgs.num_attention_heads = 4",
    "NetworkArgs.kv_channels = 32",
]
LATE_S = 0.3


def run(store: str) -> dict[str, Any]:
    """Both in one launch; the clock, which changes torch's classes, comes last."""
    mesh = start()
    results = {"order": order_of_backward(store, mesh), "waits": waits(store, mesh)}
    mesh_module.finish()
    return results


def order_of_backward(store: str, mesh: mesh_module.Mesh) -> list[str]:
    """Of the third step's backward: "bucket" where an all-reduce begins, "gradient" where a parameter's is ready."""
    pipeline, source, _, _ = assemble(make_config(store, "none", lines=LARGE), mesh)
    events: list[str] = []

    def reduce_bucket(group, bucket):  # type: ignore[no-untyped-def]  # DDP reads annotations, if there are any
        events.append("bucket")
        return allreduce_hook(group, bucket)

    dense = pipeline.model.dense
    assert isinstance(dense, DistributedDataParallel)
    dense.register_comm_hook(dense.process_group, reduce_bucket)
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
    clock.watch(pipeline.model.dense)
    batches = source.train_batches(SamplerPosition())
    late = LATE_S if mesh.rank == 1 else 0.0
    pipeline.progress(batches)

    def step(before: float, in_backward: float) -> list[float]:
        dist.barrier()
        clock.restart()
        time.sleep(before)
        batch = next(batches)
        loss, _ = pipeline.forward(batch)
        loss.register_hook(lambda _: time.sleep(in_backward))
        loss.backward()
        return _measured(clock.restart(), mesh)

    return {"nowhere": step(0, 0), "before the step": step(late, 0), "in backward": step(0, late)}


def _measured(times: Times, mesh: mesh_module.Mesh) -> list[float]:
    begun: list[Any] = [None] * mesh.world_size
    dist.all_gather_object(begun, times.begun)
    return list(split(times, begun))
