"""Ranking what requests have shown: what a model learns from, and what it must not see."""

from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hstu.base.errors import ConfigError
from hstu.config.rules import validate
from hstu.data.sampling.sampler import START
from hstu.data.store.sequence_store import SequenceStore
from hstu.parallel.mesh import Mesh
from tests.config.gin_files import ALL_RULES
from tests.conftest import write_small_store
from tests.train.tiny import build, enlarge, run, tiny_config

USERS, LENGTH, ITEMS, ACTIONS = 24, 7, 12, 4
DATASET: dict[str, Any] = {
    "candidates": "requests",
    "max_sequence_length": 10,
    "contextual_feature_names": [],
    "side_feature_names": ["device", "watched", "time_gap"],
    "known_after": ["watched"],
    "shuffle": False,
}
PLAIN = DATASET | {"side_feature_names": [], "known_after": []}
Log = dict[str, Any]
"""Arguments of write_small_store."""


def random_log(last: int = 5) -> Log:
    """Users who like some of the items, which their events show and which decide the action on a candidate."""
    rng = np.random.default_rng(0)
    likes = rng.integers(0, ACTIONS, USERS)
    events = {
        "items": (likes[:, None] + ACTIONS * rng.integers(0, ITEMS // ACTIONS, (USERS, LENGTH))).tolist(),
        "actions": np.full((USERS, LENGTH), 1).tolist(),
        "timestamps": (1000 + 60 * np.arange(LENGTH) + np.zeros((USERS, 1), dtype=int)).tolist(),
    }
    features = {name: rng.integers(0, 5, (USERS, LENGTH)).tolist() for name in ("device", "watched")}
    requests = []
    for user in range(USERS):
        for after in (3, last):
            items = rng.integers(0, ITEMS, rng.integers(2, 5))
            shown = {"item_id": items, "action": (items % ACTIONS == likes[user]).astype(int)}
            shown |= {name: rng.integers(0, 5, len(items)) for name in ("device", "watched")}
            time = 1000 + 60 * (after - 1) + 30
            requests.append((user, time, {name: values.tolist() for name, values in shown.items()}))
    return {**events, "event_features": features, "requests": requests, "num_items": ITEMS, "num_actions": ACTIONS}


def options(interleave: bool, groups: int = 1) -> dict[str, Any]:
    network = {"interleave_actions": interleave, "position_encoding": ("absolute", "relative_bias")}
    return {"dataset": DATASET, "network": network | {"target_group_size": groups}}


def predictions(mesh: Mesh, tmp_path: Path, log: Log, **given: Any) -> tuple[list[Tensor], Tensor]:
    """Of one model with large weights: the logits of the candidates, request by request, and the labels."""
    number = len(list(tmp_path.iterdir()))
    store = write_small_store(tmp_path / f"store_{number}", **log)
    sizes = {"train_batch_size": 2 * USERS, "eval_batch_size": 2 * USERS}
    trainer = build(tiny_config("ranking", store, tmp_path / f"run_{number}", **given, trainer=sizes), mesh)
    model, batch = enlarge(trainer.state.model.eval()), next(trainer.source.train_batches(START))
    with torch.no_grad():
        logits = model(batch).logits
    return list(logits.split(batch.num_labels[: batch.real_batch_size].tolist())), batch.labels


@pytest.mark.parametrize("shape", [(True, 1), (False, 1), (False, 3)], ids=["two tokens", "one token", "groups"])
def test_a_prediction_sees_the_history_and_its_own_candidate_alone(
    mesh: Mesh, tmp_path: Path, shape: tuple[bool, int]
) -> None:
    given, log = options(*shape), random_log()
    plain, labels = predictions(mesh, tmp_path, log, **given)

    hidden = deepcopy(log)
    for _, _, shown in hidden["requests"]:
        shown["action"] = [(action + 1) % 2 for action in shown["action"]]
        shown["watched"] = [(value + 1) % 5 for value in shown["watched"]]
    for name in ("items", "actions"):
        for row in hidden[name]:  # 5 events are before the last request, the others in its second or later
            row[5:] = [(value + 1) % 2 for value in row[5:]]
    for row in hidden["timestamps"]:
        row[5] = row[4] + 30
    found, other_labels = predictions(mesh, tmp_path, hidden, **given)
    assert all(map(torch.equal, found, plain)) and (labels != other_labels).all()

    shown = deepcopy(log)
    for _, _, values in shown["requests"][::2]:
        values["device"] = [(value + 1) % 5 for value in values["device"]]
    found, _ = predictions(mesh, tmp_path, shown, **given)
    training = [not torch.equal(a, b) for a, b in zip(found, plain, strict=True)]
    assert training == [True, False] * (len(plain) // 2), "the requests that showed others, and no other request"


@pytest.mark.parametrize("split", ["time", pytest.param("user_holdout", marks=pytest.mark.slow)])
def test_models_learn_to_rank_what_was_shown(mesh: Mesh, tmp_path: Path, split: str) -> None:
    store = write_small_store(tmp_path / "store", **random_log())
    trainer = {"max_train_iters": 50, "eval_at_end": True, "train_batch_size": 16}
    task = {"prediction_head_arch": [8, 1], "eval_metrics": ("AUC", "GAUC")}
    options: Any = {"trainer": trainer, "task_args": task, "optimizer": {"learning_rate": 0.02}}
    config = tiny_config("ranking", store, tmp_path, dataset=PLAIN | {"split": split}, **options)
    validate(config, 1, ALL_RULES)
    assert run(config, mesh).metrics["AUC"] > 0.8


def test_options_that_requests_do_not_have_are_errors(mesh: Mesh, store: SequenceStore, tmp_path: Path) -> None:
    def problems(task: str, network: Mapping[str, Any] | None = None, **dataset: Any) -> str:
        dataset = {"candidates": "requests", **dataset}
        with pytest.raises(ConfigError) as caught:
            validate(tiny_config(task, store, tmp_path, dataset=dataset, network=network or {}), 1, ALL_RULES)
        return str(caught.value)

    grouped = {"target_group_size": 2, "interleave_actions": True}
    assert "a candidate sees the actions, which are labels, of those before it" in problems("ranking", grouped)
    assert "window_stride" in problems("ranking", window_stride=4)
    assert "is for ranking and has no effect here" in problems("retrieval")
    with pytest.raises(ConfigError, match=r"candidates.*has no requests"):
        build(tiny_config("ranking", store, tmp_path, dataset={"candidates": "requests"}), mesh)
