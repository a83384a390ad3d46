"""Runs with tasks that the user defines: what they learn, and what their predictions must not be shown."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hstu.base.errors import ConfigError
from hstu.config.args import RankingTaskArgs
from hstu.data.sampling.sampler import START
from hstu.data.store.sequence_store import SequenceStore
from hstu.parallel.mesh import Mesh
from tests.conftest import write_small_store
from tests.train.tiny import build, run, tiny_config

USERS, LENGTH, ITEMS, ACTIONS = 24, 8, 12, 4
MISSING = "unknown"
TASKS: tuple[dict[str, Any], ...] = (
    {"label": "click", "metrics": ("AUC", "LOGLOSS", "NDCG")},
    {"label": "stars", "kind": "class", "num_classes": 3, "metrics": ("ACC", "LOGLOSS")},
    {"name": "topic", "label": "topic", "kind": "class", "num_classes": 3, "metrics": ("ACC",)},
    {"label": "watched", "kind": "regression", "scale": 10.0, "metrics": ("AUC>=20", "RMSE")},
    {"name": "often", "label": "action", "positive_values": ["& 2"], "loss": "focal", "metrics": ("AUC",)},
    {"name": "long", "label": "watched", "kind": "regression", "loss": "huber", "scale": 10.0},
)
"""All kinds. Each label follows from the item alone."""
TEXTS = {
    "click": ["0", "1", MISSING],
    "stars": ["1", "2", "3", MISSING],
    "topic": ["art", "law", "war"],
    "watched": ["10", "20", "30", "5"],
}


def tasks() -> list[RankingTaskArgs]:
    return [RankingTaskArgs(**task) for task in TASKS]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> SequenceStore:
    """Random items, from which each label follows."""
    rng = np.random.default_rng(0)
    items = rng.integers(0, ITEMS, (USERS, LENGTH))
    codes = {
        "click": items % 2,
        "stars": items % 3,
        "topic": items // 4,
        "watched": (items + 1) % 4,
        "action": items % ACTIONS,
    }
    dwell = items * 1.5
    dwell[:, 3] = np.nan
    codes["click"][:, 0], codes["stars"][:, 1] = 2, 3  # missing
    actions = codes.pop("action").tolist()
    return write_small_store(
        tmp_path_factory.mktemp("tasks") / "store",
        items.tolist(),
        actions=actions,
        event_features={name: values.tolist() for name, values in codes.items()},
        event_texts=TEXTS,
        event_numbers={"dwell": dwell.tolist()},
        num_items=ITEMS,
        num_actions=ACTIONS,
    )


def task_config(store: SequenceStore, path: Path, **options: Any) -> Any:
    defaults: dict[str, dict[str, Any]] = {
        "dataset": {"contextual_feature_names": [], "max_num_candidates": 3},
        "task_args": {"prediction_head_arch": [16], "tasks": tasks(), "eval_metrics": ("AUC",)},
    }
    given = {name: default | options.get(name, {}) for name, default in defaults.items()}
    return tiny_config("ranking", store, path, **options | given)


@pytest.mark.parametrize("sharing", ["shared", pytest.param("ple", marks=pytest.mark.slow)])
def test_a_run_learns_all_kinds_of_tasks(mesh: Mesh, store: SequenceStore, tmp_path: Path, sharing: str) -> None:
    trainer = {"max_train_iters": 60, "eval_at_end": True}
    experts = {} if sharing == "shared" else {"num_experts": 2}
    finished = run(task_config(store, tmp_path, trainer=trainer, task_args={"task_sharing": sharing, **experts}), mesh)
    metrics = finished.metrics
    assert set(metrics) == {
        *("AUC/click", "LOGLOSS/click", "NDCG/click", "ACC/stars", "LOGLOSS/stars", "ACC/topic"),
        *("AUC>=20/watched", "RMSE/watched", "AUC/often", "RMSE/long"),
    }
    learnt = [metrics[name] for name in ("AUC/click", "ACC/stars", "ACC/topic", "AUC>=20/watched", "AUC/often")]
    assert min(learnt) > 0.75, metrics


def test_the_part_of_a_task_is_the_loss_of_a_run_that_counts_it_alone(
    mesh: Mesh, store: SequenceStore, tmp_path: Path
) -> None:
    """Read out by weights that round away the other tasks. Nothing is learnt, so that the runs stay alike."""
    own = [*tasks(), RankingTaskArgs(name="focal", label="click", loss="focal", weight=0.3)]
    options: Any = {
        "trainer": {"gradient_accumulation_steps": 3, "train_batch_size": 4, "log_interval": 3},
        "optimizer": {"optimizer_str": "sgd", "learning_rate": 1e-30},
    }

    def records(number: int, chosen: list[RankingTaskArgs]) -> list[dict[str, Any]]:
        return run(task_config(store, tmp_path / str(number), task_args={"tasks": chosen}, **options), mesh).records

    whole = records(-1, own)
    assert len({record["loss"] for record in whole}) == len(whole) == 2
    for number, task in enumerate(own):
        alone = records(number, [replace(other, weight=task.weight if other is task else 1e-30) for other in own])
        assert [record[f"loss/{task.task_name}"] for record in whole] == [record["loss"] for record in alone]
    for record in whole:
        parts = [record[f"loss/{task.task_name}"] for task in own]
        assert sum(parts) == pytest.approx(record["loss"], rel=1e-6) and min(parts) > 0.01
    assert not any("/" in key for record in records(len(own), own[:1]) for key in record), "one task"


def test_numbers_are_labels_as_they_are(mesh: Mesh, store: SequenceStore, tmp_path: Path) -> None:
    task = RankingTaskArgs(label="dwell", kind="regression")
    config = task_config(store, tmp_path, task_args={"tasks": [task]})
    config = replace(config, dataset=replace(config.dataset, max_num_candidates=LENGTH - 1, shuffle=False))
    trainer = build(config, mesh)
    batch = next(trainer.source.train_batches(START))
    items = batch.features["item_id"].values().view(-1, LENGTH)[:, 1:]
    expected = items * 1.5
    expected[:, 2] = torch.nan
    assert batch.label_values is not None
    torch.testing.assert_close(batch.label_values.view_as(expected), expected, equal_nan=True)


def test_the_loss_is_the_sum_over_tasks_of_the_mean_over_labelled_items(
    mesh: Mesh, store: SequenceStore, tmp_path: Path
) -> None:

    def first_loss(number: int, tasks: list[RankingTaskArgs]) -> float:
        trainer = build(task_config(store, tmp_path / str(number), task_args={"tasks": tasks}), mesh)
        model = trainer.state.model
        with torch.no_grad():
            head = model.dense.get_submodule("task.head")
            for parameter in head.parameters():
                parameter.zero_()
            batch = next(trainer.source.train_batches(START))
            output = model(batch)
        return float(output.loss_sum / batch.num_labels_total)

    click, stars = (RankingTaskArgs(**task) for task in TASKS[:2])
    alone = [first_loss(number, [task]) for number, task in enumerate((click, stars))]
    heavy = RankingTaskArgs(**{**TASKS[1], "weight": 0.25})
    assert first_loss(2, [click, heavy]) == pytest.approx(alone[0] + 0.25 * alone[1])


BAD_LABELS: dict[str, tuple[dict[str, Any], str]] = {
    "absent": (
        {"label": "clicks"},
        r"label = 'clicks': 'clicks' is no label feature .*allowed: action, click.*mean 'click'",
    ),
    "of an item": ({"label": "item_id"}, r"label.*'item_id' is no label feature"),
    "texts": ({"label": "topic"}, r"label = 'topic': has texts, 'art' or .* may set positive_values"),
    "a text that does not occur": (
        {"label": "topic", "positive_values": ["war", "arts"]},
        r"positive_values.*must be some but not all of the labels, which are 'art' or 'law' or 'war'",
    ),
    "every text": (
        {"label": "topic", "positive_values": ["war", "law", "art"]},
        r"positive_values.*some but not all",
    ),
    "no threshold": ({"label": "stars"}, r"label = 'stars': has values from 1 to 3, and a binary label is 0 or 1"),
    "of one kind": (
        {"label": "stars", "positive_values": [">= 4"]},
        r"positive_values = .*: .* are from 1 to 3, so either all",
    ),
    "classes": (
        {**TASKS[1], "num_classes": 2},
        r"num_classes = 2: must fit the labels, which are from 1 to 3",
    ),
}


@pytest.mark.parametrize("name", BAD_LABELS)
def test_labels_that_do_not_fit_the_data_are_errors_of_their_parameter(
    mesh: Mesh, store: SequenceStore, tmp_path: Path, name: str
) -> None:
    task, told = BAD_LABELS[name]
    with pytest.raises(ConfigError, match=rf"RankingTaskArgs\.{told}"):
        build(task_config(store, tmp_path, task_args={"tasks": [RankingTaskArgs(**task)]}), mesh)


def test_a_second_store_is_evaluated_by_the_texts_of_the_first(
    mesh: Mesh, store: SequenceStore, tmp_path: Path
) -> None:
    rows = [[0, 1, 2, 3]] * 3
    texts = {**TEXTS, "topic": ["law", "war"], "stars": ["2", "3"]}
    codes = {name: [[0, 1, 1, 0]] * 3 for name in texts}
    options: dict[str, Any] = {
        "event_features": codes,
        "event_texts": texts,
        "num_items": ITEMS,
        "num_actions": ACTIONS,
    }
    other = write_small_store(tmp_path / "other", rows, actions=rows, **options)
    config = task_config(store, tmp_path, dataset={"eval_dataset_path": str(other.path)})
    trainer = build(config, mesh)
    (batch,) = trainer.source.eval_batches("valid")
    assert batch.label_values is not None
    of = dict(zip(trainer.source.roles.labels, batch.label_values[:, :3].tolist(), strict=True))
    assert (of["topic"], of["stars"]) == ([2, 2, 1], [3, 3, 2])
    assert trainer.evaluator.evaluate(trainer.source.eval_batches("valid"))["ACC/topic"] >= 0
