"""Runs small enough for a test: data that can be learnt, configurations over it, and what a run has left behind."""

import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict, Unpack

import numpy as np
import torch

from hstu.config.args import (
    BenchmarkDatasetArgs,
    DatasetArgs,
    DynamicEmbeddingArgs,
    EmbeddingArgs,
    LRScheduleArgs,
    NetworkArgs,
    OptimizerArgs,
    PrecisionArgs,
    RankingArgs,
    RankingTaskArgs,
    RetrievalArgs,
    TrainerArgs,
)
from hstu.config.run_config import RunConfig
from hstu.data.batches.batch import HSTUBatch
from hstu.data.store.sequence_store import SequenceStore
from hstu.model.gr_model import GRModel
from hstu.model.stack import ModelOutput
from hstu.observe.records import read_metrics
from hstu.parallel.data_parallel import unwrap_dense
from hstu.parallel.mesh import Mesh, seed_initial_weights
from hstu.train import builder
from hstu.train.trainer import Trainer

ITEMS, ACTIONS = 11, 4
TRAINER: dict[str, Any] = {
    "train_batch_size": 8,
    "eval_batch_size": 8,
    "max_train_iters": 4,
    "log_interval": 1,
    "eval_at_end": False,
    "ckpt_save_interval": -1,
    "tensorboard": False,
    "progress_bar": "off",
    "pipeline_type": "none",
}
NETWORK: dict[str, Any] = {
    "num_layers": 2,
    "hidden_size": 16,
    "num_attention_heads": 2,
    "kv_channels": 8,
    "hidden_dropout": 0.0,
    "dtype_str": "float32",
    "kernel_backend": "pytorch",
    "disable_contextual_mask": True,
    "num_position_buckets": 64,
}
RANKING: dict[str, Any] = {"prediction_head_arch": [8, ACTIONS], "eval_metrics": ("AUC", "GAUC", "ACC", "LOGLOSS")}
OF_THE_ACTION: dict[str, Any] = {
    "prediction_head_arch": [8],
    "eval_metrics": ("AUC",),
    "task_sharing": "ple",
    "num_experts": 2,
    "tasks": [
        RankingTaskArgs(name="level", label="action", kind="class", num_classes=ACTIONS, weight=0.5),
        RankingTaskArgs(name="odd", label="action", positive_values=["& 1"], loss="focal", metrics=("LOGLOSS", "NDCG")),
        RankingTaskArgs(name="high", label="action", positive_values=[">= 2"], metrics=("LOGLOSS",)),
    ],
}
"""Arguments of RankingArgs: tasks that need no label but the action. They compare candidates."""
ITEM_FEATURES: dict[str, Any] = {
    "colour": [item % 3 for item in range(ITEMS)],
    "tags": [[item % 4, item % 5][: 1 + item % 2] for item in range(ITEMS)],
}
"""Features of the items of walks(), for write_small_store."""
TOWER: Any = {"dataset": {"side_feature_names": ["colour", "tags"]}}
"""Options of a run that makes the vectors of items of them."""
RETRIEVAL: dict[str, Any] = {"eval_metrics": ("HR@3", "NDCG@3", "MRR")}


def walks(num_users: int = 20, seed: int = 0) -> dict[str, Any]:
    """Arguments of make_store: users who walk along the items 0, 1, … 10, 0, … and act on an item as its code says.

    The next item and the action are functions of the item, so both tasks can be learnt. Lengths 4 to 11.
    """
    rng = np.random.default_rng(seed)
    items = [
        ((start + np.arange(length)) % ITEMS).tolist()
        for start, length in zip(rng.integers(0, ITEMS, num_users), rng.integers(4, 12, num_users), strict=True)
    ]
    return {
        "items": items,
        "actions": [[item % ACTIONS for item in row] for row in items],
        "context": {"town": (np.arange(num_users) % 3).tolist()},
        "num_items": ITEMS,
        "num_actions": ACTIONS,
    }


