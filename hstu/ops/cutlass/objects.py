"""Compiled CUTLASS kernels: object files with the machine code and the host function that launches it; its arguments.

The DSL turns a nested tuple of 25 numbers into addresses in 180 µs of Python for each launch, after the 50 µs that it
takes to make the numbers. It takes objects with ``__c_pointers__`` as they are.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import itertools
import platform
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import cutlass
from cutlass import Float32, Int32
from cutlass.base_dsl.common import DSLRuntimeError
from cutlass.base_dsl.compiler import HostTarget
from cutlass.cute.runtime import find_runtime_libraries, load_module

from hstu.base.files import written_aside
from hstu.ops.self_check import cache_directory

SYMBOL = "hstu_kernel"
"""Prefix of the symbols of every object file."""


PORTABLE = (
    (HostTarget("llvm -mtriple=x86_64-unknown-linux-gnu -mcpu=x86-64"),) if platform.machine() == "x86_64" else ()
)
"""Options of ``cute.compile``: host code for every CPU of this architecture, not with the instructions of this one."""


def object_file(variant: object) -> Path:
    """Where the object of a kernel lies: the name is a hash of all that decides its contents."""
    return cache_directory() / "cutlass" / f"{hashlib.sha256(f'{_compiler()} {variant}'.encode()).hexdigest()[:32]}.o"


@functools.cache
def _compiler() -> str:
    """The sources of the kernels and the versions that compile them."""
    digest = hashlib.sha256()
    here = Path(__file__).parent
    for source in sorted([*here.glob("*.py"), *here.parent.glob("*.py")]):
        digest.update(source.name.encode() + b"\0" + source.read_bytes())
    return f"{digest.hexdigest()} {cutlass.__version__} {cutlass.CUDA_VERSION} {platform.machine()}"


def save(function: Any, variant: object) -> None:
    """Write the object of a function that ``cute.compile`` has returned."""
    for library in find_runtime_libraries(enable_tvm_ffi=False):  # the DSL resolves the symbols of what it writes
        ctypes.CDLL(library, ctypes.RTLD_GLOBAL)
    file = object_file(variant)
    file.parent.mkdir(parents=True, exist_ok=True)
    with written_aside(file, shared=True) as aside:
        aside.write_bytes(function.dump_to_object(SYMBOL))


def load(variant: object) -> Any | None:
    """The function of an object that was written before; None: there is none, or the DSL cannot read it."""
    try:
        file = object_file(variant)
        return load_module(str(file))[SYMBOL] if file.exists() else None
    except (DSLRuntimeError, RuntimeError, OSError):
        return None


class LaunchArguments:
    """Memory for the arguments of one host function; a launch has read them by the time it returns.

    ``examples``: arguments of the types that the function is compiled for, as nested tuples.
    """

    def __init__(self, *examples: Any) -> None:
        leaves = [[*_leaves(each)] for each in examples]
        formats = [{Int32: "i4x", Float32: "f4x"}.get(type(leaf), "Q") for each in leaves for leaf in each]
        self._layout = struct.Struct("=" + "".join(formats))
        self._memory = (ctypes.c_uint64 * len(formats))()
        addresses = itertools.count(ctypes.addressof(self._memory), 8)
        self.values = tuple(_Addresses(itertools.islice(addresses, len(each))) for each in leaves)
        """What the host function is called with."""

    def write(self, *values: float) -> None:
        """Set all values."""
        self._layout.pack_into(self._memory, 0, *values)


def _leaves(argument: Any) -> Iterator[Any]:
    if isinstance(argument, tuple):
        for part in argument:
            yield from _leaves(part)
    else:
        yield argument


class _Addresses:
    """One argument: the addresses of its values."""

    def __init__(self, addresses: Iterable[int]) -> None:
        self._addresses = list(addresses)

    def __c_pointers__(self) -> list[int]:
        return self._addresses
