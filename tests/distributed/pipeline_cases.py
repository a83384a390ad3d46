"""What runs on each rank in the pipelines' tests: the parts of whole trainers, on a store of 25 users, 4 a batch.

Retrieval trains on all of them, ranking on 17: on one rank or two, the last batch of an epoch has one user and else
empty sequences; of two ranks one then has nothing but empty sequences.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import traceback
import warnings
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

import hstu
from hstu.checkpoint.state import TrainState
from hstu.config.gin_io import load
from hstu.data.batch import HSTUBatch
from hstu.data.sampler import SamplerPosition
from hstu.parallel import mesh as mesh_module
from hstu.parallel.collectives import gather_objects
from hstu.parallel.cut_tensor import CutTensor
from hstu.pipeline.base import StepResult, TrainPipeline
from hstu.train.builder import build_evaluator, build_model, build_pipeline, build_trainer
from hstu.train.evaluator import Evaluator
from hstu.train.sources import BatchSource, open_source
from tests.conftest import write_small_store

USERS, ITEMS, ACTIONS, TOWNS = 25, 30, 6, 4
STEPS = 9
PIPELINES = ("none", "native", "prefetch")
EVALUATE_AFTER = (0, 2, 3, 6)
GIN = """\
TrainerArgs.train_batch_size = 4
TrainerArgs.eval_batch_size = 3
TrainerArgs.tensorboard = False
TrainerArgs.progress_bar = "off"
DatasetArgs.dataset_name = "shop"
DatasetArgs.max_sequence_length = 9
DatasetArgs.shuffle = True
DatasetArgs.contextual_feature_names = ["town"]
NetworkArgs.num_layers = 2
NetworkArgs.hidden_size = 16
NetworkArgs.num_attention_heads = 2
NetworkArgs.kv_channels = 8
NetworkArgs.disable_contextual_mask = True
NetworkArgs.dtype_str = "float32"
NetworkArgs.kernel_backend = "pytorch"
OptimizerArgs.learning_rate = 0.02
"""
TASKS = {
    "ranking": [
        "DatasetArgs.train_fraction = 0.68",
        "RankingArgs.prediction_head_arch = [8, 5]",
        'RankingArgs.eval_metrics = ("AUC>=4", "LOGLOSS")',
    ],
    "retrieval": ['RetrievalArgs.eval_metrics = ("HR@10", "MRR")'],
}


def write_store(path: Path) -> None:
    """25 users with 4 to 12 events each."""
    rng = np.random.default_rng(5)
    lengths = [4 + user % 9 for user in range(USERS)]
    write_small_store(
        path,
        [rng.integers(0, ITEMS, length).tolist() for length in lengths],
        actions=[rng.integers(1, ACTIONS, length).tolist() for length in lengths],
        context={"town": (np.arange(USERS) % TOWNS).tolist()},
        num_items=ITEMS,
        num_actions=ACTIONS,
    )


def make_config(
    store: str,
    pipeline: str,
    task: str = "ranking",
    optimizer: str = "sgd",
    sharded: tuple[str, ...] | list[str] = ("item_id", "town"),
    lines: tuple[str, ...] | list[str] = (),
) -> Any:
    """A RunConfig; ``lines``: further gin bindings."""
    tables = [
        f"{name}/EmbeddingArgs.{field} = {value!r}"
        for name, rows in (("item_id", ITEMS), ("action", ACTIONS), ("town", TOWNS))
        for field, value in (
            ("feature_names", [name]),
            ("table_name", name),
            ("item_vocab_size_or_capacity", rows),
            ("sharding_type", "model_parallel" if name in sharded else "data_parallel"),
            ("sharding", "row_wise"),
            ("init_std", 0.2),
        )
    ]
    bindings = [
        *GIN.splitlines(),
        *TASKS[task],
        *tables,
        f"DatasetArgs.dataset_path = {store!r}",
        f"TrainerArgs.pipeline_type = {pipeline!r}",
        f"OptimizerArgs.optimizer_str = {optimizer!r}",
    ]
    return load([], [*bindings, *lines], task)  # type: ignore[arg-type]


def assemble(config: Any, mesh: mesh_module.Mesh) -> tuple[TrainPipeline, BatchSource, Evaluator, TrainState]:
    """What a trainer is made of, without its run directory."""
    source = open_source(config, mesh)
    mesh_module.seed_initial_weights(config.trainer.seed)
    model, optimizers = build_model(config, source, mesh)
    pipeline = build_pipeline(config.trainer, model, optimizers, mesh)
    evaluator = build_evaluator(config, source, model, mesh)
    return pipeline, source, evaluator, TrainState(model, optimizers)


def digest(state: TrainState, mesh: mesh_module.Mesh) -> list[str]:
    """A hash a rank of all tables, dense weights and optimizer states."""
    sha = hashlib.sha256()
    for _, tensor in sorted(state.tensors().items()):
        for part in tensor.pieces.values() if isinstance(tensor, CutTensor) else [tensor]:
            sha.update(part.detach().cpu().contiguous().numpy().tobytes())
    return gather_objects(sha.hexdigest(), mesh.world_group)


def start() -> mesh_module.Mesh:
    """One thread a rank: these tensors are so small that a second one only waits, for long on a busy machine."""
    mesh = mesh_module.start(timeout_s=60)
    torch.set_num_threads(1)
    return mesh


def train_cases(store: str, cases: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Many cases in one launch: case → pipeline → what ``train`` tells."""
    mesh = start()
    results = {
        name: {pipeline: train(mesh, store, pipeline=pipeline, **case) for pipeline in PIPELINES}
        for name, case in cases.items()
    }
    mesh_module.finish()
    return results


