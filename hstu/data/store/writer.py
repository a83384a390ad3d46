"""Writes a sequence store (see sequence_store.py) atomically, and resumes after a kill."""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import KW_ONLY, asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib.format import open_memmap

from hstu.base.errors import DataError
from hstu.base.files import Journal, exchange, put_in_place, remove, sha256, sync_tree, written_aside
from hstu.data.batches.jagged import run_offsets
from hstu.data.features.values import statistics_of_numbers
from hstu.data.store.layout import (
    DTYPES,
    IN_SHARDS,
    META_FILE,
    NUMBER_ROLES,
    OFFSETS_FILE,
    REQUEST_FILES,
    SEGMENT_FILE,
    FeatureMeta,
    Role,
    list_offsets_file,
    shard_file,
    split_file,
    strings_files,
    vocabulary_stem,
)
from hstu.data.store.meta import FORMAT, UNSHARDED_VERSION, VERSION, read_meta, sealed
from hstu.data.store.sequence_store import Requests, SequenceStore, shard_bounds

_log = logging.getLogger(__name__)


@dataclass(eq=False)
class StoreWriter:
    """Context manager that fills ``.<name>.partial`` beside the target, verifies it and renames it to the target.

    Leaving the block commits; an error removes everything. A kill or Ctrl-C leaves the partial directory. The next
    writer of the target continues from it if it has the same ``resume_key``, and clears it otherwise.
    Two writers of one target exclude each other. A writer only ever replaces a store."""

    target: Path
    _: KW_ONLY
    name: str
    command: str | None
    """Makes this store again; errors about a damaged store show it."""
    overwrite: bool = False
    """Replace an existing store, even a damaged one, if its description is valid."""
    resume_key: str | None = None
    """Identifies all that determines the content. None: never continue a killed writer."""
    shards: int = 1
    """Cut the store into so many; there are never more than users."""

    def __post_init__(self) -> None:
        self.target = Path(self.target).resolve()  # a symbolic link stays; the directory behind it is replaced
        self.statistics: Mapping[str, Any] = {}
        self.sources: Mapping[str, str] = {}
        self.ranges: dict[str, Mapping[str, float]] = {}
        """See SequenceStore.ranges."""
        self.running_statistics: tuple[str, ...] = ()
        """See SequenceStore.running_statistics."""
        self.earlier_states: tuple[str, ...] = ()
        """See SequenceStore.lineage: without today's."""
        self._num_segments = 1
        self.partial = self.target.parent / f".{self.target.name}.partial"
        self.scratch = self.partial / "scratch"
        """Working files on the target's disk, removed when the block ends; ``journal`` lists finished stages."""
        self.raw_features: set[str] = set()
        """Features of which models get the raw ids, which must be int64, instead of the codes."""
        self._features: dict[str, FeatureMeta] = {}
        self._arrays: dict[str, tuple[str, int]] = {}
        self._sharded: dict[str, Any] = {}
        self._num_users = self._num_events = self._num_requests = self._num_candidates = 0
        self._split: str | None = None
        self._check_target()

    def __enter__(self) -> StoreWriter:
        self.partial.mkdir(parents=True, exist_ok=True)
        self._lock = os.open(self.partial, os.O_RDONLY)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(self._lock).st_ino != self.partial.stat().st_ino:
                raise BlockingIOError  # another writer has just renamed the directory
            self.journal = Journal(self.scratch / "journal.json", self.resume_key)
            if not self.journal.resume():
                for path in self.partial.iterdir():
                    remove(path)
                self.scratch.mkdir()
        except BaseException as error:
            os.close(self._lock)
            if not isinstance(error, (BlockingIOError, FileNotFoundError)):
                raise
            raise DataError(f"another process is writing {self.target} just now; wait for it, or end it") from error
        return self

    def __exit__(self, kind: type[BaseException] | None, *raised: object) -> None:
        interrupted = kind is not None and not issubclass(kind, Exception)
        try:
            if kind is None:
                self._commit()
            elif not (interrupted and self.resume_key):
                self._remove_partial()
        except Exception:
            self._remove_partial()
            raise
        finally:
            os.close(self._lock)

    def write_offsets(self, offsets: np.ndarray) -> None:
        """Stores int64 [U + 1] offsets, strictly ascending from 0 to the number of events."""
        self._num_users, self._num_events = len(offsets) - 1, int(offsets[-1])
        self._create(OFFSETS_FILE, np.dtype(np.int64), len(offsets))[:] = offsets

    def create_sequence(
        self, feature: str, role: Role, *, cardinality: int | None, length: int, width: int = 1
    ) -> np.memmap:
        """A flat [length] array to fill. An array that a killed writer left keeps its content. Codes are int32.
        Timestamps (int64) and numbers (float32) have cardinality None. Numbers of items have ``width`` values per item,
        only NaN where missing. Features of a role keep the order of these calls."""
        self._features[feature] = FeatureMeta(feature, role, DTYPES[role], cardinality, has_vocab=False, width=width)
        return self._create(self._features[feature].file, np.dtype(DTYPES[role]), length)

    def written(self, feature: str, of_candidates: bool = False) -> np.ndarray:
        """The content of an array that create_sequence made, or create_candidates; read-only."""
        meta = self._features[feature]
        return np.asarray(open_memmap(self.partial / (meta.candidate_file if of_candidates else meta.file), mode="r"))

    def create_list_offsets(self, feature: str, *, items: int) -> np.memmap:
        """int64 [items + 1] to fill: item i has the values [offsets[i], offsets[i + 1]), at least one."""
        return self._create(list_offsets_file(feature), np.dtype(np.int64), items + 1)

    def write_vocabulary(self, feature: str, raw_ids: np.ndarray | Iterable[str]) -> None:
        """Stores code → raw id, ascending: an int64 array or strings. The users' vocabulary is called "user_id"."""
        if isinstance(raw_ids, np.ndarray) and raw_ids.dtype != object:
            self._create(f"{vocabulary_stem(feature)}.npy", np.dtype(np.int64), len(raw_ids))[:] = raw_ids
        else:
            self.write_strings(vocabulary_stem(feature), raw_ids)

    def write_split(self, column: str, valid: np.ndarray, test: np.ndarray) -> None:
        """Stores the splits of a raw column. ``valid``, ``test``: int64 [U], each user's first event in or after it."""
        self._split = column
        for file, begins in ((split_file("valid"), valid), (split_file("test"), test)):
            self._create(file, np.dtype(np.int64), len(begins))[:] = begins

    def create_segments(self, segments: int, length: int) -> np.memmap:
        """uint16 [length] to fill with the numbers of the appends that brought the events, below ``segments``."""
        self._num_segments = segments
        return self._create(SEGMENT_FILE, np.dtype(np.uint16), length)

    def create_requests(self, requests: int, candidates: int) -> dict[str, np.memmap]:
        """Arrays to fill, by field of Requests."""
        self._num_requests, self._num_candidates = requests, candidates
        return {
            field: self._create(file, np.dtype(np.int64), requests + (field == "offsets"))
            for field, file in REQUEST_FILES.items()
        }

    def create_candidates(self, feature: str) -> np.memmap:
        """A flat [C] array to fill with the candidates' values of an item, action or event feature."""
        meta = self._features[feature]
        return self._create(meta.candidate_file, np.dtype(meta.dtype), self._num_candidates)

    def _create(self, file: str, dtype: np.dtype, length: int) -> np.memmap:
        if file in self._arrays:
            raise ValueError(f"{file} is written twice")
        self._arrays[file] = (dtype.str, length)
        return mapped(self.partial / file, dtype, length)

    def write_strings(self, stem: str, strings: Iterable[str]) -> None:
        """Stores code → string in the files of a vocabulary or, under "titles", the items' titles, some empty."""
        encoded = [string.encode() for string in strings]
        offsets = run_offsets(np.array([len(text) for text in encoded], dtype=np.int64))
        self.write_utf8(stem, offsets, np.frombuffer(b"".join(encoded), dtype=np.uint8))

    def write_utf8(self, stem: str, offsets: np.ndarray, utf8: np.ndarray) -> None:
        """Stores code → string: string i is the bytes [offsets[i], offsets[i + 1])."""
        offsets_file, utf8_file = strings_files(stem)
        for file, array in ((offsets_file, offsets), (utf8_file, utf8)):
            self._arrays[file] = (array.dtype.str, len(array))
            np.save(self.partial / file, array)

    def _remove_partial(self) -> None:
        with suppress(OSError):  # the error that led here is worth more than that of a full or read-only disk
            remove(self.partial)

    def _commit(self) -> None:
        features = [asdict(self._described(feature)) for feature in self._features.values()]
        whole = self._cut() if min(self.shards, self._num_users) > 1 else []
        (self.partial / META_FILE).write_text(sealed(self._meta(features)), encoding="utf-8")
        self.journal.file.unlink(missing_ok=True)  # from here on, another run starts anew
        shutil.rmtree(self.scratch)
        for file in whole:
            (self.partial / file).unlink()
        SequenceStore.open(self.partial).verify_values()
        sync_tree(self.partial)
        self._check_target()
        if self.target.exists() and exchange(self.partial, self.target):
            remove(self.partial)
            return
        discarded = _discarded(self.target)
        remove(discarded)
        if self.target.exists():
            self.target.rename(discarded)
        put_in_place(self.partial, self.target)
        remove(discarded)

    def _cut(self) -> list[str]:
        """Copies the arrays of events and candidates into shards. Returns their files, which the shards replace. They
        stay until the store is whole, so that a killed writer can continue."""
        for left in self.partial.glob("shard.*"):
            remove(left)
        offsets = np.load(self.partial / OFFSETS_FILE)
        requests = None
        if self._num_requests:
            requests = Requests(**{field: np.load(self.partial / file) for field, file in REQUEST_FILES.items()})
        users = cut_users(offsets, self.shards)
        if len(users) <= self.shards:
            _log.warning("%s gets %d shards: there are no more users", self.target, len(users) - 1)
        bounds, whole = shard_bounds(users, offsets, requests), [f for f in self._arrays if f.startswith(IN_SHARDS)]
        self._sharded = {"users": users.tolist(), "sha256": {file: sha256(self.partial / file) for file in whole}}
        for file in whole:
            dtype, _ = self._arrays.pop(file)
            values = np.load(self.partial / file, mmap_mode="r")
            for shard, (begin, stop) in enumerate(pairwise(bounds(file).tolist())):
                part = shard_file(shard, file)
                self._arrays[part] = (dtype, stop - begin)
                (self.partial / part).parent.mkdir(exist_ok=True)
                np.save(self.partial / part, values[begin:stop])
        return whole

    def _meta(self, features: list[dict[str, Any]]) -> dict[str, Any]:
        optional = {
            "split": self._split, "ranges": self.ranges, "running_statistics": self.running_statistics,
            "earlier_states": self.earlier_states, "shards": self._sharded,
            "num_segments": self._num_segments if self._num_segments > 1 else None,
        }  # fmt: skip
        return {
            "format": FORMAT,
            "version": VERSION if self._sharded else UNSHARDED_VERSION,
            "name": self.name,
            "command": self.command,
            **{key: value for key, value in optional.items() if value},
            "num_users": self._num_users,
            "num_events": self._num_events,
            "num_requests": self._num_requests,
            "num_candidates": self._num_candidates,
            "features": features,
            "statistics": dict(self.statistics),
            "sources": dict(self.sources),
            "files": {
                file: {
                    "dtype": dtype,
                    "length": length,
                    "bytes": (self.partial / file).stat().st_size,
                    "sha256": sha256(self.partial / file),
                }
                for file, (dtype, length) in self._arrays.items()
            },
        }

    def _described(self, feature: FeatureMeta) -> FeatureMeta:
        feature = replace(
            feature,
            has_vocab=any(f"{vocabulary_stem(feature.name)}{end}" in self._arrays for end in (".npy", ".utf8.npy")),
            is_list=list_offsets_file(feature.name) in self._arrays,
            raw=feature.name in self.raw_features,
        )
        if feature.role not in NUMBER_ROLES:
            return feature
        values = np.load(self.partial / feature.file, mmap_mode="r").reshape(-1, feature.width)
        return replace(feature, statistics=statistics_of_numbers(values))

    def _check_target(self) -> None:
        check_replaceable(self.target)
        if is_taken(self.target) and not self.overwrite:
            raise DataError(f"{self.target} exists; --force replaces it")


