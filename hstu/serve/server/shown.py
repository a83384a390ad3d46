"""The log of what was shown: CSV files with one row per item, for scripts/preprocess_dataset.py --requests."""

import csv
import io
import logging
import secrets
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from hstu.base.errors import ConfigError

from .batching import ModelMetrics
from .model import Answer, RecommendRequest, ScoreRequest

_MOST_WAITING = 10_000
_log = logging.getLogger(__name__)


class ShownLog:
    """Writes what answers show to known users, in a thread, so that no answer waits for the disk or fails with it. A
    file has the rows of an hour, a server and a set of columns. Answers that cannot be written are counted. Raises
    ConfigError if ``folder`` cannot be written to."""

    def __init__(self, folder: Path, metrics: ModelMetrics) -> None:
        self.folder, self._answers, self._server = folder, metrics.shown, secrets.token_hex(4)
        self._thread, self._room = ThreadPoolExecutor(1, "shown"), threading.Semaphore(_MOST_WAITING)
        self._numbers: dict[tuple[str, ...], int] = {}
        self._has_failed = False
        try:
            folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
        except OSError as error:
            raise ConfigError(f"--shown_log {folder}: {error.strerror}. Give a folder to write to") from None

    def add(self, asked: Any, answer: Answer, request_id: str) -> None:
        """Write the items of an answer to a RecommendRequest or ScoreRequest with a user. Returns at once."""
        explains = isinstance(asked, ScoreRequest) and asked.explain  # what was shown before
        if not isinstance(asked, RecommendRequest | ScoreRequest) or asked.user is None or explains:
            return
        if self._room.acquire(blocking=False):
            self._thread.submit(self._write, asked, answer, request_id, int(time.time()))
        else:
            self._answers.labels("lost").inc()

    def close(self) -> None:
        """Write what waits."""
        self._thread.shutdown()

    def _write(self, *answered: Any) -> None:
        outcome = "written"
        try:
            if rows := _rows(*answered):
                self._append(rows)
        except Exception as error:  # of the disk, or a defect; the server goes on
            outcome = "lost"
            if not self._has_failed:
                _log.warning("what was shown cannot be written folder=%s reason=%s", self.folder, error)
        self._has_failed = outcome == "lost"
        self._answers.labels(outcome).inc()
        self._room.release()

    def _append(self, rows: list[dict[str, Any]]) -> None:
        columns = tuple(rows[0])
        number = self._numbers.setdefault(columns, len(self._numbers))
        path = self.folder / f"{datetime.now(UTC):%Y-%m-%dT%H}-{self._server}-{number}.csv"
        with path.open("ab", buffering=0) as file:
            text, begin = io.StringIO(), file.tell()
            lines = [*([] if begin else [columns]), *(each.values() for each in rows)]
            csv.writer(text, lineterminator="\n").writerows(lines)
            data = text.getvalue().encode()
            if file.write(data) < len(data):
                file.truncate(begin)
                raise OSError("the disk is full")


def _rows(asked: RecommendRequest | ScoreRequest, answer: Answer, request_id: str, now: int) -> list[dict[str, Any]]:
    """Column → value, for each item in the order of the answer."""
    if isinstance(asked, ScoreRequest):
        items, columns = asked.candidates, {**answer["scores"], **asked.candidate_features}
    else:
        items = [each["item"] for each in answer["items"]]
        columns = {"score": [each["score"] for each in answer["items"]]}
        columns["drawn"] = [int(each.get("drawn", False)) for each in answer["items"]]
    own = {"user": asked.user, "time": now if asked.at is None else asked.at, "request": request_id}
    fixed = [{**own, "item": item, "place": place, "model": answer["model"]} for place, item in enumerate(items)]
    more = [dict(zip(columns, map(_cell, values), strict=True)) for values in zip(*columns.values(), strict=True)]
    # The fixed columns come first, and no feature replaces one of them.
    return [each | others | each for each, others in zip(fixed, more, strict=True)]


def _cell(value: Any) -> Any:
    return "|".join(map(str, value)) if isinstance(value, list) else value
