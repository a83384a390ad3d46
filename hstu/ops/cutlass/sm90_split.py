"""dK and dV of wide heads on compute capability 9.0: one warpgroup sums dV and the other dK, for the same 64 keys.

The registers of a warpgroup hold 64 rows of one sum. Each warpgroup computes one product of a tile, S = K Qᵀ or
dP = V dOᵀ: four products per tile in total, where one kernel per gradient needs five. The first passes SiLU'(α S)
through shared memory in float16. A thread reads what its counterpart wrote; no data moves between other threads.
"""

from typing import Any

import cutlass
from cutlass import Float16, Float32, Int32, cute

from hstu.ops.cutlass import common
from hstu.ops.cutlass.common import Shape
from hstu.ops.cutlass.hopper import WARPGROUP
from hstu.ops.cutlass.sm90 import ForwardSm90, Sm90Kernel

VECTOR = 4
"""int32 numbers per access of a thread to shared memory."""


class SplitBackwardSm90(Sm90Kernel):
    """dK and dV: outputs of :class:`hstu.ops.cutlass.sm90.BackwardSm90` with x, w, y, z = K, V, Q, dO."""

    num_resident = 2

    def __init__(self, shape: Shape, num_outputs: int, through_silu: bool) -> None:
        super().__init__(shape, num_outputs, through_silu)
        self.num_slopes = shape.block * shape.tile // 2
        self.of_values = _Values(shape, through_silu)
        self.of_keys = _Keys(shape, through_silu)

    @cute.jit
    def consume(self, buffers: tuple, rings: tuple, outs: tuple, batch: tuple, thread: Int32) -> None:
        """Compute, in the threads of two warpgroups; ``thread`` counts from the first of them."""
        if cute.arch.make_warp_uniform(thread // WARPGROUP) == 0:
            self.of_values.consume(buffers, rings, outs, batch, thread)
        else:
            self.of_keys.consume(buffers, rings, outs, batch, thread - WARPGROUP)


class _Half(ForwardSm90):
    """The loop of one warpgroup. ``slopes``: their address, and the address of one mbarrier per stage."""

    num_resident = 2
    output: int

    def __init__(self, shape: Shape, through_silu: bool) -> None:
        super().__init__(shape, 2, through_silu)
        self.outputs = (self.output,)

    def registers(self, scores_mma: Any, sums_mma: Any) -> tuple:
        """Registers for the sums, for the scores of a tile, and for these packed to 16 bits."""
        scores, packed, sums = self._accumulators(scores_mma, sums_mma)
        return (sums,), scores, packed

    @cute.jit
    def slopes_of(self, count: Int32, slopes: list) -> tuple[cute.Tensor, cute.Tensor]:
        """int32 [VECTOR, vectors] for the slopes of this thread's pairs in tile ``count``: in shared memory, and
        in registers."""
        vectors = self.shape.tile // 4 // VECTOR
        first = count % self.shape.stages * vectors * WARPGROUP + cute.arch.thread_idx()[0] % WARPGROUP
        layout = cute.make_layout((VECTOR, vectors), stride=(1, VECTOR * WARPGROUP))
        shared = cute.make_tensor(slopes[0] + first * VECTOR, layout)
        return shared, cute.make_rmem_tensor(shared.layout.shape, Int32)


class _Values(_Half):
    """dV: x, y, z = K, Q, dO."""

    index, output = 0, 1

    @cute.jit
    def weigh(self, count: Int32, scores: cute.Tensor, slopes: list, masking: tuple, masked: cutlass.Constexpr) -> None:
        """Replace the scores by SiLU(α S), and pass SiLU'(α S) on."""
        values = cute.make_rmem_tensor(cute.size(scores), Float32)
        for e in cutlass.range_constexpr(cute.size(scores)):
            scores[e], values[e] = common.masked_silu_and_slope(scores[e], e, masking, masked)
        # Free: loading tile ``count`` waited until both warpgroups had released the previous tile of its stage.
        shared, packed = self.slopes_of(count, slopes)
        common.pack(values, packed, Float16)
        cute.autovec_copy(packed, shared)
        cute.arch.sync_warp()
        with cute.arch.elect_one():
            cute.arch.mbarrier_arrive(slopes[1] + count % self.shape.stages)


class _Keys(_Half):
    """dK: x, y, z = V, dO, Q, so that the scores are dP."""

    index, output = 1, 0

    @cute.jit
    def weigh(self, count: Int32, scores: cute.Tensor, slopes: list, masking: tuple, masked: cutlass.Constexpr) -> None:
        """Multiply dP by SiLU'(α S), which is 0 where the pair is masked."""
        stages = self.shape.stages
        cute.arch.mbarrier_wait(slopes[1] + count % stages, count // stages % 2)
        shared, packed = self.slopes_of(count, slopes)
        cute.autovec_copy(shared, packed)
        values = cute.recast_tensor(packed, Float16)
        for e in cutlass.range_constexpr(cute.size(scores)):
            scores[e] = scores[e] * values[e].to(Float32)
