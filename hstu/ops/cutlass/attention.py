"""HSTU attention by CUTLASS kernels: host functions, kernel variants and their compilation."""

from __future__ import annotations

import functools
import itertools
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

import cuda.bindings.driver as cuda
import cutlass
import numpy as np
import torch
from cutlass import Float32, Int32, Int64, cute
from cutlass.base_dsl.compiler import DumpDir, GPUArch, KeepCUBIN, KeepPTX
from cutlass.cute.runtime import make_ptr
from torch import Tensor

from hstu.ops.compile_ahead import Job
from hstu.ops.cutlass import objects
from hstu.ops.cutlass.common import ROWS_OF_WARP, Shape
from hstu.ops.cutlass.objects import LaunchArguments
from hstu.ops.cutlass.schedule import Rows, leading_rows, list_blocks, num_ctas, work_of
from hstu.ops.cutlass.sm90 import BackwardSm90, ForwardSm90
from hstu.ops.cutlass.sm90_split import SplitBackwardSm90
from hstu.ops.kernels import AttentionConfig, AttentionInputs, Backend, Gradient, KernelShapes
from hstu.ops.layout import JaggedLayout, to_device
from hstu.ops.support import CUTLASS_CAPABILITY, CUTLASS_HEAD_DIMS, unsupported_reason

ELEMENTS = {torch.bfloat16: cutlass.BFloat16, torch.float16: cutlass.Float16}
ARCHITECTURE = "sm_90a"
ALIGNMENT = 16
"""Bytes. Every address and stride that the kernels load from is a multiple."""


def forward(inputs: AttentionInputs) -> Tensor:
    """See :data:`hstu.ops.kernels.AttentionForward`."""
    q, k, v = map(_loadable, (inputs.q, inputs.k, inputs.v))
    out = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    _launch(Kernel.FORWARD, [q, k, v], [Gradient(out)], inputs.layout, inputs.config)
    return out


def backward(grad: Tensor, inputs: AttentionInputs, grads: tuple[Gradient, Gradient, Gradient]) -> None:
    """See :data:`hstu.ops.kernels.AttentionBackward`. The gradients have the same bits in every run."""
    grad, q, k, v = map(_loadable, (grad, inputs.q, inputs.k, inputs.v))
    of_q, of_k, of_v = grads
    _launch(Kernel.KEYS, [k, v, q, grad], [of_k, of_v], inputs.layout, inputs.config)
    _launch(Kernel.QUERIES, [q, grad, k, v], [of_q], inputs.layout, inputs.config)


def _launch(
    kernel: Kernel, inputs: list[Tensor], outs: list[Gradient], layout: JaggedLayout, config: AttentionConfig
) -> None:
    """``outs`` also holds the output of forward."""
    tokens, heads, head_dim = inputs[0].shape
    before = [out.before_silu for out in outs if out.before_silu is not None]
    if tokens == 0:
        for each in before:
            each.grad_shift.zero_()
        return
    device = inputs[0].device
    variant = Variant(kernel, inputs[0].dtype, head_dim, bool(before))
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    items, ctas = _work_on(device, variant.shape, layout, config, heads, processors)
    blocks = len(items)
    totals = [torch.empty(variant.num_totals(blocks), heads, head_dim, device=device) for _ in before]
    tensors = [*inputs, *(out.target for out in outs), *(_loadable(each.value) for each in before), *totals]
    function, arguments = compiled(variant)
    with torch.cuda.device(device):
        arguments.write(
            *(tensor.data_ptr() for tensor in tensors),
            *(stride for tensor in tensors for stride in tensor.stride()[:2]),
            items.data_ptr(),
            *(tokens, heads, blocks, leading_rows(layout, config), max(layout.candidate_group_tokens, 1)),
            *(config.alpha, 1.0 / config.scaling_seqlen),
            ctas,
            torch.cuda.current_stream(device).cuda_stream,
        )
        function(*arguments.values)
    for each, total in zip(before, totals, strict=True):
        torch.sum(total, 0, out=each.grad_shift)


