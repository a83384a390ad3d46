"""What a server in production needs: readiness, ids of requests, keys of clients, and a log of what was shown."""

from __future__ import annotations

import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from hstu.serve.server.batching import Settings
from tests.serve.http_server import Client, StubLoader, running, started, until, write_folder
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
    pytest.importorskip("redis", reason="the package redis is not installed: pip install redis")
    if shutil.which("redis-server") is None:
        pytest.skip("redis-server is not installed: apt-get install redis-server")
    with socket.create_server(("127.0.0.1", 0)) as free:
        redis_port = free.getsockname()[1]
    command = ["redis-server", "--port", str(redis_port), "--save", "", "--bind", "127.0.0.1"]
    store = subprocess.Popen(command, stdout=subprocess.DEVNULL, cwd=tmp_path)
    try:
        until(lambda: socket.socket().connect_ex(("127.0.0.1", redis_port)) == 0)
        settings = Settings(poll_s=3600, users=f"redis://127.0.0.1:{redis_port}/0")
        with running(write_folder(tmp_path / "first"), StubLoader(), settings) as client:
            assert client.get("/ready").status == 200
            store.send_signal(signal.SIGSTOP)  # it takes connections, and answers nothing
            begun = time.monotonic()
            assert client.get("/ready").status == 503 and client.get("/health").status == 200
            assert client.get("/ready").status == 503 and time.monotonic() - begun < 10
            store.send_signal(signal.SIGCONT)
            until(lambda: client.get("/ready").status == 200)
            store.kill()
            store.wait()
            assert "store of users does not answer" in client.get("/ready").json["error"]
    finally:
        store.kill()
