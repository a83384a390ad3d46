"""A training step does not make the host wait for the device.

- Without a GPU the dense part runs on torch's meta device, which has shapes and no values. Whatever needs a value, or a
  size that depends on values (item, a mask as an index, nonzero, a copy to the host), raises.
  A copy from the host must come from pinned memory, else it waits for all work that the device has queued.
- Whole steps run on the CPU as they would on a GPU. Every tensor that our code reads and every event that it waits for
  is noted.
- On a GPU torch itself warns of every wait for the device, in whole steps of every pipeline. TorchRec's exchange of ids
  between ranks needs the sizes on the host; our code must not wait.
"""

import os
import traceback
import warnings
from collections.abc import Callable, Iterator
from functools import partial, partialmethod
from itertools import islice
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from torch.utils._python_dispatch import TorchDispatchMode

import hstu
from hstu.config.args import RankingTaskArgs
from hstu.config.run_config import RunConfig
from hstu.data.batches.batch import NEGATIVES, HSTUBatch
from hstu.data.sampling.sampler import SamplerPosition
from hstu.data.store.sequence_store import SequenceStore
from hstu.model.embedding import table_specs
from hstu.model.gr_model import DenseModel, GRModel
from hstu.model.ranking import RankingDense
from hstu.ops.kernels import AttentionConfig
from hstu.ops.pytorch import attention
from hstu.ops.self_check import small_layout
from hstu.parallel import mesh as meshes
from hstu.parallel.group import to_train_batch
from hstu.parallel.shards import gradient_norm
from hstu.pipeline.finite import FiniteCheck
from hstu.pipeline.step import TrainStep
from hstu.train.builder import build_task
from hstu.train.sources import open_source
from tests.conftest import write_small_store
from tests.distributed.launch import run_cases
from tests.distributed.pipeline_cases import PIPELINES, assemble, make_config, write_store
from tests.train.tiny import OF_THE_ACTION, build, tiny_config, walks

UNIFORM = {"negatives": "uniform", "num_negatives": 5}
CASES: dict[str, dict[str, Any]] = {
    "ranking, candidates": {"task": "ranking", "dataset": {"max_num_candidates": 2}},
    "ranking, tasks": {"task": "ranking", "dataset": {"max_num_candidates": 2}, "task_args": OF_THE_ACTION},
    "ranking, tasks of values": {
        "task": "ranking",
        "task_args": {
            "prediction_head_arch": [8],
            "task_sharing": "mmoe",
            "tasks": [
                RankingTaskArgs(name="kind", label="action", kind="class", num_classes=4),
                RankingTaskArgs(name="height", label="action", kind="regression", loss="huber"),
            ],
        },
    },
    "ranking, relative bias": {"task": "ranking", "network": {"position_encoding": "relative_bias"}},
    "ranking, recomputed": {"task": "ranking", "network": {"recompute_layer": True, "hidden_dropout": 0.3}},
    "retrieval, drawn in-batch negatives": {
        "task": "retrieval",
        "task_args": {"negatives": "in_batch", "num_negatives": 5},
    },
    "retrieval, shared negatives": {"task": "retrieval", "task_args": UNIFORM | {"shared_negatives": True}},
    "retrieval, mixed negatives, corrected": {
        "task": "retrieval",
        "task_args": {"negatives": "mixed", "num_negatives": 5, "logq_correction": True},
    },
    "retrieval, all items": {"task": "retrieval", "task_args": {"negatives": "full"}},
}


@pytest.fixture(scope="module")
def mesh() -> Iterator[meshes.Mesh]:
    yield meshes.start(timeout_s=60)
    meshes.finish()


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> SequenceStore:
    return write_small_store(tmp_path_factory.mktemp("walks") / "store", **walks())


