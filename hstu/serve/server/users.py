"""The events of users, kept in SQLite or Redis, so that a request may give the id of a user instead of a history."""

from __future__ import annotations

import json
import sqlite3
import time
from bisect import bisect_left, bisect_right
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

from hstu.base.errors import ConfigError
from hstu.serve.runtime import History, ServingError
from hstu.serve.runtime.files import MOST_CONTEXTS, MOST_ITEMS_OF_CONTEXT

from .batching import Metrics
from .model import MAX_EVENTS, Answer, Event, EventsRequest, Recent, ServedModel, User

Change = Callable[[dict[bytes, str | None]], Mapping[bytes, str | None]]
"""User → events before, to user → events after, as JSON. None: no events. May be called again, if another writer came
between."""
_POSITION, _RECENT = b"\xffposition:", b"\xffpopular"
"""Keys of the store that no user has, because ids are UTF-8."""
_WAIT_S = 30
"""How long SQLite waits for another server's transaction."""
_HALF_LIFE_S, _COUNT_S = 86_400, 60
_MOST_ITEMS = 100_000
"""Of the counts of new events in all contexts: those with the most events are kept."""
_no_counts = partial(defaultdict[str, defaultdict[str, float]], partial(defaultdict[str, float], float))
_KEEPS_NONE = "this server keeps no users; start it with --users FILE"


class StoreError(Exception):
    """The store does not answer."""


def open_store(place: str) -> Store:
    """Open the store at a path (SQLite) or a URL redis://HOST:PORT/DATABASE. Raises ConfigError if it cannot."""
    try:
        return RedisStore(place) if place.startswith(("redis://", "rediss://")) else SqliteStore(place)
    except StoreError as error:
        raise ConfigError(
            f"--users {place}: {error}. Give a file, which is created if it is not there, or redis://HOST:PORT/DATABASE"
        ) from None


class SqliteStore:
    """A file with one row per user: events as JSON. Several servers of one machine may share it, and threads may read
    beside one that updates. Methods raise StoreError."""

    def __init__(self, path: str) -> None:
        with _failures(sqlite3.Error):
            self._reader, self._writer = (
                sqlite3.connect(path, timeout=_WAIT_S, isolation_level=None, check_same_thread=False) for _ in range(2)
            )
            _use_write_ahead_log(self._writer)  # reads need not wait for writes
            self._writer.execute("PRAGMA synchronous = FULL")
            self._writer.execute("CREATE TABLE IF NOT EXISTS hstu_users (user BLOB PRIMARY KEY, events TEXT NOT NULL)")

    def read(self, users: Sequence[bytes]) -> list[str | None]:
        """The events of users. None: none are known."""
        with _failures(sqlite3.Error):
            return [_events_in(self._reader, user) for user in users]

    def update(self, users: Sequence[bytes], change: Change) -> None:
        """Change the events of users in one transaction. Once it returns, a killed process loses nothing of it."""
        with _failures(sqlite3.Error):
            self._writer.execute("BEGIN IMMEDIATE")  # waits for other writers
            with self._writer:  # commits, or rolls back on an exception
                changed = change({user: _events_in(self._writer, user) for user in users})
                for user, events in changed.items():
                    if events is None:
                        self._writer.execute("DELETE FROM hstu_users WHERE user = ?", (user,))
                    else:
                        self._writer.execute("INSERT OR REPLACE INTO hstu_users VALUES (?, ?)", (user, events))

    def close(self) -> None:
        """Release the file."""
        self._reader.close()
        self._writer.close()


def _use_write_ahead_log(connection: sqlite3.Connection) -> None:
    end = time.monotonic() + _WAIT_S
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError as error:  # here SQLite does not wait for another server that does the same
            if error.sqlite_errorcode != sqlite3.SQLITE_BUSY or time.monotonic() > end:
                raise
            time.sleep(0.01)


def _events_in(connection: sqlite3.Connection, user: bytes) -> str | None:
    found = connection.execute("SELECT events FROM hstu_users WHERE user = ?", (user,)).fetchone()
    return None if found is None else found[0]


class RedisStore:
    """A Redis database with one key per user. Several servers may share it. Needs the package redis."""

    def __init__(self, url: str) -> None:
        try:
            from redis import Redis, RedisError
        except ImportError:
            raise StoreError("the package redis is missing; to install it: pip install 'hstu-trainer[redis]'") from None
        self._errors = RedisError
        with _failures(self._errors, ValueError):
            self._client: Any = Redis.from_url(url, socket_timeout=30, socket_connect_timeout=5, decode_responses=True)
            self._client.ping()

    def read(self, users: Sequence[bytes]) -> list[str | None]:
        """As of SqliteStore."""
        with _failures(self._errors):
            return list(self._client.mget(map(_key, users))) if users else []

    def update(self, users: Sequence[bytes], change: Change) -> None:
        """As of SqliteStore."""

        def run(pipe: Any) -> None:
            changed = change(dict(zip(users, pipe.mget(map(_key, users)), strict=True)))
            pipe.multi()
            for user, events in changed.items():
                pipe.delete(_key(user)) if events is None else pipe.set(_key(user), events)

        with _failures(self._errors):
            self._client.transaction(run, *map(_key, users))  # again, if another client has changed one of them

    def close(self) -> None:
        """As of SqliteStore."""
        self._client.close()


