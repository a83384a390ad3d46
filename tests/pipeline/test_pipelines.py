import json
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import nn

from hstu.data.batches.batch import HSTUBatch
from hstu.data.sampling.sampler import SamplerPosition
from hstu.parallel.mesh import Mesh, seed_initial_weights
from hstu.pipeline import pipelines
from hstu.pipeline.pipelines import TrainPipeline
from hstu.train.builder import build_trainer
from tests.distributed.launch import Launch, run_cases
from tests.distributed.pipeline_cases import PIPELINES, STEPS, assemble, digest, make_config, train, write_store
from tests.distributed.training_cases import signal_in_step

AHEAD = ("native", "prefetch")
ADAM, ADAGRAD = {"optimizer_str": "adam"}, {"optimizer_str": "adagrad"}
UNIFORM = {"negatives": "uniform", "num_negatives": 6}
CASES: dict[str, Any] = {
    "ranking, sgd": {},
    "ranking, adagrad": {"optimizer": ADAGRAD},
    "ranking, adam": {"optimizer": ADAM},
    "ranking, candidates": {"dataset": {"max_num_candidates": 2}},
    "two widths": {"network": {"contextual_embedding_dim": 8}},
    "all tables replicated": {"sharded": []},
    "clipped": {"trainer": {"max_grad_norm": 0.05}},
    "retrieval, in-batch negatives": {"task": "retrieval", "task_args": {"negatives": "in_batch"}},
    "retrieval, uniform negatives": {"task": "retrieval", "task_args": UNIFORM, "optimizer": ADAM},
    "retrieval, shared negatives": {"task": "retrieval", "task_args": {**UNIFORM, "shared_negatives": True}},
    "retrieval, all items": {"task": "retrieval", "task_args": {"negatives": "full"}, "optimizer": ADAGRAD},
    "relative bias": {"task": "retrieval", "network": {"position_encoding": "relative_bias"}, "sharded": ["item_id"]},
}
NEVER_EVALUATED = {"ranking, adam, never evaluated": {**CASES["ranking, adam"], "evaluate_after": ()}}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_store(tmp_path_factory.mktemp("pipelines") / "store")


@pytest.fixture(scope="module")
def runs(store: str) -> dict[str, Any]:
    """ "case, pipeline" → what ``train`` returns, in one process."""
    cases = {
        f"{name}, {kind}": partial(train, store=store, pipeline_type=kind, **options)
        for name, options in (CASES | NEVER_EVALUATED).items()
        for kind in PIPELINES
    }
    return run_cases(Launch(1, timeout_s=200), cases)[0]


@pytest.mark.parametrize("kind", AHEAD)
@pytest.mark.parametrize("case", CASES)
def test_losses_metrics_weights_and_positions_are_those_of_none_bit_for_bit(runs: Any, case: str, kind: str) -> None:
    assert runs[f"{case}, {kind}"] == runs[f"{case}, none"]


@pytest.mark.parametrize("case", CASES)
def test_what_is_compared_trains_over_an_uneven_epoch_end(runs: Any, case: str) -> None:
    told = runs[f"{case}, none"]
    assert len(set(told["losses"])) == STEPS
    assert len({json.dumps(metrics) for metrics in told["metrics"]}) > 1
    last_of_epoch = told["positions"].index([1, 4]) - 1
    assert last_of_epoch > 2 and told["real"][last_of_epoch] == 1, "1 user, 3 empty sequences"


@pytest.mark.parametrize("kind", PIPELINES)
def test_evaluations_in_between_leave_training_as_it_is(runs: Any, kind: str) -> None:
    evaluated, never = runs[f"ranking, adam, {kind}"], runs[f"ranking, adam, never evaluated, {kind}"]
    assert evaluated["metrics"] and not never["metrics"]
    for what in ("losses", "positions", "weights"):
        assert evaluated[what] == never[what]


def iterators(mesh: Mesh, store: str, kind: str) -> dict[str, Any]:
    """Losses of iterators of 0 to 4 batches, each trained on to its end; and what happens if one is not."""
    pipeline, source, evaluator, _ = assemble(make_config(store, kind), mesh)
    batches = source.train_batches(SamplerPosition())
    losses = []
    for count in range(5):
        losses.append(list(_losses_to_the_end(pipeline, islice(batches, count))))
        with pipeline.evaluation():
            evaluator.evaluate(source.eval_batches("valid"))
    pipeline.progress(batches)
    return {"losses": losses, "left": _what_it_raises(pipeline, islice(batches, 1))}


def _losses_to_the_end(pipeline: TrainPipeline, batches: Iterator[HSTUBatch]) -> Iterator[float]:
    while True:
        try:
            yield float(pipeline.progress(batches).loss)
        except StopIteration:
            return


def _what_it_raises(pipeline: TrainPipeline, batches: Iterator[HSTUBatch]) -> str:
    try:
        pipeline.progress(batches)
    except ValueError as error:
        return str(error)
    return "no error"


def by_pipeline(function: Callable[..., Any], store: str) -> dict[str, Any]:
    """Pipeline → what the function returns on one rank."""
    return run_cases(1, {kind: partial(function, store=store, kind=kind) for kind in PIPELINES})[0]


