"""Reads and checks the description of a store, meta.json, and maps the files that it describes."""

from __future__ import annotations

import hashlib
import json
import os
import tokenize
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from threading import Thread
from typing import Any, cast

import numpy as np
from numpy.lib.format import open_memmap

from hstu.base import remote
from hstu.base.errors import DataError, printable
from hstu.base.files import sha256
from hstu.base.json_shape import check_shape
from hstu.base.shipped import command
from hstu.data.batches.jagged import run_offsets
from hstu.data.datasets import resolve_name
from hstu.data.store.layout import IN_SHARDS, META_FILE, lengths_of_files, shard_file
from hstu.data.store.parts import Parts, Values

FORMAT = "hstu-sequence-store"
VERSION = 5
"""The newest version that this program reads: that of stores in shards."""
UNSHARDED_VERSION = 4
_SEAL = "sha256"
MALFORMED = (KeyError, TypeError, IndexError, ValueError, OverflowError, AttributeError, StopIteration)
"""Errors that reading a valid JSON file raises where it does not describe a store."""


def read_meta(path: Path) -> dict[str, Any]:
    """Reads the description of a store. Raises DataError for a newer version or a wrong checksum."""
    if not os.path.isdir(path):  # Path.is_dir raises for a name that is too long
        raise DataError(f"no preprocessed data at {path}")
    try:
        meta = json.loads((path / META_FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{path} is not a sequence store: it has no {META_FILE}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path / META_FILE} cannot be read ({error})") from error
    if not isinstance(meta, dict) or meta.get("format") != FORMAT:
        raise DataError(f"{path / META_FILE} does not describe a sequence store")
    if meta.pop(_SEAL, None) != _digest(meta):
        raise DataError(f"{path / META_FILE} is damaged: its checksum is wrong")
    try:
        check_shape(meta, {"version": int})
        if meta["version"] > VERSION:
            raise DataError(
                f"{path} has store version {meta['version']}, and this program reads version {VERSION}: a newer "
                "program wrote it. Update this program"
            )
        check_shape(meta, {"files": {str: {"bytes": int, "dtype": str, "length": int, "sha256": str}}})
        check_shape(meta, {"shards?": {"users": [int], "sha256": {str: str}}})
        names = {file for file in meta["files"] if "/" not in file} - {"", ".."}
        if outside := meta["files"].keys() - names - set(_files_of_shards(meta)):
            raise ValueError(f"it lists {min(outside)!r}, which is no file of the store")
    except ValueError as error:
        raise DataError(f"{path / META_FILE} is damaged: {error}") from error
    return meta


def remedy(path: Path, meta: Mapping[str, Any] | None) -> str:
    """The command that makes the store: the one recorded in ``meta``, else a guess from the directory's name. Without a
    valid description, even --force replaces nothing: the user must move the directory away."""
    given = remote.as_given(path)
    end = " --force" if meta is not None else " (first move what is there away)" if os.path.exists(path) else ""
    script = command("scripts/preprocess_dataset.py")
    if meta and (made_by := str(meta.get("command") or "")):
        made_by = made_by.replace("python scripts/preprocess_dataset.py", script, 1)
        return f"Make it with: {printable(made_by, keep='')}{end}"
    if name := resolve_name(path.name):
        return f"Make it with: {script} --dataset_name {name} --output {given}{end}"
    return (
        f"Make it with: {script} --dataset_name NAME --output {given} (a built-in NAME), or from your own table "
        f"with: {script} --dataset_name NAME --interactions FILE --user COLUMN --item COLUMN --output {given}{end}"
    )


def _files_of_shards(meta: Mapping[str, Any]) -> Iterator[str]:
    """The files that the shards of a description consist of."""
    shards = meta.get("shards", {"users": [], "sha256": {}})
    for file in shards["sha256"]:
        if "/" not in file and file.startswith(IN_SHARDS):
            yield from (shard_file(shard, file) for shard in range(len(shards["users"]) - 1))


def sealed(meta: Mapping[str, Any]) -> str:
    """The JSON of a store's description, with a checksum of its content."""
    return json.dumps({**meta, _SEAL: _digest(meta)}, indent=1, ensure_ascii=False)


def _digest(meta: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()


class StoreFiles:
    """Maps a file name to its array, a read-only memory map. Checks raise a DataError that names the damaged file.

    A file that lies in shards has its name without the shard, and is an array of type Parts, which opens them as they
    are read."""

    def __init__(self, path: Path, meta: Mapping[str, Any], most_open: int | None = None) -> None:
        self.path = path
        self._meta = meta
        self._most_open = most_open
        self.described: Mapping[str, Any] = meta["files"]
        shards = meta.get("shards", {"users": [0], "sha256": {}})
        self.shard_users = np.array(shards["users"], dtype=np.int64)
        """int64 [shards + 1]: shard k has the users [shard_users[k], shard_users[k + 1]). [0]: there are no shards."""
        self.sharded: Mapping[str, str] = shards["sha256"]
        """File that lies in shards → SHA-256 of the same file of a store without shards."""
        self._maps: dict[str, np.ndarray] = {}
        self._staged = remote.origin(path)
        """The URL or the lake of which this has the arrays. Its shards are brought here when they are first read. None:
        all is here."""
        self._ahead: Thread | None = None
        self._expected: Sequence[int] = ()

    def __contains__(self, file: str) -> bool:
        return file in self.described or file in self.sharded

    def __getitem__(self, file: str) -> np.ndarray:
        if file not in self._maps:
            found = self._parts(file) if file in self.sharded else self._map(file)
            self._maps[file] = cast(np.ndarray, found)
        return self._maps[file]

    def _parts(self, file: str) -> Parts:
        described = [self.described[shard_file(shard, file)] for shard in range(len(self.shard_users) - 1)]
        (dtype,) = {each["dtype"] for each in described}
        bounds = run_offsets([each["length"] for each in described])
        return Parts(bounds, np.dtype(dtype), lambda shard: self._map(shard_file(shard, file)), self._most_open)

    def _map(self, file: str) -> np.ndarray:
        try:
            array = np.asarray(open_memmap(self._local(file), mode="r"))
        except (*MALFORMED, OSError, EOFError, SyntaxError, tokenize.TokenError) as error:
            raise self.damaged(file, str(error)) from error
        expected = self.described[file]
        if array.dtype.str != expected["dtype"] or array.shape != (expected["length"],):
            found = f"{array.dtype.str} {list(array.shape)}"
            raise self.damaged(file, f"it holds {found} instead of {expected['dtype']} [{expected['length']}]")
        return array

    def _local(self, file: str) -> Path:
        """The path of a file. What lies in a shard is brought here first."""
        if self._staged is not None and "/" in file:
            folder, _, name = file.partition("/")
            self._bring(int(folder.rpartition(".")[2]), name)
        return self.path / file

    def expect(self, shards: Sequence[int]) -> None:
        """Bring these shards here in a thread. They are read next, in this order."""
        if shards != self._expected and self._bring_ahead(shards):
            self._expected = shards

    def _following(self, shard: int) -> Sequence[int]:
        """The shards that are read after this one: those that are expected, else those that follow by number."""
        if shard in self._expected:
            return self._expected[self._expected.index(shard) + 1 :]
        return [*range(shard + 1, len(self.shard_users) - 1), *range(shard)]

    def _bring(self, shard: int, name: str) -> None:
        """Bring a file of a shard here, with all others, and then in a thread the shards that follow."""
        is_new = not (self.path / shard_file(shard, name)).is_file()
        remote.complete(self.path, {file: self.described[file] for file in self._files_of(shard)})
        if is_new:
            self._bring_ahead(self._following(shard))

    def _bring_ahead(self, shards: Sequence[int]) -> bool:
        """Start a thread for these shards. Returns False if one runs."""
        if self._staged is None or (self._ahead and self._ahead.is_alive()):
            return False
        self._ahead = Thread(target=self._copy_ahead, args=(shards, self._staged[1]), name="read-ahead", daemon=True)
        self._ahead.start()
        return True

    def _copy_ahead(self, shards: Sequence[int], cache: remote.Cache) -> None:
        """Bring as many of these shards here as half of the cache holds."""
        room = cache.max_bytes // 2
        for shard in shards:
            files = self._files_of(shard)
            room -= sum(self.described[file]["bytes"] for file in files)
            if room < 0:
                return
            with suppress(DataError):  # it is raised where the shard is read
                for file in files:
                    self._bring(shard, file.partition("/")[2])

    def _files_of(self, shard: int) -> list[str]:
        """The files of a shard that are brought here."""
        return [shard_file(shard, file) for file in self.sharded]

    def file_at(self, file: str, index: int) -> str:
        """The file that holds a value of an array: ``file``, or its part in a shard."""
        array: Values = self[file]
        if not isinstance(array, Parts):
            return file
        return shard_file(int(np.searchsorted(array.bounds, index, side="right")) - 1, file)

    def check_presence(self) -> None:
        """Checks that every file exists and has the described size, and outside of shards the described dtype and
        length. Those of a shard's files are checked when these are opened."""
        for file, expected in self.described.items():
            path = self.path / file
            if self._staged is not None and "/" in file and not path.exists():
                continue
            if not path.is_file():
                raise self.damaged(file, "it is missing")
            if path.stat().st_size != expected["bytes"]:
                raise self.damaged(file, f"it has {path.stat().st_size} bytes instead of {expected['bytes']}")
            if "/" not in file:
                _ = self[file]
        for file, length in lengths_of_files(self._meta).items():
            if file not in self or length not in (None, len(self[file])):
                raise self.damaged(META_FILE, f"it does not describe {file} with {length} values")

    def check_sums(self, up_to: int | None) -> None:
        """Verifies the checksums of the smallest files outside of shards, ``up_to`` bytes in total; None means all
        files."""
        left = up_to
        checked = [file for file in self.described if up_to is None or "/" not in file]
        for file in sorted(checked, key=lambda file: self.described[file]["bytes"]):
            expected = self.described[file]
            if left is not None and (left := left - expected["bytes"]) < 0:
                return
            if (found := sha256(self._local(file))) != expected["sha256"]:
                raise self.damaged(file, f"its SHA-256 is {found} instead of {expected['sha256']}")

    def check_ends(self, file: str, total: int) -> None:
        """Checks that offsets run from 0 to ``total``, and that an evenly spaced sample of them ascends."""
        offsets = self[file]
        if offsets[0] != 0 or offsets[-1] != total:
            raise self.damaged(file, f"it does not run from 0 to {total}")
        sample = offsets[np.linspace(0, len(offsets) - 1, min(1024, len(offsets)), dtype=np.int64)]
        if (np.diff(sample) < 1).any():
            raise self.damaged(file, "its values are not ascending")

    def damaged(self, file: str, what: str) -> DataError:
        """An error with the damaged file, the damage and the command that makes the store again."""
        return DataError(f"{self.path / file} is damaged: {what}. {remedy(self.path, self._meta)}")
