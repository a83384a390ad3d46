"""The description of a store, meta.json: how it is read and sealed, and whether it and the arrays are right."""

from __future__ import annotations

import hashlib
import json
import math
import os
import tokenize
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib.format import open_memmap

from hstu.base.errors import DataError, printable
from hstu.data.datasets import resolve_name
from hstu.data.datasets.spec import USER_FEATURE
from hstu.data.store.layout import (
    DTYPES,
    META_FILE,
    NUMBER_ROLES,
    OF_CANDIDATES,
    OFFSETS_FILE,
    REQUEST_FILES,
    FeatureMeta,
    candidate_file,
    feature_file,
    list_offsets_file,
    split_file,
    strings_files,
    vocabulary_stem,
)

FORMAT = "hstu-sequence-store"
VERSION = 4
"""The newest version that this program reads: a store with numbers, or with requests."""
WITH_FEATURES, WITH_SPLIT, PLAIN = 3, 2, 1
"""Version of a store with features of items or events, with a split of its own, and with none of these, which earlier
programs can read, too."""
_FILE_DTYPES = ("<i4", "<i8", "<f4", "|u1")
_LARGEST = 2**48
"""More users, events or codes than a disk holds."""
OPTIONAL = {"raw", "is_list", "width", "statistics"}
"""Fields of a feature that are left out where they have their defaults, so that earlier programs can read it."""
_OF_ONE_NUMBER = {"log_mean", "log_std", "quantiles"}
STATISTICS = ("users", "items", "events", "length_max", "length_min", "length_mean", "length_median", "sparsity")
_SEAL = "sha256"
MALFORMED = (KeyError, TypeError, IndexError, ValueError, AttributeError)
"""Errors from reading a description that is valid JSON but not that of a store."""


def read_meta(path: Path) -> dict[str, Any]:
    """The description of a store, of a version that this program reads, with a right checksum. Else DataError."""
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
    version = meta.get("version")
    if type(version) is int and version > VERSION:
        raise DataError(
            f"{path} has store version {version}, and this program reads version {VERSION}: a newer program wrote it. "
            "Update this program"
        )
    if type(version) is not int or version < 1:
        raise DataError(f"{path / META_FILE} is damaged: its version is {version!r}")
    if not _is_intact(meta):
        raise DataError(f"{path / META_FILE} is damaged: its checksum is wrong")
    return meta


def remedy(path: Path, meta: Mapping[str, Any] | None) -> str:
    """The command that makes the store: the one recorded in ``meta``, else a guess from the directory's name.

    Without a good description, nothing is replaced, not even with --force.
    """
    end = " --force" if meta is not None else " (first move what is there away)" if os.path.exists(path) else ""
    if meta and (command := meta.get("command")):
        return f"Make it with: {printable(str(command), keep='')}{end}"
    script = "python scripts/preprocess_dataset.py"
    if name := resolve_name(path.name):
        return f"Make it with: {script} --dataset_name {name} --output {path}{end}"
    return (
        f"Make it with: {script} --dataset_name NAME --output {path} (a built-in NAME), or from your own table "
        f"with: {script} --dataset_name NAME --interactions FILE --user COLUMN --item COLUMN --output {path}{end}"
    )


def sealed(meta: Mapping[str, Any]) -> str:
    """JSON of a store's description, with the checksum of its own content."""
    return json.dumps({**meta, _SEAL: _digest(meta)}, indent=1, ensure_ascii=False)


def _is_intact(meta: Mapping[str, Any]) -> bool:
    """Whether the checksum is right. Stores older than the checksums have none and pass."""
    if _SEAL not in meta:
        return f'"{_SEAL}"' not in json.dumps(meta.get("files"))
    return bool(meta[_SEAL] == _digest({name: value for name, value in meta.items() if name != _SEAL}))