def test_iterators_end_and_follow_one_another_as_with_none(store: str) -> None:
    results = by_pipeline(iterators, store)
    assert [len(losses) for losses in results["none"]["losses"]] == [0, 1, 2, 3, 4]
    assert results["none"]["left"] == "no error"
    for kind in AHEAD:
        assert results[kind]["losses"] == results["none"]["losses"]
        assert results[kind]["left"].startswith("2 batches of another iterator are in the pipeline")


def run_trainer(mesh: Mesh, store: str, directory: str, kind: str, sigterm_in: int | None = None) -> dict[str, Any]:
    """A whole run with Adam, from a checkpoint if there is one; all that metrics.jsonl says, and where it ended."""
    seed_initial_weights(mesh.seed)
    options = {
        "ckpt_save_interval": 100,
        "ckpt_load_dir": "auto",
        "eval_interval": 2,
        "eval_at_end": True,
        "max_train_iters": STEPS,
    }
    config = make_config(store, kind, output=directory, trainer=options, optimizer={"optimizer_str": "adam"})
    trainer = build_trainer(config, mesh)
    if sigterm_in is not None:
        signal_in_step(trainer, sigterm_in)
    trainer.train()
    records = [json.loads(line) for line in Path(directory, "run", "metrics.jsonl").read_text().splitlines()]
    return {
        "losses": {record["iter"]: record["loss"] for record in records if record["kind"] == "train"},
        "metrics": {record["iter"]: record["metrics"] for record in records if record["kind"] == "eval"},
        "position": [trainer.state.position.epoch, trainer.state.position.consumed],
        "weights": digest(trainer.state, mesh),
    }


def test_a_run_stopped_in_mid_epoch_goes_on_as_if_it_had_not_been(store: str, tmp_path: Path) -> None:
    of_kind = {kind: partial(run_trainer, store=store, directory=str(tmp_path / kind), kind=kind) for kind in PIPELINES}
    cases = {"straight on": of_kind["none"]}
    for kind in AHEAD:
        cases |= {f"{kind}, stopped": partial(of_kind[kind], sigterm_in=3), f"{kind}, resumed": of_kind[kind]}
    (runs,) = run_cases(Launch(1, timeout_s=120), cases)
    assert list(runs["straight on"]["losses"]) == [*range(1, STEPS + 1)]
    for kind in AHEAD:
        stopped = runs[f"{kind}, stopped"]
        assert list(stopped["losses"]) == [1, 2, 3]
        assert stopped["position"] == [0, 12], "two more batches had been fetched, and must not be skipped"
        assert runs[f"{kind}, resumed"] == runs["straight on"]
        log = (tmp_path / kind / "run" / "log.txt").read_text()
        assert log.count(f"pipeline_type '{kind}' on a CPU: ") == 2, "once a run"


def test_prefetched_ids_stay_in_memory_until_the_stream_of_the_steps_has_read_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cuda = SimpleNamespace(Stream=lambda *_, **__: Mock(), current_stream=Mock(), stream=lambda _: nullcontext())
    monkeypatch.setattr(torch, "get_device_module", lambda *_: cuda)
    prefetched = Mock(return_value={})
    monkeypatch.setattr(pipelines, "_prefetch_embeddings", prefetched)
    step: Any = SimpleNamespace(model=nn.Linear(1, 1), mesh=SimpleNamespace(device=torch.device("cuda")))
    stages = pipelines.PrefetchStages(step)
    stages._pipelined_modules = []
    stages._prefetch(Mock())
    assert prefetched.call_args.args[-1] is cuda.current_stream()
    assert stages._prefetch_stream.wait_stream.call_args.args == (stages._data_dist_stream,)  # type: ignore[union-attr]


def streams(mesh: Mesh, store: str, kind: str) -> dict[str, Any]:
    """On which CUDA streams batches are copied and dense forwards run, and the losses."""
    pipeline, source, _, _ = assemble(make_config(store, kind), mesh)
    batches = source.train_batches(SamplerPosition())
    copies, forwards = _record_streams(pipeline)
    losses = [float(pipeline.progress(batches).loss) for _ in range(STEPS)]
    return {"copy": copies, "forward": forwards, "losses": losses}


def _record_streams(pipeline: TrainPipeline) -> tuple[list[int], list[int]]:
    """Lists that get the stream of each copy of a batch to the device, and of each forward of the dense part."""
    copies: list[int] = []
    forwards: list[int] = []
    copy = _COPY

    def recorded(batch: HSTUBatch, *args: Any, **options: Any) -> HSTUBatch:
        copies.append(torch.cuda.current_stream().cuda_stream)
        return copy(batch, *args, **options)

    HSTUBatch.to = recorded  # type: ignore[method-assign]  # this process ends with the case
    pipeline.step.model.dense.register_forward_pre_hook(
        lambda *_: forwards.append(torch.cuda.current_stream().cuda_stream)  # type: ignore[func-returns-value]
    )
    return copies, forwards


_COPY = HSTUBatch.to


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: copies on streams of their own")
def test_on_a_gpu_batches_are_copied_beside_the_stream_of_the_steps(store: str) -> None:
    results = by_pipeline(streams, store)
    for kind in AHEAD:
        told = results[kind]
        assert set(told["forward"]) == set(results["none"]["forward"])
        assert told["copy"] and not set(told["copy"]) & set(told["forward"])
        assert told["losses"] == pytest.approx(results["none"]["losses"], rel=1e-4)
