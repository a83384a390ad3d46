"""A score has one meaning: it is the same in an evaluation, in a file of predictions, in an export and in a session.

Evaluation and use agree on the items that a user has had, too: RetrievalArgs.filter_seen is the policy of both.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hstu.data.store.sequence_store import SequenceStore
from hstu.parallel.mesh import Mesh
from hstu.serve.command import Candidates
from hstu.serve.contents import caveats
from hstu.serve.export import TOLERANCE, difference
from hstu.serve.predict import RankingPredictor, RetrievalPredictor
from hstu.serve.runtime import Candidates as Shown
from hstu.serve.server.model import RecommendRequest, ServedModel
from tests.conftest import write_small_store
from tests.serve.served import Served, random_model, serve
from tests.train.tiny import tiny_config, walks


def test_candidates_of_an_evaluation_score_as_each_does_alone(ranking: Served) -> None:
    trained, model = ranking.trained, ranking.model
    session, cut = trained.session(1 << 24), 0
    for batch in trained.batches("valid"):
        logits = trained.forward(batch).logits
        assert logits is not None
        users = batch.user_ids[: batch.real_batch_size].tolist()
        for user, expected in zip(users, logits.split(batch.num_labels.tolist()), strict=False):
            (whole,) = trained.histories_of(np.array([user]))
            end = len(whole.items) - len(expected)
            history = whole.cut(slice(end))
            cut += end > session.max_items
            session.encode([history])
            for place in range(end, len(whole.items)):
                event = whole.cut(slice(place, place + 1))
                assert event.timestamps is not None
                known = {name: event.features[name] for name in model.encoder.known_before if name in event.features}
                at = int(event.timestamps[0])
                found = model.predict_batch([history], [Shown(event.items, known)], at)
                found.append(session.score(whole.user, event.items, at=at, features=known))
                for each in found:
                    torch.testing.assert_close(each[0], expected[place - end], atol=TOLERANCE, rtol=TOLERANCE)
    assert cut, "some histories are longer than the model's"


def test_a_score_does_not_depend_on_the_candidates_beside(ranking: Served) -> None:
    users, names = np.arange(20), [name for name in ranking.model.encoder.known_before if name == "device"]

    def first_of(count: int) -> np.ndarray:
        items = np.tile(np.arange(count), len(users))
        given = Candidates(users, np.full_like(users, count), items, {name: items % 3 for name in names})
        return RankingPredictor(ranking.trained, given, at=10**7).logits(given)[::count]

    for count in (2, 3, 7, 11):
        np.testing.assert_allclose(first_of(count), first_of(1), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("what", ["gap", "history"])
def test_the_check_of_an_export_notices_another_meaning(
    ranking: Served, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    if what == "history":  # cut to what fits beside fewer candidates
        monkeypatch.setitem(ranking.model.facts["candidates"], "most", 2)
    else:  # counted from the candidate before
        codes = SequenceStore.time_codes

        def from_the_event_before(store: SequenceStore, feature: str, events: np.ndarray, _: Any = None) -> np.ndarray:
            return codes(store, feature, events)

        monkeypatch.setattr(SequenceStore, "time_codes", from_the_event_before)
    found = difference(ranking.trained, ranking.model)
    assert found is not None and found > 100 * TOLERANCE


def test_an_export_says_where_evaluation_and_service_differ(features: SequenceStore, tmp_path: Path) -> None:
    def said(task: str = "ranking", **options: Any) -> str:
        return " ".join(caveats(tiny_config(task, features, tmp_path, **options)))

    window = {"max_attention_span": 3, "min_full_attention_tokens": 2}
    truncated = {"truncate_after_layer": 1, "truncate_to_items": 2}
    assert "min_full_attention_tokens treats the newest events otherwise" in said(network=window)
    assert "truncate_to_items treats" in said(network=truncated)
    assert not said("retrieval", network=truncated) and not said(network=window, dataset={"max_num_candidates": 2})
    requests = {"candidates": "requests"}
    assert "their scores depend on their number" in said(dataset=requests)
    assert not said(dataset={**requests, "max_num_candidates": 2})


def test_an_unknown_candidate_has_no_score(ranking: Served) -> None:
    trained, (history,) = ranking.trained, ranking.trained.histories_of(np.array([0]))
    session, given = trained.session(1 << 24), {"device": [None, None]}
    session.encode([history])
    cached = session.score(history.user, [1000, -7], at=10**7, features=given)
    (exported,) = ranking.model.predict_batch([history], [Shown([1000, -7], given)], 10**7)
    torch.testing.assert_close(cached, exported, atol=TOLERANCE, rtol=TOLERANCE, equal_nan=True)
    assert cached.isnan().any(dim=1).tolist() == [False, True]
    named, scores = session.named(cached), ranking.model.score(history, Shown([1000, -7], given), 10**7)
    assert named.keys() == scores.keys() and {each[1] for each in scores.values()} == {None}
    for name, values in named.items():
        assert values[0] == pytest.approx(scores[name][0], abs=TOLERANCE) and np.isnan(values[1])


def test_an_item_without_a_vector_is_last_in_a_file_of_predictions(
    retrieval: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = np.array([0])
    given = Candidates(one, np.array([3]), np.arange(3), {})
    monkeypatch.setattr("hstu.serve.predict.pair_scores", lambda *_: torch.tensor([torch.nan, -0.2, -0.1]))
    monkeypatch.setitem(vars(retrieval.trained), "version", "of no checkpoint")
    table = RetrievalPredictor(retrieval.trained, None, given, denied=np.array([2]), keep_seen=True).predict(one)
    assert table["item"].to_pylist() == [1001, 1000] and table["rank"].to_pylist() == [1, 2]
    assert table["score"].to_pylist() == [pytest.approx(-0.2), None]


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
