"""Whether the description of a store, meta.json, has the fields and types of one."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from hstu.data.store_layout import DTYPES, NUMBER_ROLES

_FILE_DTYPES = ("<i4", "<i8", "<f4", "|u1")
_LARGEST = 2**48
"""More users, events or codes than a disk holds."""
OPTIONAL = {"raw", "is_list", "width", "statistics"}
"""Fields of a feature that are left out where they have their defaults, so that earlier programs can read it."""
_OF_ONE_NUMBER = {"log_mean", "log_std", "quantiles"}
STATISTICS = ("users", "items", "events", "length_max", "length_min", "length_mean", "length_median", "sparsity")


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
        is_size = cardinality is None if role == "timestamp" or has_numbers else _is_count(cardinality)
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
    if feature.get("raw") or feature.get("has_vocab"):
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
