"""sm_80: Σ SiLU'(α x yᵀ) ⊙ (w zᵀ) ⊙ mask · y α / N, and along the way Σ SiLU(α x yᵀ) ⊙ mask · z / N.

See :mod:`hstu.ops.cutlass.backward_sm90`.
"""

import cuda.bindings.driver as cuda
import cutlass
from cutlass import Float32, Int32, const_expr, cute

from hstu.ops.cutlass import ampere, parts
from hstu.ops.cutlass.parts import Shape


class BackwardSm80:
    """The kernel of one shape. ``with_weights``: it takes a second output, for the sum over z."""

    def __init__(self, shape: Shape, with_weights: bool) -> None:
        self.shape, self.with_weights = shape, with_weights

    @cute.jit
    def __call__(
        self,
        x: cute.Pointer,
        y: cute.Pointer,
        w: cute.Pointer,
        z: cute.Pointer,
        outs: tuple,
        strides: tuple,
        items: cute.Pointer,
        tiles: cute.Pointer,
        sizes: tuple,
        factors: tuple,
        grid: Int32,
        stream: cuda.CUstream,
    ) -> None:
        """Launch on ``grid`` CTAs; the arguments are those of :class:`hstu.ops.cutlass.backward_sm90.BackwardSm90`."""
        shape = self.shape
        tensors = [
            parts.heads_of(pointer, sizes[0], sizes[1], *stride, shape.head_dim)
            for pointer, stride in zip((x, y, w, z, *outs), strides, strict=True)
        ]
        x_size = cute.cosize(ampere.tile_layout(shape, shape.block, 1))
        size = cute.cosize(ampere.tile_layout(shape, shape.tile, ampere.STAGES))
        element, alignment = shape.dtype, ampere.BUFFER_ALIGNMENT

        @cute.struct
        class Storage:
            x: cute.struct.Align[cute.struct.MemRange[element, x_size], alignment]
            w: cute.struct.Align[cute.struct.MemRange[element, x_size], alignment]
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
        x_layout = ampere.tile_layout(shape, shape.block, 1)
        layout = ampere.tile_layout(shape, shape.tile, ampere.STAGES)
        s_x, s_w = ampere.view(smem.x, x_layout)[None, None, 0], ampere.view(smem.w, x_layout)[None, None, 0]
        s_y, s_z = ampere.view(smem.y, layout), ampere.view(smem.z, layout)
        buffers = (s_x, s_y, s_w, s_z, ampere.transposed(s_y), ampere.transposed(s_z))
        thread = cute.arch.thread_idx()[0]
        row_in_block, column_in_tile = thread // 32 * 16 + thread % 32 // 4, thread % 4 * 2
        mma = ampere.product(shape)
        scores, products = (
            cute.make_rmem_tensor(mma.partition_shape_C((shape.block, shape.tile)), Float32) for _ in range(2)
        )
        sums, weight_sums = (
            cute.make_rmem_tensor(mma.partition_shape_C((shape.block, shape.head_dim)), Float32) for _ in range(2)
        )
        gradients, weights = (cute.make_rmem_tensor(cute.size(scores) // 2, Int32) for _ in range(2))
        registers = (scores, products, sums, weight_sums, gradients, weights)
        heads, total = sizes[1], sizes[1] * sizes[2]
        turn = Int32(0)
        work = parts.nth_work(turn)
        while work < total:
            item, head = parts.item_of(items, work // heads), work % heads
            row = item[1] + row_in_block
            bounds = [parts.row_bounds(row + 8 * r, item, sizes[3], sizes[4], shape.rows) for r in (0, 1)]
            num_masked, num_tiles, first_tile = item[5], item[6], tiles + item[4]
            sums.fill(0.0)
            if const_expr(self.with_weights):
                weight_sums.fill(0.0)
            cute.arch.sync_threads()  # the buffers may still be read for the block before
            for i in cutlass.range_constexpr(0, 4, 2):
                ampere.load(tensors[i], item, item[1], head, buffers[i])
            self.load(tensors, item, head, first_tile, Int32(0), buffers)
            for u in cutlass.range(num_masked, unroll=1):
                self.step(tensors, item, head, first_tile, u, buffers, registers, factors, column_in_tile, bounds, True)
            for u in cutlass.range(num_masked, num_tiles, unroll=1):
                self.step(
                    tensors, item, head, first_tile, u, buffers, registers, factors, column_in_tile, bounds, False
                )
            scale = factors[0] * factors[1]
            parts.store_rows(sums, tensors[4], item, head, row, column_in_tile, scale, shape.dtype)
            if const_expr(self.with_weights):
                parts.store_rows(weight_sums, tensors[5], item, head, row, column_in_tile, factors[1], shape.dtype)
            turn += 1
            work = parts.nth_work(turn)

    @cute.jit
    def load(
        self, tensors: tuple, item: cute.Tensor, head: Int32, first_tile: cute.Pointer, u: Int32, buffers: tuple
    ) -> None:
        """Start to load tile ``u`` of the block, if it has that many."""
        if u < item[6]:
            first, stage = (first_tile + u).load(), u % ampere.STAGES
            for i in cutlass.range_constexpr(1, 4, 2):
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
        s_x, s_y, s_w, s_z, y_transposed, z_transposed = buffers
        scores, products, sums, weight_sums, gradients, weights = registers
        stage = u % ampere.STAGES
        self.load(tensors, item, head, first_tile, u + 1, buffers)
        cute.arch.cp_async_wait_group(1)
        cute.arch.sync_threads()
        column = (first_tile + u).load() + column_in_tile
        ampere.multiply_shared(shape, scores, s_x, s_y[None, None, stage])
        ampere.multiply_shared(shape, products, s_w, s_z[None, None, stage])
        parts.slopes(scores, weights, factors[0], column, bounds, masked, self.with_weights, shape.dtype)
        for e in cutlass.range_constexpr(cute.size(scores)):
            products[e] = products[e] * scores[e]
        parts.pack(products, gradients, shape.dtype)
        ampere.add_product(shape, sums, gradients, y_transposed[None, None, stage])
        if const_expr(self.with_weights):
            ampere.add_product(shape, weight_sums, weights, z_transposed[None, None, stage])
        cute.arch.sync_threads()
