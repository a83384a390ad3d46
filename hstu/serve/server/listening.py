"""Listen, limit how long connections wait, and end in order."""

import asyncio
import math
import signal
import socket
import time
from types import FrameType
from typing import Any

import h11
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from hstu.base.errors import ConfigError

from .batching import Settings

_BACKLOG = 256


class Server(uvicorn.Server):
    """Takes requests for ``drain_s`` seconds after SIGTERM, while GET /ready answers 503, and then ends in order.
    Ctrl-C, or a second SIGTERM, ends these seconds. Answers in them end their connections, so that no proxy sends its
    next request into a connection that closes."""

    def __init__(self, app: FastAPI, settings: Settings) -> None:
        config = uvicorn.Config(
            app,
            http=Connection,
            loop="asyncio",
            ws="none",
            lifespan="on",
            log_config=None,
            log_level="warning",
            access_log=False,
            server_header=False,
            timeout_keep_alive=settings.request_s,
            timeout_graceful_shutdown=settings.shutdown_s,
            limit_concurrency=4 * settings.max_waiting + 64,
        )
        super().__init__(config)
        self._app, self._drain_s, self._ends = app, settings.drain_s, math.inf

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to end."""
        is_first, self._app.state.is_draining = not self._app.state.is_draining, True
        if sig == signal.SIGTERM and is_first:
            self._ends = time.monotonic() + self._drain_s
        else:
            super().handle_exit(sig, frame)

    async def on_tick(self, counter: int) -> bool:
        """Whether to stop listening. Called 10 times per second."""
        if time.monotonic() >= self._ends:
            self.should_exit = True
        return await super().on_tick(counter)


class _Parser(h11.Connection):
    """Gives out the headers of an answer with its body, so that both leave in one packet."""

    _headers = b""

    def send(self, event: Any) -> Any:
        """What to write for an event."""
        found, self._headers = self._headers + (super().send(event) or b""), b""
        if isinstance(event, h11.Response):
            found, self._headers = b"", found
        return found


class Connection(H11Protocol):
    """A connection that must send each request, with its body, within ``timeout_keep_alive`` seconds: ``timer`` ends
    it, and is cancelled while a request is being answered. While ``limit_concurrency`` connections are open, a new one
    ends the one that has waited longest for a request."""

    timer: asyncio.TimerHandle

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Wait for the first request."""
        super().connection_made(transport)
        self.conn = _Parser(h11.SERVER)
        self.timer = self.loop.call_later(self.timeout_keep_alive, transport.abort)
        if len(self.connections) >= (self.limit_concurrency or 0):
            known = (each for each in self.connections if isinstance(each, Connection))
            longest = min((each for each in known if not each.timer.cancelled()), key=lambda each: each.timer.when())
            longest.timer.cancel()
            longest.transport.abort()

    def handle_events(self) -> None:
        """Stop waiting once a request is complete."""
        super().handle_events()
        if self.conn.their_state not in (h11.IDLE, h11.SEND_BODY):
            self.timer.cancel()

    def on_response_complete(self) -> None:
        """Wait for the next request, which may have arrived already."""
        self.timer.cancel()
        self.timer = self.loop.call_later(self.timeout_keep_alive, self.transport.abort)
        super().on_response_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        """Release the connection."""
        self.timer.cancel()
        super().connection_lost(exc)


def bound(host: str, port: int) -> socket.socket:
    """Create a listener. Raises ConfigError if it cannot."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family, backlog=_BACKLOG)
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # or bodies wait 40 ms for the client's ACK
        return listener
    except OSError as error:
        raise ConfigError(
            f"cannot listen at {host}, port {port}: {error.strerror}. Choose another with --port; 0 takes a free one"
        ) from None
