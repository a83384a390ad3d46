"""How far preprocessing is and how long it will take: a bar on a terminal, now and then a line elsewhere."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

import duckdb
from tqdm import tqdm

READING, NUMBERING, WRITING = 1.0, 0.3, 1.0
"""Work of the stages, in units of reading the logs; measured."""
_log = logging.getLogger(__name__)
_POLL_S = 0.5
_LINE_EVERY_S = 30.0


class Progress:
    """Work done of all the work, in any unit; stages announce what they do and DuckDB tells how far it is."""

    def __init__(self, unit: float) -> None:
        """``unit``: the work of reading the logs."""
        self.unit = unit
        total = unit * (READING + NUMBERING + WRITING)
        self._bar: tqdm[NoReturn] = tqdm(
            total=total,
            disable=None,
            bar_format="{desc}: {percentage:3.0f}%|{bar}| {elapsed} elapsed, {remaining} left",
        )
        self._done, self._total = 0.0, total
        self._skipped = 0.0
        self._begun = self._last_line = time.monotonic()

    def skip(self, work: float) -> None:
        """Work that an earlier run has done: it says nothing about the speed of this one."""
        self._skipped += work
        self._advance(work)

    @contextmanager
    def stage(self, what: str, work: float, engine: duckdb.DuckDBPyConnection | None = None) -> Iterator[None]:
        """``work`` is done when the block is left; meanwhile ``engine`` is asked how far its query is."""
        self._bar.set_description(what)
        begun, finished = self._done, threading.Event()
        poller = None
        if engine is not None and not self._bar.disable:
            poller = threading.Thread(target=self._poll, args=(engine, begun, work, finished), daemon=True)
            poller.start()
        try:
            yield
        finally:
            finished.set()
            if poller is not None:
                poller.join()
        self._advance(begun + work - self._done)
        self._tell(what)

    def close(self) -> None:
        """Ends the bar."""
        self._bar.close()

    def _poll(self, engine: duckdb.DuckDBPyConnection, begun: float, work: float, finished: threading.Event) -> None:
        while not finished.wait(_POLL_S):
            share = max(0.0, min(engine.query_progress(), 100.0)) / 100
            self._advance(max(0.0, begun + share * work - self._done))

    def _advance(self, work: float) -> None:
        self._done += work
        self._bar.update(work)

    def _tell(self, what: str) -> None:
        now = time.monotonic()
        worked = self._done - self._skipped
        if not self._bar.disable or now - self._last_line < _LINE_EVERY_S or worked <= 0:
            return
        self._last_line = now
        left = (now - self._begun) * (self._total - self._done) / worked
        _log.info("%s: %.0f %% done, about %.0f s left", what, 100 * self._done / self._total, left)
