"""Runs one training step of the real model without processes, data or memory, and records what it needs.

The real TrainStep trains the model of rank 0 of a tp_cp group on tensors without data (torch's FakeTensorMode), over
process groups of torch's "fake" backend. It omits tables and data parallelism, whose costs sharding.py computes.
"""

import dataclasses
import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from hstu.data.batches.batch import HSTUBatch, TensorGroup, is_of_negatives, packed
from hstu.data.batches.train_batch import TrainBatch, merge_ranks
from hstu.estimate.record import GRADIENTS, Recorder, Recording
from hstu.estimate.workload import Batch, Workload
from hstu.model.embedding import ReplicatedTables, TableSpec
from hstu.model.gr_model import DenseModel, GRModel
from hstu.model.retrieval import LogCounts
from hstu.ops.fake import fake_kernels
from hstu.ops.kernels import Backend, Kernels
from hstu.optim.optimizers import DenseOptimizer, build_optimizers
from hstu.parallel.collectives import gather_rows
from hstu.parallel.layer_comm import split_encoder
from hstu.parallel.mesh import Mesh
from hstu.parallel.own_time import own_time
from hstu.parallel.table_optimizer import TableOptimizer
from hstu.pipeline.finite import FiniteCheck
from hstu.pipeline.step import TrainStep
from hstu.train.builder import build_loss_scale, task_module

_CPU = torch.device("cpu")
ROWS, FORWARD, BACKWARD, UPDATE = "looked-up rows", "activations", "working memory", "dense optimizer"
"""Phases of a step, named by what they allocate."""


@dataclass(frozen=True)
class Weight:
    """A parameter of the dense part on one rank."""

    rows: int
    elements: int
    state_bytes: int
    """Bytes of the states that have the shape of the parameter, the moving average included."""
    step_bytes: int
    """Bytes of the optimizer's step count."""
    is_layer: bool


@dataclass(frozen=True)
class DryRun:
    """Requirements of a step on a rank that has all dense weights of its tensor-parallel shard."""

    weights: Mapping[str, Weight]
    buffers: int
    """Bytes of the buffers of the dense part."""
    recording: Recording
    ids: Mapping[str, int]
    """Feature → number of ids that a rank looks up."""
    distinct_ids: Mapping[str, int]
    """Sharded table → number of different ids among them, which are sent to the ranks that hold their rows."""
    group_ids: Mapping[str, int]
    """Feature → number of ids that all ranks of its tp_cp group look up."""
    batch_bytes: int
    """Bytes of the batches of the rank and of its group, and of their micro-batches."""
    sent_bytes: int
    """Bytes of its batch that a rank sends to the others of its group, from host memory."""


_found: WeakKeyDictionary[Batch, dict[str, DryRun]] = WeakKeyDictionary()


def dry_run(workload: Workload, batch: Batch) -> DryRun:
    """Runs, once, the step of rank 0 of the group that trains on ``batch``. DataParallelArgs do not change it."""
    config, found = workload.config, _found.setdefault(batch, {})
    key = repr((config.network, config.trainer, config.tensor_parallel, config.context_parallel))
    if key in found:
        return found[key]
    on_device, sent = train_batch(workload, batch)
    requested = Backend(config.network.kernel_backend)
    is_cpu = workload.device_type == "cpu" and requested is not Backend.PYTORCH
    with _mesh(workload) as mesh, FakeTensorMode(allow_non_fake_inputs=True):
        recorder = Recorder()
        kernels = fake_kernels(Backend.CPU if is_cpu else requested, workload.device_type, recorder.report)
        step = _build_step(workload, mesh, kernels, on_device, recorder)
        dense = cast(DenseModel, step.model.dense)
        with recorder:
            step(on_device)
        own_time.pop_s()  # of a step that computed nothing; the first of training may follow
        weights = _weights(dense, step.optimizers.dense)
    parts = {id(part): part for part in (on_device.own, *on_device.parts)}
    found[key] = DryRun(
        weights=weights,
        buffers=sum(buffer.nbytes for buffer in dense.buffers()),
        recording=recorder.recording,
        ids=_ids_of(on_device.own),
        distinct_ids=_distinct_ids(on_device.own, workload.specs),
        group_ids=_group_ids(on_device),
        batch_bytes=sum(_bytes_of(part) for part in parts.values()),
        sent_bytes=sent,
    )
    return found[key]


