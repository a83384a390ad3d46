"""What a single value must satisfy: its type, and the limits its field declares.

The declarations are in args.py (``option``); the same checks serve gin files and objects made in Python.
"""

from __future__ import annotations

import functools
import math
import re
import types
import typing
from dataclasses import MISSING, Field, fields
from typing import Any

from hstu.config.errors import ConfigError
from hstu.config.problems import did_you_mean, literal, show


class Mismatch(ValueError):
    """A value that cannot become the declared type without loss; the text says why."""


def check_instance(args: Any) -> None:
    """Checks every field of a dataclass and stores the coerced values; ConfigError lists all that is wrong."""
    name = type(args).__name__
    problems = []
    for field in fields(args):
        value = getattr(args, field.name)
        found = field_problems(type(args), field, value)
        problems += [f"{name}.{field.name} = {show(value)}: {problem}" for problem in found]
        if not found:
            object.__setattr__(args, field.name, coerce(annotation_of(type(args), field), value))
    if problems:
        raise ConfigError(problems)


def field_problems(cls: type, field: Field[Any], value: Any) -> list[str]:
    """What is wrong with ``value`` for this field; each entry also says what is allowed. Empty: nothing."""
    expected = f"expected {describe(cls, field)}"
    try:
        coerced = coerce(annotation_of(cls, field), value)
    except Mismatch as mismatch:
        return [expected + str(mismatch)]
    if coerced is None:
        return []
    if value == field.default and value not in (field.metadata["choices"] or (value,)):
        return [f"must be given, {expected} (the default is deliberately none of them)"]
    if field.metadata["not_empty"] and len(coerced) == 0:
        return [f"must not be empty, {expected}"]
    elements = coerced if isinstance(coerced, (list, tuple)) else [coerced]
    return [
        f"{expected}{f'; {show(element)} is not' if elements is coerced else ''}{_guess(field, element)}"
        for element in elements
        if not _within_limits(field, element)
    ]


def coerce(annotation: Any, value: Any) -> Any:
    """``value`` as the annotated type, where that loses nothing; Mismatch otherwise.

    int → float, list ↔ tuple, and a bare string → a tuple of one, because ``("AUC")`` is how people write one
    metric. Nothing else: True is no int, 1.0 is no int, "1" is no number.
    """
    origin, parameters = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):  # Optional, or a number or a word
        kinds = [parameter for parameter in parameters if parameter is not types.NoneType]
        inner = str if isinstance(value, str) and str in kinds else kinds[0]
        return None if value is None else coerce(inner, value)
    if origin is tuple and isinstance(value, str):
        return (value,)
    if origin in (list, tuple):
        if not isinstance(value, (list, tuple)):
            hint = f"; write [{literal(value)}]" if isinstance(value, str) else ""
            raise Mismatch(hint)
        return origin(_coerce_element(parameters[0], element) for element in value)
    if annotation is float:
        return _coerce_float(value)
    if annotation is int and (not isinstance(value, int) or isinstance(value, bool)):
        raise Mismatch(_quoted_hint(value))
    if annotation is int and not -(2**63) <= value < 2**63:
        raise Mismatch("; this needs more than 64 bits")
    if not isinstance(value, annotation):
        raise Mismatch(_quoted_hint(value))
    return value


def _coerce_element(annotation: Any, element: Any) -> Any:
    try:
        return coerce(annotation, element)
    except Mismatch as mismatch:
        raise Mismatch(f"; {show(element)} is not{mismatch}") from None


def _coerce_float(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise Mismatch(_quoted_hint(value))
    try:
        number = float(value)
    except OverflowError:
        raise Mismatch("; this is too large") from None
    if not math.isfinite(number):
        raise Mismatch("; this is not finite")
    if number != value:
        raise Mismatch("; a float cannot hold this int exactly")
    return number


def _quoted_hint(value: Any) -> str:
    """A number, True or None in quotes is a common slip: say so."""
    if isinstance(value, str) and re.fullmatch(r"[-+]?[\d.]+([eE][-+]?\d+)?|True|False|None", value.strip()):
        return f"; write {value.strip()} without quotes"
    return ""


def _within_limits(field: Field[Any], element: Any) -> bool:
    limits = field.metadata
    if limits["words"] and isinstance(element, str):
        return element in limits["words"]
    if limits["choices"] is not None and element not in limits["choices"]:
        return False
    if limits["pattern"] is not None and not re.fullmatch(limits["pattern"], element):
        return False
    return (
        (limits["minimum"] is None or element >= limits["minimum"])
        and (limits["maximum"] is None or element <= limits["maximum"])
        and (limits["above"] is None or element > limits["above"])
        and (limits["below"] is None or element < limits["below"])
    )


def _guess(field: Field[Any], element: Any) -> str:
    if not isinstance(element, str):
        return ""
    if field.metadata["words"]:
        return _quoted_hint(element) or did_you_mean(element, field.metadata["words"])
    if field.metadata["choices"] is None:
        element = re.sub(r"\d+", "K", element)  # as the examples are written: HR10 is closest to HR@K
    return did_you_mean(element, field.metadata["choices"] or field.metadata["examples"])


@functools.cache
def _annotations(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def annotation_of(cls: type, field: Field[Any]) -> Any:
    """The type of a field, resolved from its string."""
    return _annotations(cls)[field.name]


def is_required(field: Field[Any]) -> bool:
    """Whether a field has no default."""
    return field.default is MISSING and field.default_factory is MISSING


def default_of(field: Field[Any]) -> Any:
    """The default of a field that is not required."""
    return field.default if field.default_factory is MISSING else field.default_factory()


def takes_references(cls: type, field: Field[Any]) -> bool:
    """Whether the values of a field are argument objects themselves, ``@scope/Class()`` in gin."""
    return "reference @" in describe(cls, field)


def describe(cls: type, field: Field[Any]) -> str:
    """What a field accepts, for people: ``int, at least 1``; ``one of 'relu', 'gelu'``; ``None or float, above 0``."""
    kind = field.type if isinstance(field.type, str) else str(field.type)
    kind = kind.replace(" | str", "") if field.metadata["words"] else kind
    optional = kind.startswith("Optional[")
    if optional:
        kind = kind.removeprefix("Optional[").removesuffix("]")
    limits = describe_limits(field)
    standing_alone = field.metadata["choices"] or field.metadata["examples"]
    words = limits if standing_alone else ", ".join(filter(None, [_kind_in_words(kind), limits]))
    return f"None or {words}" if optional else words


def _kind_in_words(kind: str) -> str:
    if element := re.fullmatch(r"(?:list|tuple)\[(\w+)(?:, \.\.\.)?\]", kind):
        return f"list of {_kind_in_words(element[1]).removeprefix('a ')}"
    return kind if kind in ("int", "float", "bool", "str") else f"a reference @{kind}()"


def describe_limits(field: Field[Any]) -> str:
    """The limits of a field alone: ``at least 1``; ``above 0, at most 1``; empty where there are none."""
    limits = field.metadata
    if limits["choices"] is not None:
        return "one of " + ", ".join(literal(choice) for choice in limits["choices"])
    if limits["examples"]:
        return "one or more of " + ", ".join(limits["examples"])
    bounds = {"above": "above", "minimum": "at least", "below": "below", "maximum": "at most"}
    words = [f"{text} {limits[name]}" for name, text in bounds.items() if limits[name] is not None]
    if words and str(field.type).startswith("list"):
        words[0] = f"each {words[0]}"
    words += [f"or {literal(word)}" for word in limits["words"]]
    return ", ".join([*words, *(["not empty"] if limits["not_empty"] else [])])
