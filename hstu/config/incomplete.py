"""Dataclass objects that lack the wrong values of a gin file, and rules that run on them.

A rule that reads a missing value stops silently, because that mistake is already reported. All other rules run.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

from hstu.config.problems import Problem

T = TypeVar("T")


class Unknown(AttributeError):
    """Raised on reading a value that is wrong in the gin files."""


class _Incomplete:
    """Mixin for dataclass objects with missing fields."""

    def __getattribute__(self, name: str) -> Any:
        if name in type(self).__dataclass_fields__ and name not in object.__getattribute__(self, "__dict__"):  # type: ignore[attr-defined]
            raise Unknown(name)
        return object.__getattribute__(self, name)

    __repr__, __eq__, __hash__ = object.__repr__, object.__eq__, object.__hash__


@functools.cache
def _incomplete_class(cls: type) -> type:
    return type(cls.__name__, (_Incomplete, cls), {})


def incomplete(cls: type[T], known: Mapping[str, Any]) -> T:
    """An instance of a dataclass with only the ``known`` fields. Reading another field raises Unknown."""
    made: T = object.__new__(_incomplete_class(cls))  # type: ignore[arg-type]
    made.__dict__.update(known)
    return made


def apply(rules: Iterable[Callable[..., Iterator[Problem]]], *arguments: Any) -> Iterator[Problem]:
    """The problems that the rules find in ``arguments``. A rule ends at the first missing value that it reads."""
    for rule in rules:
        try:
            yield from rule(*arguments)
        except Unknown:
            continue
