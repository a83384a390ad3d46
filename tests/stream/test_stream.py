"""The whole stream, by its command: what it leaves, and what a kill at any step changes of it, which is nothing.

Where parts come from: a directory, here or at a URL, and a Kafka topic.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from confluent_kafka import Producer

from hstu.base.errors import DataError
from hstu.checkpoint.find import locate
from hstu.checkpoint.tensors import StoredTensors
from hstu.config.args import DatasetArgs
from hstu.data.sampling.samples import build_samples
from hstu.data.sampling.splits import Period
from hstu.stream.events import changes_of, popularity
from hstu.stream.parts import QUARANTINE, Directory, Topic
from hstu.stream.report import write_page
from tests.config.gin_files import table, text
from tests.conftest import REPOSITORY, topic_url, write_small_store
from tests.scripts.test_pages import blocks, follow

GIN = """
TrainerArgs.train_batch_size = 8
TrainerArgs.eval_batch_size = 64
TrainerArgs.num_train_epochs = 2
TrainerArgs.ckpt_save_interval = 2
TrainerArgs.pipeline_type = "none"
DatasetArgs.dataset_name = "films"
DatasetArgs.dataset_path = "the stream sets it"
DatasetArgs.max_sequence_length = 16
DatasetArgs.window_stride = 8
NetworkArgs.num_layers = 1
NetworkArgs.hidden_size = 16
NetworkArgs.num_attention_heads = 2
NetworkArgs.kv_channels = 8
NetworkArgs.dtype_str = "float32"
NetworkArgs.interleave_actions = False
OptimizerArgs.optimizer_str = "adam"
OptimizerArgs.learning_rate = 1e-2
RetrievalArgs.eval_metrics = ("HR@10", "NDCG@10")
""" + text(table("film", 100, sharding_type="model_parallel"))


def write_parts(folder: Path, days: int = 3) -> None:
    draw = np.random.default_rng(1)
    folder.mkdir()
    for day in range(days):
        users, films = draw.integers(0, 20 + 5 * day, 200), draw.integers(0, 40 + 10 * day, 200)
        times = 1_700_000_000 + 86_400 * day + np.sort(draw.integers(0, 80_000, 200))
        lines = "".join(f"{user},{film},{at}\n" for user, film, at in zip(users, films, times, strict=True))
        (folder / f"day-{day}.csv").write_text("user,film,at\n" + lines)


def start(folder: Path, run: str, train_on: str) -> subprocess.Popen[bytes]:
    command = [
        "scripts/stream.py", "--source", folder / "parts", "--run_dir", folder / run, "--task", "retrieval", "--once",
        "--gin-config-file", folder / "films.gin", "--dataset_name", "films", "--user", "user", "--item", "film",
        "--time", "at", "--no_export", "--train_on", train_on,
    ]  # fmt: skip
    return subprocess.Popen([sys.executable, *map(str, command)], cwd=REPOSITORY, start_new_session=True)


def outcome(run: Path) -> dict[str, Any]:
    results = [json.loads(file.read_text()) for file in sorted((run / "parts").glob("*/result.json"))]
    kept = ("name", "events", "users", "items", "new", "evaluation", "frozen", "popular")
    stored = StoredTensors(locate(run / "checkpoints"))
    tensors = {name: stored.read_whole(name).numpy().tobytes() for name in stored.sizes}
    return {"results": [{key: each.get(key) for key in kept} for each in results], "tensors": tensors}


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("train_on", ["new_events", "all"])
def test_a_stream_that_is_killed_at_every_step_ends_as_one_that_is_not(train_on: str, tmp_path: Path) -> None:
    write_parts(tmp_path / "parts")
    (tmp_path / "films.gin").write_text(GIN)
    assert start(tmp_path, "whole", train_on).wait() == 0
    second, steps = tmp_path / "killed" / "parts" / "00002", ("part.json", "evaluation.json", "frozen.json")
    for step, number in zip(steps, (signal.SIGKILL, signal.SIGTERM, signal.SIGKILL), strict=True):
        stream = start(tmp_path, "killed", train_on)
        while not (second / step).exists():
            assert stream.poll() is None
            time.sleep(0.02)
        os.kill(stream.pid, number)
        assert stream.wait() == (128 + number if number == signal.SIGTERM else -number)
    assert start(tmp_path, "killed", train_on).wait() == 0
    whole, killed = outcome(tmp_path / "whole"), outcome(tmp_path / "killed")
    assert killed["results"] == whole["results"] and killed["tensors"] == whole["tensors"]
    assert [each["new"]["events"] for each in whole["results"]] == [200, 200, 200]
    last = (tmp_path / "whole" / "training" / "metrics.jsonl").read_text().splitlines()[-1]
    assert json.loads(last)["iter"] == {"new_events": 16, "all": 19}[train_on]
    assert whole["results"][1]["evaluation"]["metrics"] == whole["results"][1]["frozen"]["metrics"]
    assert whole["results"][2]["evaluation"]["metrics"] != whole["results"][2]["frozen"]["metrics"]
    page = (tmp_path / "whole" / "stream.md").read_text()
    assert "| 3      | day-2.csv" in page and (tmp_path / "whole" / "stream.png").exists()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_first_two_days_of_the_tutorial_go_as_written(tmp_path: Path) -> None:
    page = (REPOSITORY / "docs" / "tutorials" / "every_day.md").read_text(encoding="utf-8")
    days, model, stream, _ = blocks(page, "bash")
    told = follow(tmp_path, [days.replace("range(6)", "range(2)"), model, stream])
    for line in blocks(page, "text")[0].splitlines()[:2]:
        assert line.partition("; append")[0].rpartition(" NDCG")[0] in told
    assert (tmp_path / "runs/news/exports/00002/serving/manifest.json").exists()


def test_popularity_ranks_unseen_items_by_their_events_in_the_last_part(tmp_path: Path) -> None:
    """Of the last part but one, item 2 has three events and items 1 and 3 one each; 0 and 4 have none."""
    items = [[1, 2, 3], [2, 1, 0], [3, 2, 4], [0, 2]]
    segments = [[1, 1, 2], [1, 2, 2], [1, 2, 2], [0, 1]]
    times = [[10, 11, 20], [10, 20, 21], [10, 20, 21], [5, 10]]
    store = write_small_store(tmp_path, items, timestamps=times, segments=segments)
    # Ranks among unseen items: 3 → 1 (0 and 4 have none), 1 → 1.5 (as 3), 0 → 2.5, 2 → 1, 4 → 2 (after 1, as 0: 2.5).
    args = DatasetArgs(dataset_name="toy", max_sequence_length=4)
    found = popularity(store, build_samples(store, args, "retrieval", Period(16), seed=0))["metrics"]
    assert found["HR@10"] == 1.0
    assert found["NDCG@10"] == pytest.approx(np.mean(1 / np.log2(1 + np.array([1, 1.5, 2.5, 1, 2.5]))))


def test_changes_of_a_part_are_those_of_a_plain_reference(tmp_path: Path) -> None:
    """In the part before, users 0 and 2 had items 1, 2 and 2; in the last, user 0 and a new user have items 2 and 3."""
    store = write_small_store(
        tmp_path, [[1, 2, 2], [2], [3]], segments=[[0, 0, 1], [0], [1]], timestamps=[[1, 2, 3], [2], [4]]
    )
    found = changes_of(store)
    before, now = np.array([0, 1 / 3, 2 / 3, 0]), np.array([0, 0, 1 / 2, 1 / 2])
    terms = [
        p * np.log2(2 * p / (p + q)) for each in ((before, now), (now, before)) for p, q in zip(*each, strict=True) if p
    ]
    assert found["gone"] == {"users": 1, "items": 1} and found["drift"] == pytest.approx(sum(terms) / 2)


def test_the_page_says_what_was_scored_before_it_was_trained_on(tmp_path: Path) -> None:
    part = {"newest": 0, "new": {"events": 2000, "users": 3, "items": 4}, "seconds": {"train": 40.0}, "done": 200}
    scored = {"evaluation": {"predictions": 1500, "metrics": {"HR@10": 0.1, "HR@10/new_users": 0.2}, "half_widths": {}}}
    popular = {"popular": {"metrics": {"HR@10": 0.05}, "half_widths": {"HR@10": 0.011}}}
    later = {"gone": {"users": 5, "items": 6}, "drift": 0.25, **part, **scored, **popular}
    write_page([{"number": 1, "name": "a", **part}, {"number": 2, "name": "b", **later}], tmp_path)
    rows = [line.strip("|").split("|") for line in (tmp_path / "stream.md").read_text().splitlines() if "| b" in line]
    assert [[cell.strip() for cell in row] for row in rows] == [
        ["2", "b", "1,500", "0.1000", "0.0500 ± 0.0110"],
        ["2", "b", "2,000", "3", "4", "5", "6", "0.250"],
        ["2", "b", "", "", "", "40", "", "50.0", "1970-01-01 00:00:00 UTC", "3 min 20 s"],
    ]


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
