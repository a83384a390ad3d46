"""Whole runs on a small store, over any number of ranks: what runs on each in test_tensor_parallel.py.

test_matrix.py has the same runs.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hstu.checkpoint.load import load
from hstu.checkpoint.save import save
from hstu.checkpoint.state import TrainState
from hstu.config.gin_io import load as load_gin
from hstu.config.run_config import RunConfig
from hstu.ops.dropout import draw
from hstu.ops.ranks import Ranks
from hstu.parallel import mesh as mesh_module
from hstu.parallel.collectives import gather_objects
from hstu.parallel.cut_tensor import CutTensor
from hstu.parallel.tensor import GroupRanks
from hstu.pipeline.base import StepResult
from hstu.train.builder import build_evaluator, build_model, build_pipeline
from hstu.train.sources import StoreSource
from tests.conftest import write_small_store

GLOBAL_BATCH = 8
BASE = [
    "TrainerArgs.seed = 7",
    'DatasetArgs.dataset_name = "toy"',
    "DatasetArgs.max_sequence_length = 12",
    "DatasetArgs.shuffle = True",
    "NetworkArgs.num_layers = 2",
    "NetworkArgs.hidden_size = 16",  # columns are cut in multiples of 4: for 4 ranks
    "NetworkArgs.num_attention_heads = 4",
    "NetworkArgs.kv_channels = 3",
    "NetworkArgs.num_position_buckets = 32",
    "NetworkArgs.hidden_dropout = 0.0",
    'NetworkArgs.dtype_str = "float32"',
    'NetworkArgs.kernel_backend = "pytorch"',
    "OptimizerArgs.adam_eps = 1e-4",  # so that rounding does not turn the sign of an update
]
MIXED = [
    "item_id/EmbeddingArgs.learning_rate = 0.01",
    "age/EmbeddingArgs.optimizer_str = 'rowwise_adagrad'",
    "action/EmbeddingArgs.optimizer_str = 'sgd'",
    "uvqk/PartOptimizerArgs.regex = '[01].uvqk|out.weight'",
    "uvqk/PartOptimizerArgs.optimizer_str = 'sgd'",
    "uvqk/PartOptimizerArgs.weight_decay = 0.1",
    "head/PartOptimizerArgs.regex = 'head'",
    "head/PartOptimizerArgs.optimizer_str = 'adagrad'",
    "OptimizerArgs.part_optimizers = [@uvqk/PartOptimizerArgs(), @head/PartOptimizerArgs()]",
    "OptimizerArgs.sparse_max_gradient = 0.001",
]
"""Tables and parts of the dense weights that are trained each in its own way."""
TASKS = {
    "ranking": ["RankingArgs.prediction_head_arch = [6, 4]", "RankingArgs.eval_metrics = ('AUC', 'LOGLOSS', 'GAUC')"],
    "retrieval": ["RetrievalArgs.eval_metrics = ('HR@5', 'NDCG@5', 'MRR')", "RetrievalArgs.temperature = 0.2"],
}


def write_store(path: Path) -> None:
    """33 users: the last global batch of a retrieval epoch has one, and leaves whole groups with nothing."""
    rng = np.random.default_rng(3)
    lengths = [int(n) for n in rng.integers(4, 16, 33)]
    write_small_store(
        path,
        [rng.integers(0, 30, n).tolist() for n in lengths],
        actions=[rng.integers(0, 4, n).tolist() for n in lengths],
        timestamps=[(10**6 + np.cumsum(rng.integers(0, 10**5, n))).tolist() for n in lengths],
        context={"age": [*rng.integers(0, 4, 32).tolist(), 4]},
        num_items=30,
        num_actions=4,
    )


def make_config(
    store: str,
    world_size: int,
    task: str = "ranking",
    optimizer: str = "sgd",
    sharding: str = "row_wise",
    replicated: tuple[str, ...] | list[str] = ("action",),
    pipeline: str = "none",
    learning_rate: float = 0.02,
    bindings: tuple[str, ...] | list[str] = (),
    dynamic: tuple[str, ...] | list[str] = (),
) -> RunConfig:
    """A small run whose global batch does not depend on the number of ranks. ``dynamic``: whose tables are."""
    tables = []
    for name, rows in (("item_id", 30), ("action", 4), ("age", 5)):
        args = f"{name}/{'Dynamic' if name in dynamic else ''}EmbeddingArgs"
        tables += [
            f"{args}.feature_names = ['{name}']",
            f"{args}.table_name = '{name}_table'",
            f"{args}.item_vocab_size_or_capacity = {rows}",
            f"{args}.init_std = 0.3",
        ]
        if name not in dynamic:
            kind = "data_parallel" if name in replicated else "model_parallel"
            tables += [f"{args}.sharding_type = '{kind}'", f"{args}.sharding = '{sharding}'"]
    run = [
        f"TrainerArgs.train_batch_size = {GLOBAL_BATCH // world_size}",
        f"TrainerArgs.eval_batch_size = {GLOBAL_BATCH // world_size}",
        f"TrainerArgs.pipeline_type = {pipeline!r}",
        f"DatasetArgs.dataset_path = {store!r}",
        f"OptimizerArgs.optimizer_str = {optimizer!r}",
        f"OptimizerArgs.learning_rate = {learning_rate}",
    ]
    return load_gin([], [*BASE, *TASKS[task], *tables, *run, *bindings], task)  # type: ignore[arg-type]


def new_run(mesh: mesh_module.Mesh, config: RunConfig) -> tuple[StoreSource, TrainState]:
    """The data and the model of a run, as the builder makes them."""
    mesh_module.seed_initial_weights(config.trainer.seed)
    source = StoreSource(config, config.dataset, mesh)  # type: ignore[arg-type]
    model, optimizers = build_model(config, source, mesh)
    return source, TrainState(model, optimizers)


def run_cases(store: str, tp: int, cases: dict[str, dict[str, Any]], steps: int = 8) -> dict[str, Any]:
    """Train and evaluate each case; name → losses, initial and final weights, metrics."""
    mesh = mesh_module.start(tensor_parallel_size=tp, timeout_s=60)
    results = {}
    for name, case in cases.items():
        config = make_config(store, mesh.world_size, **case)
        source, state = new_run(mesh, config)
        initial = consolidated(state, mesh)
        losses = train(mesh, config, source, state, steps)
        evaluator = build_evaluator(config, source, state.model, mesh)
        results[name] = {
            "losses": losses,
            "initial": initial,
            "final": consolidated(state, mesh),
            "metrics": evaluator.evaluate(source.eval_batches("valid")),
            "held": sum(p.numel() for p in state.model.dense.parameters()),
        }
    mesh_module.finish()
    return results


def move_checkpoints(
    store: str, tp: int, cases: dict[str, dict[str, Any]], load_from: str | None, save_to: str
) -> dict[str, Any]:
    """Load each case's checkpoint (or train three steps), save it again, and train two steps; weights and losses."""
    mesh = mesh_module.start(tensor_parallel_size=tp, timeout_s=60)
    results = {}
    for name, case in cases.items():
        config = make_config(store, mesh.world_size, **case)
        source, state = new_run(mesh, config)
        if load_from is None:
            train(mesh, config, source, state, 3)
        else:
            load(Path(load_from) / name / "iteration_00000003", state, mesh)
        stored = consolidated(state, mesh)
        names = sorted(state.tensors())
        save(Path(save_to) / name, state, mesh)
        losses = train(mesh, config, source, state, 2)
        consolidated(state, mesh)  # refuses replicated weights that are not equal on all ranks: dropout is in step
        results[name] = {"stored": stored, "names": names, "losses": losses}
    mesh_module.finish()
    return results


