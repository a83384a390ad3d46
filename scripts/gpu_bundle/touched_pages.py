"""Compile CUTLASS kernels and write which pages of the compiler's machine code were executed.

    python -m scripts.gpu_bundle.touched_pages OUTPUT

OUTPUT: the offset of the code in the file as 8 bytes, then one byte per page, 1 if it was touched. Further head
dims and dtypes touch no further pages.
"""

from __future__ import annotations

import array
import ctypes
import mmap
import sys
import tempfile
from pathlib import Path
from typing import Any

import cutlass

from scripts.gpu_bundle.libraries import PAGE

COMPILER = "_cutlass_ir.cu13."
CAPABILITY = 90
IS_PRESENT = 1 << 63
"""The bit of an entry of /proc/self/pagemap that says that the page is mapped."""


class Code:
    """The mapped machine code of a library.

    Args:
        name: part of the library's file name.
    """

    def __init__(self, name: str) -> None:
        lines = [line.split() for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()]
        (found,) = [line for line in lines if len(line) > 5 and name in line[5] and "x" in line[1]]
        self.begin, self.end = (int(address, 16) for address in found[0].split("-"))
        self.offset = int(found[2], 16)

    def forget(self) -> None:
        """Unmap all pages, so that only those that are touched from now on are mapped.

        Linux maps the neighbours of a touched page too, but only in the same memory area. Different advice for every
        other page makes each page an area of its own. Linux allows 65,530 areas; this code has about 40,000 pages.
        """
        for page in range(self.begin, self.end, 2 * PAGE):
            self._advise(page, PAGE, mmap.MADV_RANDOM)
        self._advise(self.begin, self.end - self.begin, mmap.MADV_DONTNEED)

    def touched(self) -> bytes:
        """One byte per page, 1 if it was touched."""
        entries = array.array("Q")
        with open("/proc/self/pagemap", "rb") as pagemap:
            pagemap.seek(self.begin // PAGE * entries.itemsize)
            entries.frombytes(pagemap.read((self.end - self.begin) // PAGE * entries.itemsize))
        return bytes(bool(entry & IS_PRESENT) for entry in entries)

    def _advise(self, address: int, size: int, advice: int) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.madvise(ctypes.c_void_p(address), ctypes.c_size_t(size), advice):
            raise OSError(ctypes.get_errno(), "madvise")


def compile_kernels() -> None:
    """Compile kernels, write each as an object file and load that, as training does; then provoke an error."""
    import torch
    from cutlass import cute
    from cutlass.cute.runtime import find_runtime_libraries, load_module

    from hstu.ops.cutlass.attention import compiled, variants
    from hstu.ops.cutlass.compile_ahead import compile_variant

    for library in find_runtime_libraries(enable_tvm_ffi=False):  # writing an object resolves their symbols
        ctypes.CDLL(library, ctypes.RTLD_GLOBAL)
    for dtype, head_dims in ((torch.bfloat16, (128, 256)), (torch.float16, (64,))):
        for variant in variants((dtype,), head_dims):
            if variant.capability == CAPABILITY:
                function: Any = compiled(variant)[0]
                with tempfile.NamedTemporaryFile(suffix=".o") as file:
                    file.write(function.dump_to_object("kernel"))
                    file.flush()
                    load_module(file.name)["kernel"]

    print(compile_variant(variant), flush=True)

    @cute.kernel
    def wrong(count: cutlass.Int32) -> None:
        cute.make_tensor(count, cute.make_layout(4))

    @cute.jit
    def launch(count: cutlass.Int32) -> None:
        wrong(count).launch(grid=(1, 1, 1), block=(32, 1, 1))

    try:
        cute.compile(launch, cutlass.Int32(1))
    except Exception as error:
        print(f"as intended: {type(error).__name__}")


if __name__ == "__main__":
    compiler = Code(COMPILER)
    compiler.forget()
    compile_kernels()
    Path(sys.argv[1]).write_bytes(compiler.offset.to_bytes(8, "little") + compiler.touched())
