"""Events that the server takes from a file or a Kafka topic, each once, and what is popular by them."""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hstu.base.errors import ConfigError
from hstu.serve.server import follow
from hstu.serve.server.batching import Settings
from hstu.serve.server.follow import GrowingFile, Topic
from hstu.serve.server.logs import set_up_logging
from tests.conftest import topic_url
from tests.serve.http_server import Client, serving, started, until
from tests.serve.served import Served
from tests.serve.test_users import event


def lines(first: int, stop: int) -> str:
    return "".join(json.dumps(event(number)) + "\n" for number in range(first, stop))


def times(found: list[tuple[str, bytes]]) -> list[int]:
    return [json.loads(line)["timestamp"] for _, line in found]


def read(path: Path, position: Any = None) -> tuple[list[int], Any]:
    """The times of all events that are there, by a reader that knows nothing but the position."""
    every = list[int]()
    while (found := GrowingFile(path).read(position))[0]:
        every += times(found[0])
        position = found[1]
    return every, position


def test_a_file_that_grows_and_is_renamed_gives_each_line_once(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_text(lines(0, 300) + '{"user": 7,')
    found, position = read(path)
    assert found == [*range(300)] and read(path, position) == ([], position)
    with path.open("a") as file:
        file.write(lines(300, 301).removeprefix('{"user": 7,') + lines(301, 310))
    path.rename(path.with_name("events.jsonl.2"))
    (tmp_path / "events.jsonl.1").write_text(lines(310, 320) + lines(320, 321).strip())
    (tmp_path / "events.jsonl.gz").write_text("not read")
    path.write_text(lines(321, 330))
    found, later = read(path, position)
    assert found == [*range(300, 310)], "a writer may still write to it"
    for age, name in ((30, "events.jsonl.2"), (20, "events.jsonl.1")):
        os.utime(tmp_path / name, (time.time() - age, time.time() - age))
    assert read(path, later)[0] == [*range(310, 330)]


def test_a_file_that_is_copied_and_emptied_gives_each_line_once(tmp_path: Path) -> None:
    path, copy = tmp_path / "events.jsonl", tmp_path / "events.jsonl-20260131"
    path.write_text(lines(0, 10))
    _, position = read(path)
    copy.write_text(lines(0, 20))
    path.write_text(lines(20, 22))
    os.utime(copy, (time.time() - 30, time.time() - 30))
    assert read(path, position)[0] == [*range(10, 22)]


@pytest.mark.parametrize("content", ["", lines(50, 52), lines(50, 90)])
def test_a_file_that_is_truncated_or_replaced_is_named_and_read_anew(
    content: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("hstu"), "propagate", True)
    path = tmp_path / "events.jsonl"
    path.write_text(lines(0, 10))
    _, position = read(path)
    path.write_text(content)
    assert len(read(path, position)[0]) == content.count("\n")
    assert f"{path}: truncated or replaced after byte {position[0]}; what was not read is lost" in caplog.text


def test_a_line_without_an_end_does_not_stop_what_follows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(follow, "_MOST_BYTES", 100)
    (path := tmp_path / "events.jsonl").write_text("x" * 250 + "\n" + lines(0, 1))
    found, _ = GrowingFile(path).read(None)
    assert [len(line) for _, line in found] == [100, 100, 51, len(lines(0, 1))]
    assert [place for place, _ in found] == [f"events.jsonl, byte {at}" for at in (0, 100, 200, 251)]


def test_a_topic_goes_on_from_a_position_and_names_what_is_gone(
    broker: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("hstu"), "propagate", True)

    def produce(first: int, stop: int) -> None:
        for number in range(first, stop):
            broker.produce("events", json.dumps(event(number)), partition=number % 4)
        broker.flush(9)

    def take(topic: Topic, position: Any, count: int) -> tuple[list[int], Any]:
        every = list[int]()
        while len(every) < count:
            found, position = topic.read(position)
            every += times(found)
        return sorted(every), position

    produce(0, 30)
    topic = Topic(url := topic_url(broker, "/events"))
    found, position = take(topic, None, 30)
    assert found == [*range(30)] and topic.backlog == 0 and position == {"0": 8, "1": 8, "2": 7, "3": 7}
    produce(30, 34)
    assert take(topic, position, 4)[0] == take(Topic(url), position, 4)[0] == [*range(30, 34)]
    assert take(Topic(url), {**position, "0": 99}, 12)[0] == sorted([*range(0, 36, 4), 30, 31, 33])
    assert "topic=events partition=0: the messages from 99 on are gone; reading from 0" in caplog.text


@pytest.mark.parametrize("source", ["kafka://", "kafka://host:1/a/b", "nowhere/events.jsonl", "."])
def test_what_is_no_source_is_refused_at_start(source: str, retrieval: Served, tmp_path: Path) -> None:
    for settings, problem in (
        (Settings(users=str(tmp_path / "users.db"), follow=source), r"--follow .*kafka://host:port/topic"),
        (Settings(follow=str(tmp_path / "events.jsonl")), "--follow needs --users"),
    ):
        with pytest.raises(ConfigError, match=problem), serving(retrieval, settings):
            pass


@pytest.mark.timeout(300)
@pytest.mark.parametrize("kind", ["file", pytest.param("topic", marks=pytest.mark.slow)])
def test_a_server_that_is_killed_while_it_follows_has_each_event_once(
    kind: str, broker: Any, retrieval: Served, tmp_path: Path
) -> None:
    path, count = tmp_path / "events.jsonl", 0
    source = str(path) if kind == "file" else topic_url(broker, "/events")

    def produce(number: int) -> None:
        nonlocal count
        text = lines(count, count := count + number) + "{broken\n"
        if kind == "file":
            with path.open("a") as file:
                file.write(text)
        else:
            for line in text.splitlines():
                broker.produce("events", line)
            broker.flush(9)

    def followed() -> list[int]:
        with sqlite3.connect(tmp_path / "users.db") as connection:
            found = connection.execute("SELECT events FROM hstu_users WHERE user = ?", (b"7",)).fetchone()
        return json.loads(found[0])["timestamps"] if found else []

    for round in range(3):
        produce(2000)
        server, port = started(retrieval.folder, "--users", str(tmp_path / "users.db"), "--follow", source)
        least = count - 1700
        until(lambda least=least: len(followed()) > least)
        produce(100)
        if kind == "file" and round:
            path.rename(path.with_name(f"events.jsonl.{round}"))
            produce(10)
        if round < 2:
            os.kill(server.pid, signal.SIGKILL)
            server.wait()
    until(lambda: len(followed()) >= count)
    client = Client(port)
    until(lambda: "hstu_followed_backlog 0.0" in client.get("/metrics").text)
    assert followed() == [*range(count)] and count == (6320 if kind == "file" else 6300)
    assert client.post("/embed", {"user": 7}).status == 200
    server.terminate()
    assert server.wait() == 0 and server.stderr is not None and "refused " in server.stderr.read()


def test_bad_events_and_a_store_that_does_not_answer_stop_nothing(
    retrieval: Served, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, database, now = tmp_path / "events.jsonl", tmp_path / "users.db", int(time.time())
    changes: list[Any] = [{"action": None}, {"features": {"x": 1}}, {"timestamp": 1.5}, {"timestamp": now * 1000}]
    bad = "".join(json.dumps(event(5) | each) + "\n" for each in (*changes, {"more": 1}))
    path.write_text(lines(0, 1) + bad + "\n\xff\n" + lines(1, 2))

    def is_in_metrics(text: str) -> Callable[[], bool]:
        return lambda: text in client.get("/metrics").text

    set_up_logging("text")
    settings = Settings(users=str(database), follow=str(path))
    with serving(retrieval, settings) as client:
        until(is_in_metrics('hstu_events_total{kind="in_order"} 2.0'))
        until(is_in_metrics('hstu_events_total{kind="refused"} 7.0'))
        with sqlite3.connect(database) as connection:
            connection.execute("ALTER TABLE hstu_users RENAME TO away")
        with path.open("a") as file:
            file.write(lines(2, 3) + json.dumps(event(now - 100)) + "\n")
        until(lambda: client.post("/events", {"events": [event(9)]}).status == 503)
        until(lambda: "trying again in 0.5 s" in capfd.readouterr().err)
        with sqlite3.connect(database) as connection:
            connection.execute("ALTER TABLE away RENAME TO hstu_users")
        until(is_in_metrics('hstu_events_total{kind="in_order"} 4.0'))
        with path.open("a") as file:
            file.write("bad alone\n")
        until(is_in_metrics('hstu_events_total{kind="refused"} 8.0'))
        found = re.search(r"hstu_followed_age_seconds (\d+)", client.get("/metrics").text)
        assert found is not None and 99 < int(found[1]) < 130
