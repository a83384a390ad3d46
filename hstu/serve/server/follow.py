"""Follow a source of events, a file of JSON lines that grows or a Kafka topic, beside POST /events."""

import asyncio
import hashlib
import json
import logging
import math
import re
import time
from collections.abc import Callable
from functools import partial
from itertools import accumulate, islice
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from hstu.base.errors import ConfigError
from hstu.base.topic import TopicReader

from .batching import Batcher, Metrics
from .model import Event, ServedModel
from .users import Followed, Users

_MOST_EVENTS, _MOST_BYTES, _HEAD_BYTES = 256, 1 << 20, 1024
_IDLE_S, _LOOK_S, _LONGEST_WAIT_S = 1.0, 5.0, 30.0
_SHOWN = 10
Current = Callable[[], ServedModel]
Lines = list[tuple[str, bytes]]
"""(place in the source, content) of each event. Readers return them with the position after them, which is JSON."""
_log = logging.getLogger(__name__)


class GrowingFile:
    """Lines of a file, and before it of those that it was renamed to: FILE.1, FILE-20260131."""

    def __init__(self, path: Path) -> None:
        if path.is_dir() or not path.parent.is_dir():
            raise ConfigError(f"--follow {path}: give a file, in a folder that is there, or kafka://host:port/topic")
        self._path, self.backlog = path, 0

    def read(self, position: Any) -> tuple[Lines, Any]:
        """The next whole lines. Raises OSError."""
        former = re.compile(rf"{re.escape(self._path.name)}[.-]\d+")
        renamed = [each for each in self._path.parent.iterdir() if former.fullmatch(each.name)]
        files = [*sorted(renamed, key=lambda each: each.stat().st_mtime_ns), self._path]
        offset, head = position or (0, _head(self._path, 0))
        known = [place for place, each in enumerate(files) if each.exists() and _head(each, offset) == head]
        if not known and self._path.exists():
            text = "follow source=%s: truncated or replaced after byte %d; what was not read is lost; reading it anew"
            _log.warning(text, self._path, offset)
        files, offset = (files[known[-1] :], offset) if known else (files[-1:], 0)
        while True:
            is_left = len(files) > 1 and time.time() - files[0].stat().st_mtime > _LOOK_S  # nobody writes to it
            with files[0].open("rb") as opened:
                opened.seek(offset)
                lines = [*islice(iter(partial(opened.readline, _MOST_BYTES), b""), _MOST_EVENTS)]
            if lines and not lines[-1].endswith(b"\n") and len(lines[-1]) < _MOST_BYTES and not is_left:
                lines.pop()
            if lines or not is_left:
                break
            files, offset = files[1:], 0
        begins = [*accumulate(map(len, lines), initial=offset)]
        self.backlog = sum(each.stat().st_size for each in files if each.exists()) - begins[-1]
        found = [(f"{files[0].name}, byte {begin}", line) for begin, line in zip(begins, lines, strict=False)]
        return found, (begins[-1], _head(files[0], begins[-1]))


def _head(file: Path, offset: int) -> str:
    """What a file is known by of which ``offset`` bytes were read. Empty if it is shorter."""
    with file.open("rb") as opened:
        head = opened.read(min(offset, _HEAD_BYTES))
    return hashlib.sha256(head).hexdigest() if file.stat().st_size >= offset else ""


class Topic:
    """Messages of a Kafka topic. A position is partition → offset of its next message."""

    def __init__(self, url: str) -> None:
        self._reader, self._ends, self._next_look = TopicReader("--follow", url), dict[str, int](), 0.0
        self._after: Any = None  # where the reader is
        self.backlog = 0

    def read(self, position: Any) -> tuple[Lines, Any]:
        """The messages that come within a second. Raises DataError or KafkaException."""
        position, begins, after, self._after = dict(position or {}), dict[int, int](), self._after, None
        if position != after or time.monotonic() >= self._next_look:
            for partition, (low, high) in self._reader.offsets().items():
                begin = position.get(str(partition), low)
                if not low <= begin <= high:
                    text = "follow topic=%s partition=%d: the messages from %d on are gone; reading from %d"
                    _log.warning(text, self._reader.topic, partition, begin, low)
                    begin = low
                begins[partition] = position[str(partition)] = begin
                self._ends[str(partition)] = high
            self._next_look = time.monotonic() + _LOOK_S
        found = Lines()
        for message in self._reader.read(_MOST_EVENTS, _IDLE_S, begins):
            partition, offset = message.partition() or 0, message.offset() or 0
            found.append((f"partition {partition}, offset {offset}", message.value() or b""))
            position[str(partition)] = offset + 1
        self._after = position
        self.backlog = sum(max(0, end - position[name]) for name, end in self._ends.items())
        return found, position


class Follower:
    """Stores the events of a source by ``writer``, with the position after them, so that a crash loses none. ``model``:
    returns the one that must be able to read them. Raises ConfigError for what is no source."""

    def __init__(self, source: str, users: Users, writer: Batcher, model: Current, metrics: Metrics) -> None:
        self._source, self._writer, self._model, self._metrics = source, writer, model, metrics
        self._reader = Topic(source) if source.startswith("kafka://") else GrowingFile(Path(source).absolute())
        self._key, stored = users.position(source)
        kept: tuple[Any, float] = json.loads(stored) if stored else (None, -math.inf)
        self._position, self._newest = kept
        metrics.followed_age.set_function(lambda: time.time() - self._newest)
        metrics.followed_backlog.set_function(lambda: self._reader.backlog)

    async def run(self) -> None:
        """Follow until cancelled. What could not be stored is read again."""
        failures = 0
        while True:
            try:
                wait_s, failures = await self._advance(), 0
            except Exception as error:  # also a defect
                wait_s, failures = min(_LONGEST_WAIT_S, 0.5 * 2**failures), min(failures + 1, 9)
                reason = f"{type(error).__name__}: {error}"
                _log.warning("follow source=%s: %s; trying again in %g s", self._source, reason, wait_s)
            await asyncio.sleep(wait_s)

    async def _advance(self) -> float:
        """Store the next events. Returns the seconds to wait."""
        events, refused, position = await asyncio.to_thread(self._read)
        if events or refused:
            newest = max([self._newest, *(each.timestamp for each in events if each.timestamp <= time.time())])
            text = json.dumps([position, newest])
            await self._writer.ask(Followed(events=events, key=self._key, position=text), len(events))
            self._newest = newest
            self._metrics.events.labels("refused").inc(len(refused))
            for reason in refused[:_SHOWN]:
                _log.warning("follow source=%s: refused %s", self._source, reason)
        self._position = position
        return 0.0 if events or refused else _IDLE_S

    def _read(self) -> tuple[list[Event], list[str], Any]:
        """(the next events that the model can read, why others are none, the position after them)."""
        found, refused = dict[str, Event](), list[str]()
        lines, position = self._reader.read(self._position)
        for place, line in lines:
            try:
                found[place] = Event.model_validate_json(line)
            except ValidationError as error:
                first = error.errors(include_input=False)[0]
                refused.append(" ".join([f"{place}:", *map(str, first["loc"]), first["msg"]]))
        places = [*found]
        for number, mistake in self._model().mistakes([*found.values()]):
            refused.append(f"{places[number]}: {mistake}")
            del found[places[number]]
        return [*found.values()], refused, position
