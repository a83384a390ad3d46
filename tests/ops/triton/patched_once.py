"""A pytest plugin for the process that interprets kernels: a launch replaces Triton's language once.

Triton 3.9 goes through every name of its language again whenever a kernel calls a function, though the launch has
replaced what is to be replaced: more than a quarter of the time. What is computed is the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import triton.language as tl
from triton.runtime import interpreter

_replaced: set[int] = set()
"""The modules of the language that the launch under way has replaced."""
_replace = interpreter._patch_lang
_launch = interpreter.GridExecutor.__call__


def _replace_once(function: Callable[..., Any]) -> interpreter._LangPatchScope:
    seen = {id(value) for value in function.__globals__.values() if value is tl or value is tl.core}
    if seen and seen <= _replaced:
        return interpreter._LangPatchScope()
    _replaced.update(seen)
    return _replace(function)


def _launch_anew(self: interpreter.GridExecutor, *args: Any, **kwargs: Any) -> Any:
    _replaced.clear()
    return _launch(self, *args, **kwargs)


interpreter._patch_lang = _replace_once
interpreter.GridExecutor.__call__ = _launch_anew
