"""Checks that need more than one value: across parameters, classes and the number of ranks. Imports no torch.

The rules themselves are in rules.py, each a small function. A rule names the classes it needs in its signature and
runs where the run has them; where a value that it reads is wrong by itself, the rule stays silent.
"""

from __future__ import annotations

import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from hstu.config.errors import ConfigError
from hstu.config.problems import Origin, Problem, in_reading_order, show
from hstu.config.run_config import RunConfig, Task, Unknown, kind_of

RuleFunction = Callable[..., Iterator[Problem]]


def validate(config: RunConfig, world_size: int) -> list[str]:
    """Raises ConfigError with everything that does not fit together; returns warnings, one line each."""
    run = Run(config.task, world_size, config.parts(), config.origins)
    problems = cross_problems(run)
    if problems:
        raise ConfigError(in_reading_order(problems))
    return in_reading_order(warnings_of(run))


@dataclass(frozen=True)
class Run:
    """What the rules look at: a RunConfig, or what could be read of one."""

    task: Task
    world_size: int
    parts: Mapping[str, Any]
    """As RunConfig.parts; parts may be Partial."""
    origins: Mapping[str, Mapping[str, Origin]]

    @property
    def tables(self) -> list[Any]:
        """All tables that are given by hand."""
        return [part for name, part in self.parts.items() if name.startswith("embeddings[")]

    def origin(self, part: Any, parameter: str) -> Origin | None:
        """Where a parameter was bound, None for a default."""
        name = next(name for name, other in self.parts.items() if other is part)
        return self.origins.get(name, {}).get(parameter)

    def cite(self, part: Any, parameter: str) -> str:
        """``Class.parameter = value``, and where it stands: for the other parameter that a problem is about."""
        origin = self.origin(part, parameter)
        name = origin.name if origin else f"{kind_of(part).__name__}.{parameter}"
        place = f" ({origin.at})" if origin else ""
        return f"{name} = {show(getattr(part, parameter))}{place}"

    def problem(self, part: Any, parameter: str, text: str) -> Problem:
        """A problem with this parameter of this part."""
        origin = self.origin(part, parameter)
        name = origin.name if origin else f"{kind_of(part).__name__}.{parameter}"
        default = "" if origin or not self.origins else " (default)"
        return Problem(f"{name} = {show(getattr(part, parameter))}{default}: {text}", origin.at if origin else None)


@dataclass(frozen=True)
class _Rule:
    check: RuleFunction
    needs: tuple[tuple[type, ...], ...]
    """For each parameter after ``run``: the classes that it may be."""

    def apply(self, run: Run) -> Iterator[Problem]:
        parts = [next((p for p in run.parts.values() if kind_of(p) in classes), None) for classes in self.needs]
        if None in parts:
            return
        try:
            yield from self.check(run, *parts)
        except Unknown:  # reported where it was read
            return


RULES: list[_Rule] = []
ADVICE: list[_Rule] = []


def rule(check: RuleFunction) -> RuleFunction:
    """Registers a function ``(run: Run, network: NetworkArgs, ...) -> Iterator[Problem]``."""
    RULES.append(_Rule(check, _needs(check)))
    return check


def advice(check: RuleFunction) -> RuleFunction:
    """As ``rule``, for what is allowed but probably not meant."""
    ADVICE.append(_Rule(check, _needs(check)))
    return check


def _needs(check: RuleFunction) -> tuple[tuple[type, ...], ...]:
    hints = typing.get_type_hints(check)
    wanted = [hint for name, hint in hints.items() if name not in ("run", "return")]
    return tuple(typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,) for hint in wanted)


def cross_problems(run: Run) -> list[Problem]:
    """What every rule has to say."""
    return _apply(RULES, run)


def warnings_of(run: Run) -> list[Problem]:
    """What every piece of advice has to say."""
    return _apply(ADVICE, run)


def _apply(rules: Iterable[_Rule], run: Run) -> list[Problem]:
    from hstu.config import rules as _  # noqa: F401, PLC0415  # rules.py registers itself with the lists above

    return [problem for item in rules for problem in item.apply(run)]
