"""sm_90: Σ SiLU'(α x yᵀ) ⊙ (w zᵀ) ⊙ mask · y α / N. dQ with x, y, w, z = Q, K, dO, V; dK with K, Q, V, dO.

Three products a tile. For head dims that leave the registers for it the kernel of dK sums SiLU(α x yᵀ) ⊙ mask · z / N,
which is dV, along the way; else that is another run of the forward kernel.
"""

import cuda.bindings.driver as cuda
import cutlass
from cutlass import Float32, Int32, Int64, const_expr, cute
from cutlass.cute.nvgpu import warpgroup

from hstu.ops.cutlass import hopper, parts
from hstu.ops.cutlass.hopper import Ring, acquire, multiply, release, wait
from hstu.ops.cutlass.parts import Shape


class BackwardSm90:
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
        """Launch on ``grid`` CTAs. strides: (row, head) of x, y, w, z and of each of outs; the rest as in forward."""
        shape = self.shape
        x_layout = hopper.tile_layout(shape, shape.block, 1)
        layout = hopper.tile_layout(shape, shape.tile, shape.stages)
        tensors = [
            parts.heads_of(pointer, sizes[0], sizes[1], *stride, shape.head_dim)
            for pointer, stride in zip((x, y, w, z, *outs), strides, strict=True)
        ]
        loads = [
            hopper.tma_load(tensor, of, rows, shape.head_dim)
            for tensor, of, rows in zip(tensors[:4], (x_layout, layout) * 2, (shape.block, shape.tile) * 2, strict=True)
        ]
        element, alignment = shape.dtype, hopper.BUFFER_ALIGNMENT

        @cute.struct
        class Storage:
            barriers: cute.struct.MemRange[Int64, 4 + 4 * shape.stages]
            x: cute.struct.Align[cute.struct.MemRange[element, cute.cosize(x_layout)], alignment]
            w: cute.struct.Align[cute.struct.MemRange[element, cute.cosize(x_layout)], alignment]
            y: cute.struct.Align[cute.struct.MemRange[element, cute.cosize(layout)], alignment]
            z: cute.struct.Align[cute.struct.MemRange[element, cute.cosize(layout)], alignment]

        self.storage = Storage
        self.kernel(tuple(loads), tuple(tensors[4:]), items, tiles, sizes, factors).launch(
            grid=(grid, 1, 1), block=(hopper.THREADS, 1, 1), stream=stream, min_blocks_per_mp=1
        )

    @cute.kernel
    def kernel(
        self, loads: tuple, outs: tuple, items: cute.Pointer, tiles: cute.Pointer, sizes: tuple, factors: tuple
    ) -> None:
        """One CTA: see the module and :mod:`hstu.ops.cutlass.hopper`."""
        shape = self.shape
        smem = cutlass.utils.SmemAllocator().allocate(self.storage)
        width = shape.head_dim * shape.dtype.width // 8
        barriers = smem.barriers.data_ptr()
        rings = (
            Ring(barriers, 1, shape.block * width),
            Ring(barriers + 2, shape.stages, shape.tile * width),
            Ring(barriers + 2 + 2 * shape.stages, 1, shape.block * width),
            Ring(barriers + 4 + 2 * shape.stages, shape.stages, shape.tile * width),
        )
        thread = cute.arch.thread_idx()[0]
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        if thread == 0:
            for ring in rings:
                hopper.init(ring)
        cute.arch.mbarrier_init_fence()
        cute.arch.sync_threads()
        x_layout = hopper.tile_layout(shape, shape.block, 1)
        layout = hopper.tile_layout(shape, shape.tile, shape.stages)
        buffers = (
            hopper.view(smem.x, x_layout),
            hopper.view(smem.y, layout),
            hopper.view(smem.w, x_layout),
            hopper.view(smem.z, layout),
        )
        if warp < 4:
            cute.arch.setmaxregister_decrease(hopper.PRODUCER_REGISTERS)
            if warp == 0:
                self.produce(loads, buffers, rings, items, tiles, sizes)
        else:
            cute.arch.setmaxregister_increase(hopper.CONSUMER_REGISTERS)
            transposed = hopper.transposed_layout(shape, shape.tile, shape.stages)
            rows = (hopper.view(smem.y, transposed), hopper.view(smem.z, transposed))
            self.consume(buffers, rows, rings, outs, items, tiles, sizes, factors, thread - hopper.WARPGROUP)

    @cute.jit
    def produce(
        self, loads: tuple, buffers: tuple, rings: tuple, items: cute.Pointer, tiles: cute.Pointer, sizes: tuple
    ) -> None:
        """One warp: load the blocks and their tiles, in the consumers' order."""
        heads, total = sizes[1], sizes[1] * sizes[2]
        turn, count = Int32(0), Int32(0)
        work = parts.nth_work(turn)
        while work < total:
            item, head = parts.item_of(items, work // heads), work % heads
            for i in cutlass.range_constexpr(0, 4, 2):
                _, barrier = acquire(rings[i], turn)
                hopper.load(*loads[i], item[0] + item[1], head, buffers[i][None, None, 0], barrier)
            for u in cutlass.range(item[6], unroll=1):
                first = item[0] + (tiles + item[4] + u).load()
                for i in cutlass.range_constexpr(1, 4, 2):
                    stage, barrier = acquire(rings[i], count)
                    hopper.load(*loads[i], first, head, buffers[i][None, None, stage], barrier)
                count += 1
            turn += 1
            work = parts.nth_work(turn)

    @cute.jit
    def consume(
        self,
        buffers: tuple,
        rows: tuple,
        rings: tuple,
        outs: tuple,
        items: cute.Pointer,
        tiles: cute.Pointer,
        sizes: tuple,
        factors: tuple,
        thread: Int32,
    ) -> None:
        """A thread of the two warpgroups that compute; ``thread`` counts from the first of them."""
        shape, with_weights = self.shape, self.with_weights
        heads, total = sizes[1], sizes[1] * sizes[2]
        lane = thread % 32
        row_in_block, column_in_tile = thread // 32 * 16 + lane // 4, lane % 4 * 2
        group = cute.arch.make_warp_uniform(thread // hopper.WARPGROUP) * hopper.WARPGROUP
        of_scores, of_sums = hopper.scores_mma(shape).get_slice(group), hopper.sums_mma(shape).get_slice(group)
        x, w = (of_scores.make_fragment_A(of_scores.partition_A(buffer)) for buffer in (buffers[0], buffers[2]))
        y, z = (of_scores.make_fragment_B(of_scores.partition_B(buffer)) for buffer in (buffers[1], buffers[3]))
        y_rows, z_rows = (of_sums.make_fragment_B(of_sums.partition_B(buffer)) for buffer in rows)
        operands = (x, y, w, z, y_rows, z_rows)
        scores, products = (
            cute.make_rmem_tensor(of_scores.partition_shape_C((shape.block, shape.tile)), Float32) for _ in range(2)
        )
        sums, weight_sums = (
            cute.make_rmem_tensor(of_sums.partition_shape_C((shape.block, shape.head_dim)), Float32) for _ in range(2)
        )
        gradients, weights = (cute.make_rmem_tensor(cute.size(scores) // 2, Int32) for _ in range(2))
        registers = (scores, products, sums, weight_sums, gradients, weights)
        turn, count = Int32(0), Int32(0)
        work = parts.nth_work(turn)
        while work < total:
            item, head = parts.item_of(items, work // heads), work % heads
            row = item[1] + row_in_block
            bounds = [parts.row_bounds(row + 8 * r, item, sizes[3], sizes[4], shape.rows) for r in (0, 1)]
            num_masked, num_tiles, first_tile = item[5], item[6], tiles + item[4]
            sums.fill(0.0)
            if const_expr(with_weights):
                weight_sums.fill(0.0)
            wait(rings[0], turn)
            wait(rings[2], turn)
            column = first_tile.load() + column_in_tile
            self.step(count, operands, registers, rings, factors, column, bounds, True, True)
            count += 1
            for u in cutlass.range(1, num_masked, unroll=1):
                column = (first_tile + u).load() + column_in_tile
                self.step(count, operands, registers, rings, factors, column, bounds, True, False)
                count += 1
            for _ in cutlass.range(cutlass.max(num_masked, 1), num_tiles, unroll=1):
                self.step(count, operands, registers, rings, factors, row, bounds, False, False)
                count += 1
            release(rings[0], turn)
            release(rings[2], turn)
            warpgroup.wait_group(0)
            release(rings[1], count - 1)
            release(rings[3], count - 1)
            scale = factors[0] * factors[1]
            parts.store_rows(sums, outs[0], item, head, row, column_in_tile, scale, shape.dtype)
            if const_expr(with_weights):
                parts.store_rows(weight_sums, outs[1], item, head, row, column_in_tile, factors[1], shape.dtype)
            turn += 1
            work = parts.nth_work(turn)

    @cute.jit
    def step(
        self,
        count: Int32,
        operands: tuple,
        registers: tuple,
        rings: tuple,
        factors: tuple,
        column: Int32,
        bounds: list,
        masked: cutlass.Constexpr,
        first: cutlass.Constexpr,
    ) -> None:
        """Scores of tile ``count`` and their gradients, while the tile before is added to the sums; then that one.

        ``first``: there is no tile before.
        """
        shape = self.shape
        x, y, w, z, y_rows, z_rows = operands
        scores, products, sums, weight_sums, gradients, weights = registers
        stage = wait(rings[1], count)
        warpgroup.fence()
        multiply(hopper.scores_mma(shape), scores, x[None, None, None, 0], y[None, None, None, stage], adds=False)
        wait(rings[3], count)
        multiply(hopper.scores_mma(shape), products, w[None, None, None, 0], z[None, None, None, stage], adds=False)
        warpgroup.wait_group(1)
        if const_expr(not first):
            release(rings[1], count - 1)
            release(rings[3], count - 1)
        parts.slopes(scores, weights, factors[0], column, bounds, masked, self.with_weights, shape.dtype)
        warpgroup.wait_group(0)
        for e in cutlass.range_constexpr(cute.size(scores)):
            products[e] = products[e] * scores[e]
        parts.pack(products, gradients, shape.dtype)
        warpgroup.fence()
        left = hopper.left_operand(gradients, shape.dtype)
        multiply(hopper.sums_mma(shape), sums, left, y_rows[None, None, None, stage], adds=True)
        if const_expr(self.with_weights):
            left = hopper.left_operand(weights, shape.dtype)
            multiply(hopper.sums_mma(shape), weight_sums, left, z_rows[None, None, None, stage], adds=True)
