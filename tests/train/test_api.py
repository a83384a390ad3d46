"""The Python interface: what a notebook does with a trained run."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch

from hstu import api
from hstu.api import Recommendation, TrainedModel
from hstu.base.errors import ConfigError, DataError
from hstu.checkpoint.export import export
from hstu.checkpoint.find import locate
from hstu.data.store.sequence_store import SequenceStore
from hstu.parallel.mesh import Mesh
from hstu.parallel.tables import dynamic_tables
from hstu.train.builder import build_model
from hstu.train.inference import InferenceSource
from tests.conftest import REPOSITORY
from tests.data.preprocess.test_restart import arrays
from tests.train.tiny import ACTIONS, ITEMS, FinishedRun, run, tables_with_dynamic, tiny_config, walks

SAVES = {"ckpt_save_interval": 1000}


@pytest.fixture(scope="module")
def finished(mesh: Mesh, store: SequenceStore, tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    """A retrieval run that has learnt the walks."""
    trainer = {"max_train_iters": 60, "eval_at_end": True, **SAVES}
    output = tmp_path_factory.mktemp("trained")
    return run(tiny_config("retrieval", store, output, trainer=trainer, task_args={"negatives": "full"}), mesh)


@pytest.fixture(scope="module")
def trained(finished: FinishedRun, mesh: Mesh) -> TrainedModel:
    return api.load(finished.path, mesh=mesh)


@pytest.fixture(scope="module")
def ranking(mesh: Mesh, store: SequenceStore, tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    trainer = {"eval_at_end": True, **SAVES}
    return run(tiny_config("ranking", store, tmp_path_factory.mktemp("ranking"), trainer=trainer), mesh)


def test_a_run_trained_from_text_or_a_mapping_is_that_of_the_trainer(
    finished: FinishedRun, trained: TrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    places = {"TrainerArgs.output_dir": "run", "TrainerArgs.ckpt_save_dir": "saved"}
    text = trained.config.operative_gin()
    again = api.train(text, places)
    assert again.checkpoint.parent == Path("saved") and Path("run/summary.json").exists()
    assert again.evaluate("test") == trained.evaluate("test") == api.load("run").evaluate("test")
    for name, table in trained.tables().items():
        assert torch.equal(again.tables()[name].rows, table.rows)
    with pytest.raises(ConfigError, match=r"api\.train loads what the run saves"):
        api.train(text, {**places, "TrainerArgs.ckpt_save_interval": -1})
    with pytest.raises(ConfigError, match=r"NetworkArgs\.num_layers is required") as problem:
        api.train({"RankingArgs.prediction_head_arch": [1]})
    assert problem.value._render_traceback_() == [f"ConfigError: {problem.value}"]  # what a notebook shows


def test_frames_give_the_store_of_their_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [(f"u{user}", 1000 + item) for user, row in enumerate(walks()["items"]) for item in row]
    frame = pd.DataFrame(rows, columns=["who", "what"]).assign(at=lambda rows: 1_717_000_000 + rows.index)
    users = pd.DataFrame({"who": [f"u{user}" for user in range(20)], "town": ["Ulm", None] * 10})
    given: dict[str, Any] = {"user": "who", "item": "what", "time": "at", "context_columns": ["who", "town"]}
    frame.to_csv("events.csv", index=False)
    users.to_csv("users.csv", index=False)
    expected = arrays(api.dataset("events.csv", output="data/files", context="users.csv", **given))
    dates = frame.assign(at=pd.to_datetime(frame["at"], unit="s"), what=frame["what"].astype(object))
    for name, tables in (("dates", dates), ("parts", [frame[:50], frame[50:]]), ("arrow", pa.Table.from_pandas(frame))):
        assert arrays(api.dataset(tables, output=f"data/{name}", context=users, **given)) == expected
    api.dataset(frame[:50], output="data/parts", context=users, **given, force=True)
    grown = api.dataset(frame[50:], output="data/parts", context=users, **given, append=True)
    assert arrays(grown)["offsets.npy"] == expected["offsets.npy"]
    bad = {
        "data/parts exists and does not fit this command": frame,
        r"interactions-\w{12}.parquet, row 1: 'who' is empty": frame.assign(who=frame["who"].where(frame.index > 0)),
        r"the column is DOUBLE \(pandas makes integers with gaps decimal": frame.assign(what=1.5),
        "several columns named 'what'": pd.concat([frame, frame[["what"]]], axis=1),
    }
    for message, table in bad.items():
        with pytest.raises(DataError, match=message):
            api.dataset(table, output="data/parts" if table is frame else "data/bad", context=users, **given)


def test_the_notebook_runs_and_beats_what_is_popular(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    notebook = json.loads((REPOSITORY / "docs" / "tutorials" / "notebook.ipynb").read_text(encoding="utf-8"))
    names: dict[str, Any] = {}
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    for cell in cells:
        exec("".join(cell["source"]), names)
        assert [output["output_type"] for output in cell["outputs"]] in (["stream"], ["execute_result"])
    assert names["scores"]["HR@10"] > 0.8 > 0.2 > names["popular_scores"]["HR@10"]


def test_histories_have_the_ids_and_values_of_the_raw_data(store: SequenceStore) -> None:
    found = list(api.histories(store))
    assert [history.user for history in found] == list(range(100, 120))
    assert [list(history.items) for history in found] == [[1000 + item for item in row] for row in walks()["items"]]
    assert found[4].actions is not None and list(found[4].actions) == walks()["actions"][4]
    assert found[4].timestamps is not None and list(found[4].timestamps[:2]) == [1_000_000, 1_000_060]
    assert found[4].context == {"town": 1}
    (again,) = api.histories(api.open_store(store.path), rows=[4])
    assert again.user == 104


def test_tables_are_those_of_the_checkpoint(trained: TrainedModel, finished: FinishedRun) -> None:
    tables = trained.tables()
    assert {name: tuple(table.rows.shape) for name, table in tables.items()} == {
        "item_id_table": (ITEMS, 16),
        "action_table": (ACTIONS, 16),
        "town_table": (3, 16),
    }
    items = finished.trainer.state.model.embed_items(torch.arange(ITEMS))
    torch.testing.assert_close(tables["item_id_table"].rows, items, rtol=0, atol=0)


def test_asked_at_the_time_of_the_held_out_event_a_model_gives_what_is_evaluated(
    store: SequenceStore, mesh: Mesh, trained: TrainedModel, tmp_path: Path
) -> None:
    config = tiny_config("retrieval", store, tmp_path, network={"position_encoding": "relative_bias"})
    source = InferenceSource(config, config.dataset, mesh)  # type: ignore[arg-type]
    model = TrainedModel(config, tmp_path, mesh, source, *build_model(config, source, mesh), [])
    batch = next(model.batches("test"))
    row = int(np.argmin(batch.item_lengths[: batch.real_batch_size]))
    (whole,) = api.histories(store, [int(batch.user_ids[row])])
    assert whole.timestamps is not None and whole.actions is not None
    history = replace(whole, items=whole.items[:-1], actions=whole.actions[:-1], timestamps=list(whole.timestamps[:-1]))
    expected = model.forward(batch).queries
    assert expected is not None
    scores = [
        dict(zip(entry.items, entry.scores, strict=True))
        for at in (whole.timestamps[-1], None, whole.timestamps[-2])
        for (entry,), _ in [model.recommend_for([history], top=1000, at=at)]
    ]
    items = model.item_embeddings() @ expected[row]
    for item, score in scores[0].items():
        assert score == pytest.approx(float(items[item - 1000]), abs=1e-5)
    assert scores[1] == scores[2] != scores[0]
    times = [whole.timestamps[-1], whole.timestamps[-2]] * 5  # more than a batch
    each, _ = model.recommend_for([history] * 10, top=1000, at=times)
    for place, entry in enumerate(each):
        own = scores[2 * (place % 2)]
        assert dict(zip(entry.items, entry.scores, strict=True)) == pytest.approx(own, abs=1e-6)
    with pytest.raises(DataError, match="at has 1 times for 2 histories"):
        model.recommend_for([history] * 2, at=times[:1])
    with pytest.raises(DataError, match="1970-01-12 13:46:39 UTC, and a history has an event at"):
        model.recommend_for([history] * 2, at=[times[0], 999_999])
    user = int(whole.user)
    vectors = [model.user_embeddings([user], at=at) for at in (None, whole.timestamps[-1], 10**9)]
    assert torch.equal(vectors[0], vectors[1]) and not torch.equal(vectors[0], vectors[2])
    with pytest.raises(DataError, match="1970-01-12 13:46:39 UTC, and a history has an event at"):
        model.recommend([user], at=999_999)
    with pytest.raises(ConfigError, match="does not read the time of a request"):
        trained.recommend([user], at=10**9)


def test_users_get_the_next_item_of_their_walk_and_nothing_they_know(trained: TrainedModel) -> None:
    users = [user for user, row in enumerate(walks()["items"]) if len(row) < ITEMS - 2]
    recommended = trained.recommend([100 + user for user in users], top=3)
    next_items = [(walks()["items"][user][-1] + 1) % ITEMS for user in users]
    hits = [1000 + item in entry.items[:2] for item, entry in zip(next_items, recommended, strict=True)]
    assert np.mean(hits) > 0.8
    for user, entry in zip(users, recommended, strict=True):
        assert entry.user == 100 + user
        assert len(entry.items) == len(entry.titles) == len(entry.scores) == 3
        assert not {item - 1000 for item in entry.items} & set(walks()["items"][user])
        assert entry.scores == sorted(entry.scores, reverse=True)
        assert entry.titles == [str(item) for item in entry.items]


def test_recommendations_are_printed_with_places_scores_and_titles_and_steer_no_terminal() -> None:
    recommendations = [
        Recommendation("zoe", ["A-7", "B-1"], ["Alpine skis", "B-1"], [0.98765, -0.5]),
        Recommendation("zo\x1b[2Je", ["A\n7"], ["Skis\r"], [0.5]),
    ]
    assert api.format_recommendations(recommendations).splitlines() == [
        "",
        "user zoe",
        "    1.   0.988  Alpine skis  [A-7]",
        "    2.  -0.500  B-1",
        "",
        r"user zo\x1b[2Je",
        r"    1.   0.500  Skis\r  [A\n7]",
    ]


def test_errors_name_unknown_users_missing_checkpoints_and_the_wrong_task(
    trained: TrainedModel, ranking: FinishedRun, mesh: Mesh, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=r"1 raw id\(s\) not in the vocabulary of 'user_id': 99"):
        trained.recommend(["100", "99"])
    with pytest.raises(DataError, match=r"user ids are whole numbers, got \['zoe'\]"):
        trained.user_embeddings(["zoe"])
    with pytest.raises(DataError, match="no complete checkpoint"):
        api.load(tmp_path, mesh=mesh)
    with pytest.raises(DataError, match="need a retrieval run"):
        api.load(ranking.path, mesh=mesh).recommend(["100"])


def test_only_items_with_a_row_in_a_dynamic_table_are_recommended(
    mesh: Mesh, store: SequenceStore, tmp_path: Path
) -> None:
    config = tiny_config("retrieval", store, tmp_path, tables=tables_with_dynamic(store, rows=7), trainer=SAVES)
    finished = run(config, mesh)
    held = set(dynamic_tables(finished.trainer.state.model)["movies"].slots.content()[0].tolist())
    known = set(walks()["items"][0])
    trained = api.load(finished.path, mesh=mesh)
    (entry,) = trained.recommend(["100"], top=1000)
    assert len(held) == 7 and held - known
    assert sorted(item - 1000 for item in entry.items) == sorted(held - known)
    movies = trained.tables()["movies"]
    assert movies.ids is not None and movies.ids.tolist() == sorted(held) and movies.rows.shape == (7, 16)
    exported = export(locate(str(tmp_path / "checkpoints")), tmp_path / "exported")
    for path in (tmp_path / "checkpoints", exported):
        assert api.load(path, mesh=mesh).recommend(["100"], top=1000) == [entry]
