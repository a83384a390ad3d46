"""A training step asks the device for nothing.

Without a GPU the dense part runs on torch's meta device: it has shapes and no values, so whatever needs a value, or a
size that depends on values (item, a mask as an index, nonzero, a copy to the host), raises. On a GPU torch itself warns
of every wait for the device, in whole steps of every pipeline; TorchRec's exchange of ids between ranks is known to
need the sizes on the host, ours must not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torchrec import JaggedTensor

from hstu.config.run_config import RunConfig
from hstu.data.batch import NEGATIVES, HSTUBatch
from hstu.data.sampler import SamplerPosition
from hstu.data.store import SequenceStore
from hstu.model.embedding import table_specs
from hstu.model.gr_model import DenseModel, GRModel
from hstu.model.ranking import RankingDense
from hstu.ops.pytorch import attention
from hstu.optim.dense import DenseOptimizer
from hstu.parallel import mesh as meshes
from hstu.parallel.dense import own_gradients_finite
from hstu.pipeline.boundary import Boundary
from hstu.pipeline.none import SequentialPipeline
from hstu.train.builder import build_task
from hstu.train.sources import open_source
from tests.conftest import write_small_store
from tests.distributed.launch import run_ranks
from tests.distributed.pipeline_cases import PIPELINES, write_store
from tests.train.tiny import tiny_config, walks

UNIFORM = {"negatives": "uniform", "num_negatives": 5}
CASES: dict[str, dict[str, Any]] = {
    "ranking": {"task": "ranking"},
    "ranking, candidates": {"task": "ranking", "dataset": {"max_num_candidates": 2}},
    "ranking, actions added": {
        "task": "ranking",
        "dataset": {"max_num_candidates": 2},
        "network": {"interleave_actions": False},
    },
    "ranking, relative bias": {"task": "ranking", "network": {"position_encoding": "relative_bias"}},
    "ranking, recomputed": {"task": "ranking", "network": {"recompute_layer": True, "hidden_dropout": 0.3}},
    "retrieval, in-batch negatives": {"task": "retrieval", "task_args": {"negatives": "in_batch"}},
    "retrieval, drawn in-batch negatives": {
        "task": "retrieval",
        "task_args": {"negatives": "in_batch", "num_negatives": 5},
    },
    "retrieval, uniform negatives": {"task": "retrieval", "task_args": UNIFORM},
    "retrieval, shared negatives": {"task": "retrieval", "task_args": UNIFORM | {"shared_negatives": True}},
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
    for limits in (attention.SCORES_PER_BLOCK, attention.ROWS_PER_BLOCK):
        monkeypatch.setitem(limits, "meta", limits["cuda"])


def dense_step(config: RunConfig, mesh: meshes.Mesh, spoil: Callable[[GRModel], None] = lambda model: None) -> Tensor:
    """Forward, backward, clipping and step of the dense part on the meta device; returns the loss."""
    source = open_source(config, mesh)
    lookup_negatives = getattr(config.task_args, "negatives", "in_batch") != "in_batch"
    roles = source.roles
    specs = table_specs(source.tables, config.network, roles.contextual, roles.item, lookup_negatives)
    keys = (*roles.names, *([NEGATIVES] if lookup_negatives else []))
    model = GRModel(specs, build_task(config, source, mesh), keys, roles.item, config.trainer.seed)
    model.dense.to("meta")
    spoil(model)
    optimizer = DenseOptimizer(model.dense, config.optimizer)
    pipeline = SequentialPipeline(model, SimpleNamespace(), mesh, max_grad_norm=0.0)  # type: ignore[arg-type]
    batch = next(source.train_batches(SamplerPosition())).to(torch.device("meta"), non_blocking=True)
    boundary = Boundary(rows_of_sharded_tables(model, batch), batch)
    loss_sum, count = pipeline.differentiate(boundary, batch)
    assert all(gradient.shape[1] for gradient in boundary.gradients())
    assert own_gradients_finite(model.dense).is_meta
    torch.nn.utils.clip_grad_norm_(optimizer.parameters.values(), 1.0)
    optimizer.step()
    return loss_sum / count


def rows_of_sharded_tables(model: GRModel, batch: HSTUBatch) -> dict[str, JaggedTensor]:
    """What TorchRec would have looked up."""
    keyed, rows = batch.features.to_dict(), {}
    for spec in (spec for spec in model.specs if not spec.replicated):
        for feature in spec.features:
            ids = keyed[feature]
            values = torch.empty(len(ids.values()), spec.dim, device="meta", requires_grad=True)
            rows[feature] = JaggedTensor(values, lengths=ids.lengths(), offsets=ids.offsets())
    return rows


def config_of(store: SequenceStore, output: Path, task: str, **options: Any) -> RunConfig:
    return tiny_config(task, store, output, optimizer={"optimizer_str": "sgd", "momentum": 0.9}, **options)


@pytest.mark.usefixtures("without_values")
@pytest.mark.parametrize("case", CASES)
def test_the_dense_part_of_a_step_needs_no_value_of_the_device(
    case: str, mesh: meshes.Mesh, store: SequenceStore, tmp_path: Path
) -> None:
    loss = dense_step(config_of(store, tmp_path, **CASES[case]), mesh)
    assert loss.is_meta and loss.shape == ()


@pytest.mark.usefixtures("without_values")
@pytest.mark.parametrize("ask", [float, Tensor.cpu, Tensor.nonzero, lambda loss: loss[loss > 0]])
def test_a_model_that_asks_for_a_value_is_found_out(
    ask: Callable[[Tensor], Any], mesh: meshes.Mesh, store: SequenceStore, tmp_path: Path
) -> None:
    def spoil(model: GRModel) -> None:
        assert isinstance(model.dense, DenseModel) and isinstance(model.dense.task, RankingDense)
        model.dense.task.register_forward_hook(lambda _, given, output: ask(output.loss_sum.detach()) and None)

    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        dense_step(config_of(store, tmp_path, "ranking"), mesh, spoil)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: torch's sync-debug mode counts the waits")
@pytest.mark.parametrize("task", ["ranking", "retrieval"])
def test_on_a_gpu_no_step_of_ours_waits_for_the_device(task: str, tmp_path: Path) -> None:
    write_store(tmp_path / "store")
    (waits,) = run_ranks("tests.distributed.pipeline_cases:syncs", 1, store=str(tmp_path / "store"), task=task)
    assert {kind: waits[kind]["ours"] for kind in PIPELINES} == {kind: [] for kind in PIPELINES}, waits
