"""Runs in which the vectors of items are made of their features, too: new and unseen items are found by these."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hstu import api
from hstu.base.errors import ConfigError, DataError
from hstu.config.args import DynamicEmbeddingArgs
from hstu.data.store.sequence_store import SequenceStore
from hstu.parallel.mesh import Mesh
from tests.conftest import write_small_store
from tests.train.tiny import FinishedRun, build, run, tiny_config

GENRES, PER_GENRE, USERS, LENGTH = 4, 8, 32, 5
ITEMS = GENRES * PER_GENRE
COLD = [PER_GENRE * genre for genre in range(GENRES)]
"""The first item of each genre is in no training sample."""
SIDE = {"side_feature_names": ["genre", "tags"], "contextual_feature_names": [], "valid_items": 0}
TRAINER = {"max_train_iters": 60, "train_batch_size": 16, "eval_at_end": True, "ckpt_save_interval": 1000}


def genre_of(item: int) -> int:
    return item // PER_GENRE


def write_store(path: Path, more_items: int = 0, raw: tuple[str, ...] = ()) -> SequenceStore:
    """Users who stay in one genre, and in the end get its cold item. ``more_items``: further items of each genre.

    The further items have raw ids between the others', so that the codes of most items change.
    """
    rng = np.random.default_rng(0)
    known = [(10 * item, genre_of(item)) for item in range(ITEMS)]
    new = [(10 * PER_GENRE * genre + 5 + n, genre) for genre in range(GENRES) for n in range(more_items)]
    everything = sorted(known + new)
    code_of = {raw_id: code for code, (raw_id, _) in enumerate(everything)}
    rows = []
    for user in range(USERS):
        genre = user % GENRES
        warm = PER_GENRE * genre + 1 + rng.integers(0, PER_GENRE - 1, LENGTH)
        rows.append([code_of[10 * int(item)] for item in warm] + [code_of[10 * COLD[genre]]])
    genres = [genre for _, genre in everything]
    return write_small_store(
        path,
        rows,
        item_features={"genre": genres, "tags": [[genre, 4 + genre % 2] for genre in genres]},
        num_items=len(everything),
        item_ids=[raw_id for raw_id, _ in everything],
        raw=raw,
    )


def train(mesh: Mesh, store: SequenceStore, folder: Path, tower: bool = True, **options: Any) -> FinishedRun:
    task_args = {"item_tower": tower, "eval_metrics": ("HR@7", "MRR"), **options.pop("task_args", {})}
    trainer = {**TRAINER, **options.pop("trainer", {})}
    return run(
        tiny_config("retrieval", store, folder, dataset=SIDE, trainer=trainer, task_args=task_args, **options), mesh
    )


@pytest.fixture(scope="module")
def finished(mesh: Mesh, tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    folder = tmp_path_factory.mktemp("tower")
    return train(mesh, write_store(folder / "store"), folder)


def test_a_cold_item_whose_genre_determines_its_users_is_found(
    finished: FinishedRun, mesh: Mesh, tmp_path: Path
) -> None:
    without = train(mesh, write_store(tmp_path / "store"), tmp_path, tower=False)
    assert finished.metrics["HR@7"] == 1.0, "a genre has 8 items, and a user has seen one at least"
    assert without.metrics["HR@7"] < 0.4


def test_new_items_of_newer_data_get_vectors_from_their_features_alone(finished: FinishedRun, mesh: Mesh) -> None:
    folder = finished.path.parent
    before = api.load(finished.path, mesh=mesh).item_embeddings()
    store = SequenceStore.open(folder / "store")
    try:
        (folder / "store").rename(folder / "old")
        newer = write_store(folder / "store", more_items=2)
        model = api.load(finished.path, mesh=mesh)
        vectors, raw = model.item_embeddings(), newer.raw_ids("item_id")
        (best,) = model.recommend([101], top=ITEMS)
        of_genre = [item // (10 * PER_GENRE) == 1 for item in best.items]
        assert of_genre == sorted(of_genre, reverse=True) and sum(of_genre) < PER_GENRE + 2
        assert {85, 86} <= set(best.items[: sum(of_genre)]), "new items of that genre"
        known = np.isin(raw, store.raw_ids("item_id"))
        torch.testing.assert_close(vectors[known], before)
        new = vectors[~known]
        torch.testing.assert_close(new[::2], new[1::2])  # equal features, equal vectors
        torch.testing.assert_close(new.norm(dim=1), torch.ones(len(new)))
        cold = vectors[np.searchsorted(raw, [10 * item for item in COLD])]
        torch.testing.assert_close(new[::2], cold)  # in no training sample: their ids say nothing, either
    finally:
        shutil.rmtree(folder / "store")
        (folder / "old").rename(folder / "store")


def test_without_its_data_a_model_says_that_features_are_missing(finished: FinishedRun, mesh: Mesh) -> None:
    folder = finished.path.parent
    history = api.History(user=1, items=[10, 20], features={"genre": ["value 000"] * 2, "tags": [["value 000"]] * 2})
    (recommended,), _ = api.load(finished.path, mesh=mesh).recommend_for([history], top=3)
    assert len(recommended.items) == 3
    (folder / "store").rename(folder / "away")
    try:
        with pytest.raises(DataError, match=r"no preprocessed data at .*store"):
            api.load(finished.path, mesh=mesh).recommend_for([history])
    finally:
        (folder / "away").rename(folder / "store")


@pytest.mark.parametrize("kind", ["codes", "raw ids"])
def test_dynamic_tables_serve_a_tower(mesh: Mesh, tmp_path: Path, kind: str) -> None:
    store = write_store(tmp_path / "store", raw=("item_id",) if kind == "raw ids" else ())
    tables = tuple(
        DynamicEmbeddingArgs(feature_names=[name], table_name=name, item_vocab_size_or_capacity=64, init_std=0.3)
        for name in ("item_id", "genre", "tags")
    )
    dynamic = train(mesh, store, tmp_path, tables=tables)
    assert dynamic.metrics["HR@7"] == 1.0, "cold items have no row, and are found all the same"
    model = api.load(dynamic.path, mesh=mesh)
    assert model.evaluate("test") == pytest.approx(dynamic.metrics)
    assert model.item_embeddings().norm(dim=1).min() > 0.99


def test_what_a_tower_lacks_is_told(mesh: Mesh, tmp_path: Path) -> None:
    store = write_small_store(
        tmp_path / "store",
        [[0, 1, 2, 3]] * 8,
        item_features={"genre": [0, 1, 0, 1]},
        event_features={"device": [[0, 1, 0, 1]] * 8},
    )
    dataset = {"side_feature_names": ["device"], "contextual_feature_names": []}
    options: Any = {"dataset": dataset, "task_args": {"item_tower": True}}
    with pytest.raises(ConfigError, match=r"side_feature_names.*no feature of items.*item_tower.* has genre"):
        build(tiny_config("retrieval", store, tmp_path, **options), mesh)
