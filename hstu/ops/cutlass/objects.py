"""Compiled CUTLASS kernels on disk: object files with the machine code and the host function that launches it."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import platform
from pathlib import Path
from typing import Any

import cutlass
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
