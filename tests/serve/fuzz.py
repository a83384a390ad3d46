"""Random requests to a server; each must be answered, and never with a defect.

Requests are those that fit the model, whose answers must be those of the plain runtime; the same with fields that have
been changed; any JSON; bodies and whole HTTP requests with changed bytes; and other paths and methods. Failures are a
status above 499, text in place of JSON, no answer within 30 s, and a connection that ends.
"""

from __future__ import annotations

import http.client
import json
import random
import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote

from hstu.serve import runtime
from hstu.serve.check import random_requests
from tests.data.preprocess.fuzz import mutated, mutated_json

_ANSWER_S, _TOLERANCE = 30.0, 1e-4
_PATHS = ("/recommend", "/score", "/embed")
_PAGES = (
    "/",
    "/openapi.json",
    "/health",
    "/metrics",
    "/model",
    "/items",
    "/items?q=a",
    "/items?q=1&count=100",
)
_METHODS = ("GET", "GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS", "PATCH", "TRACE")
_HEADERS = {"content-type": "application/json"}


@dataclass
class Fuzzer:
    """Cases for a server of ``model`` at a port."""

    port: int
    model: runtime.Model
    users: list[tuple[runtime.History, runtime.Candidates, int | None]] = field(default_factory=list)

    def __post_init__(self) -> None:
        for seed in range(5):
            for requests in random_requests(self.model, seed, count=20):
                pairs = zip(requests.histories, requests.candidates, strict=True)
                self.users += [(history, shown, requests.at) for history, shown in pairs]
        self._connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=_ANSWER_S)

    def run_case(self, number: int) -> str:
        """Runs a case and returns its kind and the status of the answer. Raises AssertionError for a failure."""
        chance = random.Random(number)
        kinds: tuple[Callable[[random.Random], int], ...]
        kinds = (
            self.fitting,
            self.changed,
            self.changed,
            self.changed,
            self.any_json,
            self.damaged,
            self.path,
            self.raw,
        )
        kind = chance.choice(kinds)
        return f"{kind.__name__} {kind(chance)}"

    def fitting(self, chance: random.Random) -> int:
        """A request that fits the model: the answer must be right."""
        path, body, history, shown, at = self._request(chance)
        status, text = self._ask("POST", path, json.dumps(body).encode())
        if path != "/score" and self.model.facts["task"] != "retrieval":
            assert status == 422, (status, text)
            return status
        assert status == 200, (status, text)
        answer = json.loads(text)
        if path == "/embed":
            _assert_close(answer["vector"], self.model.embed(history, at).tolist())
        elif path == "/score":
            _assert_close(answer["scores"], self.model.score(history, shown, at))
        else:
            right = self.model.recommend(history, body["k"], at)
            _assert_close([item["score"] for item in answer["items"]], right.scores)
        return status

    def changed(self, chance: random.Random) -> int:
        """The same with one to three changes, or fields that it does not have."""
        path, body, *_ = self._request(chance)
        changed: Any = body
        for _ in range(chance.randint(1, 3)):
            changed = mutated_json(changed, chance)
        return self._checked(path, json.dumps(changed).encode())

    def any_json(self, chance: random.Random) -> int:
        """What is JSON, and seldom a request; also deep, and large."""
        content: bytes
        match chance.randrange(5):
            case 0:
                content = json.dumps(mutated_json([], chance)).encode()
            case 1:
                content = b"[" * chance.choice((10, 1000, 100_000)) + b"]" * chance.choice((0, 10, 100_000))
            case 2:
                content = (
                    b'{"items": ' + b"[" * chance.choice((5, 5000)) + b"1" + b"]" * chance.choice((5, 5000)) + b"}"
                )
            case 3:
                content = json.dumps({"items": [1] * chance.choice((9_999, 10_001, 500_000))}).encode()
            case _:
                content = (
                    b'{"items": ['
                    + b"9" * chance.choice((20, 400, 4301, 50_000))
                    + b'], "k": 1e%d}' % chance.randrange(999)
                )
        return self._checked(chance.choice(_PATHS), content)

    def damaged(self, chance: random.Random) -> int:
        """The text of a request with changed bytes."""
        path, body, *_ = self._request(chance)
        return self._checked(path, mutated(json.dumps(body).encode(), chance))

    def path(self, chance: random.Random) -> int:
        """Another method, path or query."""
        path = chance.choice(_PAGES + _PATHS)
        if chance.random() < 0.7:
            path = "/" + quote(
                mutated(path.encode(), chance).lstrip(b"/"), safe="/?&=%" if chance.random() < 0.5 else "/?&="
            )
        status, _ = self._ask(chance.choice(_METHODS), path, b"")
        return status

    def raw(self, chance: random.Random) -> int:
        """A whole HTTP request with changed bytes on a connection of its own; it may stay without an answer."""
        path, body, *_ = self._request(chance)
        text = json.dumps(body).encode()
        head = (
            f"POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: {len(text)}"
        )
        message = mutated(f"{head}\r\nconnection: close\r\n\r\n".encode(), chance) + text
        received = b""
        with socket.create_connection(("127.0.0.1", self.port), timeout=_ANSWER_S) as connection:
            try:
                connection.sendall(message[: chance.randrange(len(message))] if chance.random() < 0.3 else message)
                connection.shutdown(socket.SHUT_WR)
                while part := connection.recv(1 << 16):
                    received += part
            except (ConnectionResetError, BrokenPipeError):  # the server has refused it before all was sent
                pass
        if not received:
            return 0
        assert received.startswith(b"HTTP/1.1 "), received
        status = int(received[9:12])
        assert status < 500, received
        return status

    def _checked(self, path: str, content: bytes) -> int:
        status, text = self._ask("POST", path, content)
        assert status in (200, 400, 413, 422), (status, text)
        answer = json.loads(text, parse_constant=_refuse)
        assert ("error" in answer) == (status != 200), text
        return status

    def _ask(self, method: str, path: str, body: bytes) -> tuple[int, str]:
        try:
            self._connection.request(method, path, body, _HEADERS)
            answer = self._connection.getresponse()
            status, text = answer.status, answer.read().decode()
        except (OSError, http.client.HTTPException) as error:
            self._connection.close()  # the next request opens it again
            if isinstance(error, (BrokenPipeError, ConnectionResetError)) and len(body) > 1 << 20:
                return 413, '{"error": "refused before all was sent"}'
            raise AssertionError(f"no answer: {error!r}") from error
        assert status < 500 and "Traceback" not in text, (status, text)
        return status, text

    def _request(
        self, chance: random.Random
    ) -> tuple[str, dict[str, Any], runtime.History, runtime.Candidates, int | None]:
        """(path, body, what the body says) of a request that fits the model."""
        history, shown, at = chance.choice(self.users)
        path = chance.choice(_PATHS)
        body = {name: value for name, value in vars(history).items() if value is not None}
        if at is not None:
            body["at"] = at
        if path == "/recommend":
            body["k"] = chance.choice((1, 10, 1000))
        elif path == "/score":
            body |= {"candidates": shown.items, "candidate_features": shown.features}
        return path, body, history, shown, at


def _refuse(constant: str) -> None:
    raise AssertionError(f"the answer has {constant}, which is no JSON")


def _assert_close(found: Any, right: Any) -> None:
    if isinstance(right, dict):
        assert found.keys() == right.keys()
        for name in right:
            _assert_close(found[name], right[name])
    elif isinstance(right, list):
        assert len(found) == len(right), (len(found), len(right))
        for pair in zip(found, right, strict=True):
            _assert_close(*pair)
    else:
        assert abs(found - right) <= _TOLERANCE * (1 + abs(right)), (found, right)
