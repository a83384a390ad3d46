"""Declares the fields of argument classes and checks their values, from gin files and from Python alike."""

import functools
import math
import operator
import re
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields
from types import MappingProxyType
from typing import Any, Literal, TypeVar

from hstu.base.errors import ConfigError
from hstu.config.problems import Binding, Problem, did_you_mean, literal, show

T = TypeVar("T")
_SCIENTIFIC = 1_000_000
"""From this value on, a whole float such as 1e12 is converted to int."""
_BOUNDS = {
    "above": ("above", operator.gt),
    "minimum": ("at least", operator.ge),
    "below": ("below", operator.lt),
    "maximum": ("at most", operator.le),
}


Changes = Literal["reports", "speed", "training", "model", "tensors"]
"""What changes if a run continues from a checkpoint with another value of the option:

- reports: where a run reads and writes, and what it measures and reports
- speed: speed and memory; the result stays the same
- training: what the weights learn from then on
- model: what the same weights compute; loading such a checkpoint is an error
- tensors: which tensors exist, and their sizes
"""


@dataclass(frozen=True)
class Need:
    """A condition for an option to have an effect. If it is not met, RunConfig has the default of the option."""

    option: str
    """Another option of the class, ``Class.option``, or the property "task" or "data" of RunConfig."""
    values: tuple[Any, ...]
    """Values of ``option`` that meet the condition. If its value is a list, one element is enough."""
    excepted: bool = False
    """Invert the condition: any value except ``values`` meets it."""
    why: str = ""
    strict: bool = False
    """Whether an unmet condition is an error, because the user expects another run, instead of a warning."""

    def is_met(self, value: Any) -> bool:
        """Whether ``value`` of the other option meets the condition."""
        elements = value if isinstance(value, (list, tuple)) else [value]
        return any((element in self.values) != self.excepted for element in elements)

    def wanted(self) -> str:
        """The values that meet the condition, in words."""
        return ("a value other than " if self.excepted else "") + " or ".join(map(literal, self.values))

    def __str__(self) -> str:
        if self.option in ("task", "data"):
            return f"a {self.values[0]} run" if self.option == "task" else "stored data"
        return f"{self.option}{' other than' if self.excepted else ' ='} {' or '.join(map(literal, self.values))}"


def having(option: str, *values: Any, why: str = "", strict: bool = False) -> Need:
    """A Need that one of ``values`` of another option meets."""
    return Need(option, values, False, why, strict)


def not_having(option: str, *values: Any, why: str = "", strict: bool = False) -> Need:
    """A Need that any value of another option except ``values`` meets."""
    return Need(option, values, True, why, strict)


STORED_DATA = having("data", "stored")


def option(
    default: Any = MISSING,
    *,
    changes: Changes,
    needs: Need | Sequence[Need] = (),
    excludes: Mapping[str, str] = MappingProxyType({}),
    choices: tuple[Any, ...] | None = None,
    minimum: float | None = None,
    maximum: float | None = None,
    above: float | None = None,
    below: float | None = None,
    words: tuple[str, ...] = (),
    capitals: bool = False,
    pattern: str | None = None,
    examples: tuple[str, ...] = (),
    not_empty: bool = False,
    aliases: Mapping[str, str] = MappingProxyType({}),
) -> Any:
    """A dataclass field. Without a default it is required. For a list, the limits hold for each element.

    changes: see ``Changes``. needs: conditions for an effect. excludes: options that must not be given together with
    this one → the reason, or "". choices: allowed values, in any letter case. above, below: exclusive limits.
    words: strings allowed instead of a number; with pattern, examples of them. capitals: metric names, upper-cased up
    to a "/" ("hr@10" → "HR@10"). pattern: regular expression that a string must match in full. examples: matches of
    it, for messages. not_empty: forbid an empty string or list, and empty strings in a list. aliases: other name of the
    field in gin files → field of the class whose value is added to a value given by that name.
    """
    metadata = {name: value for name, value in locals().items() if name != "default"}
    metadata["needs"] = (needs,) if isinstance(needs, Need) else tuple(needs)
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


