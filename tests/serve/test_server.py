"""The server over HTTP, on 127.0.0.1."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hstu import api
from hstu.base.errors import EXIT_BAD_CONFIG, EXIT_BAD_DATA
from hstu.data.store.sequence_store import SequenceStore
from hstu.serve import runtime
from hstu.serve.export import TOLERANCE
from hstu.serve.runtime import Candidates, History
from hstu.serve.runtime.files import digest_of
from hstu.serve.server.batching import Metrics, Settings
from hstu.serve.server.model import ServedModel
from hstu.serve.server.swap import LiveModel
from scripts import serve
from tests.serve.http_server import Client, StubLoader, running, serving, until, write_folder
from tests.serve.served import Served, Tensors, delta_of, export_with, histories, request
from tests.test_architecture import imports

EVENTS = {"items": [3, 4]}


def metric(client: Client, name: str) -> float:
    return next(float(line.split()[-1]) for line in client.get("/metrics").text.splitlines() if line.startswith(name))


def test_answers_name_the_model_and_health_and_metrics_tell_its_state(stub: Client) -> None:
    before = metric(stub, "hstu_batch_size_count")
    reply = stub.post("/recommend", {**EVENTS, "k": 2})
    assert reply.status == 200 and reply.headers["content-type"] == "application/json"
    version = reply.json["model"]
    assert version.startswith("first@")
    assert reply.json["items"] == [{"item": item, "score": 1.0, "title": ""} for item in range(2)]
    answer = {"model": version, "vector": [3.0, 4.0], "unknown_items": [], "unknown": {}}
    assert stub.post("/embed", EVENTS).json == answer
    health = stub.get("/health").json
    assert (health["status"], health["model"], health["refused"]) == ("ok", version, {})
    assert metric(stub, "hstu_batch_size_count") == before + 2
    assert metric(stub, f'hstu_model{{task="retrieval",version="{version}"}}') == 1


@pytest.mark.parametrize(
    ("request_", "where", "problem"),
    [
        ({}, "the request", "give items, or the user whose stored events are to be read"),
        ({"user": 7, "actions": [1]}, "the request", "give items with actions, or the user alone"),
        ({"items": [[1]]}, "items[0]", "expected a valid integer or a valid string"),
        ({**EVENTS, "actions": [1, 1.5]}, "actions[1]", "expected a valid integer or a valid string"),
        ({**EVENTS, "features": {"tags": [[{}]]}}, "features.tags[0]", "a valid integer or a valid number"),
        ({"items": ["x" * 1001]}, "items[0]", "at most 1000 characters"),
        ({**EVENTS, "k": 0}, "k", "greater than or equal to 1"),
        ({**EVENTS, "timestamps": [1.5]}, "timestamps[0]", "valid integer"),
        ({**EVENTS, "at": 2**60}, "at", "less than or equal to"),
        ({"items": [1] * 10_001}, "items", "at most 10000 items"),
        ({**EVENTS, "filter_seen": "no"}, "filter_seen", "valid boolean"),
        (b'{"items": [1], "features": {"price": [NaN]}}', "features.price[0]", "finite number"),
        (b'{"items": [', "character 11", "JSON"),
        (b"7", "the request", "valid dictionary"),
    ],
)
def test_mistakes_in_a_request_are_named_in_json(stub: Client, request_: object, where: str, problem: str) -> None:
    reply = stub.post("/recommend", request_)
    assert reply.status == 422, reply.text
    shown = {each["where"]: each["problem"] for each in reply.json["problems"]}
    assert problem in shown[where] and "expected give" not in shown[where]


@pytest.mark.parametrize("item", [b'"\xff"', b"[" * 5000 + b"]" * 5000, b"1" * 5000])
def test_a_request_that_cannot_be_parsed_is_a_mistake_as_any_other(stub: Client, item: bytes) -> None:
    reply = stub.post("/recommend", b'{"items": [' + item + b"]}")
    assert reply.status == 422 and "the request is no JSON in UTF-8" in reply.json["error"]


def test_many_mistakes_are_not_all_listed_and_a_large_request_is_not_read(stub: Client) -> None:
    reply = stub.post("/embed", {"items": [None] * 500})
    assert reply.status == 422 and "500 problem(s)" in reply.json["error"] and len(reply.json["problems"]) == 10
    assert len(reply.text) < 2000
    reply = stub.post("/embed", b" " * (1 << 20) + b"{}")
    assert reply.status == 413 and "larger than 1048576 bytes" in reply.json["error"]
    assert stub.post("/embed", EVENTS).status == 200


def test_a_malformed_body_is_no_defect_of_the_server(stub: Client, caplog: pytest.LogCaptureFixture) -> None:
    body = b"POST /score HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\nZZ\r\n"
    with socket.create_connection(("127.0.0.1", stub.port), timeout=10) as connection:
        connection.sendall(body)
        assert connection.recv(1000).startswith(b"HTTP/1.1 400")
    assert stub.post("/embed", EVENTS).status == 200
    assert not [record for record in caplog.records if record.exc_info]


def test_a_request_that_does_not_fit_and_a_defect_are_told_apart_and_show_nothing_inside(
    stub: Client, caplog: pytest.LogCaptureFixture
) -> None:
    reply = stub.post("/embed", {"items": ["unfit"]})
    assert (reply.status, reply.json) == (422, {"error": "a history has no actions"})
    reply = stub.post("/embed", {"items": ["defect"]})
    assert reply.status == 500 and "log" in reply.json["error"] and "secret" not in reply.text
    assert "a secret" in caplog.text  # the log has it
    for path in ("/nothing", "/embed"):
        reply = stub.get(path)
        assert reply.status in (404, 405) and list(reply.json) == ["error"]
    assert metric(stub, 'hstu_requests_total{path="/embed",status="500"}') == 1


def test_the_page_needs_nothing_from_elsewhere(stub: Client) -> None:
    reply = stub.get("/")
    assert reply.status == 200 and reply.headers["content-type"].startswith("text/html")
    assert "://" not in reply.text and "default-src 'self'" in reply.headers["content-security-policy"]
    paths = stub.get("/openapi.json").json["paths"]
    asked, told = {"/recommend", "/score", "/embed"}, {"/health", "/ready", "/metrics", "/model", "/items"}
    assert asked | told | {"/events", "/users/{user}"} == paths.keys()


needs_node = pytest.mark.skipif(shutil.which("node") is None, reason="node, which runs the page, is not installed")


def on_page(client: Client, query: str, candidate: str, steps: list[tuple[str, int | None, str, str]]) -> Any:
    """What page.js prints after these steps."""
    page = f"http://127.0.0.1:{client.port}/?{query}"
    command = ["node", str(Path(__file__).with_name("page.js")), page, candidate, json.dumps(steps)]
    return json.loads(subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout)


@needs_node
def test_the_page_has_a_field_for_each_feature_that_the_model_reads(ranking: Served) -> None:
    steps: list[tuple[str, int | None, str, str]] = [
        ("user", 0, "town", "2"),
        ("history", 0, "watched", "2.5"),
        ("history", 1, "device", "value 001"),
        ("history", 1, "watched", "x"),
        ("history", 1, "spent", "0.5"),
        ("shown", 0, "device", "value 002"),
        ("history", 0, "action", "1"),
    ]
    with serving(ranking) as client:
        found = on_page(client, "items=1000,1001", "1002", steps)
        why = on_page(client, "items=1000,1001", "1002", [*steps[5:], ("answer", 0, "why this item", "")])
    assert why["sent"]["candidate_features"] == {"device": ["value 002"]} and "How much each event" in why["answer"]
    rows = {(list_, name): (kind, values) for list_, kind, name, values in found["fields"]}
    assert rows["history", "device"] == rows["shown", "device"]
    assert rows["history", "device"] == ("select", ["device?", "value 000", "value 001", "value 002"])
    assert rows["user", "town"] == ("select", ["town?", 0, 1, 2]) and rows["history", "watched"] == ("input", [])
    assert ("shown", "watched") not in rows and ("history", "colour") not in rows
    sent = found["sent"]
    assert sent["features"] == {"device": [None, "value 001"], "watched": [2.5, "x"], "spent": [None, 0.5]}
    assert sent["context"] == {"town": 2} and sent["actions"] == [1, 3]
    assert sent["candidates"] == ["1002"] and sent["candidate_features"] == {"device": ["value 002"]}
    assert "high" in found["answer"] and found["wrong"] == "The model does not have: watched x"


@needs_node
def test_the_page_sends_events_of_a_stored_user_and_explains_an_item(retrieval: Served, tmp_path: Path) -> None:
    steps: list[tuple[str, int | None, str, str]] = [
        ("send", None, "", ""),
        ("rule-fields", 0, "Number of items", "2"),
        ("answer", 0, "why this item", ""),
    ]
    with serving(retrieval, Settings(poll_s=3600, users=str(tmp_path / "users.db"))) as client:
        found = on_page(client, "user=7&items=1000,1001", "", steps)
        assert client.get("/users/7").json["items"] == [1000, 1001]
        assert "no events" in on_page(client, "user=8&items=1000", "", [])["stored"]
    assert "2 events:" in found["stored"] and "item 1000" in found["stored"] and found["wrong"] == ""
    assert found["sent"].keys() == {"user", "at", "candidates", "explain"} and found["sent"]["user"] == "7"
    answer = found["answer"]
    assert "How much each event adds to score" in answer and "item 1001" in answer


def is_closed(connection: socket.socket) -> bool:
    """Whether the server has closed it. Sends one byte more."""
    try:
        connection.send(b"x")
    except OSError:
        return True
    return False


def test_connections_that_send_no_request_end_and_keep_nobody_out(tmp_path: Path) -> None:
    """Silent ones, and those that have sent a part of a header or of a body: more of them than the server takes."""
    root, load = write_folder(tmp_path / "first"), StubLoader(is_open=False)
    parts = (b"", b"POST /embed HTTP/1.1\r\n", b"POST /embed HTTP/1.1\r\nhost: a\r\ncontent-length: 99999\r\n\r\n{")
    with (
        running(root, load, Settings(max_waiting=1, request_s=1, poll_s=60)) as client,
        ThreadPoolExecutor(1) as pool,
        ExitStack() as stack,
    ):
        running_request = pool.submit(Client(client.port).post, "/embed", EVENTS)
        until(lambda: load.models[0].batches)
        silent = [stack.enter_context(socket.create_connection(("127.0.0.1", client.port))) for _ in range(100)]
        for place, each in enumerate(silent):
            each.sendall(parts[place % 3])
        assert client.get("/health").status == 200
        until(lambda: all(is_closed(each) for each in silent), limit_s=5)
        load.models[0].gate.set()
        assert running_request.result().status == 200  # longer than request_s after it was sent


def test_a_server_that_ends_answers_what_has_begun(tmp_path: Path) -> None:
    root, load = write_folder(tmp_path / "first"), StubLoader(is_open=False)
    with ThreadPoolExecutor(1) as pool:
        with running(root, load) as client:
            reply = pool.submit(Client(client.port).post, "/embed", EVENTS)
            until(lambda: load.models[0].batches)
            threading.Timer(0.2, load.models[0].gate.set).start()
        assert reply.result().json["vector"] == [3.0, 4.0]
    with pytest.raises(OSError):
        Client(client.port).get("/health")


def test_a_newer_export_answers_once_it_is_loaded_and_a_bad_one_is_shown(tmp_path: Path) -> None:
    write_folder(tmp_path / "a")
    with running(tmp_path, StubLoader(), Settings(poll_s=0.02)) as client:
        assert client.post("/embed", EVENTS).json["model"].startswith("a@")
        write_folder(tmp_path / "b")
        until(lambda: client.post("/embed", EVENTS).json["model"].startswith("b@"))
        assert metric(client, "hstu_model_swaps_total") == 1
        write_folder(tmp_path / "c", "bad: cut off")
        os.utime(tmp_path / "c/manifest.json")
        until(lambda: client.get("/health").json["refused"])
        assert client.get("/health").json["refused"] == {str(tmp_path / "c"): "ServingError: bad: cut off"}
        assert client.post("/embed", EVENTS).json["model"].startswith("b@")
        assert metric(client, "hstu_refused_exports") == 1


@pytest.fixture(scope="module")
def retrieval_server(retrieval: Served) -> Iterator[Client]:
    with serving(retrieval, Settings(poll_s=3600)) as client:
        yield client


def as_json(history: History) -> dict[str, Any]:
    """The fields of a request, of values that JSON has."""
    return json.loads(json.dumps(vars(history), default=lambda value: value.item() if value.ndim == 0 else list(value)))


def test_answers_are_those_of_the_runtime_and_of_the_interface_for_notebooks(
    retrieval_server: Client, features: SequenceStore, retrieval: Served
) -> None:
    given = histories(features)
    for at in (None, 3_000_000):
        expected, _ = retrieval.trained.recommend_for([api.History(**vars(each)) for each in given], top=4, at=at)
        vectors = retrieval.model.embed_batch(given, at)
        cosines = retrieval.model.score_batch(given, [[1003, -5]] * len(given), at)
        requests = [{**as_json(each), "at": at} for each in given]
        everything = [("/recommend", {**each, "k": k}) for each in requests for k in (4, 1)]
        everything += [("/embed", each) for each in requests]
        everything += [("/score", {**each, "candidates": [1003, -5]}) for each in requests]
        with ThreadPoolExecutor(len(everything)) as pool:  # all at once, so that they share batches
            replies = [*pool.map(lambda each: Client(retrieval_server.port).post(*each), everything)]
        assert {reply.status for reply in replies} == {200}
        found = [reply.json for reply in replies]
        for place, answer in enumerate(found[0 : 2 * len(given) : 2]):
            assert [item["item"] for item in answer["items"]] == expected[place].items
            scores = [item["score"] for item in answer["items"]]
            np.testing.assert_allclose(scores, expected[place].scores, atol=TOLERANCE)
            (best,) = found[2 * place + 1]["items"]
            assert best["item"] == expected[place].items[0]
            assert answer["unknown_items"] == [-5]
        for place in range(len(given)):
            embedded, scored = found[2 * len(given) + place], found[3 * len(given) + place]
            np.testing.assert_allclose(embedded["vector"], vectors[place], atol=TOLERANCE)
            (found_score, of_unknown), (expected_score, _) = scored["scores"]["score"], cosines[place]["score"]
            assert found_score == pytest.approx(expected_score, abs=TOLERANCE) and of_unknown is None
            assert -5 in scored["unknown_items"]
    assert metric(retrieval_server, "hstu_batch_size_sum") == 2 * len(everything)
    assert metric(retrieval_server, "hstu_batch_size_count") < len(everything)


def test_lists_of_items_apply_before_the_best_are_chosen(retrieval_server: Client, features: SequenceStore) -> None:
    user = {**as_json(histories(features)[0]), "k": 1000}
    items = retrieval_server.get("/model").json["items"]

    def best(**options: Any) -> list[Any]:
        answer = retrieval_server.post("/recommend", {**user, **options}).json
        assert answer["unknown_items"] == sorted({-5, *options.get("allow", ()), *options.get("deny", ())} - {*known})
        return [item["item"] for item in answer["items"]]

    known = [*range(1000, 1000 + items)]
    everything, unseen = best(filter_seen=False), best()
    assert sorted(everything) == known and 0 < len(unseen) < items
    allowed = [everything[-1], everything[2], unseen[0], 7]
    assert best(allow=allowed, filter_seen=False) == [item for item in everything if item in allowed]
    assert best(allow=allowed, k=1) == [item for item in unseen if item in allowed][:1]
    assert best(allow=allowed, deny=[unseen[0], 8]) == [item for item in unseen[1:] if item in allowed]
    assert best(deny=unseen[:2], k=1) == unseen[2:3] and best(allow=[]) == []


def test_the_server_says_what_the_model_reads_and_finds_items(
    retrieval_server: Client, retrieval: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts = retrieval_server.get("/model").json
    assert facts["task"] == "retrieval" and facts["reads"]["timestamps"] and facts["reads"]["request_time"]
    reads = facts["reads"]["features"]
    assert [*reads] == ["colour", "tags", "price"] and not any(each["required"] for each in reads.values())
    tags = {"type": "text", "is_list": True, "count": 5, "values": [f"value 00{code}" for code in range(5)]}
    assert reads["tags"] == {**tags, "required": False, "before": False}
    assert [*facts["reads"]["context"]] == ["town"] and reads["price"]["values"] == ["-1.25907..1.51392"]
    assert retrieval_server.get("/items?q=1003").json["items"] == [{"item": 1003, "title": ""}]
    titles = [f"Film {number}" for number in range(retrieval.model.encoder.items.size)]
    monkeypatch.setattr(retrieval.model, "titles", titles)
    named = ServedModel(retrieval.model, "named")
    assert [each["item"] for each in named.search("FILM 1", 3)] == [1001, 1010]
    assert named.search("1003", 3) == [{"item": 1003, "title": "Film 3"}]
    assert retrieval_server.get("/items?q=").status == 422
    needless = {"items": [1003], "actions": [1], "timestamps": [0], "candidate_features": {"colour": ["red"]}}
    assert "no features of candidates" in retrieval_server.post("/score", {**needless, "candidates": [1003]}).text


def test_a_ranking_model_scores_candidates(ranking: Served) -> None:
    own = {"device": ["value 000"], "watched": [None], "spent": [1.5]}
    user = {"items": [1000], "actions": [1], "timestamps": [0], "features": own}
    shown = {"candidates": [1000, 1001], "candidate_features": {"device": [None, "value 001"]}}
    with serving(ranking) as client:
        scores = client.post("/score", {**user, **shown}).json["scores"]
        shown["candidates"] = [-5, 1001]
        answer = client.post("/score", {**user, "actions": [77], **shown}).json
        assert answer["unknown"] == {"action": [77]} and answer["unknown_items"] == [-5]
        assert {name: values[0] for name, values in answer["scores"].items()} == dict.fromkeys(scores)
        reads = client.get("/model").json["reads"]["features"]
        assert reads["device"]["required"] and reads["device"]["before"] and not reads["watched"]["before"]
        for path in ("/recommend", "/embed"):
            reply = client.post(path, user)
            assert reply.status == 422 and "/score" in reply.json["error"]
        one_value = {"candidates": [1, 2], "candidate_features": {"device": [None]}}
        assert "for 2 candidates" in client.post("/score", {**user, **one_value}).json["error"]
    history = request([1000], [1], [0], features=own)
    expected = ranking.model.score(history, Candidates([1000, 1001], shown["candidate_features"]))  # type: ignore[arg-type]
    assert scores.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_allclose(scores[name], values, atol=TOLERANCE)


def test_damaged_exports_never_replace_a_good_one(retrieval: Served, tmp_path: Path) -> None:
    def diverge(tables: Tensors, _: Tensors) -> None:
        for rows in tables.values():
            rows.fill_(np.nan)

    good = shutil.copytree(retrieval.folder, tmp_path / "good")
    live = LiveModel(tmp_path, Metrics())
    diverged = export_with(retrieval.folder, tmp_path / "diverged", diverge)
    assert not live.refresh() and "no finite number" in live.refused[str(diverged)]
    for path in good.rglob("*.safetensors"):
        path.write_bytes(b"")  # of a mapped file this would end the process
    assert not live.refresh() and "good" in str(live.refused)
    live.current.model.check()


def test_an_export_of_the_same_configuration_shares_the_program_and_not_the_weights(
    retrieval: Served, tmp_path: Path
) -> None:
    shutil.copytree(retrieval.folder, tmp_path / "first")
    live = LiveModel(tmp_path, Metrics())
    first = live.current.model
    other = export_with(retrieval.folder, tmp_path / "other", lambda *_: None)  # with other weights
    assert live.refresh()
    second, history = live.current.model, request([1000, 1001], [1, 2], [60, 120])
    assert second._program is first._program
    expected = runtime.load(other).embed(history)
    assert second.embed(history).equal(expected) and not first.embed(history).equal(expected)


def test_a_delta_is_applied_to_the_model_in_memory_and_waits_for_the_one_before(
    retrieval: Served, tmp_path: Path
) -> None:
    def touch(tables: Tensors, _: Tensors) -> None:
        tables["item_vectors"][3] += 1

    aside, root = tmp_path / "aside", tmp_path / "exports"
    shutil.copytree(retrieval.folder, aside / "0")
    for number in (1, 2):
        export_with(aside / "0" if number == 1 else aside / "w1", aside / f"w{number}", touch)
        delta_of(aside / f"w{number}", aside / f"{number - 1}", aside / f"{number}")
    shutil.copytree(aside / "0", root / "0")
    live = LiveModel(root, Metrics())
    shutil.copytree(aside / "2", root / "2")
    os.utime(root / "2/manifest.json")
    assert not live.refresh() and "1 is no complete export" in live.refused[str(root / "2")]
    shutil.copytree(aside / "1", root / "1")
    first, history = live.current, request([1000, 1001], [1, 2], [60, 120])
    (root / "0").rename(tmp_path / "removed")  # the model in memory is its base
    assert live.refresh() and live.current.version == f"2@{digest_of(aside / 'w2')[:12]}" and not live.refused
    assert live.current.model.recommend(history) == runtime.load(aside / "w2").recommend(history)
    assert first.model.recommend(history) == retrieval.model.recommend(history)
    shutil.rmtree(root / "2")
    assert not live.refresh() and str(root / "1") in live.refused  # going back takes the base
    (tmp_path / "removed").rename(root / "0")
    assert live.refresh() and live.current.version.startswith("1@")


def test_the_command_says_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert serve.main(["--export", str(tmp_path / "none"), "--port", "0"]) == EXIT_BAD_DATA
    assert "has no export that can be served" in capsys.readouterr().err
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert serve.main(["--export", str(tmp_path), "--port", port]) == EXIT_BAD_CONFIG
    assert f"cannot listen at 127.0.0.1, port {port}: Address already in use" in capsys.readouterr().err
    for options in (["--port", "70000"], ["--max_batch", "0"]):
        with pytest.raises(SystemExit) as ended:
            serve.main(["--export", str(tmp_path), *options])
        assert ended.value.code == 2


def test_the_server_imports_no_trainer() -> None:
    reached, new = set[str](), {module for module in imports() if module.startswith("hstu.serve.server")}
    while new:
        reached |= new
        new = {other for module in new for other in imports()[module]} - reached
    own = ("hstu.serve.server", "hstu.serve.runtime")
    assert {module for module in reached if not module.startswith(own)} <= {
        "hstu.serve",
        "hstu.base.errors",
        "hstu.base.files",
        "hstu.base.remote",
        "hstu.base.topic",
    }
