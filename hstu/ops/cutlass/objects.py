"""Compiled CUTLASS kernels on disk, and memory for their launch arguments.

An object file contains machine code and the host function that launches it. The DSL takes 180 µs of Python per launch
to convert a nested tuple of 25 numbers, plus 50 µs to create it. It uses objects with ``__c_pointers__`` as they are.
"""

import ctypes
import functools
import hashlib
import itertools
import platform
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import cutlass
from cutlass import Float32, Int32
from cutlass.base_dsl.common import DSLRuntimeError
from cutlass.base_dsl.compiler import HostTarget
from cutlass.cute.runtime import find_runtime_libraries, load_module
from torch.utils._pytree import tree_leaves

from hstu.base.files import cache_directory, digest_of, only_own, written_aside

SYMBOL = "hstu_kernel"
"""Prefix of the symbols in every object file."""
PORTABLE = (
    (HostTarget("llvm -mtriple=x86_64-unknown-linux-gnu -mcpu=x86-64"),) if platform.machine() == "x86_64" else ()
)
"""Options of ``cute.compile`` for host code that runs on every CPU of this architecture."""


def object_file(variant: object) -> Path:
    """Path of a kernel's object file, named by a hash of everything that determines its contents."""
    return cache_directory() / "cutlass" / f"{hashlib.sha256(f'{_compiler()} {variant}'.encode()).hexdigest()[:32]}.o"


@functools.cache
def _compiler() -> str:
    """Hash of the kernel sources, and versions of the compiler."""
    here = Path(__file__).parent
    sources = digest_of([*here.glob("*.py"), *here.parent.glob("*.py")])
    return f"{sources} {cutlass.__version__} {cutlass.CUDA_VERSION} {platform.machine()}"


def save(function: Any, variant: object) -> None:
    """Write the object file of a function returned by ``cute.compile``."""
    for library in find_runtime_libraries(enable_tvm_ffi=False):  # the DSL resolves symbols as it writes
        ctypes.CDLL(library, ctypes.RTLD_GLOBAL)
    file = object_file(variant)
    file.parent.mkdir(mode=0o755, exist_ok=True)
    with written_aside(file, shared=True) as aside:
        aside.write_bytes(function.dump_to_object(SYMBOL))
        aside.chmod(0o644)


def load(variant: object) -> Any | None:
    """The function in a variant's object file; None if it is absent, not ``only_own`` or unreadable."""
    try:
        file = object_file(variant)
        return load_module(str(file))[SYMBOL] if only_own(file) else None
    except (DSLRuntimeError, RuntimeError, OSError):
        return None


class LaunchArguments:
    """Memory for the arguments of one host function. ``examples``: nested tuples of the types it is compiled for."""

    def __init__(self, *examples: Any) -> None:
        leaves = [tree_leaves(each) for each in examples]
        formats = [{Int32: "i4x", Float32: "f4x"}.get(type(leaf), "Q") for each in leaves for leaf in each]
        self._layout = struct.Struct("=" + "".join(formats))
        self._memory = (ctypes.c_uint64 * len(formats))()
        addresses = itertools.count(ctypes.addressof(self._memory), 8)
        self.values = tuple(_Addresses(itertools.islice(addresses, len(each))) for each in leaves)
        """Arguments to call the host function with."""

    def write(self, *values: float) -> None:
        """Set all values. A launch has read them when it returns."""
        self._layout.pack_into(self._memory, 0, *values)


class _Addresses:
    def __init__(self, addresses: Iterable[int]) -> None:
        self._addresses = list(addresses)

    def __c_pointers__(self) -> list[int]:
        return self._addresses
