"""Evaluating a trained model: the numbers of the training run, by segment, and beside another model."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from hstu.base.errors import ConfigError, DataError
from hstu.checkpoint.export import export
from hstu.checkpoint.find import locate
from hstu.data.store.sequence_store import SequenceStore
from hstu.parallel.mesh import Mesh
from hstu.serve.evaluation import Resampling, choose_split, compare, evaluate_split, segmentation, with_metrics
from hstu.serve.loaded import LoadedModel
from tests.conftest import write_small_store
from tests.train.tiny import ITEM_FEATURES, FinishedRun, walks

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

import evaluate

Finished = Callable[[str], FinishedRun]
Loaded = Callable[[str], LoadedModel]
EARLIER = "iteration_00000003"
ALL_METRICS = {"retrieval": ["HR@1", "MRR"], "ranking": ["ACC", "LOGLOSS"], "tasks": ["ACC", "LOGLOSS"]}
"""Metrics that are means over the predictions."""


@pytest.mark.parametrize("name", ["retrieval", "ranking", "tasks"])
def test_the_metrics_are_those_of_the_training_run(name: str, finished: Finished, loaded: Loaded) -> None:
    split = choose_split(loaded(name).with_data(), None)
    assert split == ("test" if name == "retrieval" else "valid")
    assert evaluate_split(loaded(name), split).metrics() == finished(name).metrics


@pytest.mark.parametrize("name", ["retrieval", "ranking"])
@pytest.mark.parametrize("by", ["history", "popularity", "cold", "town"])
def test_segments_divide_the_predictions(
    name: str, by: str, loaded: Loaded, mesh: Mesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hstu.serve.evaluation.HISTORY_BOUNDS", (0, 3, 6))
    split = "test" if name == "retrieval" else "valid"
    evaluation = evaluate_split(loaded(name), split, ALL_METRICS[name])  # type: ignore[arg-type]
    segments = [scores for _, scores in evaluation.by_segment(by, Resampling(mesh, 3))]
    whole, predictions = evaluation.metrics(), sum(scores.predictions for scores in segments)
    assert predictions == len(evaluation.observations) and len(segments) > (by != "cold")
    for metric, value in whole.items():
        total = sum(scores.metrics[metric] * scores.predictions for scores in segments)
        assert total / predictions == pytest.approx(value, rel=1e-12)
    assert all(set(scores.intervals) == (set(whole) if scores.users > 1 else set()) for scores in segments)


def test_segments_are_what_their_names_say(loaded: Loaded) -> None:
    model = loaded("retrieval")
    found = evaluate_split(model, "test").observations
    rows, lengths = walks()["items"], np.array([len(row) for row in walks()["items"]])
    np.testing.assert_array_equal(found.items, [rows[user][-1] for user in found.users])
    np.testing.assert_array_equal(found.history, np.minimum(lengths[found.users] - 1, 8))
    counts = np.bincount(np.concatenate([row[:-2][-8:] for row in rows]), minlength=11)
    decile = np.empty(11, dtype=int)
    decile[np.argsort(counts, kind="stable")] = np.arange(11) * 10 // 11
    popularity = segmentation("popularity", model, found)
    np.testing.assert_array_equal(popularity.of_row, 1 + decile[found.items])
    assert popularity.names[1] == f"1: {np.sort(counts)[0]}-{np.sort(counts)[1]} events"
    town = segmentation("town", model, found)
    assert [town.names[place] for place in town.of_row] == [str(user % 3) for user in found.users]


def test_other_data_has_the_popularity_of_the_data_that_was_trained_on(
    finished: Finished, loaded: Loaded, mesh: Mesh, tmp_path: Path
) -> None:
    newer = {**walks(num_users=6, seed=5), "num_items": 12}
    newer["items"][0][-1] = 11  # an item that the model does not have
    newer["actions"] = [[item % 4 for item in row] for row in newer["items"]]
    features = {name: [*values, values[0]] for name, values in ITEM_FEATURES.items()}
    write_small_store(tmp_path / "newer", **newer, item_features=features)
    model = LoadedModel.load(finished("retrieval").path, mesh=mesh, data=tmp_path / "newer")
    evaluation = evaluate_split(model, "test")
    assert len(evaluation.observations) == 6
    cold = segmentation("cold", model, evaluation.observations)
    assert cold.of_row.tolist() == [1, 0, 0, 0, 0, 0]
    assert np.isinf(evaluation.observations.results[0])
    with pytest.raises(DataError, match="no preprocessed data at"):
        LoadedModel.load(finished("retrieval").path, mesh=mesh, data=tmp_path / "absent")


def test_a_model_differs_from_another_and_not_from_itself(finished: Finished, loaded: Loaded, mesh: Mesh) -> None:
    earlier = LoadedModel.load(finished("retrieval").path.parent / "checkpoints" / EARLIER, mesh=mesh)
    this, other = (evaluate_split(model, "test", ["MRR"]) for model in (loaded("retrieval"), earlier))
    users, same = compare(this, this, Resampling(mesh, 20))
    assert users == 20 and (same["MRR"].interval, same["MRR"].share_above) == ((0, 0), 0)
    _, found = compare(this, other, Resampling(mesh, 100))
    assert found["MRR"].this == this.metrics()["MRR"] and found["MRR"].other == other.metrics()["MRR"]
    low, high = found["MRR"].interval
    assert low < found["MRR"].difference < high and 0.5 < found["MRR"].share_above <= 1
    with pytest.raises(DataError, match="predict other items of the same 20 users"):
        compare(this, evaluate_split(earlier, "valid", ["MRR"]), Resampling(mesh, 1))


def test_metrics_and_splits_that_a_run_does_not_have_are_refused(loaded: Loaded) -> None:
    with pytest.raises(ConfigError, match="'AUC' is not allowed"):
        evaluate_split(loaded("retrieval"), "test", ["AUC"])
    with pytest.raises(ConfigError, match=r"no task of the run has LOGLOS; .*; did you mean 'LOGLOSS'"):
        with_metrics(loaded("tasks").config, ["LOGLOS", "AUC"])
    with pytest.raises(ConfigError, match=r"no split 'test': its held-out users are all valid, .*allowed: valid"):
        choose_split(loaded("ranking").with_data(), "test")
    with pytest.raises(ConfigError, match="no split 'tset'; allowed: valid, test; did you mean 'test'"):
        choose_split(loaded("retrieval").with_data(), "tset")
    with pytest.raises(ConfigError, match=r"'towm' is no segment of .*; did you mean 'town'"):
        segmentation("towm", loaded("ranking"), evaluate_split(loaded("ranking"), "valid").observations)


def test_only_the_tasks_that_have_a_metric_are_measured(loaded: Loaded) -> None:
    assert set(evaluate_split(loaded("tasks"), "valid", ["mae"]).metrics()) == {"MAE/level"}
    assert set(evaluate_split(loaded("tasks"), "valid", ["NDCG", "MAE"]).metrics()) == {
        "MAE/level",
        "NDCG/level",
        "NDCG/odd",
        "NDCG/high",
    }


def test_the_script_prints_tables_and_writes_json(
    here: Path, finished: Finished, store: SequenceStore, capsys: pytest.CaptureFixture[str]
) -> None:
    path, output = str(finished("retrieval").path), here / "test.json"
    exported = export(locate(path), here / "exported")
    earlier = f"{path}/../checkpoints/{EARLIER}"
    model = ["--checkpoint", str(exported), "--resamples", "5"]
    options = ["--segments", "town,cold", "--compare", earlier, "--output", str(output)]
    assert evaluate.main([*model, *options]) == 0
    document, printed = json.loads(output.read_text()), capsys.readouterr().out
    assert document["metrics"] == finished("retrieval").metrics and document["data"] == str(store.path)
    assert set(document["segments"]["town"]) == {"0", "1", "2"} and document["users"] == 20
    comparison = document["comparison"]["metrics"]["MRR"]
    assert comparison["difference"] == comparison["this"] - comparison["other"]
    assert f"test of {store.path}: 20 users, 20 predictions" in printed and "this - other" in printed
    for arguments, told in (
        ([*model, "--output", str(output)], "test.json exists; give another name"),
        ([*model, "--compare", str(finished("ranking").path)], "is a ranking model, and"),
    ):
        assert evaluate.main(arguments) != 0 and told in capsys.readouterr().err