def shown(items: Sequence[Sequence[int]]) -> list[tuple[int, int, dict[str, list[int]]]]:
    """Requests of these walks, for make_store: two of each user, which show 1 to 4 items at random."""
    rng = np.random.default_rng(0)
    requests = []
    for user, row in enumerate(items):
        for after in (2, len(row)):
            codes = rng.integers(0, ITEMS, rng.integers(1, 5)).tolist()
            candidates = {"item_id": codes, "action": [code % ACTIONS for code in codes]}
            requests.append((user, 1_000_000 + 60 * (after - 1) + 30, candidates))
    return requests


def tables_of(
    store: SequenceStore, sharded: Sequence[str] = ("item_id",), sharding: str = "row_wise"
) -> tuple[EmbeddingArgs, ...]:
    """One table for each feature of the store."""
    return tuple(
        EmbeddingArgs(
            feature_names=[name],
            table_name=f"{name}_table",
            item_vocab_size_or_capacity=feature.cardinality,
            sharding_type="model_parallel" if name in sharded else "data_parallel",
            sharding=sharding,
            init_std=0.3,
        )
        for name, feature in store.features.items()
        if feature.cardinality is not None
    )


def tables_with_dynamic(
    store: SequenceStore, rows: int, name: str = "movies", **options: Any
) -> tuple[EmbeddingArgs, ...]:
    """The same, that of the items dynamic."""
    others = (table for table in tables_of(store) if table.feature_names != ["item_id"])
    dynamic = DynamicEmbeddingArgs(
        feature_names=["item_id"], table_name=name, item_vocab_size_or_capacity=rows, init_std=0.3, **options
    )
    return (dynamic, *others)


class TinyOptions(TypedDict, total=False):
    """What may be chosen of a tiny run. The mappings override single arguments of the class they are called after."""

    sharded: Sequence[str]
    sharding: str
    tables: tuple[EmbeddingArgs, ...]
    trainer: Mapping[str, Any]
    dataset: Mapping[str, Any]
    network: Mapping[str, Any]
    optimizer: Mapping[str, Any]
    schedule: Mapping[str, Any]
    table_schedule: Mapping[str, Any] | None
    precision: Mapping[str, Any]
    task_args: Mapping[str, Any]


def tiny_config(task: str, store: SequenceStore | str, output: Path | str, **options: Unpack[TinyOptions]) -> RunConfig:
    """A run of a few iterations in ``output``/run with checkpoints, if any, in ``output``/checkpoints.

    Unless ``tables`` are given, there is one for each feature that the run reads.
    """
    store = SequenceStore.open(store) if isinstance(store, str) else store
    own: dict[str, Any] = {"dataset_name": "toy", "dataset_path": str(store.path), "max_sequence_length": 8}
    own |= {"shuffle": True, **options.get("dataset", {})}
    names = [*own.get("contextual_feature_names", store.contextual_features), *own.get("side_feature_names", ())]
    used = {store.item_feature, own.get("action_feature_name", store.action_feature), *names}
    tables = tuple(
        table
        for table in tables_of(store, options.get("sharded", ("item_id",)), options.get("sharding", "row_wise"))
        if used >= {*table.feature_names}
    )
    return run_config(task, DatasetArgs(**own), options.get("tables", tables), output, **options)


