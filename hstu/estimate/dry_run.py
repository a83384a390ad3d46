"""One training step of the real model, without processes, data or memory: what it runs, keeps and exchanges.

The model is built and split as a run does it, for rank 0 of its tensor- and context-parallel group, and the real
TrainStep trains it on tensors without data (torch's FakeTensorMode), over process groups of torch's "fake" backend.
The tables are left out: rows come from nowhere. So is what data parallelism adds to a step, see data_parallel.py.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from hstu.data.batches.batch import NEGATIVES, HSTUBatch, TensorGroup, is_of_negatives, of_negatives
from hstu.data.batches.train_batch import TrainBatch
from hstu.data.features.roles import FeatureRoles
from hstu.estimate.batches import train_batch
from hstu.estimate.record import GRADIENTS, Recorder, Recording
from hstu.estimate.workload import Batch, Workload
from hstu.model.embedding import ReplicatedTables, TableSpec
from hstu.model.gr_model import DenseModel, GRModel
from hstu.model.inputs import SequenceFeatures
from hstu.model.retrieval import LogCounts
from hstu.model.stack import SequenceEncoder, kernel_shapes
from hstu.ops.fake import fake_kernels
from hstu.ops.kernels import Backend, Kernels
from hstu.ops.select import select_kernels
from hstu.optim.dense import DenseOptimizer
from hstu.optim.optimizers import Optimizers, build_optimizers
from hstu.parallel.collectives import gather_rows
from hstu.parallel.layer_comm import split_encoder
from hstu.parallel.mesh import Mesh
from hstu.parallel.table_optimizer import TableOptimizer
from hstu.pipeline.step import TrainStep
from hstu.train.builder import build_loss_scale, task_module

_CPU = torch.device("cpu")
ROWS, FORWARD, BACKWARD, UPDATE = "looked-up rows", "activations", "working memory", "dense optimizer"
"""What is allocated in the parts of a step, and their names."""


@dataclass(frozen=True)
class Weight:
    """A parameter of the dense part on one rank."""

    rows: int
    elements: int
    state_bytes: int
    """Of states that have its shape, the moving average included."""
    step_bytes: int
    """Of its count of steps."""
    is_layer: bool
    """Whether it belongs to an HSTU layer."""
    shares: int
    """Ranks among which tensor parallelism cuts it; 1: it is whole."""


@dataclass(frozen=True)
class DryRun:
    """What a step needs on a rank that has all dense weights of its tensor-parallel shard."""

    weights: Mapping[str, Weight]
    buffers: int
    """Bytes."""
    recording: Recording
    ids: Mapping[str, int]
    """Feature → ids that a rank looks up."""
    group_ids: Mapping[str, int]
    """The same of all ranks of its tp_cp group."""
    batch_bytes: int
    """Of the batch of a rank, that of its group and its micro-batches."""
    sent_bytes: int
    """What a rank sends of its batch to the others of its group, on the host."""


def dry_run(workload: Workload, batch: Batch) -> DryRun:
    """The step of a rank of the group that trains on ``batch``."""
    on_device, sent = train_batch(workload, batch)
    with _mesh(workload) as (mesh, groups), _quiet(), FakeTensorMode(allow_non_fake_inputs=True):
        recorder = Recorder(groups)
        kernels = fake_kernels(_backend(workload), recorder.report)
        step = _build_step(workload, mesh, kernels, on_device, recorder)
        dense = cast(DenseModel, step.model.dense)
        with recorder, torch.autograd.graph.saved_tensors_hooks(recorder.keep, lambda tensor: tensor):
            step(on_device)
        weights = _weights(dense, step.optimizers.dense, workload.tp_size)
    ids, group_ids = _ids_of(on_device.own), _group_ids(on_device)
    parts = {id(part): part for part in (on_device.own, *on_device.parts)}
    size = sum(_bytes_of(part) for part in parts.values())
    buffers = sum(buffer.nbytes for buffer in dense.buffers())
    return DryRun(weights, buffers, recorder.recording, ids, group_ids, size, sent)


class DryRuns:
    """Dry runs that are made once, however the ranks with equal dense weights share these."""

    def __init__(self) -> None:
        self._found: dict[tuple[str, int], tuple[Batch, DryRun]] = {}

    def of(self, workload: Workload, batch: Batch) -> DryRun:
        """See ``dry_run``."""
        config = workload.config
        parts = config.network, config.trainer, config.tensor_parallel, config.context_parallel
        key = repr(parts), id(batch)
        if key not in self._found:
            self._found[key] = batch, dry_run(workload, batch)
        return self._found[key][1]


@contextmanager
def real_step(workload: Workload, batch: Batch) -> Iterator[tuple[Callable[[], object], Optimizers]]:
    """The same step on this CPU, with data and the kernels of the run; and the optimizers that it calls."""
    network = workload.config.network
    shapes = kernel_shapes(network, workload.tp_size)
    kernels = select_kernels(network.kernel_backend, network.strict_kernel_backend, _CPU, shapes)
    on_device, _ = train_batch(workload, batch)
    with _mesh(workload) as (mesh, _), _quiet():
        step = _build_step(workload, mesh, kernels, on_device)
        yield lambda: step(on_device), step.optimizers


def _backend(workload: Workload) -> Backend:
    requested = Backend(workload.config.network.kernel_backend)
    return Backend.CPU if workload.device_type == "cpu" and requested is not Backend.PYTORCH else requested


def _build_step(
    workload: Workload, mesh: Mesh, kernels: Kernels, batch: TrainBatch, recorder: Recorder | None = None
) -> TrainStep:
    config, roles = workload.config, workload.roles
    has_counts = workload.negatives is not None and workload.negatives.logq
    task = task_module(
        config,
        SequenceFeatures.of(roles, workload.max_items),
        kernels,
        gather_pool=lambda rows, ids: gather_rows(rows, ids, mesh.dp_group),
        log_counts=LogCounts(torch.zeros(workload.corpus_size)) if has_counts else None,
    )
    split_encoder(cast(SequenceEncoder, task.encoder), mesh)
    drawn = workload.negatives is not None and workload.negatives.kind != "in_batch"
    negatives = (NEGATIVES, *map(of_negatives, roles.tower)) if drawn else ()
    sharded = tuple(replace(spec, replicated=False) for spec in (*workload.specs, *_unknown_tables(workload)))
    model = _WithoutTables(
        sharded, task, (*roles.names, *negatives), roles, _rows_per_feature(workload, batch), recorder
    )
    optimizers = build_optimizers(model, config.optimizer, cast(TableOptimizer, _NoTables()), mesh, config.located)
    step = TrainStep(model, optimizers, mesh, config.trainer.max_grad_norm, build_loss_scale(config))
    step.check = _NoCheck()  # type: ignore[assignment]
    if recorder is not None:
        _follow(step, recorder)
    return step


def _unknown_tables(workload: Workload) -> list[TableSpec]:
    """Tables of one row for features whose tables are not known before the data is preprocessed."""
    known = {feature for spec in workload.specs for feature in spec.features}
    widths = {name: workload.roles.width(name, workload.config.network) for name in workload.roles.names}
    return [TableSpec(name, 1, dim, (name,), False, "auto", 0.0) for name, dim in widths.items() if name not in known]


def _follow(step: TrainStep, recorder: Recorder) -> None:
    """Let ``recorder`` follow the parts of a step."""
    dense, update = step.model.dense, step.optimizers.step

    def begin(phase: str) -> None:
        recorder.phase = phase

    def step_weights(found_inf: Tensor | None = None) -> None:
        begin(UPDATE)
        update(found_inf)

    dense.register_forward_pre_hook(lambda *_: begin(FORWARD))
    dense.register_forward_hook(lambda *_: begin(BACKWARD))
    for weight in dense.parameters():
        weight.register_post_accumulate_grad_hook(lambda each: recorder.own(cast(Tensor, each.grad), GRADIENTS))
    step.optimizers.step = step_weights  # type: ignore[method-assign]


class _WithoutTables(GRModel):
    """A model whose looked-up rows come from nowhere."""

    def __init__(
        self,
        specs: tuple[TableSpec, ...],
        task: nn.Module,
        keys: tuple[str, ...],
        roles: FeatureRoles,
        rows: Mapping[str, int],
        recorder: Recorder | None,
    ) -> None:
        nn.Module.__init__(self)
        self.specs, self.feature_keys, self.roles = specs, keys, roles
        self.dense = DenseModel(ReplicatedTables((), 0), task, specs, keys, roles)
        self._dims = {feature: spec.dim for spec in specs for feature in spec.features}
        self._rows, self._recorder = rows, recorder

    def look_up(self, batch: HSTUBatch) -> dict[str, Tensor]:
        """See GRModel."""
        if self._recorder is not None:
            self._recorder.phase = ROWS
        source = torch.zeros((), requires_grad=True)
        return {name: _Rows.apply(source, count, self._dims[name]) for name, count in self._rows.items()}


class _Rows(torch.autograd.Function):
    """Rows [n, dim] of a table that is not there."""

    @staticmethod
    def forward(ctx: Any, source: Tensor, count: int, dim: int) -> Tensor:
        return torch.randn(count, dim)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, None, None]:
        return None, None, None


class _NoTables:
    """The optimizer of no tables."""

    def zero_grad(self) -> None:
        """Do nothing."""

    def step(self, found_inf: Tensor | None) -> None:
        """Do nothing."""


class _NoCheck:
    """Finds every step finite without reading it."""

    found_inf, overflowed = None, False

    def __call__(self, loss_sum: Tensor, finite: Tensor, batch: HSTUBatch) -> Tensor:
        return loss_sum

    def mask(self, gradients: list[Tensor]) -> list[Tensor]:
        """The gradients themselves."""
        return gradients


def _weights(dense: DenseModel, optimizer: DenseOptimizer, tp_size: int) -> dict[str, Weight]:
    states = optimizer.state_tensors()
    layers = tuple(f"{name}." for name, _ in dense.named_modules() if ".stack.layers." in name)
    found = {}
    for name, weight in dense.named_parameters():
        own = [cast(Tensor, state) for key, state in states.items() if key.rpartition(".")[0] == name]
        whole = sum(state.nbytes for state in own if state.shape == weight.shape)
        counts = sum(state.nbytes for state in own if state.shape != weight.shape)
        shares = tp_size if getattr(weight, "tensor_model_parallel", False) else 1
        found[name] = Weight(weight.shape[0], weight.numel(), whole, counts, name.startswith(layers), shares)
    return found


def _ids_of(batch: HSTUBatch) -> dict[str, int]:
    """Values of each feature."""
    return dict(zip(batch.features.keys(), batch.features.length_per_key(), strict=True))


def _group_ids(batch: TrainBatch) -> dict[str, int]:
    """Values of each feature in all parts; negatives belong to all of them."""
    of_parts = [_ids_of(part) for part in batch.parts]
    return {key: of_parts[0][key] if is_of_negatives(key) else sum(p[key] for p in of_parts) for key in of_parts[0]}


def _rows_per_feature(workload: Workload, batch: TrainBatch) -> dict[str, int]:
    """Rows that are looked up: those of replicated tables for all ranks of a group, others for this rank."""
    replicated = {feature for spec in workload.specs if spec.replicated for feature in spec.features}
    of_group = _group_ids(batch)
    return {name: of_group[name] if name in replicated else count for name, count in _ids_of(batch.own).items()}


def _bytes_of(batch: HSTUBatch) -> int:
    parts = [batch, *(each for each in vars(batch).values() if isinstance(each, TensorGroup))]
    tensors = [each for part in parts for each in vars(part).values() if isinstance(each, Tensor)]
    return sum(each.nbytes for each in (*tensors, batch.features.values(), batch.features.lengths()))


@contextmanager
def _mesh(workload: Workload) -> Iterator[tuple[Mesh, dict[str, str]]]:
    """Rank 0 of the run, in groups of torch's "fake" backend, and name of a group → what Transfer calls it.

    Inside a run that has started, the groups are new ones of its processes.
    """
    world, tp, cp = workload.world_size, workload.tp_size, workload.cp_size
    is_started = dist.is_initialized()
    if not is_started:
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
    rank, size = dist.get_rank(), tp * cp
    first = rank - rank % size
    of_dp = rank % size
    ranks = {
        "tensor": range(rank - rank % tp, rank - rank % tp + tp),
        "context": range(first + rank % tp, first + size, tp),
        "samples": range(first, first + size),
        "data": range(of_dp, world, size),
        "gradients": range(rank % tp, world, tp),
    }
    try:
        groups = {
            name: dist.new_group(list(members), backend="fake", use_local_synchronization=True)
            for name, members in ranks.items()
        }
        mesh = Mesh(
            device=_CPU,
            rank=rank,
            world_size=world,
            local_world_size=workload.ranks_per_host,
            dp_rank=rank // size,
            dp_size=workload.dp_size,
            tp_rank=rank % tp,
            tp_size=tp,
            cp_rank=rank % size // tp,
            cp_size=cp,
            world_group=groups["data"],
            dp_group=groups["data"],
            tp_group=groups["tensor"],
            cp_group=groups["context"],
            tp_cp_group=groups["samples"],
            dp_cp_group=groups["gradients"],
            seed=0,
        )
        with torch.random.fork_rng(devices=[]):
            yield mesh, {group.group_name: name for name, group in groups.items()}
    finally:
        if not is_started:
            dist.destroy_process_group()


@contextmanager
def _quiet() -> Iterator[None]:
    """Inside, the parts of a run log nothing."""
    log = logging.getLogger("hstu")
    level, log.level = log.level, logging.ERROR
    try:
        yield
    finally:
        log.setLevel(level)
