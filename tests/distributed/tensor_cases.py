"""Runs on a small store over any number of ranks, for the tests of parallelism and of checkpoints."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypedDict, Unpack

import numpy as np
import torch

from hstu.checkpoint.state import TrainState
from hstu.config.args import Task
from hstu.config.gin_io import load as load_gin
from hstu.config.run_config import RunConfig
from hstu.data.batches.batch import HSTUBatch
from hstu.parallel.collectives import gather_objects
from hstu.parallel.mesh import Mesh, seed_initial_weights
from hstu.parallel.shards import ShardedView
from hstu.pipeline.pipelines import TrainPipeline
from hstu.pipeline.step import StepResult
from hstu.train.builder import build_model, build_pipeline
from hstu.train.sources import StoreSource
from tests.config.gin_files import table
from tests.conftest import write_small_store

GLOBAL_BATCH = 8
BASE = [
    "TrainerArgs.seed = 7",
    'DatasetArgs.dataset_name = "toy"',
    "DatasetArgs.max_sequence_length = 12",
    "DatasetArgs.shuffle = True",
    "DatasetArgs.side_feature_names = ['genres', 'price', 'year', 'watched', 'vector', 'seconds']",
    "DatasetArgs.known_after = ['watched', 'seconds']",
    "seconds/NumericFeatureArgs.feature_names = ['seconds']",
    "seconds/NumericFeatureArgs.transform = 'quantile'",
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
USER_TASKS = [
    "RankingArgs.tasks = [@kind/RankingTaskArgs(), @stay/RankingTaskArgs(), @high/RankingTaskArgs()]",
    'kind/RankingTaskArgs.label = "watched"',
    'kind/RankingTaskArgs.kind = "class"',
    "kind/RankingTaskArgs.num_classes = 4",
    'kind/RankingTaskArgs.metrics = ("LOGLOSS", "ACC")',
    'stay/RankingTaskArgs.label = "stayed"',
    'stay/RankingTaskArgs.kind = "regression"',
    "stay/RankingTaskArgs.scale = 10.0",
    'stay/RankingTaskArgs.metrics = ("RMSE", "MAE")',
    'high/RankingTaskArgs.label = "action"',
    "high/RankingTaskArgs.positive_values = ['>= 2']",
    'high/RankingTaskArgs.metrics = ("LOGLOSS",)',
    "RankingArgs.prediction_head_arch = [6]",
    "RankingArgs.eval_metrics = ('AUC',)",
    'RankingArgs.task_sharing = "mmoe"',
    "DatasetArgs.max_num_candidates = 3",
]
"""Tasks that the user defines. A quarter of the labels "stayed" is missing."""
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
        item_features={
            "genres": [rng.integers(0, 6, rng.integers(1, 4)).tolist() for _ in range(30)],
            "year": rng.integers(0, 3, 30).tolist(),
        },
        event_features={
            "watched": [rng.integers(0, 4, n).tolist() for n in lengths],
            "stayed": [rng.integers(0, 4, n).tolist() for n in lengths],
        },
        event_texts={"stayed": ["12", "3.5", "7", "unknown"]},
        item_numbers={"price": with_gaps(rng.lognormal(0, 2, (30, 1))), "vector": with_gaps(rng.normal(0, 9, (30, 3)))},
        event_numbers={"seconds": [with_gaps(rng.lognormal(0, 2, n)).tolist() for n in lengths]},
        num_items=30,
        num_actions=4,
    )


def with_gaps(numbers: np.ndarray) -> np.ndarray:
    """Every fourth row is missing."""
    numbers[::4] = np.nan
    return numbers


class RunOptions(TypedDict, total=False):
    """What may be chosen of a run."""

    task: Task
    optimizer: str
    sharding: str
    replicated: Sequence[str]
    """Features whose tables are replicated."""
    pipeline: str
    learning_rate: float
    bindings: Sequence[str]
    """Further gin bindings."""
    dynamic: Sequence[str]
    """Features whose tables are dynamic."""


def make_config(store: str, world_size: int, **options: Unpack[RunOptions]) -> RunConfig:
    """A small run whose global batch does not depend on the number of ranks."""
    tables: list[str] = []
    for name, rows in (("item_id", 30), ("action", 4), ("age", 5), ("genres", 6), ("year", 3), ("watched", 4)):
        common: dict[str, Any] = {"table_name": f"{name}_table", "init_std": 0.3}
        if name in options.get("dynamic", ()):
            tables += table(name, rows, "DynamicEmbeddingArgs", **common)
        else:
            common["sharding_type"] = (
                "data_parallel" if name in options.get("replicated", ("action",)) else "model_parallel"
            )
            tables += table(name, rows, **common, sharding=options.get("sharding", "row_wise"))
    run = [
        f"TrainerArgs.train_batch_size = {GLOBAL_BATCH // world_size}",
        f"TrainerArgs.eval_batch_size = {GLOBAL_BATCH // world_size}",
        f"TrainerArgs.pipeline_type = {options.get('pipeline', 'none')!r}",
        f"DatasetArgs.dataset_path = {store!r}",
        f"OptimizerArgs.optimizer_str = {options.get('optimizer', 'sgd')!r}",
        f"OptimizerArgs.learning_rate = {options.get('learning_rate', 0.02)}",
    ]
    task = options.get("task", "ranking")
    return load_gin([], [*BASE, *TASKS[task], *tables, *run, *options.get("bindings", ())], task)


def new_run(mesh: Mesh, config: RunConfig) -> tuple[StoreSource, TrainState]:
    """The data and the model of a run, as the builder makes them."""
    seed_initial_weights(config.trainer.seed)
    source = StoreSource(config, config.dataset, mesh)  # type: ignore[arg-type]
    model, optimizers = build_model(config, source, mesh)
    return source, TrainState(model, optimizers)


def train(mesh: Mesh, config: RunConfig, source: StoreSource, state: TrainState, steps: int) -> list[float]:
    """So many steps from the state's position; the losses, each followed by its parts by task."""
    return [loss for result in train_steps(mesh, config, source, state, steps) for loss in result.losses.tolist()]


def train_steps(
    mesh: Mesh, config: RunConfig, source: StoreSource, state: TrainState, steps: int
) -> Iterator[StepResult]:
    """So many steps from the state's position, one after the other."""
    pipeline = build_pipeline(config.trainer, state.model, state.optimizers, mesh)
    pipeline.step.measures_norms = True
    batches = source.train_batches(state.position)
    for _ in range(steps):
        yield advance(pipeline, batches, state)


def advance(pipeline: TrainPipeline, batches: Iterator[HSTUBatch], state: TrainState) -> StepResult:
    """One step; the state then is at the position of its batch."""
    result = pipeline.progress(batches)
    assert result.batch.position is not None
    state.iteration, state.position = state.iteration + 1, result.batch.position
    return result


def consolidated(state: TrainState, mesh: Mesh) -> dict[str, Any]:
    """Every weight and optimizer state of the run as a single process has it, as nested lists.

    What all ranks hold alike must be equal on all of them.
    """
    parts = {
        name: [(list(start), part.tolist()) for start, part in pieces.shards.items()]
        for name, tensor in state.tensors().items()
        for pieces in [tensor if isinstance(tensor, ShardedView) else ShardedView.whole(tensor)]
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