_NO_ORIGINS: Mapping[str, Binding] = MappingProxyType({})


@typing.dataclass_transform(frozen_default=True, kw_only_default=True)
@dataclass(frozen=True)
class Args:
    """Base of all argument classes, which are frozen dataclasses. Construction checks and converts every field."""

    origins = _NO_ORIGINS
    """Field → its binding in a gin file."""

    def __init_subclass__(cls) -> None:
        dataclass(frozen=True, kw_only=True)(cls)

    def __post_init__(self) -> None:
        """Raises ConfigError that lists all invalid values."""
        cls, problems = type(self), []
        for each in options_of(cls):
            value = getattr(self, each.name)
            found = field_problems(cls, each, value)
            problems += [f"{cls.__name__}.{each.name} = {show(value)}: {problem}" for problem in found]
            if not found:
                object.__setattr__(self, each.name, converted(cls, each, value))
        ConfigError.raise_if(problems)


def with_origins(part: T, origins: Mapping[str, Binding]) -> T:
    """Sets ``Args.origins`` of ``part`` and returns it."""
    object.__setattr__(part, "origins", origins)
    return part


def args_in(value: Any) -> Iterator[Args]:
    """The argument objects in a value, with those that they refer to."""
    elements: Iterable[Any] = ()
    if isinstance(value, Args):
        yield value
        elements = [getattr(value, each.name, None) for each in options_of(type(value))]
    elif isinstance(value, (list, tuple)):
        elements = value
    elif isinstance(value, dict):
        elements = value.values()
    for element in elements:
        yield from args_in(element)


def problem(part: Args, parameter: str, text: str, is_warning: bool = False) -> Problem:
    """A problem with this parameter. ``text`` follows "Class.parameter = value: "."""
    origin = part.origins.get(parameter)
    default = "" if origin or is_given(part, parameter) else " (default)"
    return Problem(f"{_written(part, parameter)}{default}: {text}", origin.at if origin else None, is_warning)


def located(part: Args, parameter: str, text: str) -> str:
    """``problem`` as one line: file, line, parameter, value and ``text``."""
    return str(problem(part, parameter, text))


def cited(part: Args, parameter: str) -> str:
    """``Class.parameter = value (file:line)``, to cite a parameter in the problem of another one."""
    origin = part.origins.get(parameter)
    return f"{_written(part, parameter)}{f' ({origin.at})' if origin else ''}"


def _written(part: Args, parameter: str) -> str:
    origin, value = part.origins.get(parameter), getattr(part, parameter)
    name = origin.name if origin else f"{type(part).__name__}.{parameter}"
    if origin and next(args_in(value), None):
        return str(origin)
    if origin and origin.parameter != parameter and show(origin.value) != show(value):
        return f"{origin} (so {parameter} = {show(value)})"  # bound through an alias
    return f"{name} = {show(value)}"


# --- one value -----------------------------------------------------------------------------------------------------


class Mismatch(ValueError):
    """A value cannot be converted to the declared type without loss. The message is a hint, or empty."""


def field_problems(cls: type[Args], field: Field[Any], value: Any) -> list[str]:
    """What is wrong with ``value`` and what is allowed instead; empty if the value is allowed."""
    expected = f"expected {describe(cls, field)}"
    try:
        coerced = converted(cls, field, value)
    except Mismatch as mismatch:
        return [expected + str(mismatch)]
    if coerced is None:
        return []
    is_one = not isinstance(value, tuple)
    if is_one and value == field.default and value not in (field.metadata["choices"] or (value,)):
        return [f"must be given; {expected} (the default is deliberately not one of them)"]
    if field.metadata["not_empty"] and (len(coerced) == 0 or (not isinstance(coerced, str) and "" in coerced)):
        return [f"must not be empty; {expected}"]
    elements = coerced if isinstance(coerced, (list, tuple)) else [coerced]
    return [
        f"{expected}{f'; {show(element)} is not allowed' if elements is coerced else ''}{_guess(field, element)}"
        for element in elements
        if not _within_limits(field, element)
    ]