def run_config(
    task: str,
    dataset: DatasetArgs | BenchmarkDatasetArgs,
    tables: tuple[EmbeddingArgs, ...],
    output: Path | str,
    /,
    **options: Unpack[TinyOptions],
) -> RunConfig:
    """The same on any data."""
    ranking = task == "ranking"
    make_task, defaults = (RankingArgs, RANKING) if ranking else (RetrievalArgs, RETRIEVAL)
    places = {"output_dir": f"{output}/run", "ckpt_save_dir": f"{output}/checkpoints"}
    of_tables = options.get("table_schedule")
    return RunConfig(
        task=task,  # type: ignore[arg-type]
        trainer=TrainerArgs(**{**TRAINER, **places, **options.get("trainer", {})}),
        dataset=dataset,
        embeddings=tables,
        network=NetworkArgs(**{**NETWORK, **options.get("network", {})}),
        optimizer=OptimizerArgs(**{"optimizer_str": "adam", "learning_rate": 0.01, **options.get("optimizer", {})}),
        schedule=LRScheduleArgs(**options.get("schedule", {})),
        table_schedule=None if of_tables is None else LRScheduleArgs(**of_tables),
        precision=PrecisionArgs(**options.get("precision", {})),
        task_args=make_task(**{**defaults, **options.get("task_args", {})}),
    )


@dataclass(frozen=True)
class FinishedRun:
    """What a run has left behind."""

    trainer: Trainer
    path: Path

    @property
    def records(self) -> list[dict[str, Any]]:
        return read_metrics(self.path / "metrics.jsonl")

    @property
    def losses(self) -> list[float]:
        return [record["loss"] for record in self.records if record["kind"] == "train"]

    @property
    def evaluations(self) -> list[tuple[int, str]]:
        """(iteration, split) of each."""
        return [(record["iter"], record["split"]) for record in self.records if record["kind"] == "eval"]

    @property
    def metrics(self) -> dict[str, float]:
        """Of the last evaluation."""
        metrics: dict[str, float] = [record for record in self.records if record["kind"] == "eval"][-1]["metrics"]
        return metrics

    @property
    def saved(self) -> list[str]:
        """Names of its checkpoints."""
        return sorted(path.name for path in (self.path.parent / "checkpoints").glob("iteration_*"))

    @property
    def summary(self) -> dict[str, Any]:
        summary: dict[str, Any] = json.loads((self.path / "summary.json").read_text())
        return summary


Train = Callable[..., FinishedRun]
"""Trains a run of a task and of TinyOptions."""


def build(config: RunConfig, mesh: Mesh) -> Trainer:
    """The trainer, from the random state that a fresh process starts with."""
    seed_initial_weights(config.trainer.seed)
    return builder.build_trainer(config, mesh)


def enlarge(model: GRModel, factor: float = 3) -> GRModel:
    """Multiply all dense weights, so that what one token does to another is not lost in rounding."""
    with torch.no_grad():
        for parameter in model.dense.parameters():
            parameter.mul_(factor)
    return model


def in_forward(trainer: Trainer, step: int, deed: Callable[[ModelOutput], Any]) -> None:
    """Do it to the output of the model in one training step, counted from 1, or in its first micro-batch."""
    dense, forwards = unwrap_dense(trainer.state.model), itertools.count()
    first = (step - 1) * trainer.args.gradient_accumulation_steps

    def hook(_module: Any, _inputs: Any, output: ModelOutput) -> None:
        if dense.training and next(forwards) == first:
            deed(output)

    dense.register_forward_hook(hook)


def skip_measuring_the_peak() -> None:
    """In a process of its own: assume the peak FLOP/s of the machine. Measuring it takes longer than a tiny run."""
    builder.peak_tflops = lambda *_: (1.0, "assumed")


def run(config: RunConfig, mesh: Mesh) -> FinishedRun:
    """Build and train. Draws no curves, which takes longer than a tiny run; tests/observe draws some."""
    trainer = build(config, mesh)
    trainer.run_directory.draw_curves = lambda: None  # type: ignore[method-assign]
    trainer.train()
    return FinishedRun(trainer, trainer.run_directory.path)


def ids(batch: HSTUBatch, feature: str) -> list[int]:
    """The values of a feature in a batch."""
    values: list[int] = batch.features[feature].values().tolist()
    return values


def real_users(batch: HSTUBatch) -> list[int]:
    """Rows of the users in a batch, without padding."""
    users: list[int] = batch.user_ids[batch.user_ids >= 0].tolist()
    return users
