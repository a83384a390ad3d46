"""What progress.json of a checkpoint and config.json of an export must hold."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hstu.base.errors import DataError
from hstu.checkpoint.directory import DamagedCheckpoint

_LARGEST = 2**62
_COUNT, _RANKS, _NUMBER, _CARRIED = "a count", "a number of ranks", "a number", "numbers with their names"
_TABLES = {"*": {"rows": _COUNT, "dim": _COUNT, "features": ["a text"]}}
_VERSIONS = {"*": "a text"}
PROGRESS = {
    "iteration": _COUNT,
    "position": {"epoch": _COUNT, "consumed": _COUNT},
    "optimizer": {"table_steps": _COUNT, "lr_multiplier": _NUMBER},
    "world_size": _RANKS,
    "tensor_parallel_size?": _RANKS,
    "context_parallel_size?": _RANKS,
    "carried?": {"*": _CARRIED},
    "tables?": _TABLES,
    "versions?": _VERSIONS,
}
"""The fields of an object: "?" ends the names of those that may be absent, and "*" stands for any name."""
EXPORT = {"iteration": _COUNT, "version?": _COUNT, "tables?": _TABLES, "versions?": _VERSIONS}
EXPORT_VERSION = 1


def sizes_of_ranks(progress: Mapping[str, Any]) -> tuple[int, int, int]:
    """Ranks that have saved a checkpoint: of the world, of a tensor-parallel and of a context-parallel group."""
    return progress["world_size"], progress.get("tensor_parallel_size", 1), progress.get("context_parallel_size", 1)


def read_checked(path: Path, expected: Mapping[str, Any]) -> dict[str, Any]:
    """Read a file of JSON. Raises DamagedCheckpoint if it does not hold what is expected.

    Raises DataError for an export of a newer version of this program.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        version = content.get("version") if type(content) is dict and expected is EXPORT else None
        if type(version) is int and version > EXPORT_VERSION:
            raise DataError(
                f"{path.parent} was exported by a newer version of this program: its version is {version}, and this "
                f"program reads versions up to {EXPORT_VERSION}. Update the program."
            )
        _check(content, expected, "it")
    except (OSError, ValueError, RecursionError) as error:
        raise DamagedCheckpoint(f"{path} is damaged ({error}). Load another checkpoint.") from None
    return dict(content)


def _check(value: Any, expected: Any, place: str) -> None:
    """Raise ValueError if a value, whose place in the file is given, is not as expected."""
    if isinstance(expected, str):
        if not _is_a(expected, value):
            raise ValueError(f"{place} is {json.dumps(value)[:40]}, not {expected}")
    elif isinstance(expected, list):
        if type(value) is not list:
            raise ValueError(f"{place} is {json.dumps(value)[:40]}, not a list")
        for element in value:
            _check(element, expected[0], f"an element of {place}")
    elif type(value) is not dict:
        raise ValueError(f"{place} is {json.dumps(value)[:40]}, not an object")
    else:
        fields = {name: expected["*"] for name in value} if "*" in expected else expected
        for name, of_field in fields.items():
            if name.removesuffix("?") in value:
                _check(value[name.removesuffix("?")], of_field, name.removesuffix("?"))
            elif not name.endswith("?"):
                raise ValueError(f"{place} has no {name!r}")


def _is_a(kind: str, value: Any) -> bool:
    if kind == "a text":
        return type(value) is str
    if kind == _NUMBER:
        return type(value) in (int, float) and abs(value) <= 1e300  # no nan either
    if kind == _CARRIED:
        return _is_carried(value)
    return type(value) is int and (kind == _RANKS) <= value <= _LARGEST


def _is_carried(value: Any) -> bool:
    """Numbers, nulls where a number is undefined, and the texts that name the kind and the split of an evaluation."""
    if type(value) is dict:
        return all(
            _is_a("a text", each) if name in ("kind", "split") else _is_carried(each) for name, each in value.items()
        )
    if type(value) is list:
        return all(map(_is_carried, value))
    return value is None or _is_a(_NUMBER, value)