def converted(cls: type[Args], field: Field[Any], value: Any) -> Any:
    """``value`` converted to the type of the field, choices spelt as declared. Raises Mismatch."""
    coerced = coerce(annotations_of(cls)[field.name], value)
    if isinstance(coerced, (list, tuple)):
        return type(coerced)(_spelt(field, element) for element in coerced)
    return _spelt(field, coerced)


def _spelt(field: Field[Any], element: Any) -> Any:
    if not isinstance(element, str):
        return element
    if field.metadata["capitals"]:
        name, slash, task = element.partition("/")
        return f"{name.upper()}{slash}{task.lower()}"
    declared = [*(field.metadata["choices"] or ()), *field.metadata["words"]]
    return next((word for word in declared if word.lower() == element.lower()), element)


def coerce(annotation: Any, value: Any) -> Any:
    """Converts ``value`` to the annotated type. Raises Mismatch for all conversions except int to float, list to tuple
    and back, a string to a tuple of it (users write ``("AUC")``), and a whole float from a million on to int (1e12)."""
    origin, parameters = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):  # Optional[...], or number | str
        kinds = [parameter for parameter in parameters if parameter is not types.NoneType]
        fitting = (kind for kind in kinds if isinstance(value, _written_as(kind)))
        return None if value is None else coerce(next(fitting, kinds[0]), value)
    if origin is tuple and isinstance(value, str):
        return (value,)
    if origin is dict:
        return {coerce(parameters[0], key): _coerce_element(parameters[1], value[key]) for key in value}
    if origin in (list, tuple):
        if not isinstance(value, (list, tuple)):
            raise Mismatch(f"; write [{literal(value)}]" if isinstance(value, str) else "")
        return origin(_coerce_element(parameters[0], element) for element in value)
    if annotation is float:
        return _coerce_float(value)
    if annotation is int and isinstance(value, float) and value.is_integer() and abs(value) >= _SCIENTIFIC:
        value = int(value)
    if not isinstance(value, annotation) or (annotation is int and isinstance(value, bool)):
        raise Mismatch(_quoted_hint(value))
    if annotation is int and not -(2**63) <= value < 2**63:
        raise Mismatch("; this number needs more than 64 bits")
    return value


def _written_as(kind: Any) -> type | tuple[type, ...]:
    """The accepted Python types: a list may be written as a tuple, and the reverse."""
    origin = typing.get_origin(kind) or kind
    return (list, tuple) if origin in (list, tuple) else origin


def _coerce_element(annotation: Any, element: Any) -> Any:
    try:
        return coerce(annotation, element)
    except Mismatch as mismatch:
        raise Mismatch(f"; {show(element)} is not allowed{mismatch}") from None


def _coerce_float(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise Mismatch(_quoted_hint(value))
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number) or number != value:
        raise Mismatch("; a float cannot represent this number")
    return number


def _quoted_hint(value: Any) -> str:
    """A hint if ``value`` is a quoted number, True, False or None."""
    if isinstance(value, str) and re.fullmatch(r"[-+]?[\d.]+([eE][-+]?\d+)?|True|False|None", value.strip()):
        return f"; write {value.strip()} without quotes"
    return ""


def _within_limits(field: Field[Any], element: Any) -> bool:
    limits = field.metadata
    if element is None:  # its type has been checked
        return True
    if limits["words"] and isinstance(element, str):
        return element in limits["words"] or bool(limits["pattern"] and re.fullmatch(limits["pattern"], element))
    return (
        (limits["choices"] is None or element in limits["choices"])
        and (limits["pattern"] is None or limits["words"] or re.fullmatch(limits["pattern"], element) is not None)
        and all(limits[name] is None or holds(element, limits[name]) for name, (_, holds) in _BOUNDS.items())
    )


