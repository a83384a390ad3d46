"""Statements of gin files filed by the parameter they bind. Says which names do not exist and what is bound twice."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace

from hstu.config import user_code
from hstu.config.args import ARGS_CLASSES, Args
from hstu.config.checks import is_required
from hstu.config.gin_scan import Binding, Broken, Scan
from hstu.config.problems import Problem, nearest, show

CLASSES: Mapping[str, type[Args]] = {cls.__name__: cls for cls in ARGS_CLASSES}

Owner = tuple[str, type[Args]]
"""(scope, class): what a group of bindings belongs to."""


def written(owner: Owner) -> str:
    """The owner as in a gin file: ``scope/Class``."""
    scope, cls = owner
    return f"{scope}/{cls.__name__}" if scope else cls.__name__


class Bindings:
    """Statements filed by what they bind; says which names do not exist and what is bound twice."""

    def __init__(self, statements: Scan, problems: list[Problem]) -> None:
        self.by_owner: dict[Owner, dict[str, Binding]] = {}
        self.macros: dict[str, Binding] = {}
        self.user: list[Binding] = []
        self._problems = problems
        self._seen: dict[tuple[int, str, str], Binding] = {}
        for binding in statements.bindings:
            self._file(binding)

    def _file(self, binding: Binding) -> None:
        cls = find_class(binding.selector)
        if not binding.parameter:
            self._check_twice(binding, binding.name, "")
            self.macros[binding.name] = binding
            if cls:
                self._problems.append(Problem(f"{binding.name}: bind one of its parameters, not the class", binding.at))
                self.macros[binding.name] = replace(binding, value=Broken())
        elif cls:
            self._file_parameter(cls, binding)
        elif user_code.is_registered(binding.selector):
            self._check_twice(binding, f"{binding.scope}/{binding.selector}", binding.parameter)
            self.user.append(binding)
        else:
            guess = nearest(binding.selector, CLASSES)
            text = f"there is no class {binding.selector}" + (f"; did you mean {guess!r}?" if guess else "")
            known = "" if guess else "; there are " + ", ".join(CLASSES)
            self._problems.append(Problem(f"{binding.name} = {show(binding.value)}: {text}{known}", binding.at))
            if guess:  # then the parameter is not also missing
                self._file_parameter(CLASSES[guess], replace(binding, value=Broken(), selector=guess), silent=True)

    def _file_parameter(self, cls: type[Args], binding: Binding, silent: bool = False) -> None:
        names = {alias: f.name for f in fields(cls) for alias in (f.name, *f.metadata["aliases"])}  # type: ignore[arg-type]
        parameter = names.get(binding.parameter)
        if parameter is None:
            if not silent:
                self._problems.append(Problem(_no_such_parameter(cls, binding, names), binding.at))
            guess = nearest(binding.parameter, names)
            if guess:
                owned = self.by_owner.setdefault((binding.scope, cls), {})
                owned.setdefault(names[guess], replace(binding, value=Broken()))
            return
        self._check_twice(binding, written((binding.scope, cls)), parameter)
        self.by_owner.setdefault((binding.scope, cls), {})[parameter] = binding

    def _check_twice(self, binding: Binding, owner: str, parameter: str) -> None:
        first = self._seen.setdefault((binding.at.source, owner, parameter), binding)
        if first is not binding and not isinstance(first.value, Broken) and not isinstance(binding.value, Broken):
            other = f" as {first.parameter}" if first.parameter != binding.parameter else ""
            text = f"bound twice: already {show(first.value)}{other} at {first.at}; keep one of them"
            self._problems.append(Problem(f"{binding.name} = {show(binding.value)}: {text}", binding.at))

    def scopes_of(self, *classes: type[Args]) -> list[str]:
        """The scopes that are bound for any of the classes, in file order."""
        return [scope for scope, cls in self.by_owner if cls in classes and scope]


def find_class(selector: str) -> type[Args] | None:
    """By its name, or by its name with modules before it as gin allows."""
    cls = CLASSES.get(selector.rpartition(".")[2])
    return cls if cls and f".{cls.__module__}.{cls.__name__}".endswith(f".{selector}") else None


def _no_such_parameter(cls: type[Args], binding: Binding, names: Mapping[str, str]) -> str:
    text = f"{binding.name} = {show(binding.value)}: {cls.__name__} has no parameter {binding.parameter}"
    if guess := nearest(binding.parameter, names):
        return f"{text}; did you mean {guess!r}? (--explain {cls.__name__} lists all)"
    owned = [(other, f) for other in ARGS_CLASSES for f in fields(other) if f.name == binding.parameter]  # type: ignore[arg-type]
    for other, _ in sorted(owned, key=lambda one: not is_required(one[1])):  # what must be given is more likely meant
        return f"{text}; did you mean {other.__name__}.{binding.parameter}?"
    return f"{text}; it has {', '.join(names)}"
