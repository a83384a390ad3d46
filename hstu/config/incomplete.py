"""Objects with unknown values, and rules that run on them.

A gin file with mistakes still describes most of a run. Its argument objects lack the values that are wrong; a rule that
reads such a value stops without a report, because the mistake itself is reported already. All other rules run, so that
one mistake does not hide another.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

from hstu.config.problems import Problem

T = TypeVar("T")


class Unknown(AttributeError):
    """Raised when a value is read that is not known, because it is wrong in the gin files."""


class _Incomplete:
    """Base of dataclass objects that lack some fields."""

    def __getattribute__(self, name: str) -> Any:
        if name in type(self).__dataclass_fields__ and name not in object.__getattribute__(self, "__dict__"):  # type: ignore[attr-defined]
            raise Unknown(name)
        return object.__getattribute__(self, name)

    __repr__, __eq__, __hash__ = object.__repr__, object.__eq__, object.__hash__


@functools.cache
def _incomplete_class(cls: type) -> type:
    return type(cls.__name__, (_Incomplete, cls), {})


def incomplete(cls: type[T], known: Mapping[str, Any]) -> T:
    """An instance of a dataclass that has only the ``known`` fields; reading another field raises Unknown."""
    made: T = object.__new__(_incomplete_class(cls))  # type: ignore[arg-type]
    made.__dict__.update(known)
    return made


def apply(rules: Iterable[Callable[..., Iterator[Problem]]], *arguments: Any) -> Iterator[Problem]:
    """The problems that each rule finds in ``arguments``, up to the first unknown value that it reads."""
    for rule in rules:
        try:
            yield from rule(*arguments)
        except Unknown:
            continue