def train_batch(workload: Workload, batch: Batch) -> tuple[TrainBatch, int]:
    """The TrainBatch of rank 0 of the group that trains on ``batch``, and the bytes that it sends to the others."""
    config, roles, size = workload.config, workload.source.roles, workload.config.ranks_per_group
    own = [workload.source.batch_of(samples) for samples in batch.parts(size)]
    computed, group, sent = own[0], None, 0
    if size > 1:
        sent = sum(array.nbytes for array in packed(own[0]))
        computed, group = merge_ranks(own, 0, roles.item)
        replicated = {name for spec in workload.replicated_specs for name in spec.features}
        gathered = {name: counts for name, counts in group.num_values.items() if name not in replicated}
        group = dataclasses.replace(group, num_values=gathered)
    return TrainBatch.of(own[0], computed, group, config.trainer.gradient_accumulation_steps, roles), sent


def _ids_of(batch: HSTUBatch) -> dict[str, int]:
    return dict(zip(batch.features.keys(), batch.features.length_per_key(), strict=True))


def _distinct_ids(batch: HSTUBatch, specs: Iterable[TableSpec]) -> dict[str, int]:
    """Different ids per sharded table."""
    ids = {key: feature.values() for key, feature in batch.features.to_dict().items()}
    own = {spec.name: [ids[name] for name in spec.features if name in ids] for spec in specs if not spec.replicated}
    return {name: len(torch.cat(values).unique()) if values else 0 for name, values in own.items()}


def _group_ids(batch: TrainBatch) -> dict[str, int]:
    """Feature → ids over all parts. All parts share the negatives."""
    of_parts = [_ids_of(part) for part in batch.parts]
    return {key: of_parts[0][key] if is_of_negatives(key) else sum(p[key] for p in of_parts) for key in of_parts[0]}


def _bytes_of(batch: HSTUBatch) -> int:
    parts = [batch, *(each for each in vars(batch).values() if isinstance(each, TensorGroup))]
    tensors = [each for part in parts for each in vars(part).values() if isinstance(each, Tensor)]
    return sum(each.nbytes for each in (*tensors, batch.features.values(), batch.features.lengths()))


def _build_step(workload: Workload, mesh: Mesh, kernels: Kernels, batch: TrainBatch, recorder: Recorder) -> TrainStep:
    config, source = workload.config, workload.source
    corpus_size, draws = source.cardinalities[source.roles.item], source.negatives
    task = task_module(
        config,
        source.roles,
        kernels,
        gather_pool=lambda rows, ids, largest: gather_rows(rows, ids, largest, mesh.dp_group),
        log_counts=LogCounts(torch.zeros(corpus_size)) if draws is not None and draws.logq else None,
    )
    split_encoder(task.encoder, mesh)
    model = _WithoutTables(workload, task, batch, recorder)
    tables = TableOptimizer([], {}, config.optimizer, {})
    optimizers = build_optimizers(model, config.optimizer, tables, mesh)
    step = TrainStep(model, optimizers, mesh, config.trainer.max_grad_norm, build_loss_scale(config))
    step.check = _NoCheck(mesh)
    _follow(step, recorder)
    return step


def _follow(step: TrainStep, recorder: Recorder) -> None:
    """Makes ``step`` set the phase of ``recorder`` and report gradients to it."""
    dense, update = step.model.dense, step.optimizers.step

    def step_weights(found_inf: Tensor | None = None) -> None:
        recorder.begin(UPDATE)
        update(found_inf)

    dense.register_forward_pre_hook(lambda *_: recorder.begin(FORWARD))
    dense.register_forward_hook(lambda *_: recorder.begin(BACKWARD))
    for weight in dense.parameters():
        weight.register_post_accumulate_grad_hook(lambda each: recorder.own(cast(Tensor, each.grad), GRADIENTS))
    step.optimizers.step = step_weights  # type: ignore[method-assign]


