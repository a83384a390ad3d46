"""What a server in production needs: readiness, ids of requests, keys of clients, and a log of what was shown."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import logging
import re
import resource
import signal
import socket
import sqlite3
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from hstu.base.errors import ConfigError, DataError
from hstu.serve.server.batching import Metrics, Settings
from hstu.serve.server.guard import KeyFile
from hstu.serve.server.logs import set_up_logging
from hstu.serve.server.shown import ShownLog
from tests.serve.http_server import (
    Client,
    Reply,
    StubLoader,
    redis_server,
    running,
    serving,
    started,
    until,
    write_folder,
)
from tests.serve.served import Served

WHOLE: dict[str, Any] = {"items": [1003], "actions": [1], "timestamps": [0]}


def test_a_server_that_ends_is_not_ready_and_answers_what_still_comes(retrieval: Served) -> None:
    server, port = started(retrieval.folder, "--drain_s", "1.5")
    client = Client(port)
    reply = client.get("/ready")
    assert reply.status == 200 and reply.json["model"] == client.post("/embed", WHOLE).json["model"]
    begun = time.monotonic()
    server.send_signal(signal.SIGTERM)
    until(lambda: client.get("/ready").status == 503, limit_s=1)
    reply = client.get("/ready")
    assert "the server ends" in reply.json["error"] and reply.headers["connection"] == "close"
    assert Client(port).post("/embed", WHOLE).status == 200 and client.get("/health").status == 200
    assert server.wait(20) == 0 and time.monotonic() - begun > 1.5
    with pytest.raises(OSError):
        Client(port).get("/health")


@pytest.mark.parametrize("signals", [[signal.SIGINT], [signal.SIGTERM, signal.SIGTERM]])
def test_ctrl_c_and_a_second_sigterm_do_not_wait(retrieval: Served, signals: list[signal.Signals]) -> None:
    server, _ = started(retrieval.folder, "--drain_s", "600")
    for each in signals:
        server.send_signal(each)
        time.sleep(0.3)
    assert server.wait(20) == 0


def test_a_server_is_ready_while_its_store_answers(tmp_path: Path) -> None:
    with redis_server(tmp_path) as (url, store):
        settings = Settings(poll_s=3600, users=url)
        with running(write_folder(tmp_path / "first"), StubLoader(), settings) as client:
            assert client.get("/ready").status == 200
            store.send_signal(signal.SIGSTOP)  # it takes connections, and answers nothing
            assert client.get("/ready").status == 503 and client.get("/health").status == 200
            store.send_signal(signal.SIGCONT)
            until(lambda: client.get("/ready").status == 200)
            store.kill()
            store.wait()
            assert "store of users does not answer" in client.get("/ready").json["error"]


TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


@pytest.mark.parametrize(("given", "is_kept"), [("a-1_b/2", True), ("x" * 129, False), ("a b", False), ("", False)])
def test_an_answer_has_the_id_of_its_request_or_a_new_one(stub: Client, given: str, is_kept: bool) -> None:
    replies = [stub.post("/embed", {"items": [1]}, X_Request_Id=given), stub.get("/nothing", X_Request_Id=given)]
    found = {reply.headers["x-request-id"] for reply in replies}
    are_new = len(found) == 2 and all(re.fullmatch("[0-9a-f]{32}", each) for each in found)
    assert found == {given} if is_kept else are_new


@pytest.mark.parametrize(
    ("given", "is_valid"),
    [
        (f"00-{TRACE}-{PARENT}-01", True),
        (f"cc-{TRACE}-{PARENT}-00", True),
        (f"cc-{TRACE}-{PARENT}-00-more", True),
        (f"00-{TRACE}-{PARENT}-01-more", False),
        (f"cc-{TRACE}-{PARENT}-00more", False),
        (f"ff-{TRACE}-{PARENT}-01", False),
        (f"00-{'0' * 32}-{PARENT}-01", False),
        (f"00-{TRACE}-{'0' * 16}-01", False),
        (f"00-{TRACE.upper()}-{PARENT}-01", False),
        (f"00-{TRACE}-{PARENT}", False),
    ],
)
def test_a_valid_trace_context_is_in_the_answer(stub: Client, given: str, is_valid: bool) -> None:
    assert stub.get("/health", traceparent=given).headers.get("traceparent") == (given if is_valid else None)


def test_log_lines_name_the_request_as_text_and_as_json(retrieval: Served, tmp_path: Path) -> None:
    for options in ([], ["--log_format", "json"]):
        database, lines = tmp_path / f"{len(options)}.db", list[str]()
        server, port = started(retrieval.folder, "--users", str(database), *options, log=lines)
        with sqlite3.connect(database) as connection:
            connection.execute("DROP TABLE hstu_users")
        reply = Client(port).post("/embed", {"user": 7}, X_Request_Id="mine", traceparent=f"00-{TRACE}-{PARENT}-01")
        assert reply.status == 503 and reply.headers["x-request-id"] == "mine"
        server.terminate()
        assert server.wait(20) == 0 and server.stderr is not None
        lines += server.stderr.read().splitlines()
        if not options:
            assert any(re.search(f"store of users: .* request_id=mine trace_id={TRACE}$", line) for line in lines)
            continue
        found = [json.loads(line) for line in lines]
        (failed,) = (each for each in found if each["message"].startswith("store of users"))
        assert (failed["level"], failed["request_id"], failed["trace_id"]) == ("warning", "mine", TRACE)
        assert datetime.fromisoformat(failed["time"]).tzinfo is UTC
        assert {each["message"].split()[0] for each in found} >= {"serving", "listening", "stopped"}


def test_a_defect_in_the_log_names_its_request(stub: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.StringIO()
    monkeypatch.setattr("sys.stderr", written)
    for logger in (logging.getLogger("hstu"), logging.getLogger("uvicorn")):
        for name in ("handlers", "propagate"):
            monkeypatch.setattr(logger, name, getattr(logger, name))  # set back at the end
    set_up_logging("json")
    assert Client(stub.port).post("/embed", {"items": ["defect"]}, X_Request_Id="mine").status == 500
    (found,) = map(json.loads, written.getvalue().splitlines())
    assert found["message"] == "defect path=/embed" and found["request_id"] == "mine" and found["level"] == "error"
    assert "a secret" in found["traceback"]


def line_of(name: str, key: str) -> str:
    return f"{name}:{hashlib.sha256(key.encode()).hexdigest()}\n"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "has no key"),
        ("# shop\n\nshop:a secret\n", ":3 is not NAME:SHA256"),
        (line_of("a shop", "k"), ":1 is not NAME:SHA256"),
        (line_of("shop", "k").upper(), ":1 is not NAME:SHA256"),
        (line_of("shop", "k") + line_of("app", "k"), ":2 has the key of another name"),
        (None, "cannot be read"),
    ],
)
def test_a_wrong_file_of_keys_is_refused_without_showing_it(tmp_path: Path, text: str | None, problem: str) -> None:
    path = tmp_path / "keys"
    if text is not None:
        path.write_text(text)
    with pytest.raises(DataError, match=problem) as raised:
        KeyFile(path)
    assert "secret" not in str(raised.value)


def test_requests_need_a_key_of_the_file_as_it_is_now(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path, embed = tmp_path / "keys", ("/embed", {"items": [1]})
    path.write_text(line_of("shop", "old key") + line_of("shop", "new key") + line_of("app", "its key"))
    settings = Settings(poll_s=0.02, api_keys=path)
    with running(write_folder(tmp_path / "first"), StubLoader(), settings) as client:

        def status(key: str) -> int:
            return client.post(*embed, authorization=key).status

        assert [status(f"Bearer {key}") for key in ("old key", "new key", "its key")] == [200] * 3
        assert status("bearer its key") == 200
        stored = line_of("app", "its key").strip().removeprefix("app:")
        wrong = ("", "Bearer", "Bearer ", "Bearer other", "Basic its key", "its key", f"Bearer {stored}")
        assert {status(key) for key in wrong} == {401}
        reply = client.post(*embed)
        assert "Authorization: Bearer KEY" in reply.json["error"] and reply.headers["www-authenticate"] == "Bearer"
        assert {client.get(path).status for path in ("/model", "/items?q=a", "/openapi.json", "/none")} == {401}
        assert {client.get(path).status for path in ("/", "/health", "/ready", "/metrics")} == {200}
        path.write_text(line_of("app", "its key"))
        until(lambda: status("Bearer old key") == 401)
        assert status("Bearer its key") == 200
        path.unlink()  # and so do those of a file that is gone
        until(lambda: client.get("/health").json["refused"])
        assert "cannot be read" in client.get("/health").json["refused"][str(path)] and status("Bearer its key") == 200
    assert "its key" not in caplog.text and "old key" not in caplog.text


def test_one_client_cannot_fill_the_queue_and_what_nobody_waits_for_any_more_leaves_it(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text(line_of("shop", "a") + line_of("app", "b"))
    settings = Settings(max_batch=1, max_waiting_per_client=2, poll_s=60, api_keys=tmp_path / "keys")
    load = StubLoader(is_open=False)
    with running(write_folder(tmp_path / "first"), load, settings) as client, ThreadPoolExecutor(8) as pool:

        def ask(item: int, key: str) -> Reply:
            return Client(client.port).post("/embed", {"items": [item]}, authorization=f"Bearer {key}")

        def wait_for(text: str) -> None:
            until(lambda: f"hstu_{text}.0" in client.get("/metrics").text)

        first = pool.submit(ask, 0, "a")
        until(lambda: load.models[0].batches)  # it is being computed
        head = b"POST /embed HTTP/1.1\r\nhost: a\r\nauthorization: Bearer a\r\ncontent-type: application/json\r\n"
        with socket.create_connection(("127.0.0.1", client.port)) as gone:
            gone.sendall(head + b"content-length: 300014\r\n\r\n" + b'{"items": [9]}' + b" " * 300_000)
            wait_for("waiting_requests 1")
        wait_for("gone_requests_total 1")
        wait_for('requests_total{path="/embed",status="499"} 1')
        waiting = []
        for item in (1, 2):
            waiting.append(pool.submit(ask, item, "a"))
            wait_for(f"waiting_requests {item}")
        reply = ask(3, "a")
        assert reply.status == 429 and "of shop" in reply.json["error"] and int(reply.headers["retry-after"]) >= 1
        other = pool.submit(ask, 4, "b")
        wait_for("waiting_requests 3")
        load.models[0].gate.set()
        assert [each.result().status for each in (first, *waiting, other)] == [200] * 4
        assert [each.history.items[0] for (each,) in load.models[0].batches] == [0, 4, 1, 2]


def shown_rows(folder: Path) -> list[dict[str, str]]:
    """The rows of all files."""
    rows = list[dict[str, str]]()
    for path in folder.glob("*.csv"):
        with path.open(newline="") as file:
            rows += csv.DictReader(file)
    return rows


def test_what_was_shown_is_written_with_request_model_and_place(
    ranking: Served, retrieval: Served, tmp_path: Path
) -> None:
    folder, odd = tmp_path / "shown", 'a "b",\nc'
    with serving(retrieval, Settings(poll_s=3600, shown_log=folder)) as client:
        asked = {**WHOLE, "user": odd, "k": 3, "exploration": 0.4, "seed": 1}
        reply = client.post("/recommend", asked, X_Request_Id="one")
        assert client.post("/recommend", WHOLE).status == 200  # of nobody
        assert client.post("/embed", {**WHOLE, "user": 7}).status == 200
        client.post("/score", {**WHOLE, "user": 7, "candidates": [1001, -5], "at": 60}, X_Request_Id="two")
        until(lambda: 'hstu_shown_total{outcome="written"} 2.0' in client.get("/metrics").text)
    rows = shown_rows(folder)
    first, second = ([row for row in rows if row["request"] == name] for name in ("one", "two"))
    assert len(rows) == 5 and {row["model"] for row in rows} == {reply.json["model"]}
    for place, (row, item) in enumerate(zip(first, reply.json["items"], strict=True)):
        assert (row["user"], row["item"], row["place"]) == (odd, str(item["item"]), str(place))
        assert float(row["score"]) == item["score"] and row["drawn"] == str(int(item.get("drawn", False)))
        assert abs(int(row["time"]) - time.time()) < 60
    assert [row["drawn"] for row in first].count("1") == 1
    assert [(row["item"], row["place"], row["time"]) for row in second] == [("1001", "0", "60"), ("-5", "1", "60")]
    assert float(second[0]["score"]) and second[1]["score"] == ""
    own = {"device": [None], "watched": [2.5], "spent": [None]}
    with serving(ranking, Settings(poll_s=3600, shown_log=folder)) as client:
        shown = {"candidates": [1002], "candidate_features": {"device": ["value 001"]}}
        answer = client.post("/score", {**WHOLE, "user": 7, "features": own, **shown}, X_Request_Id="three").json
    (row,) = (row for row in shown_rows(folder) if row["request"] == "three")
    assert row["device"] == "value 001"
    assert [[float(row[name])] for name in answer["scores"]] == [*answer["scores"].values()]


def test_a_full_disk_costs_rows_of_the_log_and_no_answer(retrieval: Served, tmp_path: Path) -> None:
    """A limit of the size of files cuts off a row as a full disk does."""
    server, port = started(retrieval.folder, "--shown_log", str(tmp_path))
    client = Client(port)

    def ask(**outcomes: int) -> None:
        for _ in range(3):
            assert client.post("/recommend", {**WHOLE, "user": 7, "k": 5}).status == 200
        expected = {f'hstu_shown_total{{outcome="{name}"}} {count}.0' for name, count in outcomes.items()}
        until(lambda: expected <= {*client.get("/metrics").text.splitlines()})

    ask(written=3)
    _, hard = resource.prlimit(server.pid, resource.RLIMIT_FSIZE)
    (path,) = tmp_path.glob("*.csv")
    resource.prlimit(server.pid, resource.RLIMIT_FSIZE, (path.stat().st_size + 100, hard))
    ask(written=3, lost=3)
    resource.prlimit(server.pid, resource.RLIMIT_FSIZE, (hard, hard))
    ask(written=6, lost=3)
    server.terminate()
    assert server.wait(20) == 0 and server.stderr is not None
    assert server.stderr.read().count("what was shown cannot be written") == 1
    assert len(shown_rows(tmp_path)) == 30


def test_a_folder_that_cannot_be_written_to_is_refused_at_start(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"--shown_log .*file/shown: Not a directory. Give a folder to write to"):
        ShownLog(tmp_path / "file/shown", Metrics())
