"""Compiles each kernel once, for the tests that read its machine code and those that interpret its PTX."""

import functools

import pytest

from hstu.ops.cutlass import compile_ahead as ahead
from hstu.ops.cutlass.attention import Variant, compile_ahead
from hstu.ops.triton.compile_ahead import Compiled

_compiled = functools.cache(compile_ahead)


def ptx_of(variant: Variant) -> str:
    """The PTX of a kernel."""
    return _compiled(variant)[0]


def compile_variant(variant: Variant) -> Compiled:
    """As ``hstu.ops.cutlass.compile_ahead.compile_variant``, without compiling a kernel again."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ahead, "compile_ahead", _compiled)
        return ahead.compile_variant(variant)