def _digest(meta: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()


def description_problems(meta: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong with a description, field by field."""
    for name in ("num_users", "num_events"):
        if not _is_count(meta.get(name)):
            yield f"{name} is {meta.get(name)!r}"
    if not _is_name(meta.get("name")):
        yield f"name is {meta.get('name')!r}"
    if not isinstance(meta.get("command", ""), str | None):
        yield f"command is {meta['command']!r}"
    has_time = any(isinstance(each, dict) and each.get("role") == "timestamp" for each in _listed(meta.get("features")))
    for name in ("num_requests", "num_candidates") if "num_requests" in meta or "num_candidates" in meta else ():
        if not _is_count(meta.get(name)) or not has_time:
            yield f"{name} is {meta.get(name)!r}" + ("" if has_time else " without times")
    if "split" in meta and not _is_name(meta["split"]):
        yield f"split is {meta['split']!r}"
    sources = meta.get("sources")
    if not isinstance(sources, dict) or not all(isinstance(digest, str) for digest in sources.values()):
        yield "sources is not a table of files and checksums"
    yield from _statistics_problems(meta.get("statistics"))
    yield from _feature_problems(meta.get("features"))
    files = meta.get("files")
    if not isinstance(files, dict):
        yield "files is not a table"
        return
    for file, entry in files.items():
        if not _is_file_name(file) or not _is_file(entry):
            yield f"{file!r} of files is {entry!r}"


def length_problems(meta: Mapping[str, Any]) -> Iterator[str]:
    """The files that a description lacks, or gives other lengths than follow from its counts and features.

    Its fields must be those of a description.
    """
    for file, length in _lengths(meta).items():
        if meta["files"].get(file, {}).get("length") != length:
            yield f"it does not describe {file} with {length} values"


def _lengths(meta: Mapping[str, Any]) -> dict[str, int]:
    """File → how many values it must have."""
    users, requests = meta["num_users"], meta.get("num_requests", 0)
    features = [FeatureMeta.of(feature) for feature in meta["features"]]
    items = next(feature.cardinality for feature in features if feature.role == "item")
    assert items is not None, "description_problems requires it"
    lengths = {OFFSETS_FILE: users + 1}
    if "split" in meta:
        lengths |= {split_file("valid"): users, split_file("test"): users}
    for feature in features:
        file = feature_file(feature.role, feature.name)
        if feature.is_list:  # the offsets state how many values there are
            lengths |= {file: _stated_length(meta, file), list_offsets_file(feature.name): items + 1}
        else:
            of_role = {"context": users, "item_feature": items, "item_number": items * feature.width}
            lengths[file] = of_role.get(feature.role, meta["num_events"])
    lengths |= _lengths_of_strings(meta, features, items)
    if requests:
        lengths |= dict.fromkeys(REQUEST_FILES.values(), requests) | {REQUEST_FILES["offsets"]: requests + 1}
        of_candidates = (feature.name for feature in features if feature.role in OF_CANDIDATES)
        lengths |= {candidate_file(name): meta["num_candidates"] for name in of_candidates}
    return lengths


def _lengths_of_strings(meta: Mapping[str, Any], features: Sequence[FeatureMeta], items: int) -> dict[str, int]:
    """File → length of the lists of raw ids and of titles."""
    users = meta["num_users"]
    required = {
        vocabulary_stem(feature.name): users if feature.name == USER_FEATURE else feature.cardinality
        for feature in features
        if feature.has_vocab
    }
    lengths: dict[str, int] = {}
    for stem, length in ({vocabulary_stem(USER_FEATURE): users, "titles": items} | required).items():
        strings, utf8 = strings_files(stem)
        if strings in meta["files"]:
            lengths |= {strings: length + 1, utf8: _stated_length(meta, utf8)}
        elif stem in required or f"{stem}.npy" in meta["files"]:
            lengths[f"{stem}.npy"] = length
    return lengths


def _stated_length(meta: Mapping[str, Any], file: str) -> int:
    """How many values the description gives a file; -1 where it lacks the file."""
    return int(meta["files"].get(file, {}).get("length", -1))


def _statistics_problems(statistics: Any) -> Iterator[str]:
    """A store that preprocessing has made has all statistics, another one has none."""
    if not isinstance(statistics, dict):
        yield "statistics is not a table"
        return
    numbers = [statistics.get(name) for name in STATISTICS] if statistics else []
    for name, default in (("published", None), ("skipped_rows", {})) if statistics else ():
        table = statistics.get(name, default)
        if not isinstance(table, dict):
            yield f"{name} of statistics is not a table"
        else:
            numbers += table.values()
    if not all(_is_number(number) for number in numbers):
        yield "statistics has a value that is no number, or lacks one"


def _feature_problems(features: Any) -> Iterator[str]:
    if not isinstance(features, list) or not all(isinstance(feature, dict) for feature in features):
        yield "features is not a list of tables"
        return
    for feature in features:
        role, cardinality = feature.get("role"), feature.get("cardinality")
        flags = (feature.get("has_vocab"), feature.get("raw", False), feature.get("is_list", False))
        is_role = isinstance(role, str) and feature.get("dtype") == DTYPES.get(role, ())
        has_numbers = role in NUMBER_ROLES
        has_codes = role != "timestamp" and not has_numbers
        is_size = _is_count(cardinality) if has_codes else cardinality is None and not feature.get("has_vocab")
        is_whole = feature.keys() - OPTIONAL == {"name", "role", "dtype", "cardinality", "has_vocab"}
        has_flags = all(type(flag) is bool for flag in flags)
        has_right_values = role == "item_feature" or not feature.get("is_list")
        has_right_values &= _has_statistics(feature) if has_numbers else not feature.keys() & {"width", "statistics"}
        if not (is_whole and _is_name(feature["name"]) and is_role and is_size and has_flags and has_right_values):
            yield f"a feature is {feature!r}"
            return
    names = [feature["name"] for feature in features]
    roles = Counter(feature["role"] for feature in features)
    if len(set(names)) < len(names) or roles["item"] != 1 or roles["action"] > 1 or roles["timestamp"] > 1:
        yield f"features are {', '.join(map(repr, names))}, one of which is there twice, or items are missing"


def _has_statistics(feature: Mapping[str, Any]) -> bool:
    """Whether a number or a vector has its width and statistics, and no flags."""
    width, found = feature.get("width", 1), feature.get("statistics")
    if feature.get("raw"):
        return False
    if not _is_count(width) or (width > 1 and feature["role"] != "item_number") or not isinstance(found, dict):
        return False
    expected = {"count", "missing", "mean", "std"} | (_OF_ONE_NUMBER if width == 1 else set())
    if found.keys() - _OF_ONE_NUMBER | {name for name in _OF_ONE_NUMBER if found.get(name) is not None} != expected:
        return False
    counts, lists = [found["count"], found["missing"]], [found["mean"], found["std"]]
    if not all(isinstance(values, list) and len(values) == width for values in lists):
        return False
    if width == 1:
        if not isinstance(found["quantiles"], list) or len(found["quantiles"]) < 2:
            return False
        lists += [found["quantiles"], [found["log_mean"], found["log_std"]]]
    numbers = [number for values in lists for number in values]
    return all(type(number) is int and number >= 0 for number in counts) and all(map(_is_finite, numbers))


def _is_finite(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 < value < _LARGEST


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and abs(value) < _LARGEST


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and value != "" and _is_unicode(value)


def _is_unicode(value: str) -> bool:
    return not any("\ud800" <= char <= "\udfff" for char in value)


def _is_file_name(name: str) -> bool:
    return name.endswith(".npy") and "/" not in name and name.isprintable() and len(name) < 256


def _is_file(entry: Any) -> bool:
    if not isinstance(entry, dict):
        return False
    sizes = (entry.get("length"), entry.get("bytes"))
    is_sized = all(type(size) is int and size >= 0 for size in sizes)
    return is_sized and entry.get("dtype") in _FILE_DTYPES and isinstance(entry.get("sha256", ""), str)


_OFFSET_SAMPLES = 1024


class StoreFiles:
    """File → its array, a read-only view of the memory map. Checks raise DataError, which names the damaged file."""

    def __init__(self, path: Path, meta: Mapping[str, Any]) -> None:
        self.path = path
        self._described: dict[str, dict[str, Any]] = meta["files"]
        self._command: str | None = meta["command"]
        self._maps: dict[str, np.ndarray] = {}

    def __contains__(self, file: str) -> bool:
        return file in self._described

    def __getitem__(self, file: str) -> np.ndarray:
        if file not in self._maps:
            self._maps[file] = np.asarray(open_memmap(self.path / file, mode="r"))
        return self._maps[file]

    @property
    def checksums(self) -> dict[str, str]:
        """File → the SHA-256 that its description states; its size in bytes in stores older than the checksums."""
        return {file: str(entry.get("sha256", entry["bytes"])) for file, entry in self._described.items()}

    def check_presence(self) -> None:
        """Checks that every file is there, with the size, dtype and length of its description."""
        for file, expected in self._described.items():
            path = self.path / file
            if not path.is_file():
                raise self.damaged(file, "it is missing")
            if path.stat().st_size != expected["bytes"]:
                raise self.damaged(file, f"it has {path.stat().st_size} bytes instead of {expected['bytes']}")
            try:
                array = self[file]
            except (*MALFORMED, OSError, EOFError, SyntaxError, tokenize.TokenError) as error:
                raise self.damaged(file, str(error)) from error
            if array.dtype.str != expected["dtype"] or array.shape != (expected["length"],):
                found = f"{array.dtype.str} {list(array.shape)}"
                raise self.damaged(file, f"it holds {found} instead of {expected['dtype']} [{expected['length']}]")

    def check_sums(self, up_to: int | None) -> None:
        """Checks the smallest files, ``up_to`` bytes in total; None means all. Older stores have no checksums."""
        left = up_to
        for file, expected in sorted(self._described.items(), key=lambda item: item[1]["bytes"]):
            if left is not None and (left := left - expected["bytes"]) < 0:
                return
            try:
                found = sha256(self.path / file)
            except OSError as error:
                raise self.damaged(file, str(error)) from error
            if found != expected.get("sha256", found):
                raise self.damaged(file, f"its SHA-256 is {found} instead of {expected['sha256']}")

    def check_ends(self, file: str, total: int) -> None:
        """Checks the ends and a sample of offsets."""
        offsets = self[file]
        if offsets[0] != 0 or offsets[-1] != total:
            raise self.damaged(file, f"it does not run from 0 to {total}")
        sample = offsets[np.linspace(0, len(offsets) - 1, min(_OFFSET_SAMPLES, len(offsets)), dtype=np.int64)]
        if (np.diff(sample) < 1).any():
            raise self.damaged(file, "its values are not ascending")

    def damaged(self, file: str, what: str) -> DataError:
        """The error that says what is wrong with a file, and how to make the store again."""
        return DataError(f"{self.path / file} is damaged: {what}. {self.remedy()}")

    def remedy(self) -> str:
        """How to make the store again, in words: the command that made it, with --force."""
        return remedy(self.path, {"command": self._command})


def sha256(file: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
