"""Runs with tasks that the user defines: what they learn, and what their predictions must not be shown."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hstu.base.errors import ConfigError
from hstu.config.args import RankingTaskArgs
from hstu.data.sampling.sampler import START
from hstu.data.store.sequence_store import SequenceStore
from hstu.model.inputs import NumberInputs
from hstu.parallel.mesh import Mesh
from tests.conftest import write_small_store
from tests.train.tiny import build, run, tables_of, tiny_config

USERS, LENGTH, ITEMS, ACTIONS = 24, 8, 12, 4
MISSING = "unknown"
TASKS: tuple[dict[str, Any], ...] = (
    {"label": "click", "metrics": ("AUC", "LOGLOSS", "NDCG")},
    {"label": "stars", "kind": "class", "num_classes": 3, "metrics": ("ACC", "LOGLOSS")},
    {"name": "topic", "label": "topic", "kind": "class", "num_classes": 3, "metrics": ("ACC",)},
    {"label": "watched", "kind": "regression", "scale": 10.0, "metrics": ("XAUC", "RMSE")},
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


def tasks(**changes: Any) -> list[RankingTaskArgs]:
    return [RankingTaskArgs(**{**task, **changes}) for task in TASKS]


def learnable_store(path: Path, last: dict[str, int] | None = None) -> SequenceStore:
    """``last``: the labels of the last events of all users move on by so many values."""
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
    for name, shift in (last or {}).items():
        if name == "dwell":
            dwell[:, -1] += shift
            continue
        codes[name][:, -1] = (codes[name][:, -1] + shift) % (ACTIONS if name == "action" else len(TEXTS[name]))
    codes["click"][:, 0], codes["stars"][:, 1] = 2, 3  # missing
    actions = codes.pop("action").tolist()
    return write_small_store(
        path,
        items.tolist(),
        actions=actions,
        event_features={name: values.tolist() for name, values in codes.items()},
        event_texts=TEXTS,
        event_numbers={"dwell": dwell.tolist()},
        num_items=ITEMS,
        num_actions=ACTIONS,
    )


def task_config(store: SequenceStore, path: Path, **options: Any) -> Any:
    used = {"item_id", "action", *options.get("dataset", {}).get("side_feature_names", [])}
    given = {
        "tables": tuple(table for table in tables_of(store) if set(table.feature_names) <= used),
        **options,
        "dataset": {"contextual_feature_names": [], "max_num_candidates": 3, **options.get("dataset", {})},
        "task_args": {"prediction_head_arch": [16], "tasks": tasks(), **options.get("task_args", {})},
    }
    given["task_args"] = {"eval_metrics": ("AUC",), **given["task_args"]}
    return tiny_config("ranking", store, path, **given)


@pytest.mark.parametrize("sharing", ["shared", pytest.param("ple", marks=pytest.mark.slow)])
def test_a_run_learns_all_kinds_of_tasks(mesh: Mesh, tmp_path: Path, sharing: str) -> None:
    store = learnable_store(tmp_path / "store")
    trainer = {"max_train_iters": 60, "eval_at_end": True}
    experts = {} if sharing == "shared" else {"num_experts": 2}
    finished = run(task_config(store, tmp_path, trainer=trainer, task_args={"task_sharing": sharing, **experts}), mesh)
    metrics = finished.metrics
    assert set(metrics) == {
        *("AUC/click", "LOGLOSS/click", "NDCG/click", "ACC/stars", "LOGLOSS/stars", "ACC/topic"),
        *("XAUC/watched", "RMSE/watched", "AUC/often", "RMSE/long"),
    }
    learnt = [metrics[name] for name in ("AUC/click", "ACC/stars", "ACC/topic", "XAUC/watched", "AUC/often")]
    assert min(learnt) > 0.75, metrics


@pytest.mark.parametrize(
    "shape",
    [
        {"dataset": {"max_num_candidates": 2}},
        {"dataset": {"max_num_candidates": 0}, "network": {"interleave_actions": True}},
        {"dataset": {"max_num_candidates": 2}, "network": {"interleave_actions": True}},
    ],
    ids=["candidates", "two tokens", "two tokens, candidates"],
)
def test_the_labels_of_an_item_do_not_change_its_predictions(mesh: Mesh, tmp_path: Path, shape: dict[str, Any]) -> None:
    shown = ["click", "watched", "dwell"]
    side = {"side_feature_names": shown, "known_after": shown}
    labels = [{}, {"click": 1, "watched": 1, "action": 1, "stars": 1, "topic": 1, "dwell": 1}]
    plain, changed = (
        last_of_all_users(mesh, tmp_path / str(number), learnable_store(tmp_path / f"store{number}", last), shape, side)
        for number, last in enumerate(labels)
    )
    assert (plain[1] != changed[1]).any(dim=0).all(), "every label is read"
    assert torch.equal(plain[0], changed[0])


def last_of_all_users(
    mesh: Mesh, path: Path, store: SequenceStore, shape: dict[str, Any], side: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """Predictions for the last event of each user by a model with large weights, and the labels of these events."""
    options = {**shape, "dataset": {**side, **shape["dataset"], "shuffle": False, "train_fraction": 0.99}}
    own = [RankingTaskArgs(label="dwell", kind="regression")]
    own += [task for task in tasks() if shape["dataset"]["max_num_candidates"] or task.label != "click"]
    trainer = {"train_batch_size": USERS, "eval_batch_size": USERS}
    trained = build(task_config(store, path, **options, trainer=trainer, task_args={"tasks": own}), mesh)
    model = trained.state.model.eval()
    batch = next(trained.source.train_batches(START))
    with torch.no_grad():
        for parameter in model.dense.parameters():
            parameter.mul_(3)
        for module in model.modules():
            if isinstance(module, NumberInputs):  # whose statistics are those of the whole store
                module.shift.zero_()
                module.scale.fill_(1)
        last = batch.num_labels.cumsum(0)[: batch.real_batch_size] - 1
        assert batch.label_values is not None
        return model(batch).logits[last], batch.label_values[:, last].T


def test_micro_batches_train_as_the_whole_batch(mesh: Mesh, tmp_path: Path) -> None:
    store = learnable_store(tmp_path / "store")
    own = [*tasks(), RankingTaskArgs(name="pairs", label="click", loss="pairwise")]
    losses = []
    for parts in (1, 2):
        trainer = {"gradient_accumulation_steps": parts, "train_batch_size": 8 // parts}
        config = task_config(store, tmp_path / str(parts), trainer=trainer, task_args={"tasks": own})
        losses.append(run(config, mesh).losses)
    assert losses[0][0] != losses[0][-1]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)


def test_numbers_are_labels_as_they_are(mesh: Mesh, tmp_path: Path) -> None:
    task = RankingTaskArgs(label="dwell", kind="regression")
    config = task_config(learnable_store(tmp_path / "store"), tmp_path, task_args={"tasks": [task]})
    config = replace(config, dataset=replace(config.dataset, max_num_candidates=LENGTH - 1, shuffle=False))
    trainer = build(config, mesh)
    batch = next(trainer.source.train_batches(START))
    items = batch.features["item_id"].values().view(-1, LENGTH)[:, 1:]
    expected = items * 1.5
    expected[:, 2] = torch.nan
    assert batch.label_values is not None
    torch.testing.assert_close(batch.label_values.view_as(expected), expected, equal_nan=True)


def test_the_loss_is_the_sum_over_tasks_of_the_mean_over_labelled_items(mesh: Mesh, tmp_path: Path) -> None:
    store = learnable_store(tmp_path / "store")

    def first_loss(number: int, tasks: list[RankingTaskArgs]) -> float:
        trainer = build(task_config(store, tmp_path / str(number), task_args={"tasks": tasks}), mesh)
        model = trainer.state.model
        with torch.no_grad():
            head = model.dense.get_submodule("task.head")
            for parameter in head.parameters():
                parameter.zero_()
            batch = next(trainer.source.train_batches(START))
            output = model(batch)
        return float(output.loss_sum / output.num_labels)

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
def test_labels_that_do_not_fit_the_data_are_errors_of_their_parameter(mesh: Mesh, tmp_path: Path, name: str) -> None:
    task, told = BAD_LABELS[name]
    store = learnable_store(tmp_path / "store")
    with pytest.raises(ConfigError, match=rf"RankingTaskArgs\.{told}"):
        build(task_config(store, tmp_path, task_args={"tasks": [RankingTaskArgs(**task)]}), mesh)


def test_a_second_store_is_evaluated_by_the_texts_of_the_first(mesh: Mesh, tmp_path: Path) -> None:
    store = learnable_store(tmp_path / "store")
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
