"""Runs whose tokens show features of items and events: what can be learnt from them."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hstu import api
from hstu.base.errors import ConfigError, DataError
from hstu.config.args import EmbeddingArgs, NumericFeatureArgs
from hstu.data.store.sequence_store import SequenceStore
from hstu.parallel.mesh import Mesh
from tests.conftest import write_small_store
from tests.train.tiny import build, run, tiny_config

SIDE: dict[str, Any] = {
    "side_feature_names": ["genres", "device", "watched", "vector", "seconds", "load"],
    "known_after": ["watched", "seconds"],
    "contextual_feature_names": [],
}
SAVES = {"ckpt_save_interval": 4}
USERS, LENGTH, ITEMS, ACTIONS = 24, 8, 11, 4


def random_store(path: Path, more: float = 0.0, **changes: Any) -> SequenceStore:
    """Items at random; the action on one follows from the device. A half of the load is missing.

    ``more``: added to the load of all events.
    """
    rng = np.random.default_rng(0)
    columns = {
        name: rng.integers(0, high, (USERS, LENGTH))
        for name, high in (("item", ITEMS), ("device", ACTIONS), ("watched", 5))
    }
    columns["action"] = (columns["device"] + 1) % ACTIONS
    load = np.where(rng.random((USERS, LENGTH)) < 0.5, np.nan, columns["action"] * 1e5)
    numbers = {"seconds": rng.lognormal(0, 3, (USERS, LENGTH)), "load": load + more}
    genres = [rng.integers(0, 6, rng.integers(1, 4)).tolist() for _ in range(ITEMS)]
    return write_small_store(
        path,
        columns["item"].tolist(),
        actions=columns["action"].tolist(),
        item_features={"genres": genres},
        event_features={name: columns[name].tolist() for name in ("device", "watched")},
        item_numbers={"vector": rng.normal(3, 9, (ITEMS, 3))},
        event_numbers={name: column.tolist() for name, column in numbers.items()},
        num_items=ITEMS,
        num_actions=ACTIONS,
        **changes,
    )


def accuracy(mesh: Mesh, store: SequenceStore, path: Path, side: dict[str, Any]) -> float:
    trainer = {"max_train_iters": 60, "eval_at_end": True}
    dataset = {"contextual_feature_names": [], **side}
    return run(tiny_config("ranking", store, path, trainer=trainer, dataset=dataset), mesh).metrics["ACC"]


def test_a_model_learns_from_a_feature_of_the_event(mesh: Mesh, tmp_path: Path) -> None:
    store = random_store(tmp_path / "store")
    assert accuracy(mesh, store, tmp_path / "with", SIDE) > 0.95
    assert accuracy(mesh, store, tmp_path / "without", {}) < 0.5


def test_features_that_the_data_lacks_and_times_of_items_are_errors(mesh: Mesh, tmp_path: Path) -> None:
    store = random_store(tmp_path / "store")
    dataset = {"side_feature_names": ["genre"], "contextual_feature_names": []}
    with pytest.raises(ConfigError, match=r"'genre' is no side feature of .*allowed: .*genres.*mean 'genres'"):
        build(tiny_config("ranking", store, tmp_path, dataset=dataset), mesh)
    dataset = {**SIDE, "known_after": ["genres"]}
    with pytest.raises(ConfigError, match=r"known_after.*'genres' is no event feature .*allowed: device, watched"):
        build(tiny_config("ranking", store, tmp_path, dataset=dataset), mesh)


def test_a_history_given_by_hand_with_features_gets_what_its_user_gets(mesh: Mesh, tmp_path: Path) -> None:
    store = random_store(tmp_path / "store")
    dataset = {**SIDE, "side_feature_names": [*SIDE["side_feature_names"], "hour_of_day"], "max_sequence_length": 5}
    finished = run(tiny_config("retrieval", store, tmp_path, dataset=dataset, trainer=SAVES), mesh)
    model = api.load(finished.path, mesh=mesh)
    (expected,) = model.recommend([100], top=3)
    (history,) = given_histories(store, 1)
    found = [model.recommend_for([history], top=3)]
    codes, offsets = store.item_values("genres")
    assert offsets is not None
    rows = store.encode("item_id", history.items)
    genres = [store.raw_ids("genres")[codes[offsets[row] : offsets[row + 1]]].tolist() for row in rows]
    vector = store.item_numbers("vector")[rows].tolist()
    shutil.move(store.path, tmp_path / "elsewhere")
    alone = api.load(finished.path, mesh=mesh)
    with pytest.raises(
        DataError,
        match=r"no feature genres \(list of text: .*\), which the model reads and which is not known of the items",
    ):
        alone.recommend_for([history])
    found.append(
        alone.recommend_for(
            [replace(history, features={**history.features, "genres": genres, "vector": vector})], top=3
        )
    )
    for answers, unknown in found:
        assert unknown == {} and answers[0].items == expected.items
        np.testing.assert_allclose(answers[0].scores, expected.scores, rtol=1e-4)


def test_a_model_keeps_the_statistics_of_the_numbers_that_it_was_trained_on(mesh: Mesh, tmp_path: Path) -> None:
    store, other = random_store(tmp_path / "store"), random_store(tmp_path / "other", more=1e7)
    config = tiny_config("retrieval", store, tmp_path, dataset=SIDE, trainer=SAVES)
    numbers = (NumericFeatureArgs(feature_names=["seconds"], transform="quantile"),)
    finished = run(replace(config, numbers=numbers), mesh)
    histories = given_histories(store, 3)
    answers = [api.load(finished.path, mesh=mesh).recommend_for(histories, top=3)[0]]
    shutil.rmtree(store.path)
    shutil.move(other.path, store.path)
    answers.append(api.load(finished.path, mesh=mesh).recommend_for(histories, top=3)[0])
    for first, second in zip(*answers, strict=True):
        assert first.items == second.items and first.scores == second.scores


def test_transforms_and_tables_that_do_not_fit_the_numbers_are_errors(mesh: Mesh, tmp_path: Path) -> None:
    store = random_store(tmp_path / "store")
    for name, transform, told in (
        (
            "vector",
            "log1p",
            r"transform = 'log1p': is for numbers, and 'vector' is a vector; use 'standardize' or 'none'",
        ),
        ("device", "none", r"'device' is no number of the data .*; it has vector, seconds, load"),
    ):
        config = tiny_config("ranking", store, tmp_path, dataset=SIDE)
        numbers = (NumericFeatureArgs(feature_names=[name], transform=transform),)
        with pytest.raises(ConfigError, match=told):
            build(replace(config, numbers=numbers), mesh)
    table = EmbeddingArgs(
        feature_names=["load"], table_name="load", item_vocab_size_or_capacity=4, sharding_type="data_parallel"
    )
    config = replace(config, embeddings=(*config.embeddings, table))
    with pytest.raises(ConfigError, match="'load' is a number or a vector, which has no table; remove it here"):
        build(config, mesh)


def given_histories(store: SequenceStore, count: int) -> list[api.History]:
    """The first users' own histories, with the features of events and without those of items."""
    return list(api.histories(store, range(count), (*store.event_features, *store.event_number_features)))


def test_the_hour_of_an_event_teaches_without_a_column_of_its_own(mesh: Mesh, tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    hours = np.cumsum(rng.integers(0, 24, (USERS, LENGTH)), axis=1)
    actions = hours // 6 % ACTIONS
    items = rng.integers(0, ITEMS, (USERS, LENGTH)).tolist()
    times = (hours * 3600 + 10**6 // 86_400 * 86_400).tolist()
    store = write_small_store(tmp_path / "store", items, actions=actions.tolist(), timestamps=times, num_items=ITEMS)
    assert accuracy(mesh, store, tmp_path, {"side_feature_names": ["hour_of_day"]}) > 0.95
