"""Explanations of scores: each difference is that of leaving out the event by hand."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hstu.serve.runtime import Candidates, History, Model
from hstu.serve.server import model as server_model
from hstu.serve.server.batching import Settings
from hstu.serve.server.model import ScoreRequest, ServedModel
from tests.serve.served import Served, random_requests
from tests.serve.test_server import as_json, serving


def explained(model: Model, history: History, shown: Candidates, at: int | None, **fields: Any) -> dict[str, Any]:
    request = {**as_json(history), "candidates": shown.items, "candidate_features": shown.features, "at": at}
    asked = ScoreRequest.model_validate({**request, "explain": 9, **fields})
    (found,) = ServedModel(model, "first").answer([asked])
    assert isinstance(found, Iterator), found
    *steps, answer = found
    assert answer is not None
    assert steps == [None] * -(-answer["compared_events"] // 2)  # others are answered before each two events
    return answer


def by_hand(model: Model, history: History, shown: Candidates, at: int | None) -> list[dict[str, list[float]]]:
    """For each event, prediction → the differences of the candidates, NaN for an unknown one."""
    if at is None and model.reads_request_time:
        at = int((history.timestamps or ())[-1])
    whole, found = model.score(history, shown, at), []
    for place in range(len(history.items)):
        left = [other for other in range(len(history.items)) if other != place]
        without = model.score(history.changed(lambda values, left=left: [values[each] for each in left]), shown, at)  # type: ignore[misc]
        found.append(
            {
                name: [float("nan") if a is None else a - b for a, b in zip(values, without[name], strict=True)]
                for name, values in whole.items()
            }
        )
    return found


@pytest.mark.parametrize("task", ["retrieval", "ranking"])
def test_differences_are_those_of_leaving_out_events_by_hand(task: str, request: pytest.FixtureRequest) -> None:
    model, compared = request.getfixturevalue(task).model, 0
    for group in random_requests(model):
        for history, shown in zip(group.histories, group.candidates, strict=True):
            if len(history.items) < 2:
                continue
            if task == "retrieval":
                shown = Candidates([1003, -5, 1007])
            expected = by_hand(model, history, shown, group.at)
            prediction = [*expected[0]][-1]
            answer = explained(model, history, shown, group.at, explain=3, prediction=prediction)
            read, count = answer["read_events"], len(history.items)
            assert answer["compared_events"] == read and answer["prediction"] == prediction
            assert read == min(count, model.facts["max_items"] - (3 if task == "ranking" else 0))
            for place, (score, why) in enumerate(zip(answer["scores"][prediction], answer["why"], strict=True)):
                if score is None:
                    assert why == []
                    continue
                found = {each["place"]: each["difference"] for each in why}
                own = [each[prediction][place] for each in expected]
                largest = sorted(own[count - read :], key=abs, reverse=True)[:3]
                assert len(found) == min(3, read) and [abs(each["difference"]) for each in why] == pytest.approx(
                    [abs(each) for each in largest], abs=1e-5
                )
                assert {each: own[each] for each in found} == pytest.approx(found, abs=1e-5)
                assert [each["item"] for each in why] == [history.items[each] for each in found]
                compared += len(why)
    assert compared > 30


def test_the_cost_is_bounded_and_the_answer_says_so(retrieval: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    model = retrieval.model
    history = History(items=[1000, 1001] * 4, actions=[1] * 8, timestamps=[*range(0, 8000, 1000)])
    whole = explained(model, history, Candidates([1003]), None)
    assert (whole["compared_events"], whole["read_events"]) == (8, 8)
    monkeypatch.setattr(server_model, "_MAX_COMPARED", 5)
    fewer = explained(model, history, Candidates([1003]), None)
    assert fewer["compared_events"] == 5 and {each["place"] for each in fewer["why"][0]} == {3, 4, 5, 6, 7}


def test_stored_users_are_shown_and_explained(retrieval: Served, tmp_path: Path) -> None:
    events = [{"user": 7, "item": 1000 + place, "action": 1, "timestamp": 900 * place} for place in range(6)]
    columns = {f"{name}s": [each[name] for each in events] for name in ("item", "action", "timestamp")}
    settings = Settings(poll_s=3600, users=str(tmp_path / "users.db"), shown_log=tmp_path / "shown")
    with serving(retrieval, settings) as client:
        assert client.get("/model").json["keeps_users"]
        client.post("/events", {"events": events})
        shown = client.get("/users/7").json
        assert {name: shown[name] for name in columns} == columns and shown["titles"] == [""] * 6
        assert client.get("/users/8").status == 422 and "no events" in client.get("/users/8").json["error"]
        asked = {"candidates": [1008], "explain": 4, "at": 99_999}
        client.post("/recommend", {"user": 7, "at": 99_999})  # keeps keys and values
        given = client.post("/score", {**columns, **asked}).json
        stored = client.post("/score", {"user": 7, **asked}).json
        assert len(given["why"][0]) == 4
        assert [each["place"] for each in stored["why"][0]] == [each["place"] for each in given["why"][0]]
        for one, other in zip(stored["why"][0], given["why"][0], strict=True):
            assert one["difference"] == pytest.approx(other["difference"], abs=1e-5)
        alone = {name: values[:1] for name, values in columns.items()}
        for mistake, text in (
            ({**alone, **asked}, "has 1 and 1"),
            ({**columns, **asked, "candidates": [1008] * 11}, "has 6 and 11"),
            ({**columns, **asked, "prediction": "x"}, "has score"),
            ({**columns, "candidates": [1008], "prediction": "score"}, "give explain, too"),
        ):
            reply = client.post("/score", mistake)
            assert reply.status == 422 and text in reply.text
    (of_recommend,) = (tmp_path / "shown").iterdir()  # an explanation shows nothing new
    assert "drawn" in of_recommend.read_text().split("\n")[0]
