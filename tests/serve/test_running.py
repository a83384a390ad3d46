"""Running statistics at serving: a request may leave them out, and then has those of the data, to the bit."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hstu import api
from hstu.base.errors import ConfigError
from hstu.data.features.running import DAY_S
from hstu.data.store.sequence_store import SequenceStore
from hstu.parallel.mesh import Mesh
from hstu.serve.runtime import Candidates, History, ServingError
from hstu.serve.runtime.encode import Encoder
from tests.data.preprocess.test_running import make, ratings
from tests.serve.served import Served, random_model, serve

READ = ["item_mean", "prediction", "deviation", "surprise_0.9", "user_count", "in_session"]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> SequenceStore:
    return make(tmp_path_factory.mktemp("running"), ratings())


def options(**dataset: int) -> dict[str, Any]:
    """Of a model that reads the statistics."""
    read = {"side_feature_names": READ, "action_feature_name": "a", **dataset}
    return {"dataset": read, "sharded": ("i",), "task_args": {"prediction_head_arch": [8, 5]}}


@pytest.fixture(scope="module")
def served(store: SequenceStore, mesh: Mesh, tmp_path_factory: pytest.TempPathFactory) -> Served:
    folder = tmp_path_factory.mktemp("served")
    trained = random_model("ranking", store, mesh, folder, **options(max_sequence_length=20))
    return serve(trained, folder / "serving")


def of_user(store: SequenceStore, row: int) -> History:
    """The history of a user, with its statistics."""
    (found,) = api.histories(store, [row], features=READ)
    return found


def numbers(encoder: Encoder, history: History) -> Tensor:
    (events,) = encoder.histories([(history, None, 20)])
    assert events.numbers is not None
    return events.numbers


def test_an_export_computes_what_is_not_given(store: SequenceStore, served: Served) -> None:
    assert served.difference is not None and served.difference < 1e-5
    for row in range(5):
        history = of_user(store, row)
        bare, before = replace(history, features={}), history.cut(slice(-1))
        encoder = served.model.encoder
        np.testing.assert_array_equal(numbers(encoder, bare), numbers(encoder, history))
        newest = Candidates(history.items[-1:], {name: values[-1:] for name, values in history.features.items()})
        at = int(history.timestamps[-1])  # type: ignore[index]
        given, computed = (
            encoder.candidates(shown, replace(before, features={}), at)[0].numbers
            for shown in (newest, Candidates(newest.items))
        )
        np.testing.assert_array_equal(given, computed)
        scores = [served.model.predict_batch([each.cut(slice(-1))], [newest], at)[0] for each in (bare, history)]
        torch.testing.assert_close(*scores, rtol=0, atol=0)


def test_a_trained_model_computes_them_too(store: SequenceStore, served: Served) -> None:
    history = of_user(store, 3)
    encoder = served.trained.encoder
    found = numbers(encoder, replace(history, features={}))
    np.testing.assert_array_equal(found, numbers(encoder, history))


def test_later_days_know_all_of_the_data_and_unknown_items_nothing(store: SequenceStore, served: Served) -> None:
    empty, at = History(items=[], actions=[], timestamps=[]), int(store.sequence("t").max()) + 5 * DAY_S
    (events,) = served.model.encoder.candidates(Candidates([3, 999]), empty, at)
    assert events.numbers is not None
    actions = np.asarray(store.sequence("a"))
    of_item = actions[store.raw_ids("i")[store.sequence("i")] == 3]
    mean, centre = (of_item.sum() + 5 * actions.mean()) / (len(of_item) + 5), actions.mean()
    assert events.numbers[:, READ.index("item_mean")].tolist() == pytest.approx([mean, centre])
    assert events.numbers[:, READ.index("user_count")].tolist() == [0, 0]


def test_requests_without_what_they_need_are_refused(store: SequenceStore, served: Served) -> None:
    history = replace(of_user(store, 0), features={})
    shown = Candidates([3])
    with pytest.raises(ServingError, match="no timestamps, but the model reads times"):
        served.model.predict_batch([replace(history, timestamps=None)], [shown], None)
    with pytest.raises(ServingError, match="has an action that is no number"):
        served.model.predict_batch([replace(history, actions=["view"] * len(history.items))], [shown], None)
    assert "running statistics (item_mean, " in str(served.model.whole_because)


def test_candidates_that_would_see_the_actions_on_others_are_refused(
    store: SequenceStore, mesh: Mesh, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"'item_mean' counts all earlier events.*max_num_candidates = 0"):
        random_model("ranking", store, mesh, tmp_path, **options(max_num_candidates=3))