class _WithoutTables(GRModel):
    """A model without tables; looked-up rows are random."""

    def __init__(self, workload: Workload, task: nn.Module, batch: TrainBatch, recorder: Recorder) -> None:
        nn.Module.__init__(self)
        self.roles = workload.source.roles
        self.dense = DenseModel(ReplicatedTables((), 0, self.roles.item), task, batch.own.features.keys())
        self._dims = {feature: spec.dim for spec in workload.specs for feature in spec.features}
        # A rank looks up rows of replicated tables for its whole group, other rows for itself.
        of_group = {feature for spec in workload.replicated_specs for feature in spec.features}
        own, group = _ids_of(batch.own), _group_ids(batch)
        self._counts = {name: group[name] if name in of_group else count for name, count in own.items()}
        # TorchRec joins the gradients; with several ranks it also receives and orders about as many.
        self._copies = 3 if workload.world_size > 1 else 1
        self._recorder = recorder

    def look_up(self, batch: HSTUBatch) -> dict[str, Tensor]:
        self._recorder.begin(ROWS)
        shapes = [(n, self._dims[name]) for name, n in self._counts.items()]
        rows = _Rows.apply(torch.zeros((), requires_grad=True), shapes, self._copies)
        return dict(zip(self._counts, rows, strict=True))


class _Rows(torch.autograd.Function):
    """Random rows in place of table rows. Backward only allocates what the tables need to exchange the gradients."""

    @staticmethod
    def forward(ctx: Any, source: Tensor, shapes: list[tuple[int, int]], copies: int) -> tuple[Tensor, ...]:
        ctx.copies = copies
        ctx.set_materialize_grads(False)
        return tuple(torch.randn(shape) for shape in shapes)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[None, None, None]:
        copied = [torch.empty_like(each) for each in gradients * ctx.copies if each is not None]
        del copied
        return None, None, None


class _NoCheck(FiniteCheck):
    """Exchanges what the check of a run does, and treats every step as finite: reading tensors without data fails."""

    def resolve(self) -> None:
        pass


def _weights(dense: DenseModel, optimizer: DenseOptimizer) -> dict[str, Weight]:
    states, found = optimizer.state_tensors(), {}
    for name, weight in dense.named_parameters():
        own = [cast(Tensor, state) for key, state in states.items() if key.rpartition(".")[0] == name]
        whole = sum(state.nbytes for state in own if state.shape == weight.shape)
        counts = sum(state.nbytes for state in own if state.shape != weight.shape)
        found[name] = Weight(weight.shape[0], weight.numel(), whole, counts, ".stack.layers." in name)
    return found


@contextmanager
def _mesh(workload: Workload) -> Iterator[Mesh]:
    """Yields the Mesh of rank 0 in groups of torch's "fake" backend.
    In a run that has started, the groups are new groups of its processes. Logging is silenced."""
    is_started = dist.is_initialized()
    if not is_started:
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=workload.world_size)

    def group_of(field: str, ranks: range) -> dist.ProcessGroup:
        return dist.new_group(list(ranks), backend="fake", use_local_synchronization=True, group_desc=field)

    log = logging.getLogger("hstu")
    level, log.level = log.level, logging.ERROR
    try:
        others = {"device": _CPU, "local_world_size": workload.ranks_per_host, "world_group": None, "seed": 0}
        mesh = Mesh.of(workload.tp_size, workload.cp_size, group_of, **others)
        with torch.random.fork_rng(devices=[]):
            yield dataclasses.replace(mesh, world_group=mesh.dp_group)
    finally:
        log.setLevel(level)
        if not is_started:
            dist.destroy_process_group()