def _work_on(
    device: torch.device, shape: Shape, layout: JaggedLayout, config: AttentionConfig, heads: int, processors: int
) -> tuple[Tensor, int]:
    """Blocks on the device (:func:`list_blocks`) and number of CTAs, cached per layout."""

    def derive() -> tuple[Tensor, int]:
        blocks = list_blocks(layout, config, shape.rows, shape.block)
        work = np.repeat(work_of(blocks, layout, config, shape.rows, shape.block, shape.tile), heads)
        return to_device(blocks, device), num_ctas(work, processors)

    return layout.cached(("cutlass", config, shape.rows, shape.block, shape.tile, heads, processors), derive)


def _loadable(tensor: Tensor) -> Tensor:
    """``tensor``, or a contiguous copy where TMA or cp.async cannot read its address or strides."""
    size = tensor.element_size()
    is_aligned = tensor.data_ptr() % ALIGNMENT == 0 and all(s * size % ALIGNMENT == 0 for s in tensor.stride()[:2])
    # TMA descriptors cannot describe an expanded tensor, which has a stride of 0.
    if tensor.stride(2) == 1 and is_aligned and 0 not in tensor.stride():
        return tensor
    return tensor.contiguous() if not tensor.is_contiguous() else tensor.clone()


class Kernel(StrEnum):
    """The gradient or output that a kernel computes."""

    FORWARD = "forward"  # O
    QUERIES = "queries"  # dQ
    KEYS = "keys"  # dK and dV


WIDEST_KEYS_AND_VALUES = 128
"""Largest head dim at which the registers of one thread hold rows of both dK and dV."""

# Columns per tile, by head dim: as many as fit into registers and shared memory with two stages.
_TILES: dict[Kernel, dict[int, int]] = {
    Kernel.FORWARD: {32: 128, 64: 128, 128: 128, 256: 80},
    Kernel.QUERIES: {32: 128, 64: 128, 128: 96, 256: 48},
    Kernel.KEYS: {32: 96, 64: 80, 128: 48, 256: 64},
}


@dataclass(frozen=True)
class Variant:
    """A kernel for one dtype and head dim."""

    kernel: Kernel
    dtype: torch.dtype
    head_dim: int
    through_silu: bool = False
    """Whether it outputs gradients of pre-activations, and their sums over the tokens."""

    @property
    def rows(self) -> Rows:
        """Side of attention that the rows of its blocks are."""
        return Rows.KEYS if self.kernel is Kernel.KEYS else Rows.QUERIES

    @property
    def shape(self) -> Shape:
        """Tile sizes and dtype."""
        tile = _TILES[self.kernel][self.head_dim]
        block = 64 if self.is_split else 128
        return Shape(ELEMENTS[self.dtype], self.head_dim, self.rows, tile, 2, block)

    @property
    def is_split(self) -> bool:
        """Whether one warpgroup computes dV and the other dK: :mod:`hstu.ops.cutlass.sm90_split`."""
        return self.kernel is Kernel.KEYS and self.head_dim > WIDEST_KEYS_AND_VALUES

    @property
    def num_inputs(self) -> int:
        """Number of tensors that it reads: x, y, z or x, w, y, z."""
        return 3 if self.kernel is Kernel.FORWARD else 4

    @property
    def num_outputs(self) -> int:
        """Number of tensors that it writes."""
        return 2 if self.kernel is Kernel.KEYS else 1

    @property
    def elements(self) -> list[Any]:
        """Element type of each tensor: inputs, then ``outs`` of :meth:`PairwiseKernel.store`."""
        further = [ELEMENTS[self.dtype]] * self.num_outputs + [Float32] * self.num_outputs if self.through_silu else []
        return [ELEMENTS[self.dtype]] * (self.num_inputs + self.num_outputs) + further

    def num_totals(self, num_blocks: int) -> int:
        """Partial sums over tokens that it writes per output: one for the rows of each warp."""
        return num_blocks * self.shape.block // ROWS_OF_WARP

    def build(self) -> Any:
        """The kernel object that the DSL compiles."""
        if self.kernel is Kernel.FORWARD:
            return ForwardSm90(self.shape, through_silu=self.through_silu)
        return (SplitBackwardSm90 if self.is_split else BackwardSm90)(self.shape, self.num_outputs, self.through_silu)


