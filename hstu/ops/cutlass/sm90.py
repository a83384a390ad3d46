"""Attention on compute capability 9.0: tiles by TMA, products by warpgroups (WGMMA), ordered by mbarriers.

One warp of the first warpgroup loads blocks and tiles; two other warpgroups compute. They compute the scores of a tile
while the product of the previous tile is added to the sums.
"""

from collections.abc import Callable

import cuda.bindings.driver as cuda
import cutlass
from cutlass import Int32, Int64, const_expr, cute
from cutlass.cute.nvgpu import cpasync, warpgroup

from hstu.ops.cutlass import common, hopper
from hstu.ops.cutlass.common import PairwiseKernel
from hstu.ops.cutlass.hopper import Ring, acquire, multiply, release, wait
from hstu.ops.cutlass.schedule import count_tiles


class Sm90Kernel(PairwiseKernel):
    """The loops of the loading warp and of the computing warps. Subclasses compute one tile."""

    num_slopes = 0
    """int32 numbers per tile that :mod:`hstu.ops.cutlass.sm90_split` passes between warpgroups."""
    step: Callable[..., None]
    """Computes the scores of a tile: ``step(count, state, masking, masked, first)``; state: see ``consume``."""
    finish: Callable[..., None]
    """Completes a block after its last tile: ``finish(count, state)``."""

    @cute.jit
    def __call__(
        self, inputs: tuple, outs: tuple, strides: tuple, batch: tuple, grid: Int32, stream: cuda.CUstream
    ) -> None:
        """Launch on ``grid`` CTAs. Arguments: see :func:`hstu.ops.cutlass.attention._examples`."""
        shape = self.shape
        pairs = zip((*inputs, *outs), strides, strict=True)
        tensors = tuple(common.heads_of(pointer, batch[1], stride, shape.head_dim) for pointer, stride in pairs)
        block_layout = hopper.tile_layout(shape, shape.block, 1)
        tile_layout = hopper.tile_layout(shape, shape.tile, shape.stages)
        copy = cpasync.CopyBulkTensorTileG2SOp()
        boxes = [(block_layout, shape.block)] * self.num_resident + [(tile_layout, shape.tile)] * 2
        loads = [  # copy atom for [rows, d] of one head, and the tensor of its coordinates
            tuple(cpasync.make_tiled_tma_atom(copy, tensor, layout, (rows, shape.head_dim)))
            for tensor, (layout, rows) in zip(tensors[: self.num_resident + 2], boxes, strict=True)
        ]
        element, alignment = shape.dtype, hopper.BUFFER_ALIGNMENT
        resident_size = cute.cosize(hopper.tile_layout(shape, shape.block, self.num_resident))
        streamed_size = cute.cosize(hopper.tile_layout(shape, shape.tile, 2 * shape.stages))

        @cute.struct
        class Storage:
            barriers: cute.struct.MemRange[Int64, 2 * self.num_resident + 5 * shape.stages]
            resident: cute.struct.Align[cute.struct.MemRange[element, resident_size], alignment]
            streamed: cute.struct.Align[cute.struct.MemRange[element, streamed_size], alignment]
            slopes: cute.struct.Align[cute.struct.MemRange[Int32, shape.stages * self.num_slopes], alignment]

        self.storage = Storage
        self.kernel(tuple(loads), tensors[self.num_resident + 2 :], batch).launch(
            grid=(grid, 1, 1), block=(hopper.THREADS, 1, 1), stream=stream, min_blocks_per_mp=1
        )

    @cute.kernel
    def kernel(self, loads: tuple, outs: tuple, batch: tuple) -> None:
        """One CTA: see the module docstring and :mod:`hstu.ops.cutlass.hopper`."""
        shape, num_resident = self.shape, self.num_resident
        allocator = cutlass.utils.SmemAllocator()
        smem = allocator.allocate(self.storage)
        row_bytes = shape.head_dim * shape.dtype.width // 8
        barriers = smem.barriers.data_ptr()
        of_tiles = barriers + 2 * num_resident
        rings = [Ring(barriers + 2 * i, 1, shape.block * row_bytes) for i in range(num_resident)]
        rings += [Ring(of_tiles + 2 * shape.stages * i, shape.stages, shape.tile * row_bytes) for i in range(2)]
        of_slopes = of_tiles + 4 * shape.stages
        thread = cute.arch.thread_idx()[0]
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        if thread == 0:
            for ring in rings:
                hopper.init(ring)
            for stage in range(shape.stages):
                cute.arch.mbarrier_init(of_slopes + stage, hopper.WARPS_OF_WARPGROUP)
        cute.arch.mbarrier_init_fence()
        cute.arch.sync_threads()
        resident = hopper.view(smem.resident, hopper.tile_layout(shape, shape.block, num_resident))
        streamed = hopper.view(smem.streamed, hopper.tile_layout(shape, shape.tile, 2 * shape.stages))
        to_load, to_compute = hopper.registers(shape)
        if warp < 4:
            cute.arch.setmaxregister_decrease(to_load)
            if warp == 0:
                self.produce(loads, resident, streamed, tuple(rings), batch)
        else:
            cute.arch.setmaxregister_increase(to_compute)
            transposed = hopper.view(smem.streamed, hopper.transposed_layout(shape, shape.tile, 2 * shape.stages))
            buffers: tuple = (resident, streamed, transposed)
            if const_expr(self.num_slopes > 0):
                buffers = (*buffers, smem.slopes.data_ptr(), of_slopes)
            self.consume(buffers, tuple(rings), outs, batch, thread - hopper.WARPGROUP)

    @cute.jit
    def produce(self, loads: tuple, resident: cute.Tensor, streamed: cute.Tensor, rings: tuple, batch: tuple) -> None:
        """One warp: load blocks and tiles in the order in which the consumers use them."""
        num_resident, stages = self.num_resident, self.shape.stages
        items, sizes, _ = batch
        heads, total = sizes[1], sizes[1] * sizes[2]
        turn, count = Int32(0), Int32(0)
        work = common.work_index(turn)
        while work < total:
            item, head = common.item_of(items, work // heads), work % heads
            for i in cutlass.range_constexpr(num_resident):
                _, barrier = acquire(rings[i], turn)
                hopper.load(*loads[i], item[0] + item[1], head, resident[None, None, i], barrier)
            ranges = common.ranges_of(item, sizes, self.shape)
            _, num_tiles = count_tiles(ranges)
            for u in cutlass.range(num_tiles, unroll=1):
                first = item[0] + common.first_column(u, ranges, self.shape)
                for i in cutlass.range_constexpr(2):
                    stage, barrier = acquire(rings[num_resident + i], count)
                    target = streamed[None, None, i * stages + stage]
                    hopper.load(*loads[num_resident + i], first, head, target, barrier)
                count += 1
            turn += 1
            work = common.work_index(turn)

    @cute.jit
    def consume(self, buffers: tuple, rings: tuple, outs: tuple, batch: tuple, thread: Int32) -> None:
        """Compute the rows of a block; ``thread`` counts from the first thread that shares the block."""
        shape, num_resident = self.shape, self.num_resident
        items, sizes, factors = batch
        heads, total = sizes[1], sizes[1] * sizes[2]
        lane = thread % 32
        row_in_block, column_in_tile = thread // 32 * 16 + lane // 4, lane % 4 * 2
        group = cute.arch.make_warp_uniform(thread // hopper.WARPGROUP) * hopper.WARPGROUP
        of_scores, of_sums = hopper.scores_mma(shape).get_slice(group), hopper.sums_mma(shape).get_slice(group)
        operands = (
            of_scores.make_fragment_A(of_scores.partition_A(buffers[0])),
            of_scores.make_fragment_B(of_scores.partition_B(buffers[1])),
            of_sums.make_fragment_B(of_sums.partition_B(buffers[2])),
            *buffers[3:],
        )
        registers = self.registers(of_scores, of_sums)
        sums = registers[0]
        state = operands, registers, rings[num_resident:]
        turn, count = Int32(0), Int32(0)
        work = common.work_index(turn)
        while work < total:
            item, head = common.item_of(items, work // heads), work % heads
            row = item[1] + row_in_block
            bounds = tuple(common.row_bounds(row + 8 * r, item, sizes[3], sizes[4], shape.rows) for r in (0, 1))
            ranges = common.ranges_of(item, sizes, shape)
            num_masked, num_tiles = count_tiles(ranges)
            for i in cutlass.range_constexpr(len(self.outputs)):
                sums[i].fill(0.0)
            for i in cutlass.range_constexpr(num_resident):
                wait(rings[i], turn)
            column = common.first_column(Int32(0), ranges, shape) + column_in_tile
            self.step(count, state, (factors[0], column, bounds), True, True)
            count += 1
            for u in cutlass.range(1, num_masked, unroll=1):
                column = common.first_masked_column(u, ranges, shape) + column_in_tile
                self.step(count, state, (factors[0], column, bounds), True, False)
                count += 1
            for _u in cutlass.range(cutlass.max(num_masked, 1), num_tiles, unroll=1):
                self.step(count, state, (factors[0], column_in_tile, bounds), False, False)
                count += 1
            for i in cutlass.range_constexpr(num_resident):
                release(rings[i], turn)
            self.finish(count - 1, state)
            self.store(sums, outs, work // heads, (item, head, row, column_in_tile), factors)
            turn += 1
            work = common.work_index(turn)


class ForwardSm90(Sm90Kernel):
    """Σ SiLU(α x yᵀ) ⊙ mask · z / N: O with x, y, z = Q, K, V. Two products per tile."""

    num_resident = 1
    index = 0
    """Index of x among the resident blocks and of y among the streamed tiles; z is the other tile."""

    @cute.jit
    def step(
        self, count: Int32, state: tuple, masking: tuple, masked: cutlass.Constexpr, first: cutlass.Constexpr
    ) -> None:
        """Compute the weights of tile ``count`` while the previous tile, if any, is added to the sums."""
        shape, of_y, of_z = self.shape, self.index, 1 - self.index
        (resident, streamed, rows, *slopes), ((sums,), scores, weights), rings = state
        y_ring, z_ring = rings[of_y], rings[of_z]
        stage = wait(y_ring, count)
        if const_expr(not first):
            z_stage = of_z * shape.stages + wait(z_ring, count - 1)
        x, y = resident[None, None, None, of_y], streamed[None, None, None, of_y * shape.stages + stage]
        warpgroup.fence()
        multiply(hopper.scores_mma(shape), scores, x, y, adds=False)
        if const_expr(not first):
            left = common.left_operand(weights, shape.dtype)
            multiply(hopper.sums_mma(shape), sums, left, rows[None, None, None, z_stage], adds=True)
            warpgroup.wait_group(1)
        else:
            warpgroup.wait_group(0)
        release(y_ring, count)
        self.weigh(count, scores, slopes, masking, masked)
        if const_expr(not first):
            warpgroup.wait_group(0)
            release(z_ring, count - 1)
        common.pack(scores, weights, shape.dtype)

    @cute.jit
    def weigh(self, count: Int32, scores: cute.Tensor, slopes: list, masking: tuple, masked: cutlass.Constexpr) -> None:
        """Replace the scores of tile ``count`` by its weights."""
        common.silu(scores, masking, masked)

    @cute.jit
    def finish(self, count: Int32, state: tuple) -> None:
        """Add tile ``count``, the last one, to the sums."""
        shape, of_z = self.shape, 1 - self.index
        (_, _, rows, *_), ((sums,), _, weights), rings = state
        z_stage = of_z * shape.stages + wait(rings[of_z], count)
        warpgroup.fence()
        left = common.left_operand(weights, shape.dtype)
        multiply(hopper.sums_mma(shape), sums, left, rows[None, None, None, z_stage], adds=True)
        warpgroup.wait_group(0)
        release(rings[of_z], count)


class BackwardSm90(Sm90Kernel):
    """Σ SiLU'(α x yᵀ) ⊙ (w zᵀ) ⊙ mask · y α / N. dQ with x, w, y, z = Q, dO, K, V; dK with x, w, y, z = K, V, Q, dO.

    Three products per tile. A second output is Σ SiLU(α x yᵀ) ⊙ mask · z / N, which is dV in the kernel of dK.
    Head dims whose sums leave no registers for it use :mod:`hstu.ops.cutlass.sm90_split`.
    """

    num_resident = 2

    @cute.jit
    def step(
        self, count: Int32, state: tuple, masking: tuple, masked: cutlass.Constexpr, first: cutlass.Constexpr
    ) -> None:
        """Compute gradients of tile ``count`` while the previous tile, if any, is added to the sums; then add it."""
        shape = self.shape
        (resident, streamed, rows), registers, (y_ring, z_ring) = state
        (sums, weight_sums), scores, products, weights, gradients = registers
        with_weights = self.num_outputs == 2
        stage = wait(y_ring, count)
        z_stage = shape.stages + stage
        x, y = resident[None, None, None, 0], streamed[None, None, None, stage]
        w, z = resident[None, None, None, 1], streamed[None, None, None, z_stage]
        warpgroup.fence()
        multiply(hopper.scores_mma(shape), scores, x, y, adds=False)
        wait(z_ring, count)
        multiply(hopper.scores_mma(shape), products, w, z, adds=False)
        warpgroup.wait_group(1)
        if const_expr(not first):
            release(y_ring, count - 1)
            release(z_ring, count - 1)
        common.silu_derivative(scores, weights, masking, masked, with_weights, shape.dtype)
        warpgroup.wait_group(0)
        for e in cutlass.range_constexpr(cute.size(scores)):
            products[e] = products[e] * scores[e]
        common.pack(products, gradients, shape.dtype)
        warpgroup.fence()
        left = common.left_operand(gradients, shape.dtype)
        multiply(hopper.sums_mma(shape), sums, left, rows[None, None, None, stage], adds=True)
        if const_expr(with_weights):
            left = common.left_operand(weights, shape.dtype)
            multiply(hopper.sums_mma(shape), weight_sums, left, rows[None, None, None, z_stage], adds=True)

    @cute.jit
    def finish(self, count: Int32, state: tuple) -> None:
        """Wait for the product of tile ``count``, the last one, and release its buffers."""
        _, _, rings = state
        warpgroup.wait_group(0)
        release(rings[0], count)
        release(rings[1], count)