@pytest.fixture
def without_values(monkeypatch: pytest.MonkeyPatch) -> None:
    """What depends on the kind of device takes the meta device as it would take a GPU."""
    autocast, is_enabled = torch.autocast, torch.is_autocast_enabled
    known: Callable[[str], str] = lambda device: "cpu" if device == "meta" else device  # noqa: E731
    generator = torch.Generator
    monkeypatch.setattr(torch, "Generator", lambda device="cpu": generator(known(torch.device(device).type)))
    monkeypatch.setattr(torch, "autocast", lambda device, **options: autocast(known(device), **options))
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: is_enabled(known(device)))
    monkeypatch.setattr(Tensor, "pin_memory", _pinned)
    for limits in (attention.SCORES_PER_BLOCK, attention.ROWS_PER_BLOCK):
        monkeypatch.setitem(limits, "meta", limits["cuda"])


def meta_step(config: RunConfig, mesh: meshes.Mesh, spoil: Callable[[GRModel], None] = lambda model: None) -> Tensor:
    """A step on the meta device, from the rows of the sharded tables to clipping; returns the loss."""
    source = open_source(config, mesh)
    lookup_negatives = getattr(config.task_args, "negatives", "in_batch") != "in_batch"
    roles = source.roles
    specs = table_specs(source.tables, config.network, roles, lookup_negatives)
    keys = (*roles.names, *([NEGATIVES] if lookup_negatives else []))
    model = GRModel(specs, build_task(config, source, mesh), keys, roles, config.trainer.seed)
    model.dense.to("meta")
    model.look_up = partial(rows_of_sharded_tables, model)  # type: ignore[method-assign]
    spoil(model)
    optimizers = Mock(spec=["zero_grad", "gradient_norm", "clip_grad_norm", "step", "tables"])
    optimizers.gradient_norm.side_effect = partial(gradient_norm, [*model.dense.parameters()], None)
    optimizers.clip_grad_norm.side_effect = partial(clip_grad_norm_, model.dense.parameters())
    step = TrainStep(model, optimizers, mesh, max_grad_norm=1.0)
    step.check, step.measures_norms = MetaCheck(mesh), True
    batch = to_train_batch(next(source.train_batches(SamplerPosition())), roles, mesh, 2)
    batch = batch.to(torch.device("meta"), non_blocking=True)
    with PageableCopies() as copies:
        loss = step(batch).loss
    assert not copies.found
    optimizers.clip_grad_norm.assert_called_once_with(1.0)
    return loss


PINNED: dict[int, Tensor] = {}
"""Address → what a test has pinned, as far as a machine without a GPU can. It is kept, so the address stays its own."""


def _pinned(tensor: Tensor) -> Tensor:
    copy = tensor.clone()
    PINNED[copy.data_ptr()] = copy
    return copy


