"""The C++ kernels: compiled once per machine, loaded once per process, called with the addresses of tensors.

They are plain C++ behind a C interface and include no header of PyTorch or Python, so that they need only a compiler
and no rebuild for a new release of PyTorch. The library lies in the user's cache directory; its name is a hash of the
sources, the compiler, its flags, the processor and the format of the file. Its last bytes are a hash of all bytes
before them, which is checked before each use: a damaged library is compiled again.

    python -m hstu.ops.cpu.build    compile now, as an installer does; the exit code is 0 even where that fails
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from torch import Tensor

from hstu.base.files import put_in_place
from hstu.ops.self_check import cache_directory

log = logging.getLogger(__name__)

KEPT_BYTES = 1 << 30
_HASH_BYTES = hashlib.sha256().digest_size
_FORMAT = "code, then its SHA-256"
"""Part of a library's name. Libraries of versions that added no hash have other names and are not taken for damaged."""
_COMPILING = "compiling-"
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
"""Of the first two dimensions, in elements."""


class KernelsUnavailable(Exception):
    """There are no C++ kernels on this machine; the message is one line for the user: the reason and the remedy."""


def library_file(directory: Path | None = None) -> Path:
    """Path of the compiled kernels, which are compiled now if they have not been. Raises KernelsUnavailable.

    ``directory``: where compiled kernels lie, by default the user's cache. Any number of processes may call this at
    once: one compiles, the others wait for it. An interrupted compilation leaves no library behind, and the next one
    removes its files.
    """
    compiler = _compiler()
    try:
        directory = cache_directory() if directory is None else directory
        path = directory / f"cpu_kernels_{_key(compiler)}.so"
        if _is_intact(path):
            return path
        directory.mkdir(parents=True, exist_ok=True)
        with FileLock(directory / "lock"):
            if not _is_intact(path):
                if path.exists():
                    log.warning("%s is damaged and is compiled again", path)
                _compile(compiler, path)
    except OSError as error:
        place = "" if directory is None else f" to {directory}"
        raise KernelsUnavailable(f"cannot write compiled kernels{place}: {error.strerror or error}") from error
    return path


@cache
def library() -> ctypes.CDLL:
    """The compiled kernels, loaded once per process. Raises KernelsUnavailable.

    PyTorch has been imported before and has loaded OpenMP: kernels and PyTorch share one set of threads.
    """
    path = library_file()
    try:
        loaded = ctypes.CDLL(str(path))
    except OSError as error:
        raise KernelsUnavailable(f"{path} cannot be loaded: {error}; delete it to have it compiled again") from error
    loaded.hstu_packed_width.restype = int64
    return loaded


def address(tensor: Tensor | None) -> int | None:
    """Address of a tensor's first element."""
    return None if tensor is None else tensor.data_ptr()


class Arguments(ctypes.Structure):
    """The arguments of a C++ function. A subclass has the fields of the C++ struct, in the same order."""

    def set(self, **tensors: Tensor | None) -> None:
        """Set the addresses of tensors, and the strides of their first two dimensions where there is a field for them.

        None is a null pointer. The tensors live as long as the arguments.
        """
        for name, tensor in tensors.items():
            setattr(self, name, address(tensor))
            if tensor is not None and hasattr(self, f"{name}_strides"):
                setattr(self, f"{name}_strides", strides(*tensor.stride()[:2]))
        self._tensors = (*getattr(self, "_tensors", ()), *tensors.values())


def fields(*groups: tuple[Any, str]) -> list[tuple[str, Any]]:
    """The fields of :class:`Arguments`: groups of one type each, with the names separated by spaces."""
    return [(name, kind) for kind, names in groups for name in names.split()]


def with_contiguous_rows(tensor: Tensor) -> Tensor:
    """The tensor, copied only where its last dimension is not contiguous."""
    return tensor if tensor.stride(-1) == 1 or tensor.numel() == 0 else tensor.contiguous()


def is_bfloat(tensors: Sequence[Tensor]) -> bool:
    """True for bfloat16, False for float32. Raises TypeError for another dtype and for tensors of several."""
    dtypes = {tensor.dtype for tensor in tensors}
    if dtypes not in ({torch.float32}, {torch.bfloat16}):
        raise TypeError(f"the C++ kernels take float32 or bfloat16, all tensors alike, not {sorted(map(str, dtypes))}")
    return tensors[0].dtype == torch.bfloat16


def num_threads() -> int:
    """Threads that a kernel runs on: as many as PyTorch uses."""
    return torch.get_num_threads()


def keep_freed_memory() -> None:
    """Keep up to 1 GiB of freed memory in the process from now on instead of returning it to the system.

    A training step frees and allocates the same tensors again, and new pages would cost a tenth of a step at the size
    of ML-1M.
    """
    library().hstu_keep_freed_memory(int64(KEPT_BYTES))


def _compiler() -> str:
    for name in COMPILERS:
        path = shutil.which(name)
        if path:
            return path
    raise KernelsUnavailable("no C++ compiler is found; install one (on Debian and Ubuntu: apt-get install g++)")


def _key(compiler: str) -> str:
    """A hash of everything that determines the compiled code."""
    digest = hashlib.sha256()
    for source in sorted(SOURCES.iterdir()):
        digest.update(source.name.encode() + b"\0" + source.read_bytes())
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout
    digest.update("\0".join([version, *FLAGS, _processor(), _FORMAT]).encode())
    return digest.hexdigest()[:16]


def _processor() -> str:
    """What -march=native depends on: model and features, but not the core or its clock."""
    wanted = ("model name", "flags", "Features", "CPU part")
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    found = dict(line.split(":", 1) for line in lines if line.startswith(wanted))
    return f"{platform.machine()} {sorted((name.strip(), value.strip()) for name, value in found.items())}"


def _is_intact(library: Path) -> bool:
    """Whether the file exists and ends in the hash of what precedes it, as ``_seal`` left it."""
    try:
        content = library.read_bytes()
    except FileNotFoundError:
        return False
    return hashlib.sha256(content[:-_HASH_BYTES]).digest() == content[-_HASH_BYTES:]


def _seal(library: Path) -> None:
    """Append the hash, which the loader ignores."""
    digest = hashlib.sha256(library.read_bytes()).digest()
    with library.open("ab") as file:
        file.write(digest)


def _compile(compiler: str, library: Path) -> None:
    for interrupted in library.parent.glob(f"{_COMPILING}*"):  # no other process compiles, see library_file
        shutil.rmtree(interrupted, ignore_errors=True)
    sources = [str(path) for path in sorted(SOURCES.glob("*.cpp"))]
    log.info("compiling the CPU kernels with %s (some seconds, once per machine)", compiler)
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(dir=library.parent, prefix=_COMPILING) as directory:
        made = Path(directory) / library.name
        result = subprocess.run([compiler, *FLAGS, *sources, "-o", str(made)], capture_output=True, text=True)
        if result.returncode:
            first = next((line for line in result.stderr.splitlines() if "error" in line), result.stderr[-300:])
            raise KernelsUnavailable(f"{compiler} cannot compile the CPU kernels: {first.strip()}")
        _seal(made)
        put_in_place(made, library)
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
