"""Evaluation and use agree on the items that a user has had: RetrievalArgs.filter_seen is the policy of both."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest

from hstu.parallel.mesh import Mesh
from hstu.serve.predict import RetrievalPredictor
from hstu.serve.server.model import RecommendRequest, ServedModel
from tests.conftest import write_small_store
from tests.serve.served import random_model, serve
from tests.train.tiny import walks

TOP = 4


@pytest.mark.parametrize("filter_seen", [True, False])
def test_hits_of_the_evaluation_are_items_that_users_get(
    mesh: Mesh, tmp_path: Path, filter_seen: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """The held-out items of half of the users are the first items of their histories."""
    events = walks()
    events["items"] = [[*row[:-1], row[0]] if place % 2 else row for place, row in enumerate(events["items"])]
    store = write_small_store(tmp_path / "store", **events)
    task_args = {"filter_seen": filter_seen, "eval_metrics": (f"HR@{TOP}",)}
    (tmp_path / "manifest.json").write_text("{}")  # of which predictions name the checksum
    trained = random_model("retrieval", store, mesh, tmp_path, task_args=task_args, network={"num_layers": 1})
    served = serve(trained, tmp_path / "serving")
    whole = [*trained.histories_of(np.arange(store.num_users))]
    given, targets = [each.cut(slice(-1)) for each in whole], [each.items[-1] for each in whole]
    repeated = sum(target in each.items for each, target in zip(given, targets, strict=True))
    with caplog.at_level(logging.WARNING):
        expected = trained.evaluate("test")[f"HR@{TOP}"]
    assert repeated and (f"{repeated} of {len(whole)} targets" in caplog.text) == filter_seen

    requests = [RecommendRequest.model_construct(**vars(each), k=TOP) for each in given]
    answers = ServedModel(served.model, "").answer(requests)
    for found in (
        [each.items for each in trained.recommend_for(given, TOP)[0]],
        [each.items for each in served.model.recommend_batch(given, TOP)],
        [[best["item"] for best in each["items"]] for each in answers],  # type: ignore[index]
    ):
        assert np.mean([target in items for items, target in zip(found, targets, strict=True)]) == expected
    rows = RetrievalPredictor(trained, TOP).predict(np.arange(store.num_users)).to_pylist()
    pairs = {(row["user"], row["item"]) for row in rows}
    best = trained.recommend([*store.raw_ids("user_id")], TOP)
    assert pairs == {(each.user, item) for each in best for item in each.items}
    assert pairs.isdisjoint((each.user, item) for each in whole for item in each.items) == filter_seen
    assert ("left out" in (served.folder / "MODEL_CARD.md").read_text()) == filter_seen
