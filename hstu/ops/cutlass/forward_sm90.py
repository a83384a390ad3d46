"""sm_90: Σ SiLU(α x yᵀ) ⊙ mask · z / N. O with x, y, z = Q, K, V; dV with x, y, z = K, Q, dO.

Two products a tile. The scores of a tile are computed while the weights of the one before are multiplied with z.
"""

import cuda.bindings.driver as cuda
import cutlass
from cutlass import Float32, Int32, Int64, cute
from cutlass.cute.nvgpu import warpgroup

from hstu.ops.cutlass import hopper, parts
from hstu.ops.cutlass.hopper import Ring, acquire, multiply, release, wait
from hstu.ops.cutlass.parts import Shape


class ForwardSm90:
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
        """Launch on ``grid`` CTAs. strides: (row, head) of x, y, z and out, in elements. sizes: tokens T, heads H,
        blocks of the schedule, leading rows, tokens of a target group. factors: α and 1 / N.
        """
        shape = self.shape
        tokens, heads = sizes[0], sizes[1]
        x_layout = hopper.tile_layout(shape, shape.block, 1)
        layout = hopper.tile_layout(shape, shape.tile, shape.stages)
        tensors = [
            parts.heads_of(pointer, tokens, heads, *stride, shape.head_dim)
            for pointer, stride in zip((x, y, z, out), strides, strict=True)
        ]
        load_x = hopper.tma_load(tensors[0], x_layout, shape.block, shape.head_dim)
        load_y = hopper.tma_load(tensors[1], layout, shape.tile, shape.head_dim)
        load_z = hopper.tma_load(tensors[2], layout, shape.tile, shape.head_dim)
        element, alignment = shape.dtype, hopper.BUFFER_ALIGNMENT

        @cute.struct
        class Storage:
            barriers: cute.struct.MemRange[Int64, 2 + 4 * shape.stages]
            x: cute.struct.Align[cute.struct.MemRange[element, cute.cosize(x_layout)], alignment]
            y: cute.struct.Align[cute.struct.MemRange[element, cute.cosize(layout)], alignment]
            z: cute.struct.Align[cute.struct.MemRange[element, cute.cosize(layout)], alignment]

        self.storage = Storage
        self.kernel(
            load_x,
            load_y,
            load_z,
            tensors[3],
            items,
            tiles,
            sizes,
            factors,
        ).launch(grid=(grid, 1, 1), block=(hopper.THREADS, 1, 1), stream=stream, min_blocks_per_mp=1)

    @cute.kernel
    def kernel(
        self,
        load_x: tuple,
        load_y: tuple,
        load_z: tuple,
        out: cute.Tensor,
        items: cute.Pointer,
        tiles: cute.Pointer,
        sizes: tuple,
        factors: tuple,
    ) -> None:
        """One CTA: see the module and :mod:`hstu.ops.cutlass.hopper`."""
        shape = self.shape
        smem = cutlass.utils.SmemAllocator().allocate(self.storage)
        width = shape.head_dim * shape.dtype.width // 8
        barriers = smem.barriers.data_ptr()
        x_ring = Ring(barriers, 1, shape.block * width)
        y_ring = Ring(barriers + 2, shape.stages, shape.tile * width)
        z_ring = Ring(barriers + 2 + 2 * shape.stages, shape.stages, shape.tile * width)
        thread = cute.arch.thread_idx()[0]
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        if thread == 0:
            for ring in (x_ring, y_ring, z_ring):
                hopper.init(ring)
        cute.arch.mbarrier_init_fence()
        cute.arch.sync_threads()
        x_layout = hopper.tile_layout(shape, shape.block, 1)
        layout = hopper.tile_layout(shape, shape.tile, shape.stages)
        s_x, s_y, s_z = hopper.view(smem.x, x_layout), hopper.view(smem.y, layout), hopper.view(smem.z, layout)
        if warp < 4:
            cute.arch.setmaxregister_decrease(hopper.PRODUCER_REGISTERS)
            if warp == 0:
                self.produce(load_x, load_y, load_z, (s_x, s_y, s_z), (x_ring, y_ring, z_ring), items, tiles, sizes)
        else:
            cute.arch.setmaxregister_increase(hopper.CONSUMER_REGISTERS)
            z_transposed = hopper.view(smem.z, hopper.transposed_layout(shape, shape.tile, shape.stages))
            self.consume(
                (s_x, s_y, z_transposed),
                (x_ring, y_ring, z_ring),
                out,
                items,
                tiles,
                sizes,
                factors,
                thread - hopper.WARPGROUP,
            )

    @cute.jit
    def produce(
        self,
        load_x: tuple,
        load_y: tuple,
        load_z: tuple,
        buffers: tuple,
        rings: tuple,
        items: cute.Pointer,
        tiles: cute.Pointer,
        sizes: tuple,
    ) -> None:
        """One warp: load the blocks and their tiles, in the consumers' order."""
        x_ring, y_ring, z_ring = rings
        s_x, s_y, s_z = buffers
        heads, total = sizes[1], sizes[1] * sizes[2]
        turn, count = Int32(0), Int32(0)
        work = parts.nth_work(turn)
        while work < total:
            item, head = parts.item_of(items, work // heads), work % heads
            _, barrier = acquire(x_ring, turn)
            hopper.load(load_x[0], load_x[1], item[0] + item[1], head, s_x[None, None, 0], barrier)
            for u in cutlass.range(item[6], unroll=1):
                first = item[0] + (tiles + item[4] + u).load()
                stage, barrier = acquire(y_ring, count)
                hopper.load(load_y[0], load_y[1], first, head, s_y[None, None, stage], barrier)
                _, barrier = acquire(z_ring, count)
                hopper.load(load_z[0], load_z[1], first, head, s_z[None, None, stage], barrier)
                count += 1
            turn += 1
            work = parts.nth_work(turn)

    @cute.jit
    def consume(
        self,
        buffers: tuple,
        rings: tuple,
        out: cute.Tensor,
        items: cute.Pointer,
        tiles: cute.Pointer,
        sizes: tuple,
        factors: tuple,
        thread: Int32,
    ) -> None:
        """A thread of the two warpgroups that compute; ``thread`` counts from the first of them."""
        shape = self.shape
        s_x, s_y, z_transposed = buffers
        x_ring, y_ring, z_ring = rings
        heads, total = sizes[1], sizes[1] * sizes[2]
        lane = thread % 32
        row_in_block, column_in_tile = thread // 32 * 16 + lane // 4, lane % 4 * 2
        group = cute.arch.make_warp_uniform(thread // hopper.WARPGROUP) * hopper.WARPGROUP
        of_scores, of_sums = hopper.scores_mma(shape).get_slice(group), hopper.sums_mma(shape).get_slice(group)
        x = of_scores.make_fragment_A(of_scores.partition_A(s_x))
        y = of_scores.make_fragment_B(of_scores.partition_B(s_y))
        z = of_sums.make_fragment_B(of_sums.partition_B(z_transposed))
        scores = cute.make_rmem_tensor(of_scores.partition_shape_C((shape.block, shape.tile)), Float32)
        sums = cute.make_rmem_tensor(of_sums.partition_shape_C((shape.block, shape.head_dim)), Float32)
        weights = cute.make_rmem_tensor(cute.size(scores) // 2, Int32)
        turn, count = Int32(0), Int32(0)
        work = parts.nth_work(turn)
        while work < total:
            item, head = parts.item_of(items, work // heads), work % heads
            row = item[1] + row_in_block
            bounds = [parts.row_bounds(row + 8 * r, item, sizes[3], sizes[4], shape.rows) for r in (0, 1)]
            num_masked, num_tiles, first_tile = item[5], item[6], tiles + item[4]
            sums.fill(0.0)
            wait(x_ring, turn)
            stage = wait(y_ring, count)
            warpgroup.fence()
            multiply(hopper.scores_mma(shape), scores, x[None, None, None, 0], y[None, None, None, stage], adds=False)
            warpgroup.wait_group(0)
            release(y_ring, count)
            parts.weigh(scores, factors[0], first_tile.load() + column_in_tile, bounds, True)
            parts.pack(scores, weights, shape.dtype)
            for u in cutlass.range(1, num_masked, unroll=1):
                column = (first_tile + u).load() + column_in_tile
                self.step(count, x, y, z, scores, sums, weights, rings, factors, column, bounds, True)
                count += 1
            for _ in cutlass.range(cutlass.max(num_masked, 1), num_tiles, unroll=1):
                self.step(count, x, y, z, scores, sums, weights, rings, factors, row, bounds, False)
                count += 1
            release(x_ring, turn)
            stage = wait(z_ring, count)
            warpgroup.fence()
            multiply(
                hopper.sums_mma(shape),
                sums,
                hopper.left_operand(weights, shape.dtype),
                z[None, None, None, stage],
                adds=True,
            )
            warpgroup.wait_group(0)
            release(z_ring, count)
            count += 1
            parts.store_rows(sums, out, item, head, row, column_in_tile, factors[1], shape.dtype)
            turn += 1
            work = parts.nth_work(turn)

    @cute.jit
    def step(
        self,
        count: Int32,
        x: cute.Tensor,
        y: cute.Tensor,
        z: cute.Tensor,
        scores: cute.Tensor,
        sums: cute.Tensor,
        weights: cute.Tensor,
        rings: tuple,
        factors: tuple,
        column: Int32,
        bounds: list,
        masked: cutlass.Constexpr,
    ) -> None:
        """Scores of tile ``count + 1`` while tile ``count`` is added to the sums; then the weights of the new one."""
        shape = self.shape
        _, y_ring, z_ring = rings
        y_stage = wait(y_ring, count + 1)
        z_stage = wait(z_ring, count)
        warpgroup.fence()
        multiply(hopper.scores_mma(shape), scores, x[None, None, None, 0], y[None, None, None, y_stage], adds=False)
        multiply(
            hopper.sums_mma(shape),
            sums,
            hopper.left_operand(weights, shape.dtype),
            z[None, None, None, z_stage],
            adds=True,
        )
        warpgroup.wait_group(1)
        release(y_ring, count + 1)
        parts.weigh(scores, factors[0], column, bounds, masked)
        warpgroup.wait_group(0)
        release(z_ring, count)
        parts.pack(scores, weights, shape.dtype)
