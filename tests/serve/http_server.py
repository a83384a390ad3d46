"""A server in a thread of the test, and a client."""

from __future__ import annotations

import http.client
import json
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from hstu.serve.runtime import ServingError
from hstu.serve.runtime.cache import PrefixCache
from hstu.serve.server import batching
from hstu.serve.server.app import create_app
from hstu.serve.server.batching import Metrics, ModelMetrics, Settings
from hstu.serve.server.listening import Server
from hstu.serve.server.model import Answer, RecommendRequest, ServedModel, User
from hstu.serve.server.swap import LiveModel, Load, load
from tests.serve.served import Served

UNWATCHED = Settings(poll_s=3600)
ROOT = Path(__file__).parents[2]


@dataclass
class Reply:
    status: int
    headers: dict[str, str]
    text: str

    @property
    def json(self) -> Any:
        return json.loads(self.text)


@dataclass
class Client:
    """A client with one connection, which it opens again where the server has closed it."""

    port: int
    timeout_s: float = 60

    def __post_init__(self) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=self.timeout_s)

    def get(self, path: str, **headers: str) -> Reply:
        return self._ask("GET", path, None, headers)

    def post(self, path: str, content: Any, **headers: str) -> Reply:
        """Headers are written with "_" for "-"."""
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        return self._ask("POST", path, body, headers)

    def delete(self, path: str) -> Reply:
        return self._ask("DELETE", path, None, {})

    def _ask(self, method: str, path: str, body: bytes | None, headers: dict[str, str]) -> Reply:
        given = {name.replace("_", "-"): value for name, value in headers.items()}
        self._connection.request(method, path, body, {"content-type": "application/json", **given})
        answer = self._connection.getresponse()
        return Reply(answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read().decode())

    def close(self) -> None:
        self._connection.close()


@contextmanager
def running(
    root: Path, load: Load = load, settings: Settings = UNWATCHED, second: Load | None = None
) -> Iterator[Client]:
    """A server of the exports in ``root`` on a free port of this machine, until the end of the block.

    ``second``: loads those of ``settings.second_model``.
    """
    metrics = Metrics()
    models = [LiveModel(root, metrics, load)]
    if settings.second_model is not None and second is not None:
        models.append(LiveModel(settings.second_model, ModelMetrics(metrics.registry, "hstu_second"), second))
    server = Server(create_app(lambda: models, settings, metrics), settings)
    loop_s = 0 if isinstance(load, StubLoader) else batching._LOOP_S  # its gate would hold up the event loop
    with socket.create_server(("127.0.0.1", 0)) as listener, mock.patch.object(batching, "_LOOP_S", loop_s):
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        client = Client(listener.getsockname()[1])
        try:
            until(lambda: server.started)
            yield client
        finally:
            client.close()
            server.should_exit = True
            thread.join(60)
    assert not thread.is_alive()


def serving(served: Served, settings: Settings = UNWATCHED) -> AbstractContextManager[Client]:
    """A server of an export that is loaded already, which takes a second."""
    return running(served.folder, lambda _, name, __: ServedModel(served.model, name), settings)


@contextmanager
def redis_server(folder: Path) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """A Redis server until the end of the block: its URL, and its process."""
    pytest.importorskip("redis", reason="the package redis is not installed: pip install redis")
    if shutil.which("redis-server") is None:
        pytest.skip("redis-server is not installed: apt-get install redis-server")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = ["redis-server", "--port", str(port), "--save", "", "--bind", "127.0.0.1"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, cwd=folder) as server:
        try:
            until(lambda: socket.socket().connect_ex(("127.0.0.1", port)) == 0)
            yield f"redis://127.0.0.1:{port}/0", server
        finally:
            server.kill()


def started(folder: Path | str, *options: str, log: list[str] | None = None) -> tuple[subprocess.Popen[str], int]:
    """A server in a process of its own, and its port. ``log``: lines that it writes until it listens are added."""
    command = [sys.executable, "scripts/serve.py", "--export", str(folder), "--port", "0", *options]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    assert server.stderr is not None
    log = [] if log is None else log
    for line in server.stderr:
        log.append(line)
        if found := re.search(r"listening url=http://127.0.0.1:(\d+)", line):
            return server, int(found[1])
    raise AssertionError(f"the server has ended with exit code {server.wait()}: {''.join(log)}")


def until(is_true: Any, limit_s: float = 30) -> None:
    """Wait until a condition holds."""
    end = time.monotonic() + limit_s
    while not is_true():
        assert time.monotonic() < end, "nothing happened in time"
        time.sleep(0.005)


def write_folder(folder: Path, content: str = "") -> Path:
    """A folder that looks like an export."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "serving.json").write_text(content or folder.name)
    (folder / "manifest.json").write_text(json.dumps({"files": {folder.name: {}}}))
    return folder


@dataclass
class StubModel:
    """A model whose k best items are 0 … k - 1. It computes while ``gate`` is set."""

    version: str
    task: str = "retrieval"
    gate: threading.Event = field(default_factory=threading.Event)
    batches: list[list[User]] = field(default_factory=list)
    recent: dict[str, float] = field(default_factory=dict)

    def set_recent(self, recent: dict[str, float]) -> None:
        """See ServedModel."""

    def answer(self, requests: Sequence[User], cache: PrefixCache | None = None) -> list[Answer | Exception]:
        self.batches.append(list(requests))
        assert self.gate.wait(30)
        return [self._answer(request) for request in requests]

    def _answer(self, request: User) -> Answer | Exception:
        items = request.history.items
        if items[0] == "defect":
            return RuntimeError("a secret")
        if items[0] == "unfit":
            return ServingError("a history has no actions")
        content: dict[str, Any] = {"vector": [float(item) for item in items]}
        if isinstance(request, RecommendRequest):
            content = {"items": [{"item": item, "score": 1.0, "title": ""} for item in range(request.k)]}
        return {"model": self.version, **content, "unknown_items": [], "unknown": {}}


@dataclass
class StubLoader:
    """Loads folders of ``write_folder``; one that is "bad" is refused."""

    models: list[StubModel] = field(default_factory=list)
    is_open: bool = True

    def __call__(self, folder: Path, version: str, current: Any) -> Any:
        content = (folder / "serving.json").read_text()
        if content.startswith("bad"):
            raise ServingError(content)
        if content.startswith("broken"):
            raise KeyError(content)
        model = StubModel(version, "ranking" if content.startswith("ranking") else "retrieval")
        if self.is_open:
            model.gate.set()
        self.models.append(model)
        return model
