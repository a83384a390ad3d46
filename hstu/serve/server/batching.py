"""Compute waiting requests in batches."""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from .settings import Metrics, Settings

Compute = Callable[[Sequence[Any]], Sequence[Any]]
"""Queries → answers, in order. An exception instead of an answer is raised in the ``ask`` of its query."""


class Overloaded(Exception):
    """The queue of waiting requests is full."""

    def __init__(self, retry_after_s: int) -> None:
        super().__init__(f"too many requests wait; try again in {retry_after_s} s")
        self.retry_after_s = retry_after_s


@dataclass(eq=False)
class _Waiting:
    query: Any
    answer: asyncio.Future[Any]
    since: float = field(default_factory=time.monotonic)


class Batcher:
    """Computes batches of waiting queries, one at a time, with ``compute`` in a single separate thread.

    A batch of 1 to ``max_batch`` queries starts when it is full or its oldest query has waited ``max_wait_s``. During
    a batch, queries gather for the next.
    """

    def __init__(self, compute: Compute, settings: Settings, metrics: Metrics) -> None:
        self._compute, self._settings, self._metrics = compute, settings, metrics
        self._queue: deque[_Waiting] = deque()
        self._changed = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="compute")
        self._is_closing = False
        self._seconds_per_query = 0.01
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Start computing. Call it once, in the event loop."""
        self._task = asyncio.create_task(self._run())

    async def close(self) -> None:
        """Compute the waiting queries, then stop."""
        self._is_closing = True
        self._changed.set()
        if self._task is not None:
            await self._task
        self._thread.shutdown()

    async def ask(self, query: Any) -> Any:
        """Answer a query. Raises Overloaded, or the exception that ``compute`` returns or raises."""
        if len(self._queue) >= self._settings.max_waiting:
            raise Overloaded(max(1, math.ceil(len(self._queue) * self._seconds_per_query)))
        waiting = _Waiting(query, asyncio.get_running_loop().create_future())
        self._queue.append(waiting)
        self._changed.set()
        self._metrics.waiting.set(len(self._queue))
        return await waiting.answer

    async def _run(self) -> None:
        while not (self._is_closing and not self._queue):
            self._changed.clear()
            if not self._queue:
                await self._changed.wait()
            elif (patience := self._patience_s()) > 0:
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._changed.wait(), patience)
            else:
                await self._answer(self._take())

    def _patience_s(self) -> float:
        """Seconds until the next batch must start."""
        if self._is_closing or len(self._queue) >= self._settings.max_batch:
            return 0.0
        return self._queue[0].since + self._settings.max_wait_s - time.monotonic()

    def _take(self) -> list[_Waiting]:
        count = min(len(self._queue), self._settings.max_batch)
        batch = [self._queue.popleft() for _ in range(count)]
        self._metrics.waiting.set(len(self._queue))
        return batch

    async def _answer(self, batch: list[_Waiting]) -> None:
        begun = time.monotonic()
        answers: Sequence[Any]
        try:
            queries = [waiting.query for waiting in batch]
            answers = await asyncio.get_running_loop().run_in_executor(self._thread, self._compute, queries)
        except Exception as error:  # a defect fails this batch, but not the server
            answers = [error] * len(batch)
        seconds = time.monotonic() - begun
        self._metrics.batch_sizes.observe(len(batch))
        self._metrics.batch_seconds.observe(seconds)
        self._seconds_per_query += 0.1 * (seconds / len(batch) - self._seconds_per_query)
        for waiting, answer in zip(batch, answers, strict=True):
            if waiting.answer.done():  # its request was cancelled
                continue
            if isinstance(answer, Exception):
                waiting.answer.set_exception(answer)
            else:
                waiting.answer.set_result(answer)