Store = SqliteStore | RedisStore


def _key(user: bytes) -> bytes:
    return b"hstu:user:" + user


@contextmanager
def _failures(*errors: type[Exception]) -> Iterator[None]:
    try:
        yield
    except errors as error:
        raise StoreError(str(error)) from error


@dataclass
class StoredEvents:
    """The events of one user, ordered by time, then by arrival. One value per event in each list."""

    items: list[Any] = field(default_factory=list)
    actions: list[Any] = field(default_factory=list)
    timestamps: list[int] = field(default_factory=list)
    ids: list[Any] = field(default_factory=list)
    features: dict[str, list[Any]] = field(default_factory=dict)

    @classmethod
    def read(cls, text: str | None) -> StoredEvents:
        """Parse what ``text`` has written. None: no events."""
        return cls() if text is None else cls(**json.loads(text))

    def text(self) -> str:
        """All but events that are older than MAX_EVENTS others, as JSON. Of events at one time, all are kept or none:
        one that was left out and comes again is left out again."""
        first = bisect_left(self.timestamps, self.timestamps[-MAX_EVENTS]) if len(self.items) > MAX_EVENTS else 0
        content = {name: getattr(self, name)[first:] for name in ("items", "actions", "timestamps", "ids")}
        return json.dumps({**content, "features": {name: each[first:] for name, each in self.features.items()}})

    @cached_property
    def _known(self) -> set[tuple[Any, str]]:
        """What events are recognized by: their ids, or else their times and items."""
        return {*map(_identity, self.ids, self.timestamps, self.items)}

    def add(self, event: Event) -> str:
        """Put an event in its place. Returns "repeated", and does nothing, or "late" or "in_order"."""
        identity = _identity(event.id, event.timestamp, event.item)
        if identity in self._known:
            return "repeated"
        self._known.add(identity)
        place, count = bisect_right(self.timestamps, event.timestamp), len(self.items)
        self.items.insert(place, event.item)
        self.actions.insert(place, event.action)
        self.timestamps.insert(place, event.timestamp)
        self.ids.insert(place, event.id)
        for name in {**self.features, **event.features}:
            self.features.setdefault(name, [None] * count).insert(place, event.features.get(name))
        return "in_order" if place == count else "late"

    def history(self, user: Any, served: ServedModel, at: int | None) -> History:
        """The newest events until ``at`` (None: all), with the features that the model needs of each event."""
        stop = len(self.items) if at is None else bisect_right(self.timestamps, at)
        missing = [None] * len(self.items)
        needed = {name: self.features.get(name, missing) for name in served.event_features}
        every = History(user, items=self.items, actions=self.actions, timestamps=self.timestamps, features=needed)
        return every.cut(slice(max(0, stop - MAX_EVENTS), stop))


def _identity(event_id: Any, time: int, item: Any) -> tuple[Any, str]:
    return (time, str(item)) if event_id is None else ("id", str(event_id))


def _stored_id(user: Any) -> bytes:
    """The id in the store: the number 7 and the text "7" are one user, as in all ids of requests."""
    return str(user).encode()


class Followed(EventsRequest):
    """Checked events of a followed source, and the place after them, as JSON, with its key in the store."""

    events: list[Event]
    key: bytes
    position: str


