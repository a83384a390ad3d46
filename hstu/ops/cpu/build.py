"""Compiles the C++ kernels once a machine, and finds what was compiled before.

They are plain C++ behind a C interface, with no header of PyTorch or Python, so that a compiler is all it takes, some
seconds of it, and no release of PyTorch needs another build. The library lies in the user's cache directory, under a
name made of the sources, the compiler, its flags and the processor.

    python -m hstu.ops.cpu.build    compile now, as an installer does; the exit code is 0 even where that fails
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hstu.ops.cache import cache_directory

log = logging.getLogger(__name__)

SOURCES = Path(__file__).parent / "csrc"
COMPILERS = ("g++", "c++", "clang++")
FLAGS = (
    *("-std=c++17", "-O3", "-march=native", "-fopenmp", "-fPIC", "-shared", "-w"),
    *("-fno-math-errno", "-fno-trapping-math"),
    *(("-mprefer-vector-width=512",) if platform.machine() in ("x86_64", "AMD64") else ()),
)


class KernelsUnavailable(Exception):
    """Why there are no C++ kernels here, and what would help: a line for the user."""


def library_file(cache: Path | None = None) -> Path:
    """The compiled kernels, which are compiled now if they have not been. Raises KernelsUnavailable.

    ``cache``: directory for compiled kernels, the user's by default. Any number of processes may call this at once:
    one compiles, the others wait for it. An interrupted compilation leaves nothing that is taken for a library.
    """
    compiler = _compiler()
    cache = cache_directory() if cache is None else cache
    library = cache / f"cpu_kernels_{_key(compiler)}.so"
    if library.exists():
        return library
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with _locked(cache / "lock"):
            if not library.exists():
                _compile(compiler, library)
    except OSError as error:
        raise KernelsUnavailable(f"cannot write compiled kernels to {cache}: {error.strerror}") from error
    return library


def _compiler() -> str:
    for name in COMPILERS:
        path = shutil.which(name)
        if path:
            return path
    raise KernelsUnavailable("no C++ compiler is found; install one (on Debian and Ubuntu: apt-get install g++)")


def _key(compiler: str) -> str:
    """Changes with whatever changes the compiled code."""
    digest = hashlib.sha256()
    for source in sorted(SOURCES.iterdir()):
        digest.update(source.name.encode() + b"\0" + source.read_bytes())
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout
    digest.update("\0".join([version, *FLAGS, _processor()]).encode())
    return digest.hexdigest()[:16]


def _processor() -> str:
    """What -march=native looks at: model and features, but not the core or its clock."""
    wanted = ("model name", "flags", "Features", "CPU part")
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    found = dict(line.split(":", 1) for line in lines if line.startswith(wanted))
    return f"{platform.machine()} {sorted((name.strip(), value.strip()) for name, value in found.items())}"


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Alone among all processes of this host; the lock ends with the process, however that ends."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _compile(compiler: str, library: Path) -> None:
    sources = [str(path) for path in sorted(SOURCES.glob("*.cpp"))]
    log.info("compiling the CPU kernels with %s (some seconds, once on this machine)", compiler)
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(dir=library.parent) as directory:
        made = Path(directory) / library.name
        result = subprocess.run([compiler, *FLAGS, *sources, "-o", str(made)], capture_output=True, text=True)
        if result.returncode:
            first = next((line for line in result.stderr.splitlines() if "error" in line), result.stderr[-300:])
            raise KernelsUnavailable(f"{compiler} cannot compile the CPU kernels: {first.strip()}")
        os.replace(made, library)
    log.info("compiled the CPU kernels in %.0f s: %s", time.monotonic() - begun, library)


def main() -> None:
    """Compile, and say how it went."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    try:
        print(f"CPU kernels: {library_file()}")
    except KernelsUnavailable as reason:
        print(f"no CPU kernels, PyTorch will be used instead: {reason}")


if __name__ == "__main__":
    main()
