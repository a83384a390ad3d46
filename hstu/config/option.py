"""How an argument class declares a field: its default and the check that it carries."""

from __future__ import annotations

from dataclasses import MISSING, field
from typing import Any, Optional

from hstu.config.checks import check_instance


def option(
    default: Any = MISSING,
    *,
    choices: Optional[tuple[Any, ...]] = None,
    minimum: Optional[float] = None,
    maximum: Optional[float] = None,
    above: Optional[float] = None,
    below: Optional[float] = None,
    words: tuple[str, ...] = (),
    pattern: Optional[str] = None,
    examples: tuple[str, ...] = (),
    not_empty: bool = False,
    aliases: tuple[str, ...] = (),
) -> Any:
    """A dataclass field that carries its own check.

    ``minimum``/``maximum`` are inclusive, ``above``/``below`` exclusive, ``words`` strings that are
    allowed in place of a number, ``pattern`` a regular expression that
    every string of the value must match in full and ``examples`` what it means in words; ``aliases`` are other
    names accepted in gin files.
    """
    metadata = {
        "choices": choices,
        "minimum": minimum,
        "maximum": maximum,
        "above": above,
        "below": below,
        "words": words,
        "pattern": pattern,
        "examples": examples,
        "not_empty": not_empty,
        "aliases": aliases,
    }
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


class Args:
    """Base of all argument classes: checks each field against its declaration on construction."""

    def __post_init__(self) -> None:
        check_instance(self)
