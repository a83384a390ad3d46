"""Other methods that predict ratings: measured on the labels of a run."""

import json
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import roc_auc_score

from hstu.data.preprocess import InteractionColumns, import_interactions
from hstu.data.store.sequence_store import SequenceStore
from scripts.quality.evaluate import influences
from scripts.quality.ranking_peers import SPACES, Labels, Trees, inputs, main, measure


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> SequenceStore:
    """60 users with 10 to 39 ratings of 45 films, whose taste is for odd or for even ones."""
    folder = tmp_path_factory.mktemp("films")
    rng = np.random.default_rng(0)
    rows = ["user,film,stars,at"]
    for user in range(60):
        taste = rng.normal(size=2)
        for place, film in enumerate(rng.permutation(45)[: rng.integers(10, 40)]):
            stars = np.clip(np.rint(3.3 + taste[film % 2] + rng.normal(0, 0.7)), 1, 5)
            rows.append(f"{100 + user},{film},{int(stars)},{1_000_000_000 + 50_000 * user + 1800 * place}")
    (folder / "events.csv").write_text("\n".join(rows) + "\n")
    films = [f"{film},{'odd|all' if film % 2 else 'all'}" for film in range(45)]
    (folder / "films.csv").write_text("film,kinds\n" + "\n".join(films) + "\n")
    columns = InteractionColumns(
        interactions=folder / "events.csv", user="user", item="film", action="stars", time="at",
        items=folder / "films.csv", item_columns=("kinds",), lists={"kinds": "|"},
    )  # fmt: skip
    return SequenceStore.open(import_interactions("films", columns, output=folder / "films", running_statistics=True))


def test_all_ratings_of_training_users_are_labels_and_no_user_is_in_two_parts(store: SequenceStore) -> None:
    parts = [Labels.of(store, split, 1) for split in ("train", "valid", "test")]
    assert [len(np.unique(each.users)) for each in parts] == [36, 6, 18]
    assert len(np.unique(np.concatenate([each.users for each in parts]))) == 60
    offsets = np.asarray(store.offsets())
    for each in parts:  # no history has more than 200 ratings
        assert (each.events == offsets[each.users] + each.place).all()
        assert len(each.events) == np.diff(offsets)[np.unique(each.users)].sum()


def test_auc_is_measured_over_all_labels_and_by_place() -> None:
    rng = np.random.default_rng(0)
    rating, place = rng.integers(1, 6, 600), np.tile(np.arange(150), 4)
    scores = rating + rng.normal(0, 2, 600)
    found = measure(scores, rating, place)
    assert found["AUC>=4"] == pytest.approx(roc_auc_score(rating >= 4, scores))
    here = (place >= 20) & (place < 50)
    assert found["AUC>=4, 21-50"] == pytest.approx(roc_auc_score(rating[here] >= 4, scores[here]))
    assert len(found) == 5


def test_influences_have_the_deviation_of_auc_over_drawn_users() -> None:
    rng = np.random.default_rng(0)
    users = np.repeat(np.arange(200), rng.integers(1, 30, 200))
    scores = np.round(rng.normal(size=200)[users] + rng.normal(size=len(users)), 1)
    is_liked = scores + 2 * rng.normal(size=len(users)) + rng.normal(size=200)[users] > 0
    rows = [np.flatnonzero(users == user) for user in range(200)]
    drawn = (np.concatenate([rows[user] for user in rng.integers(0, 200, 200)]) for _ in range(300))
    areas = [roc_auc_score(is_liked[each], scores[each]) for each in drawn]
    found = influences(scores, is_liked, users)
    assert abs(found.sum()) < 1e-12
    assert np.sqrt((found**2).sum()) == pytest.approx(np.std(areas), rel=0.1)


def test_a_statistic_is_measured_and_written_with_its_users(store: SequenceStore, tmp_path: Path) -> None:
    command = ["--store", str(store.path), "--seed", "1", "--output", str(tmp_path / "a.json")]
    assert main([*command, "--method", "baseline", "--per_user", str(tmp_path / "users.csv")]) == 0
    labels = Labels.of(store, "test", 1)
    is_liked = np.asarray(store.sequence("stars"))[labels.events] >= 4
    known = pd.Series(np.asarray(store.sequence("baseline"))[labels.events])
    assert known.isna().any()  # of the first day
    expected = roc_auc_score(is_liked, known.fillna(known.mean()))
    assert json.loads((tmp_path / "a.json").read_text())["metrics"]["AUC>=4"] == pytest.approx(expected)
    kept = pd.read_csv(tmp_path / "users.csv", index_col="user")
    assert sorted(kept.index - 100) == np.unique(labels.users).tolist() and kept["influence"].std() > 0


def test_unknown_methods_and_absent_libraries_are_named(
    store: SequenceStore, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--store", str(store.path), "--method", "baselin"]) == 2
    assert "did you mean 'baseline'" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "lightgbm", None)
    assert main(["--store", str(store.path), "--method", "lightgbm"]) == 2
    assert 'pip install ".[quality]"' in capsys.readouterr().err


@pytest.mark.parametrize("method", SPACES)
def test_trees_learn_which_films_a_user_likes(method: str, store: SequenceStore) -> None:
    pytest.importorskip(method)
    train, valid, test = (Labels.of(store, split, 1) for split in ("train", "valid", "test"))
    table, ratings = inputs(store), np.asarray(store.sequence("stars"))
    assert list(table)[-2:] == ["kinds 0", "kinds 1"] and table["kinds 0"].nunique() + table["kinds 1"].nunique() == 3
    trees = Trees(method, table, ratings, seed=1, threads=1)
    settings = {"learning_rate": 0.1} | ({"min_data_in_leaf": 20} if method == "lightgbm" else {})
    scores, found = trees.answers(trees.fit(settings, train, valid)[0], test)
    assert found["AUC>=4"] == roc_auc_score(ratings[test.events] >= 4, scores) > 0.6
    assert found["LOGLOSS"] < np.log(5)
