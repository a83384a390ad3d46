"""What the sm_80 kernels share: tiles in shared memory by cp.async, products by ldmatrix and mma.sync.

A CTA has eight warps that each own 16 rows of the block. Two buffers take turns: while a tile is worked on the next one
is loaded. What lies beyond a sequence's end is loaded as its last row again, and masked or not stored.
"""

from typing import Any

import cutlass
from cutlass import Float32, Int32, cute
from cutlass.cute.nvgpu import cpasync, warp

from hstu.ops.cutlass.parts import Shape

THREADS = 256
STAGES = 2
CHUNK = 8
"""Numbers of 16 bits that one cp.async takes."""
BUFFER_ALIGNMENT = 1024


def tile_layout(shape: Shape, rows: int, stages: int) -> cute.ComposedLayout:
    """Layout of [rows, d] tiles, d contiguous and swizzled, with a mode for the stage."""
    width = min(shape.head_dim, 64)
    atom = cute.make_composed_layout(
        cute.make_swizzle(3 if width == 64 else 2, 3, 3), 0, cute.make_layout((8, width), stride=(width, 1))
    )
    return cute.tile_to_shape(atom, (rows, shape.head_dim, stages), (0, 1, 2))


def view(buffer: Any, layout: cute.ComposedLayout) -> cute.Tensor:
    """A buffer of the shared storage as a tensor of this layout."""
    return buffer.get_tensor(layout)


def transposed(tiles: cute.Tensor) -> cute.Tensor:
    """[rows, d, stages] as [d, rows, stages]."""
    rows, width, stages = (cute.size(tiles, mode=[i]) for i in range(3))
    return cute.composition(tiles, cute.make_layout((width, rows, stages), stride=(rows, 1, rows * width)))


def product(shape: Shape) -> cute.TiledMma:
    """[128, k] · [n, k]ᵀ: 16 rows a warp."""
    operation = warp.MmaF16BF16Op(shape.dtype, Float32, (16, 8, 16))
    return cute.make_tiled_mma(operation, (THREADS // 32, 1, 1), permutation_mnk=(shape.block, 16, 16))


@cute.jit
def load(source: cute.Tensor, item: cute.Tensor, first: Int32, head: Int32, target: cute.Tensor) -> None:
    """Start to load rows of a sequence, from ``first`` on. source: [T, d, H]; target: [rows, d]."""
    rows, chunks = cute.size(target, mode=[0]), cute.size(target, mode=[1]) // CHUNK
    atom = cute.make_copy_atom(cpasync.CopyG2SOp(), target.element_type, num_bits_per_copy=128)
    thread = cute.arch.thread_idx()[0]
    last = item[2] - 1
    for i in cutlass.range_constexpr(-(-rows * chunks // THREADS)):
        row, chunk = (thread + i * THREADS) // chunks, (thread + i * THREADS) % chunks
        token = item[0] + cutlass.min(first + row, last)
        of = cute.local_tile(source[token, None, head], (CHUNK,), (chunk,))
        to = cute.local_tile(target, (1, CHUNK), (row, chunk))
        cute.copy(atom, of, cute.make_tensor(to.iterator, of.layout))


@cute.jit
def multiply_shared(shape: cutlass.Constexpr, sums: cute.Tensor, left: cute.Tensor, right: cute.Tensor) -> None:
    """sums = left · rightᵀ, both in shared memory: [128, d] and [n, d]."""
    sums.fill(0.0)
    mma = product(shape)
    thread = cute.arch.thread_idx()[0]
    atom = cute.make_copy_atom(warp.LdMatrix8x8x16bOp(False, 4), shape.dtype)
    a, from_a, to_a = _operand(cute.make_tiled_copy_A(atom, mma), mma, left, thread, True)
    b, from_b, to_b = _operand(cute.make_tiled_copy_B(atom, mma), mma, right, thread, False)
    for k in cutlass.range_constexpr(cute.size(a, mode=[2])):
        cute.copy(cute.make_tiled_copy_A(atom, mma), from_a[None, None, k], to_a[None, None, k])
        cute.copy(cute.make_tiled_copy_B(atom, mma), from_b[None, None, k], to_b[None, None, k])
        cute.gemm(mma, sums, a[None, None, k], b[None, None, k], sums)


@cute.jit
def add_product(shape: cutlass.Constexpr, sums: cute.Tensor, packed: cute.Tensor, right: cute.Tensor) -> None:
    """sums += packed · rightᵀ: weights in registers (see :func:`hstu.ops.cutlass.parts.pack`), right [d, n]."""
    mma = product(shape)
    atom = cute.make_copy_atom(warp.LdMatrix8x8x16bOp(True, 4), shape.dtype)
    pairs = cute.recast_tensor(packed, shape.dtype)
    a = cute.make_tensor(pairs.iterator, cute.make_layout(((2, 2, 2), 1, cute.size(pairs) // 8)))
    b, from_b, to_b = _operand(cute.make_tiled_copy_B(atom, mma), mma, right, cute.arch.thread_idx()[0], False)
    for k in cutlass.range_constexpr(cute.size(a, mode=[2])):
        cute.copy(cute.make_tiled_copy_B(atom, mma), from_b[None, None, k], to_b[None, None, k])
        cute.gemm(mma, sums, a[None, None, k], b[None, None, k], sums)


def _operand(copy: cute.TiledCopy, mma: cute.TiledMma, tile: cute.Tensor, thread: Int32, is_left: bool) -> tuple:
    """Registers for an operand; where the thread's part of it lies in shared memory; the registers as the copy sees."""
    part, copying = mma.get_slice(thread), copy.get_slice(thread)
    if is_left:
        registers = part.make_fragment_A(part.partition_A(tile))
    else:
        registers = part.make_fragment_B(part.partition_B(tile))
    return registers, copying.partition_S(tile), copying.retile(registers)