class PageableCopies(TorchDispatchMode):
    """Notes the copies to the meta device from host memory that is not pinned."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        copies = function in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
        if copies and isinstance(result, Tensor) and result.is_meta:
            source = args[1] if function is torch.ops.aten.copy_.default else args[0]
            if source.device.type == "cpu" and source.dim() and source.data_ptr() not in PINNED:
                self.found.append(f"{function} {tuple(source.shape)}")
        return result


class MetaCheck(FiniteCheck):
    """A meta tensor cannot be copied to the host, not even behind its back."""

    def __call__(self, loss_sums: Tensor, gradients_finite: Tensor, batch: HSTUBatch) -> Tensor:
        assert gradients_finite.is_meta
        self.found_inf = gradients_finite.float()
        return loss_sums


def rows_of_sharded_tables(model: GRModel, batch: HSTUBatch) -> dict[str, Tensor]:
    """What TorchRec would have looked up."""
    keyed = batch.features.to_dict()
    return {
        feature: torch.empty(len(keyed[feature].values()), spec.dim, device="meta", requires_grad=True)
        for spec in model.specs
        if not spec.replicated
        for feature in spec.features
    }


def config_of(store: SequenceStore, output: Path, task: str, **options: Any) -> RunConfig:
    return tiny_config(task, store, output, trainer={"gradient_accumulation_steps": 2}, **options)


@pytest.mark.usefixtures("without_values")
@pytest.mark.parametrize("case", CASES)
def test_a_step_needs_no_value_from_the_device(
    case: str, mesh: meshes.Mesh, store: SequenceStore, tmp_path: Path
) -> None:
    loss = meta_step(config_of(store, tmp_path, **CASES[case]), mesh)
    assert loss.is_meta and loss.shape == ()


@pytest.mark.usefixtures("without_values")
@pytest.mark.parametrize("ask", [float, Tensor.cpu, Tensor.nonzero, lambda loss: loss[loss > 0]])
def test_a_model_that_reads_a_value_is_detected(
    ask: Callable[[Tensor], Any], mesh: meshes.Mesh, store: SequenceStore, tmp_path: Path
) -> None:
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        meta_step(config_of(store, tmp_path, "ranking"), mesh, spoiled_by(ask))


def spoiled_by(deed: Callable[[Tensor], Any]) -> Callable[[GRModel], None]:
    """Makes a model do the deed with its loss."""

    def spoil(model: GRModel) -> None:
        assert isinstance(model.dense, DenseModel) and isinstance(model.dense.task, RankingDense)
        model.dense.task.register_forward_hook(lambda _, given, output: (deed(output.loss_sum.detach()), None)[1])

    return spoil


@pytest.mark.usefixtures("without_values")
@pytest.mark.parametrize(
    "copy", [lambda loss: torch.ones(3).to(loss.device), lambda loss: torch.ones(3).add_(1).to(loss)]
)
def test_a_model_that_copies_pageable_memory_is_detected(
    copy: Callable[[Tensor], Any], mesh: meshes.Mesh, store: SequenceStore, tmp_path: Path
) -> None:
    with pytest.raises(AssertionError, match="_to_copy"):
        meta_step(config_of(store, tmp_path, "ranking"), mesh, spoiled_by(copy))


@pytest.mark.parametrize("kernels", ["cutlass", "triton", "pytorch"])
def test_attention_copies_what_it_plans_from_pinned_memory(kernels: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tensor, "pin_memory", _pinned)
    layout = small_layout(torch.device("meta"), (70, 0, 3), (9, 0, 1), num_contextuals=2, group_size=1)
    config = AttentionConfig(1.0, 100)
    with PageableCopies() as copies:
        if kernels == "cutlass":
            of_cutlass = pytest.importorskip("hstu.ops.cutlass.attention")
            shape = of_cutlass.Variant(of_cutlass.Kernel.KEYS, torch.bfloat16, 64, 90).shape
            planned, _ = of_cutlass._work_on(torch.device("meta"), shape, layout, config, 2, 132)
        elif kernels == "triton":
            planned = pytest.importorskip("hstu.ops.triton.attention")._longest_first(layout)
        else:
            for limits in (attention.SCORES_PER_BLOCK, attention.ROWS_PER_BLOCK):
                monkeypatch.setitem(limits, "meta", 2**20)
            planned = next(attention.groups(layout, config, heads=1)).tokens
    assert planned.is_meta and not copies.found


READS = ("item", "tolist", "numpy", "cpu", "nonzero", "__bool__", "__float__", "__int__", "__index__")
WHOLE_STEPS: dict[str, dict[str, Any]] = {
    "sgd": {"optimizer": {"optimizer_str": "sgd", "momentum": 0.9}},
    "adagrad, clipped": {"optimizer": {"optimizer_str": "adagrad"}, "trainer": {"max_grad_norm": 0.1}},
    "adam, averaged, bfloat16": {
        "optimizer": {"optimizer_str": "adam", "ema_decay": 0.9, "weight_decay": 0.1},
        "network": {"dtype_str": "bfloat16"},
    },
    "rowwise_adagrad, accumulated": {
        "optimizer": {"optimizer_str": "rowwise_adagrad"},
        "trainer": {"gradient_accumulation_steps": 2},
    },
}


@pytest.mark.parametrize("case", WHOLE_STEPS)
def test_a_whole_step_reads_nothing_but_the_check_of_the_step_before(
    case: str, mesh: meshes.Mesh, store: SequenceStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = build(tiny_config("retrieval", store, tmp_path, **WHOLE_STEPS[case]), mesh)
    step, source, parts = trainer.pipeline.step, trainer.source, trainer.args.gradient_accumulation_steps
    step.check.deferred = True
    batches = [
        to_train_batch(batch, source.roles, mesh, parts) for batch in islice(source.train_batches(SamplerPosition()), 4)
    ]
    reads: list[str] = []
    for name in READS:
        monkeypatch.setattr(Tensor, name, partialmethod(_noted, getattr(Tensor, name), reads))
    for owner in (torch.cpu.Event, torch.cpu.Stream):
        wait = getattr(owner, "synchronize", None)
        if wait is not None:
            monkeypatch.setattr(owner, "synchronize", partialmethod(_noted, wait, reads))
    monkeypatch.setattr(torch.cpu, "synchronize", lambda *_: reads.append("synchronize"))
    by_step = []
    for batch in batches:
        step(batch)
        by_step.append(reads.copy())
        reads.clear()
    monkeypatch.undo()
    assert by_step == [[], *[["finite.py resolve synchronize", "finite.py resolve tolist"]] * 3]
    trainer.run_directory.close()


def _noted(owner: Any, read: Callable[..., Any], reads: list[str], *args: Any) -> Any:
    """Read, and note it if the innermost line outside of torch is ours."""
    *stack, _ = traceback.extract_stack()
    torchs = f"{Path(torch.__file__).parent}/"
    line = next(frame for frame in reversed(stack) if not frame.filename.startswith(torchs))
    if line.filename.startswith(str(Path(hstu.__file__).parent)):
        reads.append(f"{Path(line.filename).name} {line.name} {read.__name__}")
    return read(owner, *args)


def waits(mesh: meshes.Mesh, store: str, kind: str, task: str) -> dict[str, list[str]]:
    """Where steps wait for the device, as "file:line" by whose code it is."""
    pipeline, source, _, _ = assemble(make_config(store, kind, task), mesh)
    batches = source.train_batches(SamplerPosition())
    for _ in range(3):  # the first steps make buffers, and tables their state
        pipeline.progress(batches)
    return _waits_of(lambda: pipeline.progress(batches))


def _waits_of(step: Callable[[], Any]) -> dict[str, list[str]]:
    """Of three steps, by torch's sync-debug mode; a wait is whose line is the innermost one outside of torch."""
    waits: dict[str, list[str]] = {"ours": [], "libraries'": []}
    unasked = os.path.dirname(torch.__file__) + os.sep, warnings.__file__

    def note(message: Any, *_: Any, **__: Any) -> None:
        if "synchroniz" not in str(message):
            return
        stack = traceback.extract_stack()[:-1]
        line = next(frame for frame in reversed(stack) if not frame.filename.startswith(unasked))
        ours = line.filename.startswith(os.path.dirname(hstu.__file__))
        waits["ours" if ours else "libraries'"].append(f"{line.filename}:{line.lineno}")

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note
        torch.cuda.set_sync_debug_mode("warn")
        try:
            for _ in range(3):
                step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return waits


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: torch's sync-debug mode counts the waits")
@pytest.mark.parametrize("task", ["ranking", "retrieval"])
def test_on_a_gpu_no_step_of_ours_waits_for_the_device(task: str, tmp_path: Path) -> None:
    store = write_store(tmp_path / "store")
    (found,) = run_cases(1, {kind: partial(waits, store=store, kind=kind, task=task) for kind in PIPELINES})
    assert {kind: found[kind]["ours"] for kind in PIPELINES} == {kind: [] for kind in PIPELINES}, found
