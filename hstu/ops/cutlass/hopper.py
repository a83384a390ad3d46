"""Building blocks for compute capability 9.0: tiles in shared memory, TMA, mbarriers and WGMMA.

A CTA has three warpgroups. One warp of the first loads tiles by TMA; each of the others computes 64 rows of the block.
A tile is [rows, d], contiguous along d with a 128-byte swizzle. A transposed view serves products over the rows.
"""

from dataclasses import dataclass
from typing import Any

from cutlass import Float32, Int32, cute
from cutlass.cute.nvgpu import OperandMajorMode, cpasync, warpgroup
from cutlass.utils import LayoutEnum, hopper_helpers

from hstu.ops.cutlass.common import Shape

WARPGROUP = 128
WARPS_OF_WARPGROUP = 4
ROWS_OF_WARPGROUP = 64
CONSUMERS = 2
THREADS = (1 + CONSUMERS) * WARPGROUP
WIDEST_LIGHT_HEAD = 64
"""Largest head dim at which the computing warps can leave the loading warp more registers."""
BUFFER_ALIGNMENT = 1024


def registers(shape: Shape) -> tuple[int, int]:
    """Registers per loading and per computing thread. The CTA hangs if their mean exceeds 168, its initial number."""
    return (40, 232) if shape.head_dim <= WIDEST_LIGHT_HEAD else (24, 240)


def tile_layout(shape: Shape, rows: int, stages: int) -> cute.ComposedLayout:
    """Layout of [rows, d] tiles, with a mode for the stage."""
    return hopper_helpers.make_smem_layout_a(LayoutEnum.ROW_MAJOR, (rows, 0, shape.head_dim), shape.dtype, stages)


def transposed_layout(shape: Shape, rows: int, stages: int) -> cute.ComposedLayout:
    """The bytes of :func:`tile_layout` as [d, rows]."""
    return hopper_helpers.make_smem_layout_b(LayoutEnum.COL_MAJOR, (0, shape.head_dim, rows), shape.dtype, stages)


def view(buffer: Any, layout: cute.ComposedLayout) -> cute.Tensor:
    """A buffer of the shared storage as a tensor, with the layout's swizzle in the pointer."""
    return buffer.get_tensor(layout.outer, swizzle=layout.inner)


def scores_mma(shape: Shape) -> cute.TiledMma:
    """[block, d] · [tile, d]ᵀ, both in shared memory: 64 rows per warpgroup."""
    warpgroups = (shape.block // ROWS_OF_WARPGROUP, 1, 1)
    return hopper_helpers.make_trivial_tiled_mma(
        shape.dtype, shape.dtype, OperandMajorMode.K, OperandMajorMode.K, Float32, warpgroups, (64, shape.tile)
    )


def sums_mma(shape: Shape) -> cute.TiledMma:
    """[block, tile] · [tile, d], the left operand in registers: 64 rows per warpgroup."""
    return hopper_helpers.make_trivial_tiled_mma(
        shape.dtype,
        shape.dtype,
        OperandMajorMode.K,
        OperandMajorMode.MN,
        Float32,
        (shape.block // ROWS_OF_WARPGROUP, 1, 1),
        (64, shape.head_dim),
        warpgroup.OperandSource.RMEM,
    )


@cute.jit
def load(
    atom: cute.CopyAtom, source: cute.Tensor, first: Int32, head: Int32, target: cute.Tensor, barrier: cute.Pointer
) -> None:
    """Start to load the rows of a head from token ``first``. source: [T, d, H]; target: [rows, d], one stage."""
    rows_and_dim = (cute.size(target, mode=[0]), cute.size(target, mode=[1]))
    rows = cute.local_tile(cute.domain_offset((first, 0), source[None, None, head]), rows_and_dim, (0, 0))
    to, of = cpasync.tma_partition(
        atom, 0, cute.make_layout(1), cute.group_modes(target, 0, 2), cute.group_modes(rows, 0, 2)
    )
    cute.copy(atom, of, to, tma_bar_ptr=barrier)


@dataclass(frozen=True)
class Ring:
    """Buffers that one warp fills by TMA and eight warps read. Each has a "full" and an "empty" mbarrier."""

    barriers: cute.Pointer
    """mbarriers in shared memory: ``stages`` that count loaded bytes, then ``stages`` that count readers."""
    stages: int
    num_bytes: int  # Bytes of one buffer


# Functions, not methods: loops in a kernel would carry a method's object from turn to turn.


def init(ring: Ring) -> None:
    """Initialize the mbarriers in one thread before any other use."""
    for stage in range(ring.stages):
        cute.arch.mbarrier_init(ring.barriers + stage, 1)
        cute.arch.mbarrier_init(ring.barriers + ring.stages + stage, CONSUMERS * WARPS_OF_WARPGROUP)


def acquire(ring: Ring, count: Int32) -> tuple[Int32, cute.Pointer]:
    """Producer: wait until the buffer of the count-th use is empty. Returns its stage and its "full" barrier."""
    stage = count % ring.stages
    cute.arch.mbarrier_wait(ring.barriers + ring.stages + stage, (count // ring.stages) % 2 ^ 1)
    with cute.arch.elect_one():
        cute.arch.mbarrier_arrive_and_expect_tx(ring.barriers + stage, ring.num_bytes)
    return stage, ring.barriers + stage


def wait(ring: Ring, count: Int32) -> Int32:
    """Consumer: wait until the buffer of the count-th use is full. Returns its stage."""
    stage = count % ring.stages
    cute.arch.mbarrier_wait(ring.barriers + stage, (count // ring.stages) % 2)
    return stage


def release(ring: Ring, count: Int32) -> None:
    """Consumer: signal that this warp has read the buffer of the count-th use."""
    with cute.arch.elect_one():
        cute.arch.mbarrier_arrive(ring.barriers + ring.stages + count % ring.stages)


def multiply(mma: cute.TiledMma, sums: cute.Tensor, left: cute.Tensor, right: cute.Tensor, adds: bool) -> None:
    """Start sums (+)= left · right as one WGMMA group, after the caller's ``warpgroup.fence()``. Modifies ``mma``."""
    for k in range(cute.size(right, mode=[2])):
        mma.set(warpgroup.Field.ACCUMULATE, adds or k != 0)
        cute.gemm(mma, sums, left[None, None, k], right[None, None, k], sums)
    warpgroup.commit_group()
