"""The kernels by name, with their tiles; compiling them."""

from __future__ import annotations

import functools
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import cuda.bindings.driver as cuda
import cutlass
import torch
from cutlass import Float32, Int32, Int64, cute
from cutlass.base_dsl.compiler import DumpDir, GPUArch, KeepCUBIN, KeepPTX
from cutlass.cute.runtime import make_ptr

from hstu.ops.cutlass.backward_sm80 import BackwardSm80
from hstu.ops.cutlass.backward_sm90 import BackwardSm90
from hstu.ops.cutlass.coverage import CAPABILITIES, HEAD_DIMS
from hstu.ops.cutlass.forward_sm80 import ForwardSm80
from hstu.ops.cutlass.forward_sm90 import ForwardSm90
from hstu.ops.cutlass.parts import Shape
from hstu.ops.cutlass.schedule import Rows

ELEMENTS = {torch.bfloat16: cutlass.BFloat16, torch.float16: cutlass.Float16}
ARCHITECTURES = {80: "sm_80", 90: "sm_90a"}
ALIGNMENT = 16
"""Bytes: of every address and stride that the kernels load from."""


class Kernel(StrEnum):
    """What a kernel computes."""

    FORWARD = "forward"
    """O."""
    QUERIES = "queries"
    """dQ."""
    KEYS = "keys"
    """dK, and dV up to head dim WIDEST_JOINT."""
    VALUES = "values"
    """dV, for wider heads."""


WIDEST_JOINT = 128
"""Head dim up to which the registers hold dK and dV of a block at once."""

# Columns streamed at a time, by head dim: as many as registers and shared memory (two stages) leave room for.
_TILES: dict[int, dict[Kernel, dict[int, int]]] = {
    90: {
        Kernel.FORWARD: {32: 128, 64: 128, 128: 128, 256: 80},
        Kernel.QUERIES: {32: 128, 64: 128, 128: 96, 256: 48},
        Kernel.KEYS: {32: 96, 64: 96, 128: 48, 256: 48},
        Kernel.VALUES: {256: 80},
    },
    80: {
        Kernel.FORWARD: {32: 64, 64: 64, 128: 64, 256: 32},
        Kernel.QUERIES: {32: 64, 64: 64, 128: 32, 256: 16},
        Kernel.KEYS: {32: 64, 64: 64, 128: 32, 256: 16},
        Kernel.VALUES: {256: 32},
    },
}


@dataclass(frozen=True)
class Variant:
    """A kernel for one type, head dim and GPU."""

    kernel: Kernel
    dtype: torch.dtype
    head_dim: int
    capability: int
    """90 for compute capability 9.0."""

    @property
    def rows(self) -> Rows:
        """What the blocks of its schedule are made of."""
        return Rows.KEYS if self.kernel in (Kernel.KEYS, Kernel.VALUES) else Rows.QUERIES

    @property
    def shape(self) -> Shape:
        """Its tiles."""
        tile = _TILES[self.capability][self.kernel][self.head_dim]
        return Shape(ELEMENTS[self.dtype], self.head_dim, self.rows, tile, stages=2)

    @property
    def num_inputs(self) -> int:
        """Tensors that it reads: x, y, z or x, y, w, z."""
        return 3 if self.kernel in (Kernel.FORWARD, Kernel.VALUES) else 4

    @property
    def num_outputs(self) -> int:
        """Tensors that it writes."""
        return 2 if self.kernel is Kernel.KEYS and self.head_dim <= WIDEST_JOINT else 1

    def make(self) -> Any:
        """The kernel itself."""
        if self.num_inputs == 3:
            return (ForwardSm90 if self.capability == 90 else ForwardSm80)(self.shape)
        return (BackwardSm90 if self.capability == 90 else BackwardSm80)(self.shape, self.num_outputs == 2)


def variants(
    dtypes: Sequence[torch.dtype] = (torch.bfloat16,), head_dims: Sequence[int] = HEAD_DIMS
) -> Iterator[Variant]:
    """All of them, of these types and head dims."""
    for capability in CAPABILITIES.values():
        for dtype in dtypes:
            for kernel, tiles in _TILES[capability].items():
                yield from (Variant(kernel, dtype, head_dim, capability) for head_dim in head_dims if head_dim in tiles)


@functools.cache
def compiled(variant: Variant) -> Callable[..., None]:
    """The variant's host function: see :func:`arguments`. Seconds the first time in a process."""
    return _compile(variant)


def compile_ahead(variant: Variant) -> tuple[str, bytes]:
    """PTX and machine code of the variant; no GPU is needed."""
    with tempfile.TemporaryDirectory() as folder:
        function = _compile(variant, KeepPTX(True), KeepCUBIN(True), DumpDir(folder))
        return function.__ptx__, function.__cubin__


def _compile(variant: Variant, *options: Any) -> Any:
    tensors = [(ALIGNMENT, 8, 8)] * (variant.num_inputs + variant.num_outputs)
    examples = arguments(variant, tensors, schedule=(ALIGNMENT, ALIGNMENT), sizes=(1,) * 5, factors=(1.0, 1.0), grid=1)
    with warnings.catch_warnings():  # it would have loops left as loops, which then index registers at run time
        warnings.simplefilter("ignore")
        return cute.compile[(GPUArch(ARCHITECTURES[variant.capability]), *options)](variant.make(), *examples)


def arguments(
    variant: Variant,
    tensors: list[tuple[int, int, int]],
    schedule: tuple[int, int],
    sizes: tuple[int, ...],
    factors: tuple[float, float],
    grid: int,
    stream: int = 0,
) -> tuple[Any, ...]:
    """What the host function of a variant takes.

    tensors: address, row stride and head stride in elements, of the inputs and then of the outputs; schedule: addresses
    of items and tiles; sizes: tokens, heads, blocks, leading rows, tokens of a target group; factors: α and 1 / N;
    grid: CTAs; stream: its handle.
    """

    def pointer(dtype: Any, address: int) -> Any:
        return make_ptr(dtype, address, cute.AddressSpace.gmem, assumed_align=ALIGNMENT)

    pointers = [pointer(ELEMENTS[variant.dtype], address) for address, _, _ in tensors]
    outs: Any = tuple(pointers[variant.num_inputs :])
    return (
        *pointers[: variant.num_inputs],
        outs[0] if variant.num_inputs == 3 else outs,
        tuple((Int64(row), Int64(head)) for _, row, head in tensors),
        *(pointer(Int32, address) for address in schedule),
        tuple(Int32(size) for size in sizes),
        tuple(Float32(factor) for factor in factors),
        Int32(grid),
        cuda.CUstream(stream),
    )
