"""How the rules in rules.py are run.

A rule is a function that names the classes it needs in its signature; it runs where the run has them. Where a value
that it reads is wrong by itself, which is already reported, it stays silent.
"""

from __future__ import annotations

import types
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from hstu.config.problems import Origin, Problem, show
from hstu.config.run_config import Task, Unknown, kind_of

Problems = Iterator[Problem]
RuleFunction = Callable[..., Problems]


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
        if benchmark := self.parts.get("BenchmarkDatasetArgs"):
            return list(benchmark.embedding_args)  # Unknown, if the references are wrong
        return [part for name, part in self.parts.items() if name.startswith("embeddings[")]

    @property
    def table_features(self) -> list[str]:
        """Features of the tables that are given by hand."""
        return [name for table in self.tables for name in table.feature_names]

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
class Rule:
    """A check with what it needs to run."""

    check: RuleFunction
    needs: tuple[tuple[type, ...], ...]
    """For each parameter after ``run``: the classes that it may be."""

    def apply(self, run: Run) -> Iterator[Problem]:
        """What the rule has to say; nothing where the run lacks what it needs."""
        parts = [next((p for p in run.parts.values() if kind_of(p) in classes), None) for classes in self.needs]
        if any(part is None for part in parts):
            return
        try:
            yield from self.check(run, *parts)
        except Unknown:  # reported where it was read
            return


class RuleBook:
    """A list of rules. As a decorator it adds one: ``(run: Run, network: NetworkArgs, ...) -> Problems``.

    ``included``: books whose rules are part of this one.
    """

    def __init__(self, *included: RuleBook) -> None:
        self.rules: list[Rule] = [item for book in included for item in book.rules]

    def __call__(self, check: RuleFunction) -> RuleFunction:
        """Adds a rule; what it needs is read from its annotations."""
        hints = typing.get_type_hints(check)
        wanted = [hint for name, hint in hints.items() if name not in ("run", "return")]
        needs = tuple(typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,) for hint in wanted)
        self.rules.append(Rule(check, needs))
        return check

    def apply(self, run: Run) -> list[Problem]:
        """What all rules have to say."""
        return [problem for item in self.rules for problem in item.apply(run)]


def each_once(run: Run, named: list[tuple[Any, list[Any]]], parameter: str) -> Problems:
    """Problems where a name occurs twice: ``named`` lists parts with the names that each gives in ``parameter``."""
    owners: dict[str, Any] = {}
    for part, names in named:
        for name in names:
            if name in owners:
                text = f"{name!r} is given twice, also in {run.cite(owners[name], parameter)}; keep one of them"
                yield run.problem(part, parameter, text)
            elif name is not None:
                owners[name] = part
