"""The server under random requests, and while models are swapped under load."""

from __future__ import annotations

import json
import random
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import psutil
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hstu.serve.check import TOLERANCE
from hstu.serve.runtime import History
from hstu.serve.server.metrics import Metrics
from hstu.serve.server.settings import Settings
from hstu.serve.server.swap import loader
from tests.serve.http_server import UNWATCHED, Client, running, until
from tests.serve.served import BIAS, Served, random_model, serve

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

CLIENTS, SWAPS = 8, 10
# What fits, what almost fits, and anything else.
IDS = st.one_of(st.integers(1000, 1020), st.integers(), st.text(max_size=8), st.none(), st.booleans(), st.floats())
NUMBERS = st.one_of(st.integers(0, 2**40), st.integers(), st.floats(), st.none())
JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8)),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
FIELDS: dict[str, st.SearchStrategy[Any]] = {
    "items": st.lists(st.integers(1000, 1020) | IDS, max_size=6) | JSON,
    "actions": st.lists(st.integers(0, 4) | IDS, max_size=6) | JSON,
    "timestamps": st.lists(NUMBERS, max_size=6) | JSON,
    "features": st.dictionaries(
        st.sampled_from(["colour", "tags", "price", "time_gap", "x"]), st.lists(JSON, max_size=6), max_size=3
    ),
    "context": JSON,
    "user": JSON,
    "at": NUMBERS | JSON,
    "k": st.integers(-1, 1001) | JSON,
    "filter_seen": JSON,
    "candidates": st.lists(IDS, max_size=6) | JSON,
    "candidate_features": JSON,
    "other": JSON,
}
# Requests of models that read nothing else: events of equal number, then whatever comes on top.
FITTING = st.integers(1, 5).flatmap(
    lambda count: st.fixed_dictionaries(
        {
            "items": st.lists(st.integers(1000, 1020) | IDS, min_size=count, max_size=count),
            "actions": st.lists(st.integers(0, 4), min_size=count, max_size=count),
            "timestamps": st.lists(st.integers(0, 10**9), min_size=count, max_size=count),
        },
        optional={
            name: strategy for name, strategy in FIELDS.items() if name not in ("items", "actions", "timestamps")
        },
    )
)
ANYTHING = st.fixed_dictionaries({}, optional=FIELDS)
BYTES = st.binary(max_size=200) | st.text(max_size=100).map(lambda text: text.encode("utf-8", "surrogatepass"))


@pytest.fixture(scope="module")
def client(retrieval: Served) -> Iterator[Client]:
    metrics = Metrics()
    with running(retrieval.folder, loader(1 << 16, metrics), UNWATCHED, metrics) as found:
        yield found


@given(path=st.sampled_from(["/recommend", "/score", "/embed"]), body=FITTING | ANYTHING | JSON | BYTES)
@settings(
    max_examples=600, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_every_request_gets_an_answer_in_json_and_never_a_defect(client: Client, path: str, body: Any) -> None:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    reply = client.post(path, content)
    assert reply.status in (200, 400, 422), reply.text
    answer = json.loads(reply.text, parse_constant=pytest.fail)  # no NaN
    assert ("error" in answer) == (reply.status != 200) and "Traceback" not in reply.text


@given(path=st.text(max_size=30), method=st.sampled_from(["GET", "POST", "PUT", "DELETE", "HEAD"]))
@settings(
    max_examples=100, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_no_path_is_a_defect(client: Client, path: str, method: str) -> None:
    client._connection.request(method, "/" + quote(path, errors="surrogatepass"))
    answer = client._connection.getresponse()
    answer.read()
    assert answer.status in (200, 404, 405, 422)


@pytest.fixture(scope="module")
def two(mesh: Any, features: Any, tmp_path_factory: pytest.TempPathFactory) -> list[Served]:
    """Models with different weights."""
    found = []
    for number in range(2):
        output = tmp_path_factory.mktemp(f"model{number}")
        trained = random_model("retrieval", features, mesh, output, network={**BIAS, "num_layers": 1 + number})
        found.append(serve(trained, output / "serving"))
    return found


def test_models_are_swapped_under_load_without_a_lost_or_wrong_answer(two: list[Served], tmp_path: Path) -> None:
    draw = random.Random(0)
    requests = [draw.choices(range(1000, 1020), k=draw.randint(1, 12)) for _ in range(60)]
    users = [History(items, [item % 4 for item in items], [60 * n for n in range(len(items))]) for items in requests]
    expected = [each.model.embed_batch(users) for each in two]
    sources: dict[str, int] = {}
    shutil.copytree(two[0].folder, tmp_path / "copy-0")
    sources["copy-0"] = 0
    answers: list[tuple[int, int, str]] = []
    ended, metrics = threading.Event(), Metrics()
    memory = psutil.Process().memory_info

    def ask(port: int, seed: int) -> None:
        own, client = random.Random(seed), Client(port)
        while not ended.is_set():
            place = own.randrange(len(users))
            reply = client.post(
                "/embed", {name: vars(users[place])[name] for name in ("items", "actions", "timestamps")}
            )
            answers.append((place, reply.status, reply.text))
        client.close()

    with running(tmp_path, loader(1 << 14, metrics), Settings(max_batch=4, poll_s=0.05), metrics) as client:
        threads = [threading.Thread(target=ask, args=(client.port, seed)) for seed in range(CLIENTS)]
        for thread in threads:
            thread.start()
        used = []
        try:
            for number in range(1, SWAPS + 1):
                name = f"copy-{number}"
                sources[name] = number % 2
                shutil.copytree(two[number % 2].folder, tmp_path / name)
                (tmp_path / name / "manifest.json").touch()
                wait_for(client, name)
                shutil.rmtree(tmp_path / f"copy-{number - 1}")  # nobody needs it
                used.append(memory().rss / 2**20)
        finally:
            ended.set()
            for thread in threads:
                thread.join(60)
        assert client.get("/health").json["refused"] == {}
    assert {status for _, status, _ in answers} == {200} and len(answers) > 20 * SWAPS
    versions = set()
    for place, _, text in answers:
        answer = json.loads(text)
        name = answer["model"].split("@")[0]
        versions.add(name)
        found = torch.tensor(answer["vector"])
        torch.testing.assert_close(found, expected[sources[name]][place], atol=TOLERANCE, rtol=0)
    assert versions == sources.keys()
    print(f"{len(answers)} answers of {len(versions)} models, memory {[round(each) for each in used]} MiB")
    assert max(used[-3:]) < max(used[2:5]) + 40


def wait_for(client: Client, name: str) -> None:
    until(lambda: client.get("/health").json["model"].startswith(f"{name}@"), limit_s=120)
