"""What runs on each rank in test_against_runs.py: a run is built and takes a step; what is counted is returned."""

from __future__ import annotations

import json
import math
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hstu.config.run_config import RunConfig
from hstu.data.batch import HSTUBatch
from hstu.data.sampler import SamplerPosition
from hstu.parallel import mesh as meshes
from hstu.parallel.embedding import sharded_weights
from hstu.train.builder import build_model, build_pipeline
from hstu.train.sources import open_source
from tests.train.estimate.runs import CASES, run_config

BYTES = {"float": 4, "long int": 8, "int": 4, "c10::BFloat16": 2, "unsigned char": 1, "double": 8}


def count_all(tp: int) -> dict[str, Any]:
    """Name of each case that fits this launch → what it holds and exchanges."""
    mesh = meshes.start(tensor_parallel_size=tp, timeout_s=60)
    results = {
        name: count(run_config(**case["run"], tp=tp), mesh)
        for name, case in CASES.items()
        if (mesh.world_size, tp) in case["launches"]
    }
    meshes.finish()
    return results


def count(config: RunConfig, mesh: meshes.Mesh) -> dict[str, Any]:
    """Bytes by kind of one run on this rank."""
    meshes.seed_initial_weights(1)
    source = open_source(config, mesh)
    model, optimizers = build_model(config, source, mesh)
    states = optimizers.state_tensors()
    tables = [shard.tensor for weight in sharded_weights(model).values() for shard in weight.local_shards()]
    pipeline, batches = build_pipeline(config.trainer, model, optimizers, mesh), source.train_batches(SamplerPosition())
    result = {
        "weights": sum(p.nbytes for p in model.dense.parameters()),
        "states": sum(t.nbytes for name, t in states.items() if name.startswith("dense.")),
        "tables": sum(t.nbytes for t in tables),
        "table states": sum(
            shard.tensor.nbytes
            for name, state in states.items()
            if name.startswith("tables.")
            for shard in state.local_shards()
        ),
    }
    first = next(batches)
    result["activations"] = kept_for_backward(model, first)
    pipeline.progress(batches)  # DDP settles its buckets after the first step
    result["exchanged"] = exchanged(lambda: pipeline.progress(batches))
    result["gradients"] = sum(p.grad.nbytes for p in model.dense.parameters() if p.grad is not None)
    return result


def kept_for_backward(model: torch.nn.Module, batch: HSTUBatch) -> int:
    """Bytes of the storages that autograd keeps, beyond parameters and the batch itself."""
    not_counted = {p.untyped_storage().data_ptr() for p in model.parameters()}
    for one in (batch, batch.group.batch if batch.group is not None else batch):
        tensors = [one.features.values(), one.features.lengths(), one.labels, one.num_labels, one.draws]
        not_counted |= {t.untyped_storage().data_ptr() for t in tensors if t is not None}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor  # held, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(batch)
    output.loss_sum.backward()  # the ranks' collectives of backward
    return sum(t.untyped_storage().nbytes() for address, t in kept.items() if address not in not_counted)


def exchanged(step: Any) -> dict[str, int]:
    """Collective → bytes that this rank's gloo took as inputs, by torch's profiler."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, record_shapes=True) as profiler:
        step()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    found: Counter[str] = Counter()
    for event in events:
        name = event.get("name", "")
        if name.startswith("gloo:") and name != "gloo:broadcast":  # DDP's, once, to settle its buckets
            shapes = zip(event["args"]["Input Dims"], event["args"]["Input type"], strict=True)
            found[name.removeprefix("gloo:")] += sum(math.prod(dims) * BYTES[kind] for dims, kind in shapes if kind)
    return dict(found)