def train(
    mesh: mesh_module.Mesh, store: str, evaluate_after: tuple[int, ...] | list[int] = EVALUATE_AFTER, **config: Any
) -> dict[str, Any]:
    """STEPS steps with evaluations in between: losses, positions, sizes of the batches trained on, metrics, weights."""
    pipeline, source, evaluator, state = assemble(make_config(store, **config), mesh)
    batches = source.train_batches(SamplerPosition())
    told: dict[str, Any] = {"losses": [], "positions": [], "real": [], "metrics": []}
    for step in range(STEPS + 1):
        if step > 0:
            state.optimizers.set_lr_multiplier(1.0 / step)
            result = pipeline.progress(batches)
            told["losses"].append(float(result.loss))
            told["positions"].append([result.batch.position.epoch, result.batch.position.consumed])
            told["real"].append(result.batch.real_batch_size)
        if step in evaluate_after:
            with pipeline.evaluation():
                told["metrics"] += [evaluator.evaluate(source.eval_batches(split)) for split in source.final_splits]
    told["weights"] = digest(state, mesh)
    return told


def iterators(store: str) -> dict[str, Any]:
    """Pipeline → losses of iterators of 0 to 4 batches, each trained on to its end; and what happens if one is not."""
    mesh = start()
    results = {}
    for kind in PIPELINES:
        pipeline, source, evaluator, _ = assemble(make_config(store, kind), mesh)
        batches = source.train_batches(SamplerPosition())
        losses = []
        for count in range(5):
            losses.append(list(_losses_to_the_end(pipeline, islice(batches, count))))
            with pipeline.evaluation():
                evaluator.evaluate(source.eval_batches("valid"))
        pipeline.progress(batches)
        results[kind] = {"losses": losses, "left": _what_it_raises(pipeline, islice(batches, 1))}
    mesh_module.finish()
    return results


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


def streams(store: str) -> dict[str, Any]:
    """On a GPU: pipeline → on which CUDA streams batches are copied and dense forwards run, and the losses."""
    mesh = start()
    results = {}
    for kind in PIPELINES:
        pipeline, source, _, _ = assemble(make_config(store, kind), mesh)
        batches = source.train_batches(SamplerPosition())
        copies, forwards = _record_streams(pipeline)
        losses = [float(pipeline.progress(batches).loss) for _ in range(STEPS)]
        results[kind] = {"copy": copies, "forward": forwards, "losses": losses}
    mesh_module.finish()
    return results