def variants(
    dtypes: Sequence[torch.dtype] = (torch.bfloat16,), head_dims: Sequence[int] = CUTLASS_HEAD_DIMS
) -> Iterator[Variant]:
    """The variants that training uses."""
    for dtype, kernel, head_dim in itertools.product(dtypes, Kernel, head_dims):
        if head_dim in _TILES[kernel]:
            yield Variant(kernel, dtype, head_dim, kernel is not Kernel.FORWARD)


@functools.cache
def compiled(variant: Variant) -> tuple[Callable[..., None], LaunchArguments]:
    """Host function and arguments of a variant. Compiles for seconds unless an object file exists."""
    return objects.load(variant) or _compile(variant), LaunchArguments(*_examples(variant))


def save_compiled(variant: Variant) -> None:
    """Compile a variant for later processes unless its object file exists. Needs no GPU."""
    if objects.load(variant) is None:
        objects.save(_compile(variant, *objects.PORTABLE), variant)


def jobs(shapes: KernelShapes | None, capability: int, operators: Sequence[str]) -> list[Job]:
    """Compile jobs for the kernels that serve these shapes; empty if Triton serves them.

    Backward kernels also without SiLU, as context parallelism and benchmarks launch them.
    """
    is_other = divmod(capability, 10) != CUTLASS_CAPABILITY or "attention" not in operators
    if is_other or shapes is None or unsupported_reason(Backend.CUTLASS, "attention", shapes):
        return []
    fused = list(variants((shapes.dtype,), (shapes.head_dim,)))
    without_silu = [replace(variant, through_silu=False) for variant in fused if variant.through_silu]
    return [
        Job(f"{kernel_name(variant)} ({variant.head_dim} channels)", functools.partial(save_compiled, variant))
        for variant in (*fused, *without_silu)
    ]


def kernel_name(variant: Variant) -> str:
    """Kernel name for tables."""
    return f"{variant.kernel.value}_sm90"


def compile_ahead(variant: Variant) -> tuple[str, bytes]:
    """PTX and machine code of a variant. Needs no GPU."""
    with tempfile.TemporaryDirectory() as folder:
        function = _compile(variant, KeepPTX(True), KeepCUBIN(True), DumpDir(folder))
        return function.__ptx__, function.__cubin__


def _compile(variant: Variant, *options: Any) -> Any:
    with warnings.catch_warnings():
        # The DSL warns about unrolled loops. Loops over registers must be unrolled: registers have no run-time index.
        warnings.simplefilter("ignore")
        return cute.compile[(GPUArch(ARCHITECTURE), *options)](variant.build(), *_examples(variant))


def _examples(variant: Variant) -> tuple[Any, ...]:
    """Arguments of the types for which the host function of a variant is compiled: addresses of inputs and of outputs;
    row and head stride of each in elements; ``batch`` of PairwiseKernel; number of CTAs; handle of the CUDA stream."""
    ins, elements = variant.num_inputs, variant.elements
    return (
        tuple(map(_pointer, elements[:ins])),
        tuple(map(_pointer, elements[ins:])),
        tuple((Int64(8), Int64(8)) for _ in elements),
        (
            _pointer(Int32),
            (Int32(1),) * 5,  # tokens, heads, blocks, leading rows, tokens per target group
            (Float32(1.0),) * 2,  # α and 1 / N
        ),
        Int32(1),
        cuda.CUstream(0),
    )


def _pointer(dtype: Any) -> Any:
    return make_ptr(dtype, ALIGNMENT, cute.AddressSpace.gmem, assumed_align=ALIGNMENT)
