"""Kernels compiled ahead, each once for all tests: those that look at the machine code and those that run the PTX."""

from __future__ import annotations

import functools

import pytest

from hstu.ops.cutlass import compile_ahead as ahead
from hstu.ops.cutlass.kernels import Variant, compile_ahead
from hstu.ops.triton.compile_ahead import Compiled

_compiled = functools.cache(compile_ahead)


def ptx_of(variant: Variant) -> str:
    """The kernel as it is run by the interpreter."""
    return _compiled(variant)[0]


def compile_variant(variant: Variant) -> Compiled:
    """What ``hstu.ops.cutlass.compile_ahead`` reads in the machine code, and refuses."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ahead, "compile_ahead", _compiled)
        return ahead.compile_variant(variant)