def reshard(store: str, tp: int, cases: dict[str, dict[str, Any]], load_from: str | None, save_to: str) -> Any:
    """A hop of a chain: load each case's checkpoint (or train ``before`` steps), save it again, and train two steps.

    A case has its global ``batch`` and ``before`` besides the arguments of ``make_config``. Returns its tensors, the
    losses of the two steps and the users of each step, with its epoch.
    """
    mesh = mesh_module.start(tensor_parallel_size=tp, timeout_s=60)
    torch.set_num_threads(1)
    results = {}
    for name, case in cases.items():
        arguments = dict(case)
        per_rank = f"TrainerArgs.train_batch_size = {arguments.pop('batch') // mesh.world_size}"
        before, arguments["bindings"] = arguments.pop("before"), [*arguments.get("bindings", ()), per_rank]
        config = make_config(store, mesh.world_size, **arguments)
        source, state = new_run(mesh, config)
        state.operative_gin = config.operative_gin()
        first = []
        if load_from is None:
            first = list(train_steps(mesh, config, source, state, before))
        else:
            load(next((Path(load_from) / name).iterdir()), state, mesh)
        tensors = consolidated(state, mesh)
        save(Path(save_to) / name, state, mesh)
        last = list(train_steps(mesh, config, source, state, 2))
        losses = [float(step.loss) for step in last]
        results[name] = {"tensors": tensors, "losses": losses, "users": [_users(step, mesh) for step in first + last]}
    mesh_module.finish()
    return results if mesh.is_main else None


