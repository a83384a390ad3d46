"""Where parts come from: a directory, here or at a URL, and a Kafka topic."""

import json
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
from confluent_kafka import Producer

from hstu.base.errors import DataError
from hstu.stream.parts import QUARANTINE, Directory, Topic


def test_parts_of_a_directory_come_in_the_order_of_names_and_what_is_being_written_is_no_part(tmp_path: Path) -> None:
    for name in ("b/2.csv", "b/1.csv", "b/_SUCCESS", "a.csv", ".c.csv", "_temporary/d.csv"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    source = Directory(str(tmp_path))
    assert source.waiting([]) == ["a.csv", "b"]
    assert source.waiting(["a.csv"]) == ["b"]
    assert source.fetch("b", ["a.csv"], tmp_path / "copies") == [tmp_path / "b/1.csv", tmp_path / "b/2.csv"]
    (tmp_path / "Z.csv").write_text("a late part")
    assert source.waiting(["a.csv", "b"]) == ["Z.csv"]


def test_parts_at_a_url_are_copied_once(tmp_path: Path) -> None:
    remote = fsspec.filesystem("memory")
    remote.pipe({"/lake/day=1/x.csv": b"x", "/lake/day=1/deep/y.csv": b"y"})
    source = Directory("memory://lake")
    assert source.waiting([]) == ["day=1"]
    files = source.fetch("day=1", [], tmp_path)
    assert [(file.name, file.read_text()) for file in files] == [("y.csv", "y"), ("x.csv", "x")]
    remote.pipe("/lake/day=1/x.csv", b"changed")
    assert [file.read_text() for file in source.fetch("day=1", [], tmp_path)] == ["y", "x"]


@pytest.fixture
def broker() -> Iterator[Producer]:
    """librdkafka's own cluster, in this process; its topics have four partitions."""
    yield Producer({"test.mock.num.brokers": 1, "bootstrap.servers": "mock", "log_level": 0})


def topic_url(broker: Producer, topic: str) -> str:
    return "kafka://" + ",".join(f"{b.host}:{b.port}" for b in broker.list_topics(timeout=9).brokers.values()) + topic


def test_parts_of_a_topic_have_each_message_once_and_set_bad_ones_aside(broker: Producer, tmp_path: Path) -> None:
    for number in range(20):
        broker.produce("events", json.dumps({"user": number, "item": "a,b\n"}), partition=number % 3)
    for bad in (b"\xff", b"[1]", b'{"user": [1]}', b'{"user": NaN}'):
        broker.produce("events", bad, partition=3)
    broker.flush(9)
    source, taken, users, aside = Topic(topic_url(broker, "/events"), 10, 10), list[str](), list[str](), list[str]()
    while waiting := source.waiting(taken):
        folder = tmp_path / str(len(taken)) / "copies"
        for file in source.fetch(waiting[0], taken, folder):
            users += [line.split(",")[0] for line in file.read_text().splitlines()[1:] if line[0].isdigit()]
        aside += (folder.parent / QUARANTINE).read_text().splitlines()
        assert source.fetch(waiting[0], taken, folder) == source.fetch(waiting[0], taken, folder)
        taken += waiting
    assert sorted(map(int, users)) == [*range(20)] and taken[-1] == "0-7,1-7,2-6,3-4" and len(taken) > 2
    assert [json.loads(line)["offset"] for line in aside] == [0, 1, 2, 3]


def test_more_bad_messages_than_allowed_stop_the_stream(broker: Producer, tmp_path: Path) -> None:
    for _ in range(3):
        broker.produce("events", b"{", partition=0)
    broker.flush(9)
    source = Topic(topic_url(broker, "/events"), most=10, most_bad=2)
    with pytest.raises(DataError, match=r"3 messages of the part 0-3.* cannot be read.*allows 2.*no JSON"):
        source.fetch(source.waiting([])[0], [], tmp_path / "copies")
    assert not (tmp_path / QUARANTINE).exists()
