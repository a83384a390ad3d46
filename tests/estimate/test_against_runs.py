"""Memory and traffic of the estimate against what real runs hold, keep and exchange."""

import json
import math
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from copy import copy
from functools import cache, partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from hstu.config.run_config import RunConfig
from hstu.data.batches.train_batch import TrainBatch
from hstu.data.sampling.sampler import SamplerPosition
from hstu.estimate.dry_run import DryRun, dry_run
from hstu.estimate.estimate import transfers
from hstu.estimate.record import Recorder
from hstu.estimate.sharding import held_weights, plan_tables, replicated_bytes, state_bytes, table_bytes
from hstu.estimate.workload import Workload, plan_workload
from hstu.model.gr_model import GRModel
from hstu.ops.comm import Pending
from hstu.parallel.data_parallel import unwrap_dense
from hstu.parallel.group import look_up, to_train_batch
from hstu.parallel.layer_comm import ProcessGroupComm
from hstu.parallel.mesh import Mesh, seed_initial_weights
from hstu.parallel.shards import local_part, numbers_of
from hstu.parallel.tables import sharded_weights
from hstu.pipeline.step import detach_rows
from hstu.train.builder import build_model, build_pipeline
from hstu.train.sources import open_source
from tests.distributed.launch import Launch, run_cases
from tests.estimate.runs import CASES, ONE, TWO_BY_TENSOR, Sizes, held_bytes, run_config

BYTES = {"float": 4, "long int": 8, "int": 4, "c10::BFloat16": 2, "unsigned char": 1, "double": 8}


def launched(min_group_size: int = 1) -> Iterator[Any]:
    """(case, launch) as parameters. Starting ranks takes most of the time: by default one, or two that split heads."""
    for name, launch in ((name, launch) for name, case in CASES.items() for launch in case["launches"]):
        if max(launch[1:]) >= min_group_size:
            yield pytest.param(name, launch, marks=() if launch in (ONE, TWO_BY_TENSOR) else pytest.mark.slow)


@cache
def counted(launch: Sizes) -> list[dict[str, Any]]:
    """Per rank: case → counts. One launch serves all cases."""
    ranks, tp, cp = launch
    cases = {
        name: partial(count, config=run_config(**case["run"], tp=tp, cp=cp))
        for name, case in CASES.items()
        if launch in case["launches"]
    }
    return run_cases(Launch(ranks, 200, tp, cp), cases)


@cache
def case(name: str, launch: Sizes) -> tuple[Workload, list[dict[str, Any]]]:
    ranks, tp, cp = launch
    config = run_config(**CASES[name]["run"], tp=tp, cp=cp)
    return plan_workload(config, ranks, ranks, "cpu"), [rank[name] for rank in counted(launch)]


@cache
def run_of(name: str, launch: Sizes, step: int) -> DryRun:
    workload, _ = case(name, launch)
    return dry_run(workload, workload.steps[step][0])


@pytest.mark.parametrize(("name", "launch"), launched())
def test_what_stays_is_known_to_the_byte(name: str, launch: Sizes) -> None:
    workload, ranks = case(name, launch)
    run = run_of(name, launch, 0)
    dense = 4 * sum(weight.elements for weight in run.weights.values())
    held = 4 * sum(held_weights(workload, run).values())
    replicated, _, replicated_states = replicated_bytes(workload, run)
    is_sharded = workload.shard_group_size > 1
    for rank in ranks:
        assert rank["gradients"] == (held if is_sharded else dense)
        assert rank["weights"] == (held if is_sharded else dense) + replicated
    assert max(rank["states"] for rank in ranks) == state_bytes(workload, run) + replicated_states
    assert max((rank["tables"], rank["table states"]) for rank in ranks) == table_bytes(workload, plan_tables(workload))


class SavingRecorder(Recorder):
    """Also finds the most bytes that autograd saves for backward, without weights and batches: ``most``."""

    def __init__(self) -> None:
        super().__init__()
        self.most = 0
        self._saved = set[int]()
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._save, lambda tensor: tensor)

    def _save(self, tensor: Tensor) -> Tensor:
        self._saved.add(id(tensor.untyped_storage()))
        self.most = max(self.most, sum(self._owners[key][2] for key in self._saved & self._owners.keys()))
        return tensor

    def _allocate(self, tensor: Tensor) -> None:
        if (key := id(tensor.untyped_storage())) not in self._owners:
            self._saved.discard(key)  # of a storage that is freed
        super()._allocate(tensor)

    def __enter__(self) -> Any:
        self._hooks.__enter__()
        return super().__enter__()

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)
        self._hooks.__exit__(*raised)


@pytest.mark.parametrize(("name", "launch"), launched())
def test_what_backward_needs_is_known_within_a_tenth(name: str, launch: Sizes, monkeypatch: pytest.MonkeyPatch) -> None:
    workload, ranks = case(name, launch)
    recorder = SavingRecorder()
    monkeypatch.setattr("hstu.estimate.dry_run.Recorder", lambda: recorder)
    dry_run(workload, copy(workload.steps[0][0]))  # a batch whose dry run nothing remembers
    assert ranks[0]["activations"] == pytest.approx(recorder.most, rel=0.1)


