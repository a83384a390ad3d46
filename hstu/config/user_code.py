"""The user's own functions in a gin file: ``import my_module`` and then ``@my_function()`` or ``%MY_CONSTANT``.

Only these go through gin's global registry; our own classes never do.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import gin

from hstu.config.gin_scan import Import, Macro, Reference
from hstu.config.problems import Problem


def run_imports(imports: list[Import]) -> list[Problem]:
    """Imports the modules that a file names, so that they register what they offer with gin."""
    problems = []
    for statement in imports:
        try:
            importlib.import_module(statement.module)
        except Exception as error:  # user code may raise anything; the user is told which
            text = f"import {statement.module}: {type(error).__name__}: {error}"
            problems.append(Problem(text, statement.at))
    return problems


def is_registered(selector: str) -> bool:
    """Whether gin knows a function or class of this name."""
    try:
        gin.get_configurable(selector)
    except (ValueError, KeyError):  # unknown or ambiguous
        return False
    return True


def constant(macro: Macro) -> tuple[bool, Any]:
    """(found, value) of a constant registered with gin."""
    try:
        return True, gin.query_parameter(macro.name)
    except (ValueError, RuntimeError):  # no constant; gin takes the name for a parameter and fails
        return False, None


def evaluate(reference: Reference) -> Any:
    """The configured function, called if the reference has parentheses. Raises whatever the function raises."""
    scoped = f"{reference.scope}/{reference.selector}" if reference.scope else reference.selector
    function: Callable[..., Any] = gin.get_configurable(scoped)
    return function() if reference.call else function


def forget_bindings() -> None:
    """Starts afresh, so that loading twice in a process does not mix two files."""
    gin.clear_config()


def bind(scope: str, selector: str, parameter: str, value: Any) -> None:
    """Binds a parameter of a registered function; ValueError where there is no such parameter."""
    gin.bind_parameter((scope, selector, parameter), value)
