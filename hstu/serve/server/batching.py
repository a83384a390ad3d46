"""Settings and metrics of the server, and the batches in which it computes waiting requests."""

import asyncio
import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, Summary

_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
BATCH_SIZE = 8192
"""Largest total size of the queries of a batch, except one that is larger alone."""
_SMALL, _LOOP_S = 256, 0.05
"""Queries below this size are small. The event loop computes them while one takes less than these seconds."""
Compute = Callable[[Sequence[Any]], Sequence[Any]]
"""Queries → answers, in order. An exception instead of an answer is raised in the ``ask`` of its query."""


@dataclass(frozen=True)
class Settings:
    """Settings of a server. ``hstu-serve --help`` explains those that are options."""

    max_batch: int = 32
    threads: int = 1
    """Threads per batch. More threads slow small models down, because every operator synchronizes them."""
    max_waiting: int = 256
    max_waiting_per_client: int = 64
    max_body_bytes: int = 1 << 20
    poll_s: float = 5.0
    request_s: int = 30
    """Seconds in which a connection must send its next request. Otherwise it is closed."""
    shutdown_s: int = 20
    """Seconds for running requests to finish after SIGTERM."""
    log_format: str = "text"
    api_keys: Path | None = None
    drain_s: float = 0
    users: str | None = None
    follow: str | None = None
    items: Path | None = None
    shown_log: Path | None = None
    cache_bytes: int = 256 << 20
    """Of each model, for keys and values of users whose ids requests give."""
    map_exports: bool = False
    second_model: Path | None = None
    second_share: float = 1.0
    shadow: bool = False


class ModelMetrics:
    """Prometheus metrics of a model that answers. ``prefix``: of their names."""

    def __init__(self, registry: CollectorRegistry, prefix: str) -> None:
        self.registry = registry
        self.timing = timing = partial(Histogram, buckets=_SECONDS, registry=registry)
        self.answer_seconds = timing(f"{prefix}_answer_seconds", "Time to answer by the model, with waiting")
        self.batch_seconds = timing(f"{prefix}_batch_seconds", "Time to compute a batch")
        self.batch_sizes = Histogram(f"{prefix}_batch_size", "Requests in a batch", buckets=_SIZES, registry=registry)
        self.waiting = Gauge(f"{prefix}_waiting_requests", "Requests that wait to be computed", registry=registry)
        self.gone = Counter(f"{prefix}_gone_requests", "Requests whose client left the queue", registry=registry)
        self.cache_bytes = Gauge(f"{prefix}_cache_bytes", "Memory of keys and values of users", registry=registry)
        self.shown = Counter(f"{prefix}_shown", "Answers in the log of what was shown", ["outcome"], registry=registry)
        self.swaps = Counter(f"{prefix}_model_swaps", "Newer exports that have replaced older ones", registry=registry)
        self.refused = Gauge(f"{prefix}_refused_exports", "Exports that could not be loaded", registry=registry)
        self.model = Gauge(f"{prefix}_model", "1 for the model in use", ["version", "task"], registry=registry)


class Metrics(ModelMetrics):
    """Prometheus metrics of one server, and of its first model."""

    def __init__(self) -> None:
        super().__init__(registry := CollectorRegistry(), "hstu")
        ProcessCollector(registry=registry)
        self.requests = Counter("hstu_requests", "Answered requests", ["path", "status"], registry=registry)
        self.seconds = self.timing("hstu_request_seconds", "Time from a request to its answer", ["path"])
        self.events = Counter("hstu_events", "Events stored, forgotten or refused", ["kind"], registry=registry)
        self.followed_age = Gauge("hstu_followed_age_seconds", "Age of the newest followed event", registry=registry)
        self.followed_backlog = Gauge("hstu_followed_backlog", "Bytes or messages to be followed", registry=registry)
        self.shadow = Counter("hstu_shadow", "Requests to the shadow", ["outcome"], registry=registry)
        self.overlap = Summary("hstu_shadow_overlap", "Part of the items that both models have", registry=registry)
        text = "Mean absolute difference of the scores of both models"
        self.score_difference = Summary("hstu_shadow_score_difference", text, registry=registry)


class Overloaded(Exception):
    """The queue of waiting requests is full, or has too many of one client."""

    def __init__(self, retry_after_s: int, whose: str) -> None:
        super().__init__(f"too many requests{whose} wait; try again in {retry_after_s} s")
        self.retry_after_s = retry_after_s


@dataclass(eq=False)
class _Waiting:
    query: Any
    size: int
    client: str
    turn: int
    """Of two equally small queries, the one with the lower turn comes first."""
    in_loop: bool
    answer: asyncio.Future[Any]


