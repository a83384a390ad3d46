"""What requests pass: keys, ids, a limit of size, headers of answers, metrics, an answer to each defect, parsing."""

import asyncio
import hashlib
import json
import logging
import re
import time
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import h11
from fastapi.responses import Response
from fastapi.routing import APIRoute
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hstu.base.errors import DataError

from .batching import Metrics
from .logs import CURRENT, ids_of
from .watched import WatchedFile

_OPEN = ("/", "/health", "/ready", "/metrics")
_KEY_LINE = re.compile(r"([\w.-]{1,64}):([0-9a-f]{64})")
_log = logging.getLogger(__name__)
_HEADERS = [
    (b"x-content-type-options", b"nosniff"),
    (b"cache-control", b"no-store"),
    (b"content-security-policy", b"default-src 'self' 'unsafe-inline'; img-src data:; frame-ancestors 'none'"),
]


class BodyRoute(APIRoute):
    """Gives a body to its function directly: FastAPI takes as long as HTTP. Cancels it when the client goes away."""

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request. FastAPI answers one that is no JSON or has mistakes."""
        received, content = list[Message](), None
        kind: Any = self.body_field and self.body_field.field_info.annotation

        async def again() -> Message:
            return received.pop(0) if received else await receive()

        if kind and scope["method"] == "POST" and (b"content-type", b"application/json") in scope["headers"]:
            while not received or received[-1].get("more_body"):
                received.append(await receive())
            with suppress(KeyError, ValueError, RecursionError):
                content = kind.model_validate(json.loads(b"".join(each["body"] for each in received)))
        if content is None:
            return await super().handle(scope, again, send)
        answering, going = asyncio.ensure_future(self.endpoint(content)), asyncio.ensure_future(receive())
        going.add_done_callback(lambda _: answering.cancel())
        try:
            answer: Response = await answering
        except asyncio.CancelledError:
            if not going.done():
                raise
            answer = failure(499, "the client has gone")  # nobody reads it, but it is counted
        finally:
            going.cancel()
        await answer(scope, receive, send)


class KeyFile(WatchedFile[dict[bytes, str]]):
    """A file with a line NAME:SHA256 per key, in hexadecimal. It has no keys, so who reads it can ask nothing. A name
    may have several, so that a client can change its key. Raises DataError if the file is wrong."""

    def client_of(self, authorization: bytes) -> str | None:
        """The client with the key of a header "Bearer KEY". None: no client."""
        scheme, _, key = authorization.partition(b" ")
        digest = hashlib.sha256(key.strip()).digest()  # how long the look-up takes says nothing of a key
        return self.content.get(digest) if scheme.lower() == b"bearer" else None

    def read(self) -> dict[bytes, str]:
        """SHA-256 → name. Errors contain no line, which may be a key by mistake."""
        names: dict[bytes, str] = {}
        try:
            lines = self.path.read_text(encoding="utf-8").splitlines()
        except (OSError, ValueError) as error:
            raise DataError(f"--api_keys {self.path} cannot be read: {error}") from None
        for number, line in enumerate(map(str.strip, lines), 1):
            if not line or line.startswith("#"):
                continue
            if not (found := _KEY_LINE.fullmatch(line)):
                raise DataError(
                    f"--api_keys {self.path}:{number} is not NAME:SHA256, with a name of letters, digits, '.', '_' and "
                    "'-', and the 64 digits that printf %s KEY | sha256sum prints"
                )
            if names.setdefault(bytes.fromhex(found[2]), found[1]) != found[1]:
                raise DataError(f"--api_keys {self.path}:{number} has the key of another name; give each its own")
        if not names:
            raise DataError(f"--api_keys {self.path} has no key; write a line NAME:SHA256 for each client")
        return names


@dataclass(frozen=True)
class Guard:
    """ASGI middleware that counts requests, limits their size, adds headers and answers exceptions with status 500."""

    app: ASGIApp
    metrics: Metrics
    max_body_bytes: int
    """Larger requests get status 413, chunked requests without a length get 411."""
    paths: Collection[str]
    """Paths that are counted by name; other paths are counted as "other"."""
    keys: KeyFile | None
    """Without one of them, requests to other paths than ``_OPEN`` get status 401."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        begun, status = time.monotonic(), 0

        async def send_and_note(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {**message, "headers": [*message["headers"], *added]}
            await send(message)

        headers = dict(scope["headers"])
        ids = ids_of(headers)
        CURRENT.set(ids)
        added = [*_HEADERS, (b"x-request-id", ids["request_id"].encode())]
        if "trace_id" in ids:
            added.append((b"traceparent", headers[b"traceparent"]))
        if scope["app"].state.is_draining:
            added.append((b"connection", b"close"))
        answer = self._refusal(scope["path"], headers) or self.app
        try:
            await answer(scope, receive, send_and_note)
        except h11.LocalProtocolError:  # a malformed body, which uvicorn has already answered
            _log.info("malformed request path=%s", scope["path"])
        except Exception:
            _log.exception("defect path=%s", scope["path"])
            if status:
                raise
            answer = failure(500, "the server has failed to answer this request; its log says why")
            await answer(scope, receive, send_and_note)
        finally:
            path = getattr(scope.get("route"), "path", scope["path"])
            path = path if path in self.paths else "other"
            self.metrics.requests.labels(path, str(status)).inc()
            self.metrics.seconds.labels(path).observe(time.monotonic() - begun)

    def _refusal(self, path: str, headers: Mapping[bytes, bytes]) -> Response | None:
        """The answer to a request that is not read. None: it is."""
        if self.keys is not None and path not in _OPEN:
            client = self.keys.client_of(headers.get(b"authorization", b""))
            if client is None:
                text = "give the header Authorization: Bearer KEY, with a key of this server"
                return failure(401, text, {"WWW-Authenticate": "Bearer"})
            CURRENT.set({**CURRENT.get(), "client": client})
        if b"transfer-encoding" in headers:
            return failure(411, "give the header Content-Length")
        if int(headers.get(b"content-length", 0)) > self.max_body_bytes:
            return failure(413, f"the request is larger than {self.max_body_bytes} bytes")
        return None


def as_json(content: Mapping[str, Any], status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """An answer in ASCII, because texts may have lone surrogates, and without FastAPI's slow validation of numbers."""
    return Response(json.dumps(content, allow_nan=False), status, headers, media_type="application/json")


def failure(status: int, text: str, headers: Mapping[str, str] | None = None, **more: Any) -> Response:
    """The answer to a request that fails."""
    return as_json({"error": text, **more}, status, headers)