def _users(step: StepResult, mesh: mesh_module.Mesh) -> tuple[int, list[int]]:
    """The epoch and all ranks' users of a step."""
    assert step.batch.position is not None
    users = [int(user) for user in step.batch.user_ids if user >= 0]
    return step.batch.position.epoch, sorted(user for rank in gather_objects(users, mesh.world_group) for user in rank)


def dropout_patterns(store: str, tp: int) -> dict[str, Any]:
    """Train with dropout; what the ranks of a group must share, and what they must not."""
    mesh = mesh_module.start(tensor_parallel_size=tp, timeout_s=60)
    dropout = "NetworkArgs.hidden_dropout = 0.5"
    results: dict[str, Any] = {}
    for name, bindings in (("kept", [dropout]), ("recomputed", [dropout, "NetworkArgs.recompute_layer = True"])):
        config = make_config(store, mesh.world_size, bindings=bindings)
        source, state = new_run(mesh, config)
        results[name] = train(mesh, config, source, state, 3)
        consolidated(state, mesh)  # refuses replicated weights that are not equal on all ranks
    for place, ranks in (("before W_o", GroupRanks(mesh.tp_group, by_tokens=False)), ("input", Ranks())):
        results[place] = draw(torch.Size([64]), 0.5, torch.device("cpu"), ranks).tolist()
    mesh_module.finish()
    return results


def train(mesh: mesh_module.Mesh, config: RunConfig, source: StoreSource, state: TrainState, steps: int) -> list[float]:
    """So many steps from the state's position; the losses."""
    return [float(result.loss) for result in train_steps(mesh, config, source, state, steps)]


def train_steps(
    mesh: mesh_module.Mesh, config: RunConfig, source: StoreSource, state: TrainState, steps: int
) -> Iterator[StepResult]:
    """So many steps from the state's position, one after the other."""
    pipeline = build_pipeline(config.trainer, state.model, state.optimizers, mesh)
    batches = source.train_batches(state.position)
    for _ in range(steps):
        result = pipeline.progress(batches)
        state.iteration += 1
        assert result.batch.position is not None
        state.position = result.batch.position
        yield result


def consolidated(state: TrainState, mesh: mesh_module.Mesh) -> dict[str, Any]:
    """Every weight and optimizer state of the run as a single process has it, as nested lists.

    What all ranks hold alike must be equal on all of them.
    """
    parts = {
        name: [(list(start), part.tolist()) for start, part in pieces.pieces.items()]
        for name, tensor in state.tensors().items()
        for pieces in [tensor if isinstance(tensor, CutTensor) else CutTensor.whole(tensor)]
    }
    by_rank = gather_objects(parts, mesh.world_group)
    return {name: _assembled(name, tensor.size(), by_rank) for name, tensor in state.tensors().items()}


def _assembled(name: str, size: torch.Size, by_rank: list[dict[str, Any]]) -> Any:
    whole = np.full(size, np.nan)
    for start, values in (part for rank in by_rank for part in rank[name]):
        piece = np.array(values)
        place = tuple(slice(first, first + length) for first, length in zip(start, piece.shape, strict=True))
        assert np.isnan(whole[place]).all() or np.array_equal(whole[place], piece), name
        whole[place] = piece
    assert not np.isnan(whole).any(), name
    return whole.tolist()
