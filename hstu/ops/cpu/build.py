"""Compile the C++ kernels once per machine, load them once per process, and pass them addresses of tensors.

Plain C++ behind a C interface, without headers of PyTorch or Python: a compiler suffices, and a new PyTorch release
needs no rebuild. The library is in the user's cache, named by a hash of sources, compiler, flags and processor.

    python -m hstu.ops.cpu.build    compile now, as an installer does; the exit code is 0 even if that fails
"""

import ctypes
import logging
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from torch import Tensor

from hstu.base.files import cache_directory, digest_of, only_own, written_aside

log = logging.getLogger(__name__)

KEPT_BYTES = 1 << 30
SOURCES = Path(__file__).parent / "csrc"
COMPILERS = ("g++", "c++", "clang++")
FLAGS = (
    *("-std=c++17", "-O3", "-march=native", "-fopenmp", "-fPIC", "-shared", "-w"),
    *("-fno-math-errno", "-fno-trapping-math"),
    "-fno-tree-loop-distribute-patterns",  # a call of memmove per row would cost more than the row
    *(("-mprefer-vector-width=512",) if platform.machine() in ("x86_64", "AMD64") else ()),
)
pointer, int64, int32, float32 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32, ctypes.c_float
strides = int64 * 2
"""Strides of the first two dimensions, in elements."""


class KernelsUnavailable(Exception):
    """No C++ kernels on this machine; the message is one line for the user: the reason and the remedy."""


def library_file() -> Path:
    """Path of the kernels, compiled once per user's cache. Raises KernelsUnavailable."""
    compiler = next(filter(None, map(shutil.which, COMPILERS)), None)
    if compiler is None:
        raise KernelsUnavailable("no C++ compiler is found; install one (on Debian and Ubuntu: apt-get install g++)")
    try:
        directory = cache_directory()
        path = directory / f"cpu_kernels_{_key(compiler)}.so"
        if not only_own(path):
            with FileLock(directory / "lock"):
                if not only_own(path):
                    _compile(compiler, path)
    except OSError as error:
        raise KernelsUnavailable(f"cannot write compiled kernels: {error}") from error
    return path


@cache
def library() -> ctypes.CDLL:
    """The loaded kernels. They share OpenMP's threads with PyTorch, imported before. Raises KernelsUnavailable."""
    path = library_file()
    try:
        loaded = ctypes.CDLL(str(path))
    except OSError as error:
        raise KernelsUnavailable(f"{path} cannot be loaded: {error}; delete it to have it compiled again") from error
    loaded.hstu_packed_width.restype = int64
    return loaded


class Arguments(ctypes.Structure):
    """Arguments of a C++ function. Subclasses list the fields of the C++ struct in the same order."""

    def __init__(self, **numbers: float) -> None:
        super().__init__(threads=torch.get_num_threads(), **numbers)
        self._tensors: list[Tensor | None] = []

    def set(self, **tensors: Tensor | None) -> None:
        """Set the addresses of tensors, and the strides of their first two dimensions if a field exists for them.

        The arguments keep the tensors alive. A tensor with strides is copied if its last dimension is not contiguous.
        """
        for name, tensor in tensors.items():
            if tensor is not None and hasattr(self, f"{name}_strides"):
                tensor = tensor if tensor.stride(-1) == 1 or tensor.numel() == 0 else tensor.contiguous()
                setattr(self, f"{name}_strides", strides(*tensor.stride()[:2]))
            setattr(self, name, None if tensor is None else tensor.data_ptr())
            self._tensors.append(tensor)


def fields(*groups: tuple[Any, str]) -> list[tuple[str, Any]]:
    """Fields of :class:`Arguments`, from groups of one type and names separated by spaces."""
    return [(name, kind) for kind, names in groups for name in names.split()]


def is_bfloat(tensors: Sequence[Tensor]) -> bool:
    """True for bfloat16, False for float32. Raises TypeError for other or mixed dtypes."""
    dtypes = {tensor.dtype for tensor in tensors}
    if dtypes not in ({torch.float32}, {torch.bfloat16}):
        raise TypeError(f"the C++ kernels take float32 or bfloat16, all tensors alike, not {sorted(map(str, dtypes))}")
    return tensors[0].dtype == torch.bfloat16


def keep_freed_memory() -> None:
    """Keep up to 1 GiB of freed memory in the process: new pages would cost a tenth of a training step on ML-1M."""
    library().hstu_keep_freed_memory(int64(KEPT_BYTES))


def _key(compiler: str) -> str:
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout
    return digest_of(SOURCES.iterdir(), version, *FLAGS, _processor())[:16]


def _processor() -> str:
    """What -march=native depends on: model and features, without the core or its clock."""
    wanted = ("model name", "flags", "Features", "CPU part")
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    found = dict(line.split(":", 1) for line in lines if line.startswith(wanted))
    return f"{platform.machine()} {sorted((name.strip(), value.strip()) for name, value in found.items())}"


def _compile(compiler: str, library: Path) -> None:
    sources = [str(path) for path in sorted(SOURCES.glob("*.cpp"))]
    log.info("compiling the CPU kernels with %s (some seconds, once per machine)", compiler)
    begun = time.monotonic()
    with written_aside(library) as made:
        result = subprocess.run([compiler, *FLAGS, *sources, "-o", str(made)], capture_output=True, text=True)
        if result.returncode:
            first = next((line for line in result.stderr.splitlines() if "error" in line), result.stderr[-300:])
            raise KernelsUnavailable(f"{compiler} cannot compile the CPU kernels: {first.strip()}")
        made.chmod(0o755)
    log.info("compiled the CPU kernels in %.0f s: %s", time.monotonic() - begun, library)


def main() -> None:
    """Compile, and print the result."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    try:
        print(f"CPU kernels: {library_file()}")
    except KernelsUnavailable as reason:
        print(f"no CPU kernels, PyTorch will be used instead: {reason}")


if __name__ == "__main__":
    main()
