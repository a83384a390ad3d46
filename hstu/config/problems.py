"""Mistakes in a configuration: location, text and correction; rules on objects without the wrong values."""

import difflib
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

T = TypeVar("T")


@dataclass(frozen=True, order=True)
class Location:
    """A line of a gin file or of a ``--gin-bindings`` text. Sorts in reading order."""

    source: int
    """Number of the file or command-line binding in reading order."""
    line: int
    """From 1. 0 is the file as a whole."""
    name: str
    """Path of the file as given, or "--gin-bindings"."""

    def __str__(self) -> str:
        is_file = not self.name.startswith("--")
        return f"{self.name}:{self.line}" if self.line and is_file else self.name


@dataclass(frozen=True)
class Binding:
    """``scope/selector.parameter = value`` in a gin file; a macro (``name = value``) has no parameter."""

    scope: str
    selector: str
    parameter: str
    value: Any
    """Right side as in the file, with macros and references."""
    at: Location

    @property
    def name(self) -> str:
        """The left side as in the file."""
        scope = f"{self.scope}/" if self.scope else ""
        return f"{scope}{self.selector}{f'.{self.parameter}' if self.parameter else ''}"

    def __str__(self) -> str:
        return f"{self.name} = {show(self.value)}"


@dataclass(frozen=True)
class Problem:
    """A mistake or warning, printed as ``file:line: text``."""

    text: str
    at: Location | None = None
    is_warning: bool = False
    """Whether it is allowed, but probably unintended."""

    def __str__(self) -> str:
        return f"{self.at}: {self.text}" if self.at else self.text


def in_reading_order(problems: Iterable[Problem]) -> list[str]:
    """The distinct problems as text, in reading order. Problems without a location come last."""
    ordered = sorted(problems, key=lambda p: (p.at is None, p.at or Location(0, 0, "")))
    return list(dict.fromkeys(str(problem) for problem in ordered))


def show(value: Any) -> str:
    """A value in gin syntax, cut to 100 characters. Never raises."""
    try:
        text = literal(value)
    except (ValueError, RecursionError):  # an int of thousands of digits, or a deeply nested list
        text = f"<{type(value).__name__}>"
    return text if len(text) <= 100 else text[:99] + "…"


def literal(value: Any) -> str:
    """``repr``, with escapes for what cannot be encoded as UTF-8."""
    return repr(value).encode(errors="backslashreplace").decode()


def nearest(name: str, candidates: Iterable[str]) -> str | None:
    """The candidate most similar to ``name``; None if none is similar."""
    spellings = {candidate.lower(): candidate for candidate in candidates}
    found = difflib.get_close_matches(name.lower(), spellings, n=1, cutoff=0.6)
    return spellings[found[0]] if found else None


def did_you_mean(name: str, candidates: Iterable[str]) -> str:
    """The text "; did you mean 'x'?", or an empty string if no candidate is similar."""
    guess = nearest(name, candidates)
    return f"; did you mean {guess!r}?" if guess else ""


# --- objects that lack the wrong values of a gin file ----------------------------------------------------------------


class Unknown(AttributeError):
    """Raised on reading a value that is wrong in the gin files."""


class _Incomplete:
    """Mixin for dataclass objects with missing fields."""

    def __getattribute__(self, name: str) -> Any:
        if name in type(self).__dataclass_fields__ and name not in object.__getattribute__(self, "__dict__"):  # type: ignore[attr-defined]
            raise Unknown(name)
        return object.__getattribute__(self, name)

    def __init_subclass__(cls) -> None:
        """Keeps Args from adding methods that read all fields."""

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
        with suppress(Unknown):
            yield from rule(*arguments)
