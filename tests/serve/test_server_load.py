"""The server while models are swapped under load."""

from __future__ import annotations

import json
import random
import shutil
import threading
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from hstu.serve.export import TOLERANCE
from hstu.serve.server.settings import Settings
from tests.serve.http_server import Client, running, until
from tests.serve.served import BIAS, Served, random_model, request, serve

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

CLIENTS, SWAPS = 8, 10


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
    users = [request(items, [i % 4 for i in items], [60 * n for n in range(len(items))]) for items in requests]
    expected = [each.model.embed_batch(users) for each in two]
    sources: dict[str, int] = {}
    shutil.copytree(two[0].folder, tmp_path / "copy-0")
    sources["copy-0"] = 0
    answers: list[tuple[int, int, str]] = []
    ended = threading.Event()
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

    with running(tmp_path, settings=Settings(max_batch=4, poll_s=0.05)) as client:
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
