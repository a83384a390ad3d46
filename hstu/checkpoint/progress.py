"""What progress.json of a checkpoint and config.json of an export must hold."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from hstu.checkpoint.directory import DamagedCheckpoint, NewerCheckpoint

Check = Callable[[Any, str], None]
"""Raises ValueError if a value, whose place in the file is given, is not as expected."""

_LARGEST = 2**62


def _count(value: Any, place: str) -> None:
    if type(value) is not int or not 0 <= value <= _LARGEST:
        raise ValueError(f"{place} is {_shown(value)}, not a count")


def _number(value: Any, place: str) -> None:
    if type(value) not in (int, float) or not abs(value) <= 1e300:  # no nan either
        raise ValueError(f"{place} is {_shown(value)}, not a number")


def _text(value: Any, place: str) -> None:
    if type(value) is not str:
        raise ValueError(f"{place} is {_shown(value)}, not a text")


def _ranks(value: Any, place: str) -> None:
    _count(value, place)
    if value == 0:
        raise ValueError(f"{place} is 0")


def _list_of(check: Check) -> Check:
    def check_list(value: Any, place: str) -> None:
        if type(value) is not list:
            raise ValueError(f"{place} is {_shown(value)}, not a list")
        for index, element in enumerate(value):
            check(element, f"{place}[{index}]")

    return check_list


def _each(check: Check) -> Check:
    def check_mapping(value: Any, place: str) -> None:
        for name, element in _mapping(value, place).items():
            check(element, f"{place}.{name}")

    return check_mapping


def _fields(required: Mapping[str, Check], optional: Mapping[str, Check] | None = None) -> Check:
    """Fields that must be and may be in an object. It may have others, which are not read."""

    def check_fields(value: Any, place: str) -> None:
        found = _mapping(value, place)
        for name, check in {**required, **(optional or {})}.items():
            if name in found:
                check(found[name], f"{place}.{name}".removeprefix("."))
            elif name in required:
                raise ValueError(f"{place or 'it'} has no {name!r}")

    return check_fields


def _mapping(value: Any, place: str) -> dict[str, Any]:
    if type(value) is not dict:
        raise ValueError(f"{place or 'it'} is {_shown(value)}, not an object")
    return value


def _carried(value: Any, place: str) -> None:
    """Numbers, nulls where a number is undefined, and the texts that name the kind and the split of an evaluation."""
    if type(value) is dict:
        for name, element in value.items():
            (_text if name in ("kind", "split") else _carried)(element, f"{place}.{name}")
    elif type(value) is list:
        for index, element in enumerate(value):
            _carried(element, f"{place}[{index}]")
    elif value is not None:
        _number(value, place)


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


_TABLES = {"tables": _each(_fields({"rows": _count, "dim": _count, "features": _list_of(_text)}))}
_VERSIONS = {"versions": _each(_text)}
PROGRESS = _fields(
    {
        "iteration": _count,
        "position": _fields({"epoch": _count, "consumed": _count}),
        "optimizer": _fields({"table_steps": _count, "lr_multiplier": _number}),
        "world_size": _ranks,
    },
    {
        "tensor_parallel_size": _ranks,
        "context_parallel_size": _ranks,
        "carried": _each(_carried),
        **_TABLES,
        **_VERSIONS,
    },
)
EXPORT = _fields({"iteration": _count}, {"version": _count, **_TABLES, **_VERSIONS})
EXPORT_VERSION = 1


def sizes_of_ranks(progress: Mapping[str, Any]) -> tuple[int, int, int]:
    """Ranks that have saved a checkpoint: of the world, of a tensor-parallel and of a context-parallel group."""
    return progress["world_size"], progress.get("tensor_parallel_size", 1), progress.get("context_parallel_size", 1)


def read_checked(path: Path, check: Check) -> dict[str, Any]:
    """Read a file of JSON. Raises DamagedCheckpoint if it does not hold what it must, or NewerCheckpoint."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if check is EXPORT and type(content) is dict and type(version := content.get("version")) is int:
            _check_version(path, version)
        check(content, "")
    except (OSError, ValueError, RecursionError) as error:
        raise DamagedCheckpoint(f"{path} is damaged ({error}). Load another checkpoint.") from None
    return dict(content)


def _check_version(path: Path, version: int) -> None:
    if version > EXPORT_VERSION:
        raise NewerCheckpoint(
            f"{path.parent} was exported by a newer version of this program: its version is {version}, and this "
            f"program reads versions up to {EXPORT_VERSION}. Update the program."
        )
