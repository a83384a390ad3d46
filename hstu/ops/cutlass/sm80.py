"""Attention on compute capability 8.0: tiles by cp.async, products by ldmatrix and mma.sync.

A CTA has eight warps with 16 rows of the block each. While one tile is computed, the next is loaded into the other of
two buffers. Rows beyond the end of a sequence load its last row again, and are masked or not stored.
"""

from collections.abc import Callable

import cuda.bindings.driver as cuda
import cutlass
from cutlass import Float32, Int32, const_expr, cute
from cutlass.cute.nvgpu import cpasync, warp

from hstu.ops.cutlass import bias, common
from hstu.ops.cutlass.common import PairwiseKernel, Shape
from hstu.ops.cutlass.schedule import count_tiles

THREADS = 256
STAGES = 2
CHUNK = 8
"""16-bit numbers per cp.async."""
BUFFER_ALIGNMENT = 1024


class Sm80Kernel(PairwiseKernel):
    """The loop over blocks and tiles. Subclasses add one tile to the sums."""

    compute: Callable[..., None]
    """Adds the tile in a stage to the sums: ``compute(stage, state, masking, masked)``; state: see ``kernel``."""

    @cute.jit
    def __call__(
        self, inputs: tuple, outs: tuple, strides: tuple, batch: tuple, grid: Int32, stream: cuda.CUstream
    ) -> None:
        """Launch on ``grid`` CTAs. Arguments: see :func:`hstu.ops.cutlass.attention._examples`."""
        shape = self.shape
        pairs = zip((*inputs, *outs), strides, strict=True)
        tensors = tuple(common.heads_of(pointer, batch[1], stride, shape.head_dim) for pointer, stride in pairs)
        element, alignment = shape.dtype, BUFFER_ALIGNMENT
        resident_size = cute.cosize(tile_layout(shape, shape.block, self.num_resident))
        streamed_size = cute.cosize(tile_layout(shape, shape.tile, 2 * STAGES))

        @cute.struct
        class Storage:
            resident: cute.struct.Align[cute.struct.MemRange[element, resident_size], alignment]
            streamed: cute.struct.Align[cute.struct.MemRange[element, streamed_size], alignment]

        self.storage = Storage
        if const_expr(shape.has_bias):
            self.tables = bias.storage(shape.tile, self.sums_bias)
        self.kernel(tensors, batch).launch(grid=(grid, 1, 1), block=(THREADS, 1, 1), stream=stream, min_blocks_per_mp=1)

    @cute.kernel
    def kernel(self, tensors: tuple, batch: tuple) -> None:
        """One CTA: compute its blocks of rows in turn."""
        shape, (items, sizes, factors, _) = self.shape, batch
        allocator = cutlass.utils.SmemAllocator()
        smem = allocator.allocate(self.storage)
        tables: tuple = ()
        if const_expr(shape.has_bias):
            tables = bias.load_tables(allocator.allocate(self.tables), batch[3], shape.tile, self.sums_bias, THREADS)
        resident = smem.resident.get_tensor(tile_layout(shape, shape.block, self.num_resident))
        streamed = smem.streamed.get_tensor(tile_layout(shape, shape.tile, 2 * STAGES))
        buffers = (resident, streamed, transposed(streamed))
        registers, of_bias = self.registers(product(shape), product(shape)), self.bias_sums(batch)
        sums, state = registers[0], (tensors, buffers, registers)
        thread = cute.arch.thread_idx()[0]
        row_in_block, column_in_tile = thread // 32 * 16 + thread % 32 // 4, thread % 4 * 2
        heads, total = sizes[1], sizes[1] * sizes[2]
        turn = Int32(0)
        work = common.work_index(turn)
        while work < total:
            item, head = common.item_of(items, work // heads), work % heads
            row = item[1] + row_in_block
            bounds = tuple(common.row_bounds(row + 8 * r, item, sizes[3], sizes[4], shape.rows) for r in (0, 1))
            ranges = common.ranges_of(item, sizes, shape)
            num_masked, num_tiles = count_tiles(ranges)
            pairs = self.begin_pairs(batch, tables, item, row, of_bias)
            block, masking = (item, head, ranges), (factors[0], column_in_tile, bounds, pairs)
            for i in cutlass.range_constexpr(self.num_outputs):
                sums[i].fill(0.0)
            cute.arch.sync_threads()  # warps may still read the buffers for the previous block
            for i in cutlass.range_constexpr(self.num_resident):
                load(tensors[i], item, item[1], head, resident[None, None, i])
            self.load(tensors, block, Int32(0), buffers)
            for u in cutlass.range(num_masked, unroll=1):
                self.step(block, u, state, masking, True)
            for u in cutlass.range(num_masked, num_tiles, unroll=1):
                self.step(block, u, state, masking, False)
            if const_expr(self.sums_bias):
                bias.end_sums(pairs)
            outs = tensors[self.num_resident + 2 :]
            self.store(sums, outs, work // heads, (item, head, row, column_in_tile), factors)
            turn += 1
            work = common.work_index(turn)
        if const_expr(self.sums_bias):
            bias.store_sums(batch[3], tables)

    @cute.jit
    def load(self, tensors: tuple, block: tuple, u: Int32, buffers: tuple) -> None:
        """Start to load tile ``u`` of the block, if it exists. block: item, head, ranges of tiles."""
        item, head, ranges = block
        _, num_tiles = count_tiles(ranges)
        if u < num_tiles:
            first, stage = common.first_column(u, ranges, self.shape), u % STAGES
            for i in cutlass.range_constexpr(2):
                load(tensors[self.num_resident + i], item, first, head, buffers[1][None, None, i * STAGES + stage])
        cute.arch.cp_async_commit_group()

    @cute.jit
    def step(self, block: tuple, u: Int32, state: tuple, masking: tuple, masked: cutlass.Constexpr) -> None:
        """Add tile ``u`` to the sums while the next tile loads. The column of ``masking`` counts within the tile."""
        tensors, buffers, _ = state
        self.load(tensors, block, u + 1, buffers)
        cute.arch.cp_async_wait_group(1)
        cute.arch.sync_threads()
        alpha, column_in_tile, bounds, pairs = masking
        column = common.first_column(u, block[2], self.shape) + column_in_tile
        self.compute(u % STAGES, state, (alpha, column, bounds, pairs), masked)
        cute.arch.sync_threads()


class ForwardSm80(Sm80Kernel):
    """Σ SiLU(α x yᵀ) ⊙ mask · z / N. O with x, y, z = Q, K, V; dV with x, y, z = K, Q, dO."""

    num_resident = 1

    @cute.jit
    def compute(self, stage: Int32, state: tuple, masking: tuple, masked: cutlass.Constexpr) -> None:
        """Add the tile in ``stage`` to the sums."""
        _, (resident, streamed, streamed_transposed), ((sums,), scores, weights) = state
        multiply_shared(self.shape, scores, resident[None, None, 0], streamed[None, None, stage])
        if const_expr(self.shape.has_bias):
            bias.add(scores, masking[1], masking[3], self.shape.rows, False)
        common.silu(scores, masking, masked)
        common.pack(scores, weights, self.shape.dtype)
        add_product(self.shape, sums, weights, streamed_transposed[None, None, STAGES + stage])


class BackwardSm80(Sm80Kernel):
    """The sums of :class:`hstu.ops.cutlass.sm90.BackwardSm90`, with one or two outputs."""

    num_resident = 2

    @cute.jit
    def compute(self, stage: Int32, state: tuple, masking: tuple, masked: cutlass.Constexpr) -> None:
        """Add the tile in ``stage`` to the sums."""
        shape = self.shape
        _, (resident, streamed, streamed_transposed), registers = state
        (sums, weight_sums), scores, products, weights, gradients = registers
        with_weights = self.num_outputs == 2
        multiply_shared(shape, scores, resident[None, None, 0], streamed[None, None, stage])
        multiply_shared(shape, products, resident[None, None, 1], streamed[None, None, STAGES + stage])
        if const_expr(shape.has_bias):
            bias.add(scores, masking[1], masking[3], shape.rows, self.sums_bias)
        common.silu_derivative(scores, weights, masking, masked, with_weights, shape.dtype)
        for e in cutlass.range_constexpr(cute.size(scores)):
            products[e] = products[e] * scores[e]
        if const_expr(self.sums_bias):
            bias.sum_tile(products, masking[1], masking[3])
        common.pack(products, gradients, shape.dtype)
        add_product(shape, sums, gradients, streamed_transposed[None, None, stage])
        if const_expr(with_weights):
            add_product(shape, weight_sums, weights, streamed_transposed[None, None, STAGES + stage])


def tile_layout(shape: Shape, rows: int, stages: int) -> cute.ComposedLayout:
    """Layout of [rows, d] tiles, contiguous and swizzled along d, with a mode for the stage."""
    width = min(shape.head_dim, 64)
    atom = cute.make_composed_layout(
        cute.make_swizzle(3 if width == 64 else 2, 3, 3), 0, cute.make_layout((8, width), stride=(width, 1))
    )
    return cute.tile_to_shape(atom, (rows, shape.head_dim, stages), (0, 1, 2))


def transposed(tiles: cute.Tensor) -> cute.Tensor:
    """[rows, d, stages] as [d, rows, stages]."""
    rows, width, stages = (cute.size(tiles, mode=[i]) for i in range(3))
    return cute.composition(tiles, cute.make_layout((width, rows, stages), stride=(rows, 1, rows * width)))


def product(shape: Shape) -> cute.TiledMma:
    """[128, k] · [n, k]ᵀ, 16 rows per warp."""
    operation = warp.MmaF16BF16Op(shape.dtype, Float32, (16, 8, 16))
    return cute.make_tiled_mma(operation, (THREADS // 32, 1, 1), permutation_mnk=(shape.block, 16, 16))


@cute.jit
def load(source: cute.Tensor, item: cute.Tensor, first: Int32, head: Int32, target: cute.Tensor) -> None:
    """Start to load the rows of a sequence from row ``first``. source: [T, d, H]; target: [rows, d]."""
    rows, chunks = cute.size(target, mode=[0]), cute.size(target, mode=[1]) // CHUNK
    atom = cute.make_copy_atom(cpasync.CopyG2SOp(), target.element_type, num_bits_per_copy=128)
    thread = cute.arch.thread_idx()[0]
    last = item[2] - 1
    if const_expr(rows * chunks < THREADS):
        thread = thread % (rows * chunks)  # some chunks are loaded twice
    for i in cutlass.range_constexpr(-(-rows * chunks // THREADS)):
        row, chunk = (thread + i * THREADS) // chunks, (thread + i * THREADS) % chunks
        token = item[0] + cutlass.min(first + row, last)
        of = cute.local_tile(source[token, None, head], (CHUNK,), (chunk,))
        to = cute.local_tile(target, (1, CHUNK), (row, chunk))
        cute.copy(atom, of, cute.make_tensor(to.iterator, of.layout))


@cute.jit
def multiply_shared(shape: cutlass.Constexpr, sums: cute.Tensor, left: cute.Tensor, right: cute.Tensor) -> None:
    """sums = left · rightᵀ, both operands in shared memory: [128, d] and [n, d]."""
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
    """sums += packed · rightᵀ. packed: weights in registers (:func:`hstu.ops.cutlass.common.pack`); right: [d, n]."""
    mma = product(shape)
    atom = cute.make_copy_atom(warp.LdMatrix8x8x16bOp(True, 4), shape.dtype)
    a = common.left_operand(packed, shape.dtype)
    b, from_b, to_b = _operand(cute.make_tiled_copy_B(atom, mma), mma, right, cute.arch.thread_idx()[0], False)
    for k in cutlass.range_constexpr(cute.size(a, mode=[2])):
        cute.copy(cute.make_tiled_copy_B(atom, mma), from_b[None, None, k], to_b[None, None, k])
        cute.gemm(mma, sums, a[None, None, k], b[None, None, k], sums)


def _operand(copy: cute.TiledCopy, mma: cute.TiledMma, tile: cute.Tensor, thread: Int32, is_left: bool) -> tuple:
    """Registers for an operand, the thread's share in shared memory, and the registers as the copy addresses them."""
    of_mma, copying = mma.get_slice(thread), copy.get_slice(thread)
    if is_left:
        registers = of_mma.make_fragment_A(of_mma.partition_A(tile))
    else:
        registers = of_mma.make_fragment_B(of_mma.partition_B(tile))
    return registers, copying.partition_S(tile), copying.retile(registers)