def syncs(store: str, task: str) -> dict[str, Any]:
    """On a GPU: pipeline → where steps wait for the device, as "file:line" by whose code it is."""
    mesh = start()
    results = {}
    for kind in PIPELINES:
        pipeline, source, _, _ = assemble(make_config(store, kind, task=task), mesh)
        batches = source.train_batches(SamplerPosition())
        for _ in range(3):  # the first steps make buffers, and tables their state
            pipeline.progress(batches)
        results[kind] = _waits_of(lambda pipeline=pipeline, batches=batches: pipeline.progress(batches))
    mesh_module.finish()
    return results


def _waits_of(step: Callable[[], Any]) -> dict[str, list[str]]:
    """Of three steps, by torch's sync-debug mode; a wait is whose line is the innermost one outside of torch."""
    waits: dict[str, list[str]] = {"ours": [], "libraries'": []}
    unasked = os.path.dirname(torch.__file__) + os.sep, warnings.__file__

    def note(message: Any, *_: Any, **__: Any) -> None:
        if "synchroniz" not in str(message):
            return
        *stack, _ = traceback.extract_stack()
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


def _record_streams(pipeline: TrainPipeline) -> tuple[list[int], list[int]]:
    """Lists that get the stream of each copy of a batch to the device, and of each forward of the dense part."""
    copies: list[int] = []
    forwards: list[int] = []
    copy = _COPY

    def recorded(batch: HSTUBatch, *args: Any, **options: Any) -> HSTUBatch:
        copies.append(torch.cuda.current_stream().cuda_stream)
        return copy(batch, *args, **options)

    HSTUBatch.to = recorded  # type: ignore[method-assign]  # this process ends with the case
    pipeline.model.dense.register_forward_pre_hook(
        lambda *_: forwards.append(torch.cuda.current_stream().cuda_stream)  # type: ignore[func-returns-value]
    )
    return copies, forwards


_COPY = HSTUBatch.to


def stopped_and_resumed(store: str, directory: str) -> dict[str, Any]:
    """Runs of the trainer: "none" straight on; the others stopped by SIGTERM in their third step, then resumed."""
    mesh = start()
    results = {"straight on": run_trainer(mesh, store, f"{directory}/none", "none")}
    for kind in ("native", "prefetch"):
        results[f"{kind}, stopped"] = run_trainer(mesh, store, f"{directory}/{kind}", kind, sigterm_in=3)
        results[f"{kind}, resumed"] = run_trainer(mesh, store, f"{directory}/{kind}", kind)
    mesh_module.finish()
    return results


def run_trainer(
    mesh: mesh_module.Mesh, store: str, directory: str, kind: str, sigterm_in: int | None = None
) -> dict[str, Any]:
    """A whole run with Adam, from a checkpoint if there is one; all that metrics.jsonl says, and where it ended."""
    lines = [
        f"TrainerArgs.output_dir = {directory!r}",
        f"TrainerArgs.ckpt_save_dir = {directory + '/ckpt'!r}",
        "TrainerArgs.ckpt_save_interval = 100",
        "TrainerArgs.ckpt_load_dir = 'auto'",
        "TrainerArgs.log_interval = 1",
        "TrainerArgs.eval_interval = 2",
        f"TrainerArgs.max_train_iters = {STEPS}",
    ]
    mesh_module.seed_initial_weights(mesh.seed)
    trainer = build_trainer(make_config(store, kind, optimizer="adam", lines=lines), mesh)
    progress = trainer.pipeline.progress

    def progress_until_sigterm(batches: Iterator[HSTUBatch]) -> StepResult:
        if trainer.state.iteration + 1 == sigterm_in:
            os.kill(os.getpid(), signal.SIGTERM)
        return progress(batches)

    trainer.pipeline.progress = progress_until_sigterm  # type: ignore[method-assign]
    trainer.train()
    records = [json.loads(line) for line in (Path(directory) / "metrics.jsonl").read_text().splitlines()]
    return {
        "losses": {record["iter"]: record["loss"] for record in records if record["kind"] == "train"},
        "metrics": {record["iter"]: record["metrics"] for record in records if record["kind"] == "eval"},
        "position": [trainer.state.position.epoch, trainer.state.position.consumed],
        "weights": digest(trainer.state, mesh),
    }