class Users:
    """The users of a server. ``store`` None: it keeps none."""

    def __init__(self, store: Store | None, metrics: Metrics) -> None:
        self._store, self._metrics = store, metrics
        self._recent: Recent = {}
        """The new events of all servers, as of the last time that they were counted."""
        self._counted_at, self._new = time.time(), _no_counts()  # events that this server has stored since

    def write(self, requests: Sequence[EventsRequest | str], served: ServedModel) -> list[dict[str, int] | Exception]:
        """Store the events of requests, and forget users whose ids are given, in one transaction. A request with an
        event that the model cannot read gets a ServingError, and none of its events is stored."""
        problems = [self._problem(each, served) for each in requests]
        fitting = [each for each, problem in zip(requests, problems, strict=True) if problem is None]
        counts, new = list[dict[str, int]](), list[Event]()

        def change(before: dict[bytes, str | None]) -> Mapping[bytes, str | None]:
            new.clear()
            events = {user: StoredEvents.read(before[user]) for user in before if user not in ends}
            counts[:] = [_applied(each, events, new) for each in fitting]
            texts = {user: each.text() if each.items else None for user, each in events.items()}
            return {**texts, **ends}

        ends = {each.key: each.position for each in fitting if isinstance(each, Followed)}
        ids = [[each] if isinstance(each, str) else [event.user for event in each.events] for each in fitting]
        if fitting and self._store is not None:
            self._store.update([*{_stored_id(user): None for own in ids for user in own}, *ends], change)
        for event in new:
            if event.timestamp <= time.time():
                weight = 0.5 ** ((self._counted_at - event.timestamp) / _HALF_LIFE_S)
                for context in ("", *served.contexts_of(event.context)):
                    self._new[context][str(event.item)] += weight
        for kind in ("in_order", "late", "repeated", "forgotten"):
            self._metrics.events.labels(kind).inc(sum(own.get(kind, 0) for own in counts))
        found = iter(counts)
        return [next(found) if problem is None else problem for problem in problems]

    def position(self, source: str) -> tuple[bytes, str | None]:
        """The key of the position in a followed source, and its value. Raises ConfigError without a store."""
        if self._store is None:
            raise ConfigError("--follow needs --users: a file, or redis://HOST:PORT/DATABASE, where events are kept")
        return (key := _POSITION + source.encode()), self._store.read([key])[0]

    def count_recent(self, models: Sequence[ServedModel]) -> None:
        """Add, each minute, the new events of this server to those in the store, and give models the numbers of those
        of all servers, halved with each day of their age."""
        now, is_known = time.time(), all(each.recent is self._recent for each in models)
        if self._store is None or (is_known and now - self._counted_at < _COUNT_S):
            return

        def change(before: dict[bytes, str | None]) -> Mapping[bytes, str | None]:
            counts = _no_counts()
            for at, some in (json.loads(before[_RECENT] or "[0, {}]"), (self._counted_at, self._new)):
                factor = 0.5 ** ((now - at) / _HALF_LIFE_S)
                for context, own in some.items():
                    for item, count in own.items():
                        counts[context][item] += count * factor
            self._recent = recent = {}
            for context in sorted(counts, key=lambda each: -sum(counts[each].values()))[: 1 + MOST_CONTEXTS]:
                largest = Counter(counts[context]).most_common(MOST_ITEMS_OF_CONTEXT if context else _MOST_ITEMS)
                recent[context] = {item: count for item, count in largest if count > 0.01}
            return {_RECENT: json.dumps([now, recent])} if counts else {}

        self._store.update([_RECENT], change)
        self._counted_at, self._new = now, _no_counts()
        for each in models:
            each.set_recent(self._recent)

    def filled(self, requests: Sequence[User], served: ServedModel) -> list[User | Exception]:
        """The requests, with the stored events of the user in those that give none."""
        found = list[User | Exception](requests)
        places = [place for place, request in enumerate(requests) if request.items is None]
        if not places:
            return found
        try:
            if self._store is None:
                raise ServingError("the request has no items, and this server keeps no users; give items")
            texts = self._store.read([_stored_id(requests[place].user) for place in places])
        except (ServingError, StoreError) as error:
            return [each if each.items is not None else error for each in requests]
        for place, text in zip(places, texts, strict=True):
            request, events = requests[place], StoredEvents.read(text)
            history = events.history(request.user, served, request.at)
            columns = {name: getattr(history, name) for name in ("items", "actions", "timestamps", "features")}
            filled = found[place] = request.model_copy(update=columns)
            if not history.items and served.task == "retrieval" and not served.falls_back(filled):
                found[place] = ServingError(
                    f"the user {request.user!r} has no events{' until then' * bool(events.items)}; give some to "
                    "POST /events, or items in the request"
                )
        return found

    def check(self) -> None:
        """Raise StoreError if the store does not answer. Thread-safe."""
        if self._store is not None:
            self._store.read([b""])

    def stored(self, user: str, served: ServedModel) -> Answer:
        """The events of a user, in the fields of a request, and the titles of the items. Raises as ``filled``."""
        if self._store is None:
            raise ServingError(_KEEPS_NONE)
        (found,) = self.filled([User.model_construct(user=user)], served)
        if isinstance(found, Exception):
            raise found
        titles = [each["title"] for each in served.titled(found.history.items)]
        columns = {name: getattr(found, name) for name in ("items", "actions", "timestamps", "features")}
        return {"model": served.version, **columns, "titles": titles}

    def close(self) -> None:
        """Release the store."""
        if self._store is not None:
            self._store.close()

    def _problem(self, request: EventsRequest | str, served: ServedModel) -> Exception | None:
        try:
            if self._store is None:
                raise ServingError(_KEEPS_NONE)
            if isinstance(request, EventsRequest) and not isinstance(request, Followed):
                for place, mistake in served.mistakes(request.events):
                    return ServingError(f"events[{place}]: {mistake}")
        except Exception as error:  # also a defect
            return error
        return None


def _applied(request: EventsRequest | str, events: dict[bytes, StoredEvents], new: list[Event]) -> dict[str, int]:
    """Change the events of users. Returns how many of each kind there were. Those not stored before go to ``new``."""
    if isinstance(request, str):
        user = _stored_id(request)
        forgotten, events[user] = events[user], StoredEvents()
        return {"forgotten": len(forgotten.items)}
    kinds = [events[_stored_id(event.user)].add(event) for event in request.events]
    new += [event for event, kind in zip(request.events, kinds, strict=True) if kind != "repeated"]
    return {kind: kinds.count(kind) for kind in ("in_order", "late", "repeated")}
