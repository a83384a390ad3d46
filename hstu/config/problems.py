"""How a mistake in a configuration is told: where it is, what was written, and what was probably meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, order=True)
class Location:
    """A line of a gin file or of a ``--gin-bindings`` text; sorts in the order of reading."""

    source: int
    """Running number of the file or command-line binding."""
    line: int
    """Counted from 1; 0: the file as a whole."""
    name: str
    """The file's path as given, or "--gin-bindings"."""

    def __str__(self) -> str:
        is_file = not self.name.startswith("--")
        return f"{self.name}:{self.line}" if self.line and is_file else self.name


@dataclass(frozen=True)
class Origin:
    """Where a parameter was bound, and the name it was bound by."""

    at: Location
    name: str
    """As written, with its scope: "item/EmbeddingArgs.table_name"."""


@dataclass(frozen=True)
class Problem:
    """One mistake; printed as ``file:line: what``."""

    text: str
    at: Location | None = None

    def __str__(self) -> str:
        return f"{self.at}: {self.text}" if self.at else self.text


def in_reading_order(problems: Iterable[Problem]) -> list[str]:
    """The problems as lines, from top to bottom; what belongs to no line comes last. Repeats are dropped."""
    ordered = sorted(problems, key=lambda p: (p.at is None, p.at or Location(0, 0, "")))
    return list(dict.fromkeys(str(problem) for problem in ordered))


def show(value: Any, limit: int = 100) -> str:
    """A value the way it is written in a gin file, cut to ``limit`` characters; printable in any case."""
    try:
        text = literal(value)
    except (ValueError, RecursionError):  # an int of thousands of digits, a very deep list
        text = f"<{type(value).__name__}>"
    return text if len(text) <= limit else text[: limit - 1] + "…"


def literal(value: Any) -> str:
    """``repr``, with escapes only where a string cannot be written as UTF-8."""
    text = repr(value)
    try:
        text.encode()
    except UnicodeEncodeError:
        return ascii(value)
    return text


def nearest(name: str, candidates: Iterable[str]) -> str | None:
    """The candidate that ``name`` is most likely a misspelling of, None where nothing is close."""
    spellings = {candidate.lower(): candidate for candidate in candidates}
    found = difflib.get_close_matches(name.lower(), spellings, n=1, cutoff=0.6)
    return spellings[found[0]] if found else None


def did_you_mean(name: str, candidates: Iterable[str]) -> str:
    """``"; did you mean 'x'?"``, or nothing."""
    guess = nearest(name, candidates)
    return f"; did you mean {guess!r}?" if guess else ""
