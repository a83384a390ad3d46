"""A split evaluated, predictions and vectors in Parquet: those of training and notebooks, restarts, and mistakes."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

from hstu import api
from hstu.base.errors import ConfigError, DataError
from hstu.checkpoint.export import export
from hstu.checkpoint.find import locate
from hstu.data.store.reader import GivenRequests
from hstu.data.store.sequence_store import USER_FEATURE, SequenceStore
from hstu.parallel.mesh import Mesh
from hstu.serve.command import read_candidates
from hstu.serve.histories import stored_vocabulary
from hstu.serve.loaded import LoadedModel
from hstu.serve.predict import choose_split, evaluate_split, with_metrics
from scripts import embed, evaluate, predict
from tests.conftest import write_small_store
from tests.data.store.test_lake import ROWS, write_lake
from tests.serve.served import Served
from tests.train.tiny import ACTIONS, ITEM_FEATURES, ITEMS, FinishedRun, walks

Finished = Callable[[str], FinishedRun]
Loaded = Callable[[str], LoadedModel]
USERS = [str(100 + user) for user in range(20)]


@pytest.fixture
def call(here: Path, loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """``call("retrieval", "--top", 3)``: the exit code of the script, with the model of that run."""

    def run(name: str, *options: Any, where: str = "out", script: ModuleType = predict) -> int:
        monkeypatch.setattr(script, "load_model", lambda cls, options: loaded(name))
        found: int = script.main(["--run_dir", name, "--output", str(here / where), *map(str, options)])
        return found

    return run


@pytest.fixture
def predicted(here: Path, call: Callable[..., int]) -> Callable[..., pd.DataFrame]:
    """What the script writes. ``where``: directory below ``here``."""

    def read(name: str, *options: Any, where: str = "out") -> pd.DataFrame:
        assert call(name, *options, where=where) == 0
        return pd.read_parquet(here / where)

    return read


@pytest.fixture
def refused(call: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """The errors of a call that fails."""

    def errors(name: str, *options: Any) -> str:
        assert call(name, *options) in (2, 3)
        return capsys.readouterr().err

    return errors


def test_users_get_what_the_interface_for_notebooks_recommends(
    predicted: Callable[..., pd.DataFrame], finished: Finished, mesh: Mesh
) -> None:
    found = predicted("retrieval", "--top", 4, "--part_users", 7)
    expected = api.load(finished("retrieval").path, mesh=mesh).recommend(USERS, top=4)
    assert found["user"].tolist() == [int(entry.user) for entry in expected for _ in entry.items]
    assert found["item"].tolist() == [item for entry in expected for item in entry.items]
    np.testing.assert_allclose(found["score"], [score for entry in expected for score in entry.scores], rtol=1e-6)
    assert found["rank"].tolist() == [place for entry in expected for place in range(1, len(entry.items) + 1)]


def cosines(finished: Finished, mesh: Mesh, keep_seen: bool) -> dict[int, dict[int, float]]:
    """User → item → score, by hand."""
    trained = api.load(finished("retrieval").path, mesh=mesh)
    scores = (trained.user_embeddings(USERS) @ trained.item_embeddings().T).tolist()
    return {
        100 + user: {
            1000 + item: score for item, score in enumerate(row) if keep_seen or item not in walks()["items"][user]
        }
        for user, row in enumerate(scores)
    }


@pytest.mark.parametrize("keep_seen", [False, True])
def test_items_are_chosen_by_lists(
    predicted: Callable[..., pd.DataFrame],
    finished: Finished,
    mesh: Mesh,
    here: Path,
    keep_seen: bool,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (here / "allow.txt").write_text("1001\n1002\n1003\n1004\n1005\n7\n")
    (here / "deny.csv").write_text("item,why\n1003,old\n")
    (here / "users.txt").write_text("105\n102\n105\nnobody\n")
    options = ["--deny", here / "deny.csv", *(["--keep_seen"] if keep_seen else [])]
    scores = cosines(finished, mesh, keep_seen)
    listed = predicted("retrieval", "--allow", here / "allow.txt", "--users_file", here / "users.txt", *options)
    printed = capsys.readouterr().err
    assert "1 unknown item(s) left out: '7'" in printed and "1 unknown user(s) left out: 'nobody'" in printed
    rows = [
        (user, item, scores[user][item])
        for user in (105, 102)
        for item in sorted((1001, 1002, 1004, 1005), key=lambda item: -scores[user].get(item, 0))
        if item in scores[user]
    ]
    assert [tuple(row[:2]) for row in listed[["user", "item"]].to_numpy()] == [row[:2] for row in rows]
    np.testing.assert_allclose(listed["score"], [row[2] for row in rows], rtol=1e-5)


@pytest.mark.parametrize(("name", "held_out"), [("ranking", 1), ("tasks", 2)])
def test_a_ranking_model_predicts_candidates_as_it_was_evaluated_on_them(
    name: str, held_out: int, here: Path, finished: Finished, loaded: Loaded
) -> None:
    rows = walks()["items"]
    earlier = {**walks(), "items": [row[:-held_out] for row in rows]}
    earlier["actions"] = [row[:-held_out] for row in walks()["actions"]]
    write_small_store(here / "earlier", **earlier, item_features=ITEM_FEATURES)
    pairs = [(100 + user, 1000 + item) for user, row in enumerate(rows) for item in row[-held_out:]]
    extra = [(user, 1000 + item) for user in (103, 104) for item in range(ITEMS)]
    pd.DataFrame([*extra, *pairs], columns=["user", "item"]).to_csv(here / "pairs.csv", index=False)
    arguments = ["--run_dir", finished(name).path, "--data", here / "earlier", "--part_users", "9"]
    arguments += ["--candidates", here / "pairs.csv", "--output", here / "out"]
    assert predict.main(list(map(str, arguments))) == 0
    found = pd.read_parquet(here / "out")
    assert len(found) == len(pairs) + len(extra) and (found["user"][: ITEMS + held_out] == 103).all()
    observations = evaluate_split(loaded(name), "valid").observations
    columns = loaded(name).columns(observations.results)
    assert set(found) == {"user", "item", *columns}
    by_user = found.groupby("user").tail(held_out).set_index("user")
    for user in np.unique(observations.users):
        last = np.flatnonzero(observations.users == user)[-held_out:]
        own = by_user.loc[[100 + user]]
        assert own["item"].tolist() == (1000 + observations.items[last]).tolist()
        for column, values in columns.items():
            np.testing.assert_allclose(own[column], values[last], rtol=1e-4, atol=1e-5)


def test_classes_are_named_by_the_texts_of_the_actions(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    model = loaded("ranking")
    texts = np.array(["buy", "cart", "look", "view"], dtype=object)
    monkeypatch.setitem(model.store.features, "action", replace(model.store.feature("action"), has_vocab=True))
    monkeypatch.setattr(SequenceStore, "raw_ids", lambda self, name: texts)
    (prediction,) = model.predictions
    assert prediction.columns == ["p_buy", "p_cart", "p_look", "p_view"]


def test_a_run_that_was_killed_goes_on_and_writes_the_same_files(
    predicted: Callable[..., pd.DataFrame],
    here: Path,
    finished: Finished,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    predicted("retrieval", "--part_users", 6, where="whole")
    write, options = predict._put, ["--part_users", "6", "--output", str(here / "killed")]

    def killed(path: Path, table: Any) -> None:
        if "00002" in path.name:
            path.with_name(f".writing_{path.name}").write_text("half")
            raise KeyboardInterrupt
        write(path, table)

    arguments = ["--run_dir", str(finished("retrieval").path), *options]
    with monkeypatch.context() as patched:
        patched.setattr(predict, "_put", killed)
        assert predict.main(arguments) == 130
    capsys.readouterr()
    assert predict.main([*arguments, "--top", "3"]) == 3
    assert "has parts of another call" in capsys.readouterr().err
    assert predict.main(arguments) == 0
    assert "2 of 4 parts are there; going on with the rest" in capsys.readouterr().err
    for file in sorted((here / "whole").glob("*.parquet")):
        assert (here / "killed" / file.name).read_bytes() == file.read_bytes()
    assert len(list((here / "killed").iterdir())) == 5
    assert predict.main(arguments) == 3 and "exists and is complete" in capsys.readouterr().err


def test_mistakes_are_told(refused: Callable[..., str], here: Path) -> None:
    (here / "wrong.csv").write_text("users,item\n100,1000\n")
    (here / "nobody.txt").write_text("zoe\n")
    (here / "gap.csv").write_text("user,item\n100,\n")
    users = {"wrong.csv": " has no column 'user'; it has users, item; did you mean 'users'?"}
    users["nobody.txt"] = ": the data knows no user of this file: 'zoe'"
    for name, problem in users.items():
        assert name + problem in refused("retrieval", "--users_file", here / name)
    assert "absent.parquet cannot be read" in refused("ranking", "--candidates", here / "absent.parquet")
    assert "1 row(s) have no item" in refused("ranking", "--candidates", here / "gap.csv")
    assert "--candidates is for ranking" in refused("retrieval", "--candidates", here / "gap.csv")
    assert "name a file of them with --candidates" in refused("ranking")
    assert "--top is for retrieval" in refused("ranking", "--top", 3)
    (here / "pairs.csv").write_text("user,item\n100,1000\n")
    for name, *options in (("ranking", "--candidates", here / "pairs.csv"), ("retrieval",)):
        assert "does not read the time of a request" in refused(name, *options, "--at", "now")
    (here / "items.txt").write_text("1001\n")
    lists = ("--allow", here / "items.txt", "--deny", here / "items.txt")
    assert "no item is left to recommend" in refused("retrieval", *lists)
    assert not (here / "out").exists()
    (here / "out").mkdir(exist_ok=True)
    (here / "out" / "mine.txt").write_text("mine")
    assert "out exists; give another name" in refused("retrieval")


def test_a_file_of_candidates_has_raw_values_and_unknown_ones_are_named(
    ranking: Served, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "pairs.csv").write_text("user,item,watched,device\n100,1000,2.5,tv\n100,1001,,tv\n100,1002,much,tv\n")
    found = read_candidates(ranking.trained, str(tmp_path / "pairs.csv"), ["watched"])
    assert found.values["watched"].tolist() == [2, 4, 4]
    assert "1 unknown value(s) of watched, taken for missing: 'much'" in capsys.readouterr().err
    with pytest.raises(
        DataError, match=r"'device' has values .* know: 'tv'; it has device \(text: value 000, value 001"
    ):
        read_candidates(ranking.trained, str(tmp_path / "pairs.csv"), ["device"])


def test_users_of_a_lake_are_found_in_any_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    lake = SequenceStore.open(write_lake(tmp_path / "lake", ROWS | {"who": [9, 3, 12, 5, 8]}, context_columns=[]))
    assert stored_vocabulary(lake, USER_FEATURE).rows(["8", 5, 9, 7]).tolist() == [4, 3, 0, -1]


def test_candidates_after_the_time_of_the_request_are_refused(store: SequenceStore) -> None:
    with pytest.raises(DataError, match="a history has an event at second"):
        GivenRequests(store, np.array([0]), np.array([1]), {}, at=1_000_000)


def test_vectors_are_those_of_the_interface_for_notebooks(
    here: Path,
    call: Callable[..., int],
    finished: Callable[[str], FinishedRun],
    mesh: Mesh,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("hstu.serve.predict.PART_USERS", 2)
    (here / "users.csv").write_text("user\n107\n103\n119\n107\n")
    assert call("retrieval", "--users_file", here / "users.csv", script=embed) == 0
    users, items = (pd.read_parquet(here / "out" / f"{name}.parquet") for name in ("users", "items"))
    vectors, of_items = np.stack([*users["vector"]]), np.stack([*items["vector"]])
    trained = api.load(finished("retrieval").path, mesh=mesh)
    assert users["user"].tolist() == [107, 103, 119] and items["item"].tolist() == list(range(1000, 1000 + ITEMS))
    np.testing.assert_allclose(vectors, trained.user_embeddings([107, 103, 119]).numpy(), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(of_items, trained.item_embeddings().numpy())


def test_vectors_of_a_ranking_model_and_into_a_used_directory_are_refused(
    call: Callable[..., int], here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("ranking", script=embed) == 3 and "need a retrieval run" in capsys.readouterr().err
    (here / "out").mkdir()
    (here / "out" / "mine").touch()
    assert call("retrieval", "--only", "items", script=embed) == 3
    assert "out exists; give another name" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["retrieval", "ranking", "tasks"])
def test_the_metrics_are_those_of_the_training_run(name: str, finished: Finished, loaded: Loaded) -> None:
    split = choose_split(loaded(name).with_data(), None)
    assert split == ("test" if name == "retrieval" else "valid")
    assert evaluate_split(loaded(name), split).metrics() == finished(name).metrics


def test_an_item_of_newer_data_that_the_model_does_not_have_is_a_miss(
    finished: Finished, mesh: Mesh, tmp_path: Path
) -> None:
    newer = {**walks(num_users=6, seed=5), "num_items": 12}
    newer["items"][0][-1] = 11
    newer["actions"] = [[item % 4 for item in row] for row in newer["items"]]
    features = {name: [*values, values[0]] for name, values in ITEM_FEATURES.items()}
    write_small_store(tmp_path / "newer", **newer, item_features=features)
    model = LoadedModel.load(finished("retrieval").path, mesh=mesh, data=tmp_path / "newer")
    results = evaluate_split(model, "test").observations.results[:, 0]
    assert np.isinf(results).tolist() == [True] + [False] * 5
    with pytest.raises(DataError, match="no preprocessed data at"):
        LoadedModel.load(finished("retrieval").path, mesh=mesh, data=tmp_path / "absent")


def test_metrics_and_splits_that_a_run_does_not_have_are_refused(loaded: Loaded) -> None:
    with pytest.raises(ConfigError, match="'AUC' is not allowed"):
        evaluate_split(loaded("retrieval"), "test", ["AUC"])
    with pytest.raises(ConfigError, match=r"no task of the run has LOGLOS; .*; did you mean 'LOGLOSS'"):
        with_metrics(loaded("tasks").config, ["LOGLOS", "AUC"])
    with pytest.raises(ConfigError, match="no split 'tset'; allowed: valid, test; did you mean 'test'"):
        choose_split(loaded("retrieval").with_data(), "tset")


def test_only_the_tasks_that_have_a_metric_are_measured(loaded: Loaded) -> None:
    assert set(evaluate_split(loaded("tasks"), "valid", ["ndcg"]).metrics()) == {"NDCG/odd", "NDCG/high"}


def test_the_script_prints_a_table_and_writes_json(
    here: Path, finished: Finished, store: SequenceStore, capsys: pytest.CaptureFixture[str]
) -> None:
    output = here / "test.json"
    exported = export(locate(str(finished("retrieval").path)), here / "exported")
    arguments = ["--checkpoint", str(exported), "--output", str(output)]
    assert evaluate.main(arguments) == 0
    document = json.loads(output.read_text())
    assert document["metrics"] == finished("retrieval").metrics and document["data"] == str(store.path)
    assert f"test of {store.path}: 20 users, 20 predictions" in capsys.readouterr().out
    assert evaluate.main(arguments) == 3 and "test.json exists; give another name" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "suffix"), [("retrieval", "csv"), ("retrieval", "parquet"), ("ranking", "csv"), ("tasks", "parquet")]
)
def test_the_metrics_follow_from_the_rows_of_the_targets(
    here: Path, finished: Finished, mesh: Mesh, name: str, suffix: str
) -> None:
    path = here / f"rows.{suffix}"
    metrics = {"retrieval": "HR@10,NDCG@10,HR@3", "ranking": "AUC,GAUC", "tasks": "AUC,LOGLOSS"}[name]
    options = ["--per_user", str(path), "--metrics", metrics, "--output", str(here / "printed.json")]
    assert evaluate.main(["--run_dir", str(finished(name).path), *options]) == 0
    rows = pd.read_csv(path) if suffix == "csv" else pd.read_parquet(path)
    printed = json.loads((here / "printed.json").read_text())
    if suffix == "parquet":
        assert pq.read_metadata(path).metadata[b"model"].decode() == printed["model"]
    found = printed["metrics"]
    assert len(rows) == printed["predictions"] and rows["user"].nunique() == printed["users"]
    if name == "retrieval":
        assert found["HR@10"] == (rows["rank"] <= 10).mean() and found["HR@3"] == (rows["rank"] <= 3).mean()
        gains = (rows["rank"] <= 10) / np.log2(rows["rank"] + 1)
        assert found["NDCG@10"] == pytest.approx(gains.mean(), rel=1e-12)
        items = {100 + user: 1000 + row[-1] for user, row in enumerate(walks()["items"])}
        assert dict(zip(rows["user"], rows["item"], strict=True)) == items
        trained = api.load(finished(name).path, mesh=mesh)
        assert rows["score"].between(-1.001, 1.001).all() and trained.version == printed["model"]
    elif name == "ranking":
        areas = [area(rows[f"p_{action}"], rows["label"] == action) for action in range(ACTIONS)]
        assert found["AUC"] == pytest.approx(np.nanmean(areas), abs=1e-6)
        assert (rows["label"] == (rows["item"] - 1000) % ACTIONS).all()
    else:
        assert found["AUC/odd"] == pytest.approx(area(rows["score_odd"], rows["label_odd"] == 1), abs=1e-6)
        chance = rows["score_high"].where(rows["label_high"] == 1, 1 - rows["score_high"])
        assert found["LOGLOSS/high"] == pytest.approx(-np.log(chance).mean(), rel=1e-4)


def area(scores: "pd.Series[Any]", positive: "pd.Series[Any]") -> float:
    """Area under the ROC curve: the share of pairs in order, ties counted half."""
    differences = scores[positive].to_numpy()[:, None] - scores[~positive].to_numpy()
    return float((np.sign(differences) / 2 + 0.5).mean())
