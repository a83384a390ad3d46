"""Compile CUTLASS kernels and find which pages of the compiler's machine code that executes.

    python -m scripts.gpu_bundle.touched_pages COMPILER

COMPILER: the library of the CUTLASS DSL in the package that is imported. It is overwritten: code that is not executed
while it is loaded, used and unloaded is blanked. Further head dims and dtypes touch no further pages. Some code depends
on addresses, which differ from process to process; therefore TRACES processes compile the same.
"""

from __future__ import annotations

import array
import ctypes
import mmap
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from scripts.gpu_bundle import libraries
from scripts.gpu_bundle.libraries import PAGE

HOSTS = ("x86-64", "skylake-avx512", "icelake-server", "sapphirerapids", "emeraldrapids", "znver3", "znver4")
"""CPUs of GPU machines: the compiler writes the function that launches a kernel for the CPU that it runs on."""
TRACES = 6
CPUID, NEAR = b"\x0f\xa2", range(-4, 5)
"""The instruction that identifies the CPU; the pages around it are kept, for what the compiler does on other CPUs."""
MLOCK_ONFAULT = 1
IS_PRESENT = 1 << 63
"""The bit of an entry of /proc/self/pagemap that says that the page is mapped."""


class Code:
    """The mapped machine code of a library.

    Args:
        library: its file, which this process has loaded.
    """

    def __init__(self, library: Path) -> None:
        lines = [line.split() for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()]
        (found,) = [line for line in lines if line[-1] == str(library) and "x" in line[1]]
        self.begin, self.end = (int(address, 16) for address in found[0].split("-"))
        self.offset = int(found[2], 16)
        self._libc = ctypes.CDLL(None, use_errno=True)

    def forget(self) -> None:
        """Unmap all pages, so that only those that are touched from now on are mapped.

        Linux maps the neighbours of a touched page too, but only in the same memory area. Different advice for every
        other page makes each page an area of its own. Linux allows 65,530 areas; this code has about 40,000 pages.
        Touched pages are locked, because Linux unmaps pages where memory runs short.
        """
        for page in range(self.begin, self.end, 2 * PAGE):
            self._advise(page, PAGE, mmap.MADV_RANDOM)
        self._advise(self.begin, self.end - self.begin, mmap.MADV_DONTNEED)
        if self._libc.mlock2(ctypes.c_void_p(self.begin), ctypes.c_size_t(self.end - self.begin), MLOCK_ONFAULT):
            raise OSError(
                ctypes.get_errno(), "cannot lock the compiler's code in memory; allow it with ulimit -l unlimited"
            )

    def touched(self) -> bytes:
        """One byte per page, 1 if it was touched."""
        entries = array.array("Q")
        with open("/proc/self/pagemap", "rb") as pagemap:
            pagemap.seek(self.begin // PAGE * entries.itemsize)
            entries.frombytes(pagemap.read((self.end - self.begin) // PAGE * entries.itemsize))
        return bytes(bool(entry & IS_PRESENT) for entry in entries)

    def _advise(self, address: int, size: int, advice: int) -> None:
        if self._libc.madvise(ctypes.c_void_p(address), ctypes.c_size_t(size), advice):
            raise OSError(ctypes.get_errno(), "madvise")


def compile_kernels() -> None:
    """Compile kernels, write each as an object file and load that, as training does; then one of them for HOSTS."""
    import torch
    from cutlass.base_dsl.compiler import HostTarget
    from cutlass.cute.runtime import find_runtime_libraries, load_module

    from hstu.ops.cutlass.attention import _compile, compile_ahead, variants

    for library in find_runtime_libraries(enable_tvm_ffi=False):  # writing an object resolves their symbols
        ctypes.CDLL(library, ctypes.RTLD_GLOBAL)
    chosen = [
        variant
        for dtype, head_dims in ((torch.bfloat16, (128, 256)), (torch.float16, (64,)))
        for variant in variants((dtype,), head_dims)
    ]
    print(f"{chosen[0]}: {len(compile_ahead(chosen[0])[1])} bytes of machine code", flush=True)
    for variant in chosen:
        with tempfile.NamedTemporaryFile(suffix=".o") as file:
            file.write(_compile(variant).dump_to_object("kernel"))
            file.flush()
            load_module(file.name)["kernel"]
    for host in HOSTS:
        _compile(chosen[0], HostTarget(f"llvm -mtriple=x86_64-unknown-linux-gnu -mcpu={host}")).dump_to_object("kernel")


def trace(library: Path, constructors: int, count: int, destructors: int) -> bytes:
    """Which pages of the file are executed, one byte per page. The loader must not see the library's constructors.

    Args:
        library: the file.
        constructors, count, destructors: of ``libraries.remove_constructors``.
    """
    ctypes.CDLL(str(library))  # the later import finds it loaded
    code = Code(library)
    code.forget()
    base = code.begin - code.offset
    for function in (ctypes.c_void_p * count).from_address(base + constructors):
        ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)(function or 0)(0, None, None)
    compile_kernels()
    ctypes.CFUNCTYPE(None)(ctypes.c_void_p.from_address(base + destructors).value or 0)()
    return bytes(code.offset // PAGE) + code.touched()


def main(library: Path) -> None:
    """Blank the code that no trace executes."""
    original = library.read_bytes()
    patched = bytearray(original)
    numbers = libraries.remove_constructors(patched)
    library.unlink()
    library.write_bytes(patched)
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        traces = [Path(folder) / str(number) for number in range(TRACES)]
        command = [sys.executable, "-m", "scripts.gpu_bundle.touched_pages", str(library), *map(str, numbers)]
        for _ in pool.map(lambda trace: subprocess.run([*command, str(trace)], check=True), traces):
            pass
        touched = [any(pages) for pages in zip(*(trace.read_bytes() for trace in traces), strict=True)]
    detecting = {match.start() // PAGE for match in re.finditer(CPUID, original)}
    kept = {page + near for page in detecting if page < len(touched) and touched[page] for near in NEAR}
    blank = bytearray(original)
    blanked = libraries.keep_pages(blank, 0, lambda page: touched[page] or page in kept)
    library.unlink()
    libraries.write(blank, library)
    print(f"{library.name}: {blanked} of {len(touched)} pages blanked", flush=True)


if __name__ == "__main__":
    if len(sys.argv) == 2:
        main(Path(sys.argv[1]).resolve())
    else:
        Path(sys.argv[5]).write_bytes(trace(Path(sys.argv[1]), *map(int, sys.argv[2:5])))
        os._exit(0)  # the destructors must not run twice