class Batcher:
    """Computes batches of waiting queries, one at a time, with ``compute`` in a single separate thread.

    During a batch, queries gather for the next, of at most ``max_batch``. It takes the smallest, so that they do not
    wait for many large ones; among equally small ones, those of all clients in turn. A batch after one that has left
    out the oldest query takes it.
    """

    def __init__(self, compute: Compute, settings: Settings, metrics: ModelMetrics) -> None:
        self._compute, self._settings, self._metrics = compute, settings, metrics
        self._queue: list[_Waiting] = []
        self._is_oldest_next = False
        self._turn = 0
        self._last_turns: dict[str, int] = {}
        self._changed = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="compute")
        self._is_closing = False
        self._seconds_per_query = 0.01

    def start(self) -> None:
        """Start computing. Call it once, in the event loop."""
        self._task = asyncio.create_task(self._run())

    async def close(self) -> None:
        """Compute the waiting queries for which somebody waits, then stop."""
        self._queue = [each for each in self._queue if not each.answer.done()]
        self._is_closing = True
        self._changed.set()
        await self._task
        self._thread.shutdown()

    async def ask(self, query: Any, size: int = 0, client: str = "", in_loop: bool = False) -> Any:
        """Answer a query of ``size`` events and candidates, unless it is cancelled while it waits.

        Raises Overloaded, or the exception of ``compute``. ``client``: whose queries may wait in a limited number.
        ``in_loop``: the event loop may compute it, if it is small and waits alone, because that waits for no disk and
        no other program. Going to the thread and back waits for a core twice on busy machines.
        """
        own = sum(each.client == client for each in self._queue) if client else 0
        is_limited = own >= self._settings.max_waiting_per_client
        if is_limited or len(self._queue) >= self._settings.max_waiting:
            retry_after_s = max(1, math.ceil(len(self._queue) * self._seconds_per_query))
            raise Overloaded(retry_after_s, f" of {client}" * is_limited)
        # Start-time fair queueing: a client's next turn is after its last, and not before the one that is being served.
        turn = self._last_turns[client] = max(self._turn, self._last_turns.get(client, -1) + 1)
        answer, in_loop = asyncio.get_running_loop().create_future(), in_loop and size < _SMALL
        waiting = _Waiting(query, size, client, turn, in_loop, answer)
        self._queue.append(waiting)
        self._changed.set()
        self._metrics.waiting.set(len(self._queue))
        try:
            found = await waiting.answer
        finally:
            if waiting in self._queue:  # it was cancelled
                self._queue.remove(waiting)
                self._metrics.gone.inc()
                self._metrics.waiting.set(len(self._queue))
        if isinstance(found, Exception):
            raise found
        return found

    async def run(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call a function between two batches of the thread. Queries in the event loop do not wait for it."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, function, *arguments)

    async def _run(self) -> None:
        while self._queue or not self._is_closing:
            await (self._answer(self._next_batch()) if self._queue else self._changed.wait())
            self._changed.clear()

    def _next_batch(self) -> list[_Waiting]:
        """Take the next batch from the queue. Small queries are equally small."""
        oldest = self._queue[0] if self._is_oldest_next else None
        order = sorted(self._queue, key=lambda one: (one is not oldest, (one.size // _SMALL).bit_length(), one.turn))
        count = sum(total <= BATCH_SIZE for total in accumulate(each.size for each in order))
        batch = order[: min(max(1, count), self._settings.max_batch)]
        self._is_oldest_next = self._queue[0] not in batch
        self._turn = max(self._turn, *(each.turn for each in batch))
        self._queue = [each for each in self._queue if each not in batch]
        self._metrics.waiting.set(len(self._queue))
        return batch

    async def _answer(self, batch: list[_Waiting]) -> None:
        begun = time.monotonic()
        answers: Sequence[Any]
        try:
            queries, is_alone = [waiting.query for waiting in batch], len(batch) == 1 and not self._queue
            in_loop = is_alone and batch[0].in_loop and self._seconds_per_query < _LOOP_S
            answers = self._compute(queries) if in_loop else await self.run(self._compute, queries)
        except Exception as error:  # a defect fails this batch, but not the server
            answers = [error] * len(batch)
        seconds = time.monotonic() - begun
        self._metrics.batch_sizes.observe(len(batch))
        self._metrics.batch_seconds.observe(seconds)
        self._seconds_per_query += 0.1 * (seconds / len(batch) - self._seconds_per_query)
        for waiting, answer in zip(batch, answers, strict=True):
            if not waiting.answer.done():  # else its request was cancelled
                waiting.answer.set_result(answer)