@pytest.mark.parametrize(("name", "launch"), launched(min_group_size=2))
def test_what_is_exchanged_is_known_within_a_fifth(name: str, launch: Sizes) -> None:
    workload, ranks = case(name, launch)
    expected: Counter[str] = Counter()
    calls: Counter[str] = Counter()
    for transfer in transfers(workload, run_of(name, launch, 2), plan_tables(workload)):
        # gloo sums whole tensors where a part would do
        expected[transfer.kind.replace("reduce_scatter", "all_reduce")] += transfer.payload
        calls[transfer.kind.replace("reduce_scatter", "all_reduce")] += transfer.calls
    busiest = {kind: max(rank["exchanged"].get(kind, 0) for rank in ranks) for kind in expected}
    assert busiest == pytest.approx(dict(expected), rel=0.2)
    for rank in ranks:
        assert rank["collectives"] == calls
        assert rank["pickled"] == 0


def count(mesh: Mesh, config: RunConfig) -> dict[str, Any]:
    """Bytes by kind that one run holds on this rank after a step, and what it exchanges in one."""
    seed_initial_weights(1)
    source = open_source(config, mesh)
    model, optimizers = build_model(config, source, mesh)
    dense_states, table_states = optimizers.dense.state_tensors(), optimizers.tables.state_tensors()
    replicated_states = optimizers.tables.replicated_state_tensors()
    tables = [shard.tensor for weight in sharded_weights(model).values() for shard in weight.local_shards()]
    pipeline, batches = build_pipeline(config.trainer, model, optimizers, mesh), source.train_batches(SamplerPosition())
    result: dict[str, Any] = {
        "weights": sum(local_part(p.detach()).nbytes for p in model.dense.parameters()),
        "states": sum(map(held_bytes, (*dense_states.values(), *replicated_states.values()))),
        "tables": sum(t.nbytes for t in tables),
        "table states": sum(shard.nbytes for state in table_states.values() for _, shard in state),
    }
    first = next(batches)
    parts = config.trainer.gradient_accumulation_steps
    result["activations"] = kept_for_backward(model, to_train_batch(first, model.roles, mesh, parts), mesh)
    pipeline.progress(batches)  # DDP settles its buckets after the first step
    uneven = Counter[str]()
    exchange = ProcessGroupComm._exchange

    def counted(comm: ProcessGroupComm, rows: Tensor, sent: list[int], received: list[int]) -> Pending:
        moved = max(sum(counts) - counts[comm.cp_rank] for counts in (sent, received))
        even = rows.new_empty((1, *rows.shape[1:])).nbytes * moved * comm.cp_size // (comm.cp_size - 1)
        uneven["all_to_all"] += even - rows.nbytes  # what an even exchange of as much would add
        return exchange(comm, rows, sent, received)

    with (
        patch.object(dist.distributed_c10d, "_object_to_tensor") as pickled,
        patch.object(ProcessGroupComm, "_exchange", counted),
    ):
        result["exchanged"], result["collectives"] = exchanged(lambda: pipeline.progress(batches))
    result["pickled"] = pickled.call_count
    for kind, difference in uneven.items():
        result["exchanged"][kind] += difference
    gradients = [p.grad for p in unwrap_dense(model).get_submodule("task").parameters() if p.grad is not None]
    result["gradients"] = sum(numbers_of(gradient).nbytes for gradient in gradients)
    return result


def kept_for_backward(model: GRModel, batch: TrainBatch, mesh: Mesh) -> int:
    """Bytes of the storages that autograd keeps of the first micro-batch, beyond parameters and the batch itself."""
    not_counted = {local_part(p.detach()).untyped_storage().data_ptr() for p in model.parameters()}
    for one in (batch.own, *batch.parts):
        tensors = [one.features.values(), one.features.lengths(), one.labels, one.num_labels, one.negatives.draws]
        not_counted |= {t.untyped_storage().data_ptr() for t in tensors if t is not None}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor  # held, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        rows = look_up(model, batch, mesh)
        if len(batch.parts) > 1:
            rows = detach_rows(rows, batch.parts)[0]
        output = model.dense(rows, batch.parts[0])
    not_counted |= {local_part(p.detach()).untyped_storage().data_ptr() for p in model.parameters()}
    output.loss_sum.backward()  # the ranks' collectives of backward
    return sum(t.untyped_storage().nbytes() for address, t in kept.items() if address not in not_counted)


def exchanged(step: Callable[[], Any]) -> tuple[dict[str, int], dict[str, int]]:
    """Collective → bytes that this rank's gloo took as inputs, and → number of calls, by torch's profiler."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, record_shapes=True) as profiler:
        step()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    found: Counter[str] = Counter()
    calls: Counter[str] = Counter()
    for event in events:
        name = event.get("name", "")
        if name.startswith("gloo:") and name != "gloo:broadcast":  # DDP's, once, to settle its buckets
            shapes = zip(event["args"]["Input Dims"], event["args"]["Input type"], strict=True)
            found[name.removeprefix("gloo:")] += sum(math.prod(dims) * BYTES[kind] for dims, kind in shapes if kind)
            calls[name.removeprefix("gloo:")] += 1
    return dict(found), dict(calls)
