"""The sequence store: a dataset as a directory of memory-mapped arrays. It opens in milliseconds at any size.

    meta.json                     version, features, counts, statistics, sources; each array's dtype, length and SHA-256
    offsets.npy                   int64 [U + 1]: the events of user u are [offsets[u], offsets[u + 1])
    sequence.<feature>.npy        [E] item codes, actions, times, or codes of an event feature, user after user
    context.<feature>.npy         [U] codes of a contextual feature
    item.<feature>.npy            codes of an item feature: [I], or the lists of all items one after another
    item.<feature>.offsets.npy    int64 [I + 1]: the list of item i is [offsets[i], offsets[i + 1]), for lists
    split.<split>.npy             int64 [U]: each user's first "valid" or "test" event, where the data defines splits
    request.<field>.npy           [R] requests: see Requests
    candidate.<feature>.npy       [C] item codes, actions, or codes of an event feature, request after request
    vocabulary.<feature>.*        code -> raw id: int64 [cardinality], or UTF-8 bytes and their offsets
    titles.*                      item code -> human title, where the data has titles
    segment.npy                   uint16 [E]: number of the append that brought each event, where there was one
    shard.<number>/               the parts of sequence.*, candidate.* and segment.npy, in a store in shards

U users and I items are ordered by raw id. E events are in time order within a user; ties keep the raw file's order.
Numbers are float32 instead of codes, NaN where missing: item.<feature>.npy holds [I * width] of them.
A shard holds consecutive users with their events and candidates: the shards one after another are a store without them.
layout.py declares these files, writer.py writes them, meta.py maps and checks them.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import numpy as np

from hstu.base import remote
from hstu.base.errors import DataError
from hstu.base.ids import codes_of
from hstu.data.datasets.spec import USER_FEATURE
from hstu.data.store.lake import describe, files_of
from hstu.data.store.layout import (
    META_FILE,
    NUMBER_ROLES,
    OF_CANDIDATES,
    OFFSETS_FILE,
    REQUEST_FILES,
    SEGMENT_FILE,
    TIME_FEATURES,
    FeatureMeta,
    HeldOut,
    Role,
    list_offsets_file,
    split_file,
    strings_files,
    vocabulary_stem,
)
from hstu.data.store.meta import MALFORMED, remedy
from hstu.data.store.parts import Parts, Places, Values

_CHUNK = 1 << 18
_HASHED_ON_OPENING = 8 << 20
"""Bytes whose checksums are verified at every opening, smallest files first. This takes a few milliseconds."""
NO_EVENT = -1
"""Stands for the time of the event before a user's first event."""


@dataclass(frozen=True)
class Requests:
    """R requests with C candidates in total, sorted by user and then by time; int64."""

    users: np.ndarray
    """[R] rows of the users in the store, ascending."""
    times: np.ndarray
    """[R] seconds since 1970."""
    history_ends: np.ndarray
    """[R] one past the user's last event before the request. Events in the second of the request come after it."""
    offsets: np.ndarray
    """[R + 1]: request r has the candidates [offsets[r], offsets[r + 1])."""

    def __len__(self) -> int:
        return len(self.users)

    @property
    def sizes(self) -> np.ndarray:
        """[R] number of candidates per request."""
        return np.diff(self.offsets)


