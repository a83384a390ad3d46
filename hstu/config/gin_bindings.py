"""Statements of gin files, filed by the parameter that they bind, and the user's own functions that they call.

Unknown names and double bindings are reported here. A misspelt name is reported and then read as the most similar
name, so that the rest of the statement is checked too.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import gin

from hstu.config.args import ACCEPTED, CLASSES, REGISTRY, REPLACED, Args
from hstu.config.gin_scan import Binding, Broken, Import, Macro, Reference, Scan
from hstu.config.option import is_required, options_of
from hstu.config.problems import Problem, nearest, show

Owner = tuple[str, type[Args]]
"""(scope, class): what a group of bindings belongs to."""


def written(owner: Owner) -> str:
    """The owner as in a gin file: ``scope/Class``."""
    scope, cls = owner
    return f"{scope}/{cls.__name__}" if scope else cls.__name__


class Bindings:
    """Statements by what they bind. ``problems`` receives what is wrong with their names."""

    def __init__(self, statements: Scan, problems: list[Problem]) -> None:
        self.by_owner: dict[Owner, dict[str, Binding]] = {}
        self.macros: dict[str, Binding] = {}
        self.user: list[Binding] = []
        self.not_in_force: list[Binding] = []
        """Those that a later file or the command line overrides, and those of ``ACCEPTED`` and ``REPLACED``."""
        self._is_stored = statements.is_stored
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
                self._report(binding, f"is a class; bind one of its parameters: {cls.__name__}.parameter = value")
                self.macros[binding.name] = replace(binding, value=Broken())
        elif cls:
            self._file_parameter(cls, binding)
        elif is_registered(binding.selector):
            self._check_twice(binding, f"{binding.scope}/{binding.selector}", binding.parameter)
            self.user.append(binding)
        else:
            guess = nearest(binding.selector, CLASSES)
            hint = f"did you mean {guess!r}?" if guess else f"there are {', '.join(CLASSES)}"
            self._report(binding, f"there is no class {binding.selector}; {hint}")
            if guess:
                self._file_parameter(CLASSES[guess], binding, is_guess=True)

    def _file_parameter(self, cls: type[Args], binding: Binding, is_guess: bool = False) -> None:
        if binding.parameter in ACCEPTED:
            self.not_in_force.append(binding)
            self._report(binding, ACCEPTED[binding.parameter], is_warning=True)
            return
        if replaced := REPLACED.get((cls.__name__, binding.parameter)):
            self.not_in_force.append(binding)
            if not self._is_stored:
                self._report(binding, replaced)
            return
        names = {name: option.name for option in options_of(cls) for name in (option.name, *option.metadata["aliases"])}
        owner = (binding.scope, cls)
        if binding.parameter in names:
            parameter = names[binding.parameter]
            self._check_twice(binding, written(owner), parameter)
            bound = self.by_owner.setdefault(owner, {})
            self.not_in_force += [bound[parameter]] if parameter in bound else []
            bound[parameter] = binding
            return
        guess = nearest(binding.parameter, names)
        if guess or not is_guess:
            self._report(binding, _no_such_parameter(cls, binding, guess, names))
        if guess:
            as_meant = binding if guess == names[guess] else replace(binding, parameter=guess)
            self.by_owner.setdefault(owner, {}).setdefault(names[guess], as_meant)

    def _check_twice(self, binding: Binding, owner: str, parameter: str) -> None:
        first = self._seen.setdefault((binding.at.source, owner, parameter), binding)
        if first is binding or isinstance(first.value, Broken) or isinstance(binding.value, Broken):
            return
        other = f" as {first.parameter}" if first.parameter != binding.parameter else ""
        is_equal = not other and repr(first.value) == repr(binding.value)
        text = f"bound twice: already {show(first.value)}{other} at {first.at}; keep one of them"
        self._report(binding, text, is_warning=is_equal)

    def _report(self, binding: Binding, text: str, is_warning: bool = False) -> None:
        self._problems.append(Problem(f"{binding}: {text}", binding.at, is_warning))

    def owners_of(self, cls: type[Args]) -> list[Owner]:
        """The objects of a class or a subclass that the files bind, in file order.

        Bindings without a scope are defaults of those with a scope, as in gin; alone they are one object.
        """
        owners = [owner for owner in self.by_owner if issubclass(owner[1], cls)]
        scoped = {kind for scope, kind in owners if scope}
        return [owner for owner in owners if owner[0] or owner[1] not in scoped]


def find_class(selector: str) -> type[Args] | None:
    """The class of this name. As in gin, modules may precede it: ``hstu.config.args.NetworkArgs``."""
    cls = CLASSES.get(selector.rpartition(".")[2])
    return cls if cls and f".hstu.config.args.{cls.__name__}".endswith(f".{selector}") else None


def _no_such_parameter(cls: type[Args], binding: Binding, guess: str | None, names: Mapping[str, str]) -> str:
    text = f"{cls.__name__} has no parameter {binding.parameter}"
    if guess:
        return f"{text}; did you mean {guess!r}? (--explain {cls.__name__} lists all)"
    owners = [(other, option) for other in REGISTRY for option in options_of(other) if option.name == binding.parameter]
    for other, _ in sorted(owners, key=lambda owner: not is_required(owner[1])):  # more likely if it is required
        return f"{text}; did you mean {other.__name__}.{binding.parameter}?"
    return f"{text}; it has {', '.join(names)}"


# --- the user's own functions and constants, the only ones in gin's own registry -------------------------------------


def run_imports(imports: list[Import]) -> list[Problem]:
    """Imports the modules that a file names, so that they register their functions and constants with gin."""
    problems = []
    for statement in imports:
        try:
            importlib.import_module(statement.module)
        except Exception as error:  # user code may raise anything
            text = f"import {statement.module}: {type(error).__name__}: {error}; check the name, PYTHONPATH and module"
            problems.append(Problem(text, statement.at))
    return problems


def is_registered(selector: str) -> bool:
    """Whether gin has a function or class of this name."""
    try:
        gin.get_configurable(selector)
    except (ValueError, KeyError):  # unknown or ambiguous
        return False
    return True


def constant(macro: Macro) -> tuple[bool, Any]:
    """(found, value) of a constant that is registered with gin."""
    try:
        return True, gin.query_parameter(macro.name)
    except (ValueError, RuntimeError):  # no constant; gin takes the name for a parameter and fails
        return False, None


def evaluate(reference: Reference) -> Any:
    """The configured function, called if the reference has parentheses. Raises what the function raises."""
    function: Callable[..., Any] = gin.get_configurable(reference.name)
    return function() if reference.call else function
