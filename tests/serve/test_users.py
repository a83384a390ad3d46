"""Events of users that a server keeps: each once, in the order of their times, also when it is killed."""

from __future__ import annotations

import os
import random
import signal
import sqlite3
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from time import time as clock
from typing import Any

import numpy as np
import pytest
import torch

from hstu.base.errors import ConfigError
from hstu.data.store import popularity
from hstu.data.store.sequence_store import SequenceStore
from hstu.serve.runtime import Candidates, History
from hstu.serve.runtime.files import VOCABULARY
from hstu.serve.server import users as users_module
from hstu.serve.server.batching import Metrics, Settings
from hstu.serve.server.model import EventsRequest, RecommendRequest, ServedModel, User
from hstu.serve.server.users import Store, Users, open_store
from tests.serve.http_server import Client, redis_server, serving, started, until
from tests.serve.served import Served


@pytest.fixture(params=["sqlite", "redis"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """Where a store may be: a file, or a Redis server of this test."""
    if request.param == "sqlite":
        yield str(tmp_path / "users.db")
        return
    with redis_server(tmp_path) as (url, _):
        yield url


@pytest.fixture
def store(place: str) -> Iterator[Store]:
    opened = open_store(place)
    yield opened
    opened.close()


def event(time: int, item: Any = 1000, user: Any = 7, **more: Any) -> dict[str, Any]:
    return {"user": user, "item": item, "timestamp": time, "action": 1, **more}


def written(users: Users, served: ServedModel, *events: dict[str, Any]) -> dict[str, int]:
    (found,) = users.write([EventsRequest.model_validate({"events": events})], served)
    assert isinstance(found, dict), found
    return found


def counts(in_order: int, late: int, repeated: int) -> dict[str, int]:
    return {"in_order": in_order, "late": late, "repeated": repeated}


def stored(users: Users, served: ServedModel, user: Any = 7, at: int | None = None) -> History:
    (found,) = users.filled([User.model_validate({"user": user, "at": at})], served)
    assert isinstance(found, User), found
    return found.history


def in_any_order(events: Sequence[dict[str, Any]], draw: random.Random) -> Iterator[list[dict[str, Any]]]:
    """The events in small requests, in any order but for those of one time, and a third of them again later."""
    times = draw.sample(found := sorted({each["timestamp"] for each in events}), len(found))
    sent = [each for time in times for each in events if each["timestamp"] == time]
    for again in draw.sample(sent, len(sent) // 3):
        sent.insert(draw.randint(sent.index(again) + 1, len(sent)), again)
    while sent:
        count = draw.randint(1, 4)
        yield sent[:count]
        del sent[:count]


@pytest.mark.parametrize("task", ["retrieval", "ranking"])
@pytest.mark.parametrize("seed", range(3))
def test_answers_are_those_of_whole_histories_in_any_order_and_over_restarts(
    task: str, seed: int, place: str, request: pytest.FixtureRequest
) -> None:
    draw, model = random.Random(seed), request.getfixturevalue(task).model
    served = ServedModel(model, "first")
    own = {"device": "value 001", "watched": 2.5, "spent": 1.5} if task == "ranking" else {}
    times = sorted(draw.choices(range(50), k=30))
    events = [event(time, 1000 + number % 5, features=own, id=number) for number, time in enumerate(times)]
    total = counts(0, 0, 0)
    for part in in_any_order(events, draw):
        users = Users(open_store(place), Metrics())
        total = {kind: total[kind] + count for kind, count in written(users, served, *part).items()}
        users.close()
    assert total["in_order"] + total["late"] == 30 and total["repeated"] == 10 and total["late"] > 5
    users = Users(open_store(place), Metrics())
    for at in (None, times[20]):
        seen = [each for each in events if at is None or each["timestamp"] <= at]
        features = {name: [value] * len(seen) for name, value in own.items()}
        items, seconds = [each["item"] for each in seen], [each["timestamp"] for each in seen]
        whole = History(7, items=items, timestamps=seconds, actions=[1] * len(seen), features=features)
        found = stored(users, served, at=at)
        shown = Candidates([1000, 1001], {"device": [None, "value 002"]} if own else {})
        assert model.score(found, shown, at) == model.score(whole, shown, at)
    users.close()


def test_events_without_an_id_are_known_by_time_and_item_and_users_are_known_by_the_text_of_their_id(
    retrieval: Served, store: Store
) -> None:
    users, served = Users(store, Metrics()), ServedModel(retrieval.model, "first")
    assert written(users, served, event(60), event(60), event(60, "1000", "7")) == counts(1, 0, 2)
    assert written(users, served, event(60, 1001), event(50)) == counts(1, 1, 0)
    assert written(users, served, event(60, id="a"), event(99, 1003, id="a"))["repeated"] == 1
    assert stored(users, served, "7").items == [1000, 1000, 1001, 1000]
    other = event(1, 1002, "a/?")
    assert written(users, served, other)["in_order"] == 1 and stored(users, served, "a/?").items == [1002]
    assert users.write(["7"], served) == [{"forgotten": 4}] and users.write(["7"], served) == [{"forgotten": 0}]
    (error,) = users.filled([User.model_validate({"user": 7})], served)
    assert "the user 7 has no events; give some to POST /events" in str(error)
    (error,) = users.filled([User.model_validate({"user": "a/?", "at": 0})], served)
    assert "has no events until then" in str(error)


def test_old_events_that_were_left_out_do_not_come_back(
    retrieval: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(users_module, "MAX_EVENTS", 5)
    served, draw = ServedModel(retrieval.model, "first"), random.Random(0)
    for number in range(20):
        users = Users(open_store(str(tmp_path / f"{number}.db")), Metrics())
        events = [event(draw.randrange(12), id=place) for place in range(20)]
        sent = [*events, *draw.sample(events, 20)]  # all of them again
        for each in sent:
            written(users, served, each)
        newest = sorted(events, key=lambda each: each["timestamp"])[-5:]
        assert stored(users, served).timestamps == [each["timestamp"] for each in newest]
        users.close()


def test_new_events_make_items_popular(retrieval: Served, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    now, day, model = int(clock()), 86_400, retrieval.model
    users, served = Users(store, Metrics()), ServedModel(model, "first")
    monkeypatch.setattr(users_module, "_COUNT_S", 0)

    def popular() -> dict[Any, Any]:
        users.count_recent([served])
        assert served.popularity is not None
        items = model.encoder.items.values_at(torch.arange(model.encoder.items.size))
        scores = dict(zip(items, served.popularity.tolist(), strict=False))
        return {item: pytest.approx(score, 1e-3) for item, score in scores.items()}

    data = popular()
    written(users, served, *(event(now - 20 * day, 1001, id=number) for number in range(500)))
    written(users, served, *(event(now + day, 1001, id=number) for number in range(500, 1000)))
    assert popular() == data, "neither last month nor tomorrow is now"
    written(users, served, *(event(now, 1002, id=f"a{number}") for number in range(30)), event(now, "gone"))
    for _ in range(2):  # events that come again are not counted again
        written(users, served, *(event(now - 2 * day, 1003, user) for user in range(400)))
    expected = {item: 10 * score.expected for item, score in data.items()}
    expected[1002] += 30
    expected[1003] += 100
    most = max(expected.values())
    expected = {item: score / most for item, score in expected.items()}
    assert popular() == expected


def test_what_is_popular_are_the_events_of_all_servers_of_a_store(
    retrieval: Served, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(users_module, "_COUNT_S", 0)
    now, model = int(clock()), retrieval.model
    servers = [
        (Users(open_store(place), Metrics()), [ServedModel(model, f"{n}"), ServedModel(model, "")]) for n in "ab"
    ]
    for turn in range(3):
        for number, (users, models) in enumerate(servers):
            written(
                users, models[0], *(event(now, 1001 + number, id=f"{number} {turn} {n}") for n in range(4 + number))
            )
            users.count_recent(models)
    for users, models in servers:
        users.count_recent(models)
        for each in models:
            assert each.recent == {"": {"1001": pytest.approx(12, 1e-3), "1002": pytest.approx(15, 1e-3)}}
        users.close()


def scores_of(answer: Any) -> dict[Any, float]:
    return {each["item"]: each["score"] for each in answer["items"]}


def in_towns(features: SequenceStore) -> np.ndarray:
    """Events by town and item, [3, items]."""
    towns = np.repeat(features.context("town"), np.diff(features.offsets()))
    return np.stack([np.bincount(features.sequence("item_id")[towns == town], minlength=11) for town in range(3)])


def test_a_server_that_has_just_started_knows_what_is_popular_in_a_context(
    retrieval: Served, features: SequenceStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts, overall = in_towns(features), in_towns(features).sum(axis=0)
    with serving(retrieval, Settings()) as client:
        for town in range(3):
            expected = counts[town] + 10 * overall / overall.max()
            found = client.post("/recommend", {"items": [], "k": 11, "context": {"town": town}}).json
            assert (found["fallback"], found["popular_in"]) == ("popular", [f"town={town}"])
            assert scores_of(found) == pytest.approx(dict(enumerate(expected / expected.max(), 1000)), 1e-5)
    for each in (retrieval.model.facts, retrieval.model.contents.tensors[VOCABULARY]):  # as of an older export
        monkeypatch.delitem(each, "popular_in")
    asked = RecommendRequest.model_validate({"items": [], "k": 11, "context": {"town": 0}})
    (found,) = ServedModel(retrieval.model, "older").answer([asked])
    assert isinstance(found, dict) and found["popular_in"] == []
    assert scores_of(found) == pytest.approx(dict(enumerate(overall / overall.max(), 1000)), 1e-5)


def test_events_of_contexts_are_those_of_their_most_popular_values_and_items(
    features: SequenceStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    every = in_towns(features)
    town = int(every.sum(axis=1).argmax())
    counts, items, events = popularity.events_by_context(features, ["user_id", "town"], 1, 4)
    assert counts == {f"town={town}": 4}
    assert sorted(events) == sorted(every[town])[-4:] and (every[town][items] == events).all()
    users = np.bincount(features.context("town"))
    monkeypatch.setattr(popularity, "_LEAST_USERS", users.min() + 1)
    kept = {f"town={town}" for town, number in enumerate(users) if number > users.min()}
    assert popularity.events_by_context(features, ["town"], 3, 4)[0].keys() == kept


def test_what_is_popular_in_a_context_is_answered_also_after_a_restart(
    retrieval: Served, features: SequenceStore, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(users_module, "_COUNT_S", 0)
    now, numbers, known = int(clock()), [30, 20, 5], retrieval.model.popularity  # 5 events of a town are not enough
    assert known is not None
    towns = [town for town, number in enumerate(numbers) for _ in range(number)]
    events = [event(now, 1001 + town, each, context={"town": town}) for each, town in enumerate(towns)]
    counts = torch.tensor([0, *numbers, *[0] * (len(known) - 4)])
    overall = (10 * known + counts) / (10 * known + counts).max()

    def close_to(scores: torch.Tensor) -> Any:
        return pytest.approx(dict(enumerate((scores / scores.max()).tolist()[:11], 1000)), 1e-3)

    for is_new in (True, False):
        with serving(retrieval, Settings(poll_s=0.02, users=place)) as client:

            def popular(**context: Any) -> Any:
                return client.post("/recommend", {"items": [], "k": 11, "context": context}).json

            assert not is_new or client.post("/events", {"events": events}).json["in_order"] == 55
            until(lambda: scores_of(popular()) == close_to(overall))
            for town, is_enough in ((0, True), ("1", True), (2, False)):
                scores = 10 * overall[:11] + torch.from_numpy(in_towns(features)[int(town)])
                if is_enough:
                    scores = 10 * scores / scores.max() + counts[:11] * (torch.arange(11) == int(town) + 1)
                found = popular(town=town)
                assert (found["fallback"], found["popular_in"]) == ("popular", [f"town={town}"])
                assert scores_of(found) == close_to(scores)
            assert popular(town=9)["popular_in"] == [] and scores_of(popular(town=9)) == close_to(overall)
            wrong = client.post("/events", {"events": [event(now, context={"twon": 0})]}).json
            for mistake in (popular(twon=0), wrong):
                assert "no contextual feature 'twon'; it has town (" in mistake["error"]


def test_counts_of_contexts_are_bounded_and_a_number_counts_as_its_range(
    ranking: Served, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, most in (("_COUNT_S", 0), ("MOST_CONTEXTS", 2), ("_MOST_ITEMS", 4), ("MOST_ITEMS_OF_CONTEXT", 2)):
        monkeypatch.setattr(users_module, name, most)
    monkeypatch.setitem(ranking.model.facts, "contextual", ["watched"])
    users, served, now = Users(store, Metrics()), ServedModel(ranking.model, "first"), int(clock())
    features = dict.fromkeys(served.event_features)
    for watched, count in ((0.1, 1), (0.2, 2), (0.7, 3), (2, 4), (8, 5), (9, 5), ("fridge", 6)):
        own = {"context": {"watched": watched}, "features": features}
        written(users, served, *(event(now, 1000 + count + n, id=f"{watched} {n}", **own) for n in range(count)))
    for _ in range(2):
        users.count_recent([served])
    kept = {context: len(items) for context, items in served.recent.items()}
    assert kept == {"": 4, "watched=value 002": 2, "watched=value 003": 2}
    assert [*served.recent["watched=value 003"].values()] == pytest.approx([2, 2], 1e-3)


def test_a_newer_model_reads_features_that_older_events_lack_as_missing(
    ranking: Served, retrieval: Served, store: Store
) -> None:
    users, newer = Users(store, Metrics()), ServedModel(ranking.model, "newer")
    written(users, ServedModel(retrieval.model, "older"), event(1), event(2))
    own = {"device": "value 001", "watched": 1, "spent": 2}
    written(users, newer, event(3, features=own))
    found = stored(users, newer)
    assert found.features == {name: [None, None, value] for name, value in own.items()}
    assert stored(users, ServedModel(retrieval.model, "older")).features == {}
    ranking.model.score(found, Candidates([1000], {"device": [None]}))


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"action": None}, "events[1]: a history has no actions, but the model reads action"),
        (
            {"features": {}},
            "has the features none; give those that the model reads of every event, null where one is missing, and",
        ),
        ({"features": {"device": ["a"], "watched": 1, "spent": 1}}, "a value of 'device' is ['a']; give one value"),
        ({"features": {"device": "a", "watched": 1, "spent": "x"}}, "a value of 'spent' is 'x'; give a finite number"),
        ({"timestamp": 1_700_000_000_000}, "give whole seconds since 1970, not milliseconds"),
    ],
)
def test_a_request_with_an_event_that_the_model_cannot_read_stores_nothing(
    ranking: Served, tmp_path: Path, change: dict[str, Any], problem: str
) -> None:
    users, served = Users(open_store(str(tmp_path / "users.db")), Metrics()), ServedModel(ranking.model, "first")
    good = event(5, features={"device": None, "watched": 1, "spent": None})
    requests = [EventsRequest.model_validate({"events": each}) for each in ([good, {**good, **change}], [good])]
    error, found = users.write(requests, served)
    assert problem in str(error) and found == counts(1, 0, 0)
    assert stored(users, served).timestamps == [5]
    users.close()


def test_writers_of_several_servers_to_one_user_lose_nothing(retrieval: Served, place: str) -> None:
    served, servers = ServedModel(retrieval.model, "first"), [Users(open_store(place), Metrics()) for _ in range(4)]

    def write(number: int) -> None:
        for time in range(25):
            written(servers[number], served, event(time, id=f"{number} {time}"))

    with ThreadPoolExecutor(4) as pool:
        [*pool.map(write, range(4))]
    assert stored(servers[0], served).timestamps == sorted([*range(25)] * 4)
    for each in servers:
        each.close()


def test_a_store_that_fails_is_no_defect_and_costs_only_the_requests_that_need_it(
    retrieval: Served, tmp_path: Path
) -> None:
    path, whole = tmp_path / "users.db", {"items": [1003], "actions": [1], "timestamps": [0]}
    with serving(retrieval, Settings(poll_s=3600, users=str(path))) as client:
        assert "has no events" in client.post("/embed", {"user": 7}).json["error"]
        assert client.post("/events", {"events": [event(0, 1003, "a/b")]}).json == counts(1, 0, 0)
        vector = client.post("/embed", {"user": "a/b"}).json["vector"]
        assert vector == client.post("/embed", whole).json["vector"]
        assert client.delete("/users/a%2Fb").json == {"forgotten": 1}
        assert 'hstu_events_total{kind="forgotten"} 1' in client.get("/metrics").text
        with sqlite3.connect(path) as connection:
            connection.execute("DROP TABLE hstu_users")
        assert client.post("/embed", {"user": 7}).status == client.delete("/users/7").status == 503
        assert client.post("/embed", whole).status == 200
        assert 'path="/users/{user:path}",status="503"' in client.get("/metrics").text
    with serving(retrieval) as client:
        assert "keeps no users; give items" in client.post("/embed", {"user": 7}).json["error"]
        for reply in (client.delete("/users/7"), client.get("/users/7")):
            assert "start it with --users" in reply.json["error"]


@pytest.mark.parametrize("place", ["nowhere/users.db", "text", "redis://127.0.0.1:1/0", "redis://"])
def test_a_place_that_is_no_store_is_refused_at_start(place: str, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("no database" * 100)
    with pytest.raises(ConfigError, match="Give a file, which is created"):
        open_store(place if ":" in place else str(tmp_path / place))


def test_servers_that_make_one_store_at_once_wait_for_each_other(tmp_path: Path) -> None:
    place = str(tmp_path / "users.db")
    other = sqlite3.connect(place, isolation_level=None)
    other.executescript("CREATE TABLE it_is_making (a); BEGIN IMMEDIATE")
    with ThreadPoolExecutor(1) as pool:
        opened = pool.submit(open_store, place)
        assert wait([opened], timeout=0.2).not_done
        other.execute("COMMIT")
        opened.result().close()


def test_a_server_that_is_killed_has_lost_no_event_that_it_confirmed(retrieval: Served, tmp_path: Path) -> None:
    server, port = started(retrieval.folder, "--users", str(tmp_path / "users.db"))
    confirmed: list[int] = []

    def write(number: int) -> None:
        client = Client(port)
        for time in range(number, 10_000, 3):
            try:
                reply = client.post("/events", {"events": [event(time)]})
            except OSError:
                return
            assert reply.json["repeated"] == 0
            confirmed.append(time)

    with ThreadPoolExecutor(3) as pool:
        writing = pool.map(write, range(3))
        until(lambda: len(confirmed) > 100)
        os.kill(server.pid, signal.SIGKILL)
        assert [*writing] == [None] * 3
    server.wait()
    users = Users(open_store(str(tmp_path / "users.db")), Metrics())
    times = stored(users, ServedModel(retrieval.model, "first")).timestamps
    users.close()
    assert times is not None and {*confirmed} <= {*times} and [*times] == sorted({*times})