class SequenceStore:
    """A read-only, memory-mapped dataset: only what is indexed is read from disk. It pickles as its path."""

    def __init__(self, path: Path, meta: dict[str, Any], most_open: int | None = None) -> None:
        self.path = path
        self.name: str = meta["name"]
        self.num_users: int = meta["num_users"]
        self.num_events: int = meta["num_events"]
        self.statistics: dict[str, Any] = meta["statistics"]
        self.sources: dict[str, str] = meta["sources"]
        self.features = {f["name"]: FeatureMeta.of(f) for f in meta["features"]}
        self.item_feature: str = self._named("item")[0]
        self.action_feature: str | None = next(iter(self._named("action")), None)
        self.timestamp_feature: str | None = next(iter(self._named("timestamp")), None)
        self.contextual_features: tuple[str, ...] = self._named("context")
        self.item_side_features: tuple[str, ...] = self._named("item_feature")
        self.event_features: tuple[str, ...] = self._named("event")
        self.item_number_features: tuple[str, ...] = self._named("item_number")
        self.event_number_features: tuple[str, ...] = self._named("event_number")
        known = TIME_FEATURES if self.timestamp_feature else {}
        self.time_features = {name: meta for name, meta in known.items() if name not in self.features}
        self.num_requests: int = meta.get("num_requests", 0)
        self.num_candidates: int = meta.get("num_candidates", 0)
        self.split: str | None = meta.get("split")
        """Column of the raw data that assigns events to splits. None: the options of a run define the splits."""
        ranges = meta.get("ranges", {}).items()
        self.ranges = {name: {key: float(first) for key, first in each.items()} for name, each in ranges}
        """Feature of --bins → its values, which are ranges of numbers → the first number of each, ascending."""
        self.running_statistics: tuple[str, ...] = tuple(meta.get("running_statistics", ()))
        """Event features that ``--running_statistics`` has made."""
        self.num_segments: int = meta.get("num_segments", 1)
        """1 plus the number of appends that brought events."""
        self.command: str | None = meta["command"]
        self._most_open = most_open
        self._files = files_of(path, meta, most_open)
        self.shard_users = self._files.shard_users
        """int64 [shards + 1]: shard k has the users [shard_users[k], shard_users[k + 1]). [0]: there are no shards."""
        self.num_shards = len(self.shard_users) - 1
        content = sorted((file, digest) for file, digest in self.checksums.items() if file != SEGMENT_FILE)
        state = hashlib.sha256(json.dumps(content).encode()).hexdigest()
        self.lineage: tuple[str, ...] = (*meta.get("earlier_states", ()), state)
        """Digests of the content after the first build and after each change of it, oldest first. The last is today's
        state. Stores of equal arrays have equal states, whatever files and commands made them."""

    @classmethod
    def open(cls, path: str | Path, most_open: int | None = None) -> SequenceStore:
        """Opens and checks a store in time independent of its size; of a URL, its local copy. Checks the version and
        checksum of the description, the presence, size, dtype and length of every array, a sample of the offsets, and
        the checksums of the smallest files up to 8 MiB. Of shards it checks presence and size, and opens none.
        verify_contents checks the rest. ``most_open``: see Parts. Raises DataError with the damage and the command that
        makes the store."""
        path = remote.stage(path, root_only=True).absolute()
        directory = _inode(path)
        try:
            store = cls._open(path, most_open)
        except DataError:
            if _inode(path) == directory:
                raise
            return cls.open(path, most_open)
        # If a writer has replaced the store in the meantime, files of both may have been read.
        return store if _inode(path) == directory else cls.open(path, most_open)

    @classmethod
    def _open(cls, path: Path, most_open: int | None) -> SequenceStore:
        meta = describe(path)
        try:
            store = cls(path, meta, most_open)
            store._files.check_presence()
        except MALFORMED as error:
            raise DataError(f"{path / META_FILE} is incomplete ({error!r}). {remedy(path, meta)}") from error
        store._check_offsets()
        store._files.check_sums(up_to=_HASHED_ON_OPENING)
        return store

    def __reduce__(self) -> tuple[Any, ...]:
        return SequenceStore.open, (self.path, self._most_open)

    def __str__(self) -> str:
        """The path or URL as it was given."""
        return remote.as_given(self.path)

    @property
    def checksums(self) -> dict[str, str]:
        """File → its SHA-256 in the description, equal for any number of shards."""
        described = self._files.described.items()
        return {file: entry["sha256"] for file, entry in described if "/" not in file} | {**self._files.sharded}

    def expect(self, shards: Sequence[int]) -> None:
        """Bring shards of a URL or a lake here, in a thread, as they are read next, in this order."""
        self._files.expect(shards)

    def feature(self, name: str) -> FeatureMeta:
        """A stored feature or a time feature. Raises DataError for an unknown name."""
        found = self.features.get(name) or self.time_features.get(name)
        if found is None:
            raise DataError(
                f"{self} has no feature {name!r}; it has: {', '.join([*self.features, *self.time_features])}"
            )
        return found

    def offsets(self) -> np.ndarray:
        """int64 [U + 1]: user u's events are [offsets[u], offsets[u + 1])."""
        return self._files[OFFSETS_FILE]

    def sequence(self, feature: str) -> Values:
        """[E] values of the item, the action, the timestamp or an event feature. Codes are int32, time features int64,
        times int64 seconds, and numbers float32, NaN where missing."""
        if feature in self.time_features:
            return self.time_codes(feature, np.arange(self.num_events))
        return self._files[self.feature(feature).file]

    def places(self, events: np.ndarray) -> Places:
        """These events, int64 [n], at which several sequences are read."""
        return Places(events, self.offsets()[self.shard_users])

    def time_codes(self, feature: str, events: np.ndarray, before: np.ndarray | None = None) -> np.ndarray:
        """int64 [n] codes of a time feature of these events. ``before``: the event that each follows (None: the one
        before it), unless it is the first of its user."""
        times, offsets = self.sequence(str(self.timestamp_feature)), self.offsets()
        is_first = offsets[np.searchsorted(offsets, events, side="right") - 1] == events
        previous = times[np.maximum(events - 1 if before is None else before, 0)]
        return time_codes(feature, times[events], np.where(is_first, NO_EVENT, previous))

    def segments(self) -> Values | None:
        """uint16 [E]: the append that brought each event, 0 for the first build. None if num_segments is 1."""
        return self._files[SEGMENT_FILE] if self.num_segments > 1 else None

    def gaps(self, events: np.ndarray) -> np.ndarray:
        """int64 [n]: seconds from the event before to each of these events, none of which is a user's first."""
        times = self.sequence(str(self.timestamp_feature))
        return np.asarray(times[events] - times[events - 1])

    def context(self, feature: str) -> np.ndarray:
        """int32 [U] codes of a contextual feature."""
        return self._files[self.feature(feature).file]

    def item_values(self, feature: str) -> tuple[np.ndarray, np.ndarray | None]:
        """(codes, offsets) of an item feature: int32 [I] and None, or for lists int32 [n] and int64 [I + 1]. Item i has
        the list codes[offsets[i] : offsets[i + 1]], of at least one code."""
        meta = self.feature(feature)
        return self._files[meta.file], self._files[list_offsets_file(feature)] if meta.is_list else None

    def item_numbers(self, feature: str) -> np.ndarray:
        """float32 [I, width]: the number or vector of each item, NaN where missing."""
        meta = self.feature(feature)
        return self._files[meta.file].reshape(-1, meta.width)

    def requests(self) -> Requests:
        """The requests. Raises DataError where the store has none."""
        if not self.num_requests:
            raise DataError(f"{self} has no requests; preprocess the data with --requests FILE")
        return Requests(**{field: self._files[file] for field, file in REQUEST_FILES.items()})

    def candidates(self, feature: str) -> Values:
        """[C] values of the item, the action or an event feature, request after request, in the dtypes of events."""
        return self._files[self.feature(feature).candidate_file]

    def candidate_times(self, candidates: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Times of the candidates' requests, and of the last events before these requests; int64 [n] each."""
        requests, times = self.requests(), self.sequence(str(self.timestamp_feature))
        rows = np.searchsorted(requests.offsets, candidates, side="right") - 1
        return requests.times[rows], times[requests.history_ends[rows] - 1]

    def columns(self, feature: str) -> list[Values]:
        """Values of an item, action or event feature: of all events and, with requests, of all candidates."""
        return [self.sequence(feature), *([self.candidates(feature)] if self.num_requests else [])]

    def least_value(self, feature: str) -> int:
        """The smallest value of an item, action or event feature over all events and candidates; reads all of them."""
        return min(int(values.min()) for values in self.columns(feature))

    def held_out(self, split: HeldOut) -> tuple[np.ndarray, np.ndarray]:
        """(begin, end), int64 [U] each: the events of a split that the data defines."""
        begin = self._files[split_file(split)]
        return begin, self._files[split_file("test")] if split == "valid" else self.offsets()[1:]

    def events_by_split(self) -> dict[str, int]:
        """Split → number of its events, where the data defines splits; else empty."""
        if self.split is None:
            return {}
        (valid, valid_end), (test, test_end) = self.held_out("valid"), self.held_out("test")
        bounds = {"train": (self.offsets()[:-1], valid), "valid": (valid, valid_end), "test": (test, test_end)}
        return {split: int((end - begin).sum()) for split, (begin, end) in bounds.items()}

    def cardinality(self, feature: str) -> int:
        """Number of codes, which lie in [0, cardinality). For user_id, the number of users."""
        if feature == USER_FEATURE:
            return self.num_users
        meta = self.feature(feature)
        if meta.cardinality is None:
            raise DataError(f"{self}: feature {feature!r} is a {meta.role} and has no cardinality")
        return meta.cardinality

    def raw_ids(self, feature: str) -> np.ndarray:
        """Code → raw id, [cardinality], int64 or str objects; for user_id and features with a vocabulary."""
        arrays = self.raw_id_arrays(feature)
        return arrays[0] if len(arrays) == 1 else self._decoded(vocabulary_stem(feature))

    def raw_id_arrays(self, feature: str) -> tuple[np.ndarray, ...]:
        """raw_ids as stored: int64 [cardinality], or int64 [cardinality + 1] offsets and UTF-8 bytes."""
        if feature != USER_FEATURE and not self.feature(feature).has_vocab:
            raise DataError(f"{self}: feature {feature!r} has no vocabulary, its values are the raw ones")
        stem = vocabulary_stem(feature)
        files = (f"{stem}.npy",) if f"{stem}.npy" in self._files else strings_files(stem)
        return tuple(self._files[file] for file in files)

    def model_ids(self, feature: str, codes: np.ndarray) -> np.ndarray:
        """Model ids of codes, int64 [n]: the codes, or the raw ids if the feature keeps them."""
        is_raw = feature in self.features and self.features[feature].raw
        return self.raw_ids(feature)[codes] if is_raw else codes.astype(np.int64, copy=False)

    def encode(self, feature: str, raw: Sequence[Any] | np.ndarray) -> np.ndarray:
        """Raw ids → codes, int64 of the same length. Raises DataError for unknown raw ids."""
        known = self.raw_ids(feature)
        wanted = np.array([str(value) for value in raw], dtype=object) if known.dtype == object else np.asarray(raw)
        if known.dtype != object and not (wanted.dtype == np.int64 or len(wanted) == 0):
            raise DataError(f"{self}: raw ids of {feature!r} are int64, got {list(raw[:5])!r}")
        order = np.argsort(known, kind="stable")  # the users of a lake may be in any order
        found = codes_of(wanted, known[order])
        codes = np.where(found < 0, found, order[found])
        unknown = wanted[codes < 0]
        if len(unknown):
            shown = ", ".join(repr(value) for value in unknown[:5].tolist()) + (", …" if len(unknown) > 5 else "")
            raise DataError(f"{self}: {len(unknown)} raw id(s) not in the vocabulary of {feature!r}: {shown}")
        return codes

    def titles(self) -> np.ndarray | None:
        """Item code → human title, str objects [cardinality]; None where the data has no titles."""
        return self._decoded("titles") if strings_files("titles")[0] in self._files else None

    def _decoded(self, stem: str) -> np.ndarray:
        offsets, utf8 = strings_files(stem)
        try:
            return decode_strings(self._files[offsets], self._files[utf8])
        except UnicodeDecodeError as error:
            raise self._files.damaged(utf8, str(error)) from error

    def verify_contents(self) -> None:
        """Checks the checksum and the values of every array. Raises a DataError that names the damaged file."""
        self._files.check_sums(up_to=None)
        self.verify_values()

    def verify_values(self) -> None:
        """Checks offsets, ranges of codes, and the order of times and splits within users. Raises DataError."""
        for file, problem in self._value_problems():
            raise self._files.damaged(file, problem)

    def _value_problems(self) -> Iterator[tuple[str, str]]:
        offsets = self.offsets()
        if (np.diff(offsets) < 1).any():
            yield OFFSETS_FILE, "a user has no events, or offsets are not ascending"
        if self.split is not None:
            bounds = (offsets[:-1], self._files[split_file("valid")], self._files[split_file("test")], offsets[1:])
            if any((after < before).any() for before, after in pairwise(bounds)):
                yield split_file("valid"), "a split begins outside the events of its user"
        for name, feature in self.features.items():
            if feature.is_list and (np.diff(self._files[list_offsets_file(name)]) < 1).any():
                yield list_offsets_file(name), "an item has no values, or offsets are not ascending"
            of_candidates = self.num_requests and feature.role in OF_CANDIDATES
            for file in (feature.file, *([feature.candidate_file] if of_candidates else [])):
                for start, values in _chunks(self._files[file]):
                    if feature.role == "timestamp":
                        backwards = start + 1 + np.flatnonzero(values[1:] < values[:-1])
                        if (offsets[np.searchsorted(offsets, backwards)] != backwards).any():
                            yield self._files.file_at(file, start), "a user's events are not in time order"
                    elif feature.role in NUMBER_ROLES:
                        if np.isinf(values).any():
                            yield self._files.file_at(file, start), "a number is infinite"
                    elif values.min() < 0 or values.max() >= self.cardinality(name):
                        yield self._files.file_at(file, start), f"values outside [0, {feature.cardinality})"
        for start, values in () if self.num_segments == 1 else _chunks(self._files[SEGMENT_FILE]):
            if int(values.max()) >= self.num_segments:
                yield self._files.file_at(SEGMENT_FILE, start), f"values outside [0, {self.num_segments})"
        if self.num_requests:
            yield from request_problems(self.requests(), offsets, self.sequence(str(self.timestamp_feature)))

    def _named(self, role: Role) -> tuple[str, ...]:
        return tuple(name for name, feature in self.features.items() if feature.role == role)

    def _check_offsets(self) -> None:
        self._files.check_ends(OFFSETS_FILE, self.num_events)
        if self.num_requests:
            self._files.check_ends(REQUEST_FILES["offsets"], self.num_candidates)
        for name in self.item_side_features:
            if self.features[name].is_list:
                self._files.check_ends(list_offsets_file(name), len(self._files[self.features[name].file]))
        if self._files.sharded:
            self._check_shards()

    def _check_shards(self) -> None:
        users = self.shard_users
        if users[0] == 0 and users[-1] == self.num_users and (np.diff(users) > 0).all():
            bounds = shard_bounds(users, self.offsets(), self.requests() if self.num_requests else None)
            arrays = {file: cast(Parts, self._files[file]) for file in self._files.sharded}
            if all(np.array_equal(parts.bounds, bounds(file)) for file, parts in arrays.items()):
                return
        raise self._files.damaged(META_FILE, "its shards are not the events and candidates of their users")

    def remedy(self) -> str:
        """The command that made the store, with --force."""
        return remedy(self.path, {"command": self.command})


def decode_strings(offsets: np.ndarray, utf8: np.ndarray) -> np.ndarray:
    """Strings as objects [n] from offsets [n + 1] into bytes."""
    text = utf8.tobytes()
    strings = np.empty(len(offsets) - 1, dtype=object)
    strings[:] = [text[begin:end].decode() for begin, end in pairwise(offsets.tolist())]
    return strings


def _inode(path: Path) -> int:
    return os.stat(path).st_ino if os.path.exists(path) else 0


def _chunks(values: Values) -> Iterator[tuple[int, np.ndarray]]:
    """Yields (start, chunk). Within a shard, chunks overlap by one value, so that the chunks have every pair of
    neighbours; users lie in one shard."""
    bounds = values.bounds.tolist() if isinstance(values, Parts) else (0, len(values))
    for begin, stop in pairwise(bounds):
        yield from ((start, values[start : min(start + _CHUNK + 1, stop)]) for start in range(begin, stop, _CHUNK))


def shard_bounds(users: np.ndarray, offsets: np.ndarray, requests: Requests | None) -> Callable[[str], np.ndarray]:
    """File in shards → the first value of each shard, int64 [shards + 1]. ``users``: first user of each shard, int64
    [shards + 1]. ``offsets``: int64 [U + 1], the events of each user."""
    of_events = offsets[users]
    of_candidates = None if requests is None else requests.offsets[np.searchsorted(requests.users, users)]
    return lambda file: of_candidates if file.startswith("candidate.") and of_candidates is not None else of_events


def request_problems(requests: Requests, offsets: np.ndarray, times: Values) -> Iterator[tuple[str, str]]:
    """Yields (file, problem). ``offsets``: int64 [U + 1], the events of each user. ``times``: int64 [E]."""
    users, ends, num_users = requests.users, requests.history_ends, len(offsets) - 1
    if (requests.sizes < 1).any():
        yield REQUEST_FILES["offsets"], "a request has no candidates, or offsets are not ascending"
    if (np.diff(users) < 0).any() or not 0 <= users[0] <= users[-1] < num_users:
        yield REQUEST_FILES["users"], f"users are not ascending, or outside [0, {num_users})"
        return
    if (np.diff(requests.times) < 0)[np.diff(users) == 0].any():
        yield REQUEST_FILES["times"], "a user's requests are not in time order"
    if ((ends <= offsets[users]) | (ends > offsets[users + 1])).any():
        yield REQUEST_FILES["history_ends"], "a history ends outside the events of its user, or is empty"
        return
    has_later = ends < offsets[users + 1]
    is_early = times[ends[has_later]] < requests.times[has_later]
    if (times[ends - 1] >= requests.times).any() or is_early.any():
        yield REQUEST_FILES["history_ends"], "a history does not end where its request is"


def time_codes(feature: str, now: np.ndarray, before: np.ndarray) -> np.ndarray:
    """int64 [n] codes of a time feature. now: int64 [n], seconds since 1970. before: int64 [n], the time of the user's
    previous event, or NO_EVENT."""
    if feature == "hour_of_day":
        return now // 3_600 % 24
    if feature == "day_of_week":
        return (now // 86_400 + 3) % 7  # 1970 began on a Thursday
    is_first = before == NO_EVENT
    _, exponent = np.frexp(1 + np.where(is_first, 0, now - before))  # exact: mantissa * 2^exponent, 0.5 <= mantissa < 1
    most = (TIME_FEATURES["time_gap"].cardinality or 0) - 1
    return np.where(is_first, 0, np.minimum(exponent, most)).astype(np.int64)
