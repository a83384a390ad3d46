"""Around every request: what is counted, headers for browsers, and JSON where something has gone wrong."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hstu.serve.runtime import ServingError

from .batching import Overloaded
from .settings import Metrics

CLIENT_GONE = 499
_SHOWN_PROBLEMS = 10
_HEADERS = [
    (b"x-content-type-options", b"nosniff"),
    (b"cache-control", b"no-store"),
    (b"content-security-policy", b"default-src 'self' 'unsafe-inline'; img-src data:; frame-ancestors 'none'"),
]
_log = logging.getLogger(__name__)


class ClientGone(Exception):
    """The client has hung up, so nobody reads the answer."""


class Guard:
    """ASGI middleware that counts and limits requests, adds headers and answers defects with a plain 500.

    Args:
        app: what it is around.
        metrics: where to count.
        max_body_bytes: a larger request is answered with 413.
        paths: paths that are counted by name; "other" for the rest.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, max_body_bytes: int, paths: Collection[str]) -> None:
        self._app, self._metrics, self._max_body_bytes, self._paths = app, metrics, max_body_bytes, paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        begun, status, received = time.monotonic(), 0, 0

        async def receive_some() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self._max_body_bytes:
                raise HTTPException(413, f"the request is larger than {self._max_body_bytes} bytes")
            return message

        async def send_and_note(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {**message, "headers": [*message["headers"], *_HEADERS]}
            await send(message)

        try:
            await self._app(scope, receive_some, send_and_note)
        except Exception:
            _log.exception("defect path=%s", scope["path"])
            if status:
                raise
            answer = failure(500, "the server has failed to answer this request; its log says why")
            await answer(scope, receive, send_and_note)
        finally:
            path = scope["path"] if scope["path"] in self._paths else "other"
            self._metrics.requests.labels(path, str(status)).inc()
            self._metrics.seconds.labels(path).observe(time.monotonic() - begun)


def failure(
    status: int, text: str, problems: Sequence[dict[str, str]] = (), headers: dict[str, str] | None = None
) -> Response:
    """An answer that says what is wrong."""
    content: dict[str, Any] = {"error": text} | ({"problems": list(problems)} if problems else {})
    # In ASCII: a text may have half of a character that takes two, which UTF-8 cannot write.
    return Response(json.dumps(content), status, headers, media_type="application/json")


def add_handlers(app: FastAPI) -> None:
    """Answer every kind of error with JSON and without what the request held."""

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        found = error.errors()
        shown = [{"where": _where(each), "problem": str(each["msg"])} for each in found[:_SHOWN_PROBLEMS]]
        more = f"; the first {_SHOWN_PROBLEMS} are shown" if len(found) > _SHOWN_PROBLEMS else ""
        return failure(422, f"the request has {len(found)} problem{'s'[: len(found) != 1]}{more}", shown)

    @app.exception_handler(ServingError)
    async def unfit(_: Request, error: ServingError) -> Response:
        return failure(422, str(error))

    @app.exception_handler(Overloaded)
    async def overloaded(_: Request, error: Overloaded) -> Response:
        return failure(429, str(error), headers={"Retry-After": str(error.retry_after_s)})

    @app.exception_handler(ClientGone)
    async def gone(_: Request, __: ClientGone) -> Response:
        return failure(CLIENT_GONE, "the client has hung up")

    @app.exception_handler(HTTPException)
    async def refused(_: Request, error: HTTPException) -> Response:
        return failure(error.status_code, str(error.detail), headers=dict(error.headers or {}))


def _where(error: Mapping[str, Any]) -> str:
    """Such as "items[3]"; a name that a client has made up is cut off."""
    _, *location = error["loc"]  # in the body, or in the query
    if error["type"] == "json_invalid":
        return f"character {location[0]}"
    parts = [f"[{part}]" if isinstance(part, int) else f".{part[:80]}" for part in location]
    return "".join(parts).removeprefix(".") or "the request"