def cut_users(offsets: np.ndarray, shards: int) -> np.ndarray:
    """int64 [n + 1]: the first users of n shards of about equally many events, and the number of users. n is ``shards``
    or, if that is less, the number of users. ``offsets``: int64 [U + 1], the events of each user."""
    users = len(offsets) - 1
    count = min(shards, users)
    places = np.arange(count + 1)
    nearest = np.searchsorted(offsets, np.linspace(0, offsets[-1], count + 1))
    ascending = np.maximum.accumulate(nearest - places) + places  # a user with many events takes a shard alone
    return np.minimum(ascending, users - count + places)


def restore_discarded(target: Path) -> None:
    """Put back the store that a killed writer had moved away, but not yet replaced."""
    if not target.exists() and _discarded(target).exists():
        _discarded(target).rename(target)


def _discarded(target: Path) -> Path:
    """Where the old store is until the new one is in its place, on file systems that cannot exchange them."""
    return target.parent / f".{target.name}.discarded"


def mapped(path: Path, dtype: np.dtype, length: int) -> np.memmap:
    """A flat array to fill in a file. A file that a killed process left keeps its content."""
    if not path.is_file():
        with written_aside(path) as aside:
            open_memmap(aside, mode="w+", dtype=dtype, shape=(length,))
    # Allocate all blocks first: on a full disk, writing to a mapped page would end the process with SIGBUS.
    with path.open("r+b") as stream:
        os.posix_fallocate(stream.fileno(), 0, path.stat().st_size)
    return open_memmap(path, mode="r+")


def is_taken(target: Path) -> bool:
    """Whether ``target`` exists and is not an empty directory."""
    return target.exists() and not (target.is_dir() and not any(target.iterdir()))


def check_replaceable(target: Path) -> None:
    """Raises DataError if replacing ``target`` would delete anything but a store, which may be damaged."""
    if not is_taken(target):
        return
    if not target.is_dir():
        raise DataError(f"{target} is a file; give another --output, or move it away")
    try:
        described = {META_FILE, *(files := read_meta(target)["files"]), *(file.rpartition("/")[0] for file in files)}
    except DataError as error:
        raise DataError(f"{error}. It is not replaced: move it away, or give another --output") from error
    if foreign := sorted({str(path.relative_to(target)) for path in target.rglob("*")} - described):
        shown = ", ".join(foreign[:5]) + (", …" if len(foreign) > 5 else "")
        raise DataError(f"{target} holds files that are not of the store: {shown}; move them away")
