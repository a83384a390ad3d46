"""Evaluating a trained model gives the numbers of the training run."""

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
from hstu.serve.loaded import LoadedModel
from hstu.serve.predict import choose_split, evaluate_split, with_metrics
from tests.conftest import write_small_store
from tests.train.tiny import ITEM_FEATURES, FinishedRun, walks

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

import evaluate

Finished = Callable[[str], FinishedRun]
Loaded = Callable[[str], LoadedModel]


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
    results = evaluate_split(model, "test").observations.results
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