def _guess(field: Field[Any], element: Any) -> str:
    if not isinstance(element, str):
        return ""
    if field.metadata["words"]:
        number = re.match(r"[\d.]*", element)[0]  # type: ignore[index]  # it matches any string
        words = [re.sub(r"^\d+", number, word) for word in field.metadata["words"]]
        return _quoted_hint(element) or did_you_mean(element, words)
    if field.metadata["choices"] is None:
        element = re.sub(r"\d+", "K", element)  # so that HR10 is closest to the example HR@K
    return did_you_mean(element, field.metadata["choices"] or field.metadata["examples"])


# --- what a field declares -----------------------------------------------------------------------------------------


def options_of(cls: type[Args]) -> tuple[Field[Any], ...]:
    """The fields of an argument class: required ones first, and inherited ones before its own."""
    return tuple(sorted(fields(cls), key=lambda each: not is_required(each)))


annotations_of: Callable[[type], dict[str, Any]] = functools.cache(typing.get_type_hints)
"""Argument class → field → its evaluated type."""


def is_required(field: Field[Any]) -> bool:
    """Whether a field has no default."""
    return field.default is MISSING and field.default_factory is MISSING


def default_of(field: Field[Any]) -> Any:
    """The default of a field that is not required."""
    return field.default if field.default_factory is MISSING else field.default_factory()


def is_given(part: Args, parameter: str) -> bool:
    """Whether ``part`` has this parameter and its value differs from the default."""
    field = part.__dataclass_fields__.get(parameter)
    return field is not None and (is_required(field) or getattr(part, parameter) != default_of(field))


def referred_class(cls: type[Args], field: Field[Any]) -> type[Args] | None:
    """The argument class that a field refers to (``@scope/Class()`` in gin); None for plain values."""
    kinds = [annotations_of(cls)[field.name]]
    while kinds:
        kind = kinds.pop()
        if isinstance(kind, type) and issubclass(kind, Args):
            return kind
        kinds += typing.get_args(kind)
    return None


def describe(cls: type[Args], field: Field[Any]) -> str:
    """The values that a field allows: ``int, at least 1``; ``one of 'relu', 'gelu'``; ``None or float, above 0``."""
    kind = str(field.type)
    kind = kind.replace(" | str", "") if field.metadata["words"] else kind
    inner = kind.removeprefix("Optional[").removesuffix("]") if kind.startswith("Optional[") else kind
    limits = describe_limits(field)
    is_enough = field.metadata["choices"] or field.metadata["examples"]
    kinds = " or ".join(map(_kind_in_words, inner.split(" | ")))
    words = limits if is_enough else ", ".join(filter(None, [kinds, limits]))
    return words if inner == kind else f"None or {words}"


def _kind_in_words(kind: str) -> str:
    if element := re.fullmatch(r"(?:list|tuple)\[(?:(Optional)\[)?(\w+)\]?(?:, \.\.\.)?\]", kind):
        is_optional, name = element.groups()
        words = f"list of {_kind_in_words(name).replace('a reference', 'references')}"
        return f"{words} and None" if is_optional else words
    if value := re.fullmatch(r"dict\[str, (\w+)\]", kind):
        return f"dict from feature to {_kind_in_words(value[1])}"
    return kind if kind in ("int", "float", "bool", "str") else f"a reference @scope/{kind}()"


def describe_limits(field: Field[Any]) -> str:
    """The limits of a field without its type: ``at least 1``; ``above 0, at most 1``; empty if there are none."""
    limits = field.metadata
    if limits["choices"] is not None:
        return "one of " + ", ".join(literal(choice) for choice in limits["choices"])
    if limits["examples"]:
        return "one or more of " + ", ".join(limits["examples"])
    words = [f"{text} {limits[name]}" for name, (text, _) in _BOUNDS.items() if limits[name] is not None]
    if words and str(field.type).startswith("list"):
        words[0] = f"each {words[0]}"
    words += [f"or {literal(word)}" for word in limits["words"]]
    return ", ".join([*words, *(["not empty"] if limits["not_empty"] else [])])
