"""Compiles each kernel once, for the tests that read its machine code and those that interpret its PTX."""

import functools

from kernel_variants import Compiled, read_cutlass_kernel

from hstu.ops.cutlass.attention import Variant, compile_ahead

_compiled = functools.cache(compile_ahead)


def ptx_of(variant: Variant) -> str:
    """The PTX of a kernel."""
    return _compiled(variant)[0]


def compile_variant(variant: Variant) -> Compiled:
    """What the machine code of a kernel needs."""
    return read_cutlass_kernel(variant, *_compiled(variant))
