"""sm_80: Σ SiLU(α x yᵀ) ⊙ mask · z / N. O with x, y, z = Q, K, V; dV with x, y, z = K, Q, dO."""

import cuda.bindings.driver as cuda
import cutlass
from cutlass import Float32, Int32, cute

from hstu.ops.cutlass import ampere, parts
from hstu.ops.cutlass.parts import Shape


class ForwardSm80:
    """The kernel of one shape; an instance is callable in a function that the DSL compiles."""

    def __init__(self, shape: Shape) -> None:
        self.shape = shape

    @cute.jit
    def __call__(
        self,
        x: cute.Pointer,
        y: cute.Pointer,
        z: cute.Pointer,
        out: cute.Pointer,
        strides: tuple,
        items: cute.Pointer,
        tiles: cute.Pointer,
        sizes: tuple,
        factors: tuple,
        grid: Int32,
        stream: cuda.CUstream,
    ) -> None:
        """Launch on ``grid`` CTAs; the arguments are those of :class:`hstu.ops.cutlass.forward_sm90.ForwardSm90`."""
        shape = self.shape
        tensors = [
            parts.heads_of(pointer, sizes[0], sizes[1], *stride, shape.head_dim)
            for pointer, stride in zip((x, y, z, out), strides, strict=True)
        ]
        x_size = cute.cosize(ampere.tile_layout(shape, shape.block, 1))
        size = cute.cosize(ampere.tile_layout(shape, shape.tile, ampere.STAGES))
        element, alignment = shape.dtype, ampere.BUFFER_ALIGNMENT

        @cute.struct
        class Storage:
            x: cute.struct.Align[cute.struct.MemRange[element, x_size], alignment]
            y: cute.struct.Align[cute.struct.MemRange[element, size], alignment]
            z: cute.struct.Align[cute.struct.MemRange[element, size], alignment]

        self.storage = Storage
        self.kernel(tuple(tensors), items, tiles, sizes, factors).launch(
            grid=(grid, 1, 1), block=(ampere.THREADS, 1, 1), stream=stream, min_blocks_per_mp=1
        )

    @cute.kernel
    def kernel(self, tensors: tuple, items: cute.Pointer, tiles: cute.Pointer, sizes: tuple, factors: tuple) -> None:
        """One CTA: see the module and :mod:`hstu.ops.cutlass.ampere`."""
        shape = self.shape
        smem = cutlass.utils.SmemAllocator().allocate(self.storage)
        s_x = ampere.view(smem.x, ampere.tile_layout(shape, shape.block, 1))
        layout = ampere.tile_layout(shape, shape.tile, ampere.STAGES)
        s_y, s_z = ampere.view(smem.y, layout), ampere.view(smem.z, layout)
        buffers = (s_x[None, None, 0], s_y, s_z, ampere.transposed(s_z))
        thread = cute.arch.thread_idx()[0]
        row_in_block, column_in_tile = thread // 32 * 16 + thread % 32 // 4, thread % 4 * 2
        mma = ampere.product(shape)
        scores = cute.make_rmem_tensor(mma.partition_shape_C((shape.block, shape.tile)), Float32)
        sums = cute.make_rmem_tensor(mma.partition_shape_C((shape.block, shape.head_dim)), Float32)
        weights = cute.make_rmem_tensor(cute.size(scores) // 2, Int32)
        registers = (scores, sums, weights)
        heads, total = sizes[1], sizes[1] * sizes[2]
        turn = Int32(0)
        work = parts.nth_work(turn)
        while work < total:
            item, head = parts.item_of(items, work // heads), work % heads
            row = item[1] + row_in_block
            bounds = [parts.row_bounds(row + 8 * r, item, sizes[3], sizes[4], shape.rows) for r in (0, 1)]
            num_masked, num_tiles, first_tile = item[5], item[6], tiles + item[4]
            sums.fill(0.0)
            cute.arch.sync_threads()  # the buffers may still be read for the block before
            ampere.load(tensors[0], item, item[1], head, buffers[0])
            self.load(tensors, item, head, first_tile, Int32(0), buffers)
            for u in cutlass.range(num_masked, unroll=1):
                self.step(tensors, item, head, first_tile, u, buffers, registers, factors, column_in_tile, bounds, True)
            for u in cutlass.range(num_masked, num_tiles, unroll=1):
                self.step(
                    tensors, item, head, first_tile, u, buffers, registers, factors, column_in_tile, bounds, False
                )
            parts.store_rows(sums, tensors[3], item, head, row, column_in_tile, factors[1], shape.dtype)
            turn += 1
            work = parts.nth_work(turn)

    @cute.jit
    def load(
        self, tensors: tuple, item: cute.Tensor, head: Int32, first_tile: cute.Pointer, u: Int32, buffers: tuple
    ) -> None:
        """Start to load tile ``u`` of the block, if it has that many."""
        if u < item[6]:
            first, stage = (first_tile + u).load(), u % ampere.STAGES
            for i in cutlass.range_constexpr(1, 3):
                ampere.load(tensors[i], item, first, head, buffers[i][None, None, stage])
        cute.arch.cp_async_commit_group()

    @cute.jit
    def step(
        self,
        tensors: tuple,
        item: cute.Tensor,
        head: Int32,
        first_tile: cute.Pointer,
        u: Int32,
        buffers: tuple,
        registers: tuple,
        factors: tuple,
        column_in_tile: Int32,
        bounds: list,
        masked: cutlass.Constexpr,
    ) -> None:
        """Add tile ``u`` to the sums, while the next one is loaded."""
        shape = self.shape
        scores, sums, weights = registers
        s_x, s_y, _, z_transposed = buffers
        stage = u % ampere.STAGES
        self.load(tensors, item, head, first_tile, u + 1, buffers)
        cute.arch.cp_async_wait_group(1)
        cute.arch.sync_threads()
        ampere.multiply_shared(shape, scores, s_x, s_y[None, None, stage])
        parts.weigh(scores, factors[0], (first_tile + u).load() + column_in_tile, bounds, masked)
        parts.pack(scores, weights, shape.dtype)
        ampere.add_product(shape, sums, weights, z_transposed[None, None, stage])
        cute.arch.sync_threads()
