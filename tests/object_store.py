"""A real S3 server (moto's) as a process, and a proxy in front of it that injects faults."""

import http.client
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import s3fs

BUCKET = "lake"
Fault = Callable[[str, str], str | None]
"""(method, path) → "503", "403", "truncate", "slow", or None: the request passes."""


class ObjectStore:
    """The server's address for clients, and the fault that its proxy injects. ``requests``: (method, path) so far."""

    def __init__(self, backend: int) -> None:
        self.fault: Fault = lambda method, path: None
        self.requests: list[tuple[str, str]] = []
        store = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def _pass(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                store.requests.append((self.command, self.path))
                kind = store.fault(self.command, self.path)
                if kind in ("503", "403"):
                    code = {"503": "SlowDown", "403": "ExpiredToken"}[kind]
                    self._answer(int(kind), {}, f"<Error><Code>{code}</Code><Message>{code}</Message></Error>".encode())
                    return
                if kind == "slow":
                    time.sleep(1.0)
                connection = http.client.HTTPConnection("127.0.0.1", backend, timeout=60)
                connection.request(self.command, self.path, body, dict(self.headers))
                answer = connection.getresponse()
                content, headers = answer.read(), dict(answer.getheaders())
                connection.close()
                self._answer(answer.status, headers, content[: len(content) // 2] if kind == "truncate" else content)

            def _answer(self, status: int, headers: dict[str, str], content: bytes) -> None:
                self.send_response(status)
                is_head = self.command == "HEAD" and "Content-Length" in headers
                for name, value in headers.items():
                    if name.lower() not in ("content-length", "transfer-encoding", "connection", "date", "server"):
                        self.send_header(name, value)
                self.send_header("Content-Length", headers["Content-Length"] if is_head else str(len(content)))
                self.end_headers()
                self.wfile.write(content if self.command != "HEAD" else b"")

            do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _pass

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        Thread(target=self.server.serve_forever, daemon=True).start()
        self.environment = {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.server.server_port}",
            "AWS_ACCESS_KEY_ID": "id-of-the-test",
            "AWS_SECRET_ACCESS_KEY": "secret-of-the-test",
            "AWS_DEFAULT_REGION": "us-east-1",
        }


@contextmanager
def object_store() -> Iterator[ObjectStore]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        env={**os.environ, "MOTO_S3_CUSTOM_ENDPOINTS": ""},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
                connection.request("PUT", f"/{BUCKET}", headers={"Content-Length": "0"})
                assert connection.getresponse().status == 200
                break
            except ConnectionRefusedError:
                assert time.monotonic() < deadline and server.poll() is None, "moto's server does not start"
                time.sleep(0.1)
        s3fs.S3FileSystem.clear_instance_cache()  # they have the address of an earlier server
        store = ObjectStore(port)
        yield store
        store.server.shutdown()
    finally:
        server.kill()
        server.wait()
