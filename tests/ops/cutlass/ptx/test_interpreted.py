"""Compares the interpreted CUTLASS kernels, called as in a layer, with the PyTorch reference in float64.

The PTX of a kernel is interpreted with the arguments that its host function passes.
"""

import functools
import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hstu.ops.functional import hstu_attention
from hstu.ops.kernels import AttentionConfig, AttentionInputs, Gradient
from hstu.ops.layout import JaggedLayout
from hstu.ops.pytorch.operators import REFERENCE_KERNELS
from hstu.ops.self_check import small_layout

pytest.importorskip("cutlass", reason="nvidia-cutlass-dsl is not installed: the CUTLASS kernels are NOT compiled here")

from hstu.ops.cutlass.attention import Kernel, Variant, compile_ahead
from hstu.ops.cutlass.hopper import THREADS
from hstu.ops.cutlass.operators import OPERATORS
from hstu.ops.cutlass.schedule import leading_rows, list_blocks
from hstu.ops.support import CUTLASS_HEAD_DIMS
from tests.ops.cutlass.ptx.machine import Cta, TensorMap
from tests.ops.cutlass.ptx.registers import parse

FIRST_ADDRESS = 2**32
NUM_CTAS = 2  # so few that each computes several blocks
TOLERANCE = 4e-3
"""Relative to the norm: the rounding of weights and outputs to eight bits."""
LAYOUT = small_layout(torch.device("cpu"), (3, 0, 135), (1, 0, 20), num_contextuals=3, group_size=4)
"""Sequences of several blocks, of one block, with candidates, and an empty one."""
SHORT = small_layout(torch.device("cpu"), (3, 0, 90), (1, 0, 20), num_contextuals=3, group_size=4)
"""Sequences of one block and one tile each: takes a third of the time."""


@functools.cache
def ptx_of(variant: Variant) -> str:
    """The PTX of a kernel."""
    return compile_ahead(variant)[0]


def run_kernel(
    variant: Variant,
    ptx: str,
    inputs: list[Tensor],
    before_silu: Sequence[Tensor],
    layout: JaggedLayout,
    config: AttentionConfig,
) -> list[Tensor]:
    """The outputs of a kernel for its inputs x, y, z or x, y, w, z: [T, H, d].

    With ``before_silu``, of which the rows of each output are the SiLU, the sums [H, d] of each output follow.
    """
    program = parse(ptx)
    shape = variant.shape
    blocks = list_blocks(layout, config, shape.rows, shape.block)
    tokens, heads, width = inputs[0].shape
    memory: dict[int, np.ndarray] = {}

    def address_of(array: np.ndarray) -> int:
        address = FIRST_ADDRESS * (1 + len(memory))
        memory[address] = array.reshape(-1).view(np.uint8)
        return address

    def loaded(tensor: Tensor, num_rows: int) -> TensorMap:
        return TensorMap(tensor.contiguous().view(torch.int16).numpy().view(np.uint16), num_rows, min(width, 64))

    box_rows = [shape.block] * (variant.num_inputs - 2) + [shape.tile] * 2
    # As in a layer, the outputs are views of a larger tensor.
    between = (tokens, heads, 3, width)
    outs = [torch.full(between, float("nan"), dtype=variant.dtype)[:, :, 1] for _ in range(variant.num_outputs)]
    totals = [torch.full((variant.num_totals(len(blocks)), heads, width), float("nan")) for _ in before_silu]
    in_memory = [*outs, *before_silu, *totals]  # inputs come as TMA descriptors
    tensors = [
        np.array([address_of(_bytes_of(tensor)), tokens | heads << 32, *tensor.stride()[:2]], np.uint64).tobytes()
        for tensor in in_memory
    ]
    items = np.array([address_of(blocks)], np.uint64).tobytes()
    group = max(layout.candidate_group_tokens, 1)
    sizes = [tokens, heads, len(blocks), leading_rows(layout, config), group]
    numbers = [np.array([number], np.int32).tobytes() for number in sizes]
    numbers += [np.array([number], np.float32).tobytes() for number in (config.alpha, 1 / config.scaling_seqlen)]
    remaining = iter([items, *numbers])
    maps, structs = iter(map(loaded, inputs, box_rows)), iter(tensors)
    params: dict[str, Any] = {}
    coordinates = False
    for name, size in program.params:
        if coordinates:  # the shape of a tensor that TMA loads, which no kernel reads
            params[name], coordinates = b"", False
        elif size == 128:
            params[name], coordinates = next(maps), True
        else:
            params[name] = next(structs) if size == 32 else next(remaining)
    assert next(remaining, None) is None
    for index in range(NUM_CTAS):
        Cta(program, params, memory, index, NUM_CTAS, THREADS).run()
    return [*outs, *(total.sum(0) for total in totals)]


def _bytes_of(tensor: Tensor) -> np.ndarray:
    """The memory of a tensor, from its first to its last element."""
    extent = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.as_strided((extent,), (1,)).view(torch.uint8).numpy()


def interpret(patch: pytest.MonkeyPatch, ptx_of: Callable[[Variant], str] = ptx_of) -> None:
    """Run launches on the interpreter, as on a GPU."""

    def launch(
        kernel: Kernel,
        inputs: list[Tensor],
        outs: list[Gradient],
        layout: JaggedLayout,
        config: AttentionConfig,
    ) -> None:
        before = [out.before_silu for out in outs if out.before_silu is not None]
        variant = Variant(kernel, inputs[0].dtype, inputs[0].shape[2], bool(before))
        values = [each.value for each in before]
        computed = run_kernel(variant, ptx_of(variant), inputs, values, layout, config)
        targets = [*(out.target for out in outs), *(each.grad_shift for each in before)]
        for target, result in zip(targets, computed, strict=True):
            target.copy_(result)

    patch.setattr("hstu.ops.cutlass.attention._launch", launch)


def errors(layout: JaggedLayout, heads: int, head_dim: int, dtype: torch.dtype, **mask: bool) -> list[float]:
    """The norm of the error of O, dQ, dK, dV and their sums over tokens, relative to each."""
    torch.manual_seed(0)
    config = AttentionConfig(head_dim**-0.5, 150, **mask)
    projected = torch.randn(layout.num_tokens, heads, 3, head_dim).to(dtype)
    grad = torch.randn(layout.num_tokens, heads, head_dim).to(dtype)
    leaves = [each.requires_grad_() for each in (projected, torch.zeros(heads, 3, head_dim))]
    v, q, k = projected.unbind(2)
    out = hstu_attention(AttentionInputs(q, k, v, layout, config), OPERATORS["attention"], leaves[1])
    gradient, *others = torch.autograd.grad(out, leaves, grad)
    ours = [out, *gradient.unbind(2), *others]

    # v, q and k are rounded, as in a layer: that is no error of a kernel.
    v, q, k = (each.detach().double().requires_grad_() for each in F.silu(projected).unbind(2))
    right = hstu_attention(AttentionInputs(q, k, v, layout, config), REFERENCE_KERNELS.attention)
    of_activated = torch.autograd.grad(right, [v, q, k], grad.double())
    before = projected.detach().double().requires_grad_()
    (of_projected,) = torch.autograd.grad(F.silu(before), before, torch.stack(of_activated, 2))
    exact = [right, *of_projected.unbind(2), of_projected.sum(0)]
    return [
        float((a.detach().double() - b.detach()).norm() / b.detach().norm()) for a, b in zip(ours, exact, strict=True)
    ]


CAUSAL = {"is_causal": True, "contextual_mask": True}
slow = partial(pytest.param, marks=pytest.mark.slow)
EVERY_KERNEL = [
    slow(LAYOUT, 2 if head_dim == 64 else 1, head_dim, torch.bfloat16, CAUSAL) for head_dim in CUTLASS_HEAD_DIMS
]
OTHER_MASKS = [slow(LAYOUT, 1, 32, torch.float16, mask) for mask in ({"contextual_mask": False}, {"is_causal": False})]


@pytest.mark.parametrize(
    ("layout", "heads", "head_dim", "dtype", "mask"),
    [(SHORT, 1, 32, torch.bfloat16, CAUSAL), *EVERY_KERNEL, *OTHER_MASKS],
)
def test_attention_and_its_gradients_equal_the_reference(
    layout: JaggedLayout,
    heads: int,
    head_dim: int,
    dtype: torch.dtype,
    mask: dict[str, bool],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    interpret(monkeypatch)
    assert max(errors(layout, heads, head_dim, dtype, **mask)) < TOLERANCE


def forward_error(monkeypatch: pytest.MonkeyPatch, of: str, to: str) -> float:
    """The error of O where the PTX of its kernel is changed."""
    ptx = ptx_of(Variant(Kernel.FORWARD, torch.bfloat16, 32))
    broken, count = re.subn(of, to, ptx)
    assert count
    interpret(monkeypatch, lambda variant: broken)
    torch.manual_seed(0)
    q, k, v = torch.randn(3, LAYOUT.num_tokens, 1, 32).bfloat16()
    inputs = AttentionInputs(q, k, v, LAYOUT, AttentionConfig(0.125, 150))
    exact = REFERENCE_KERNELS.attention.forward(inputs).double()
    return float((OPERATORS["attention"].forward(inputs).double() - exact).norm() / exact.norm())


@pytest.mark.parametrize(
    ("of", "to", "is_right"),
    [
        (r"wgmma.wait_group.sync.aligned \t1;", r"\g<0>", True),
        (r"wgmma.wait_group.sync.aligned \t1;", "wgmma.wait_group.sync.aligned 2;", False),  # uses a result too early
        (r"setp.le.s32", "setp.lt.s32", False),  # masks one pair too many
    ],
)
def test_the_interpreter_notices_a_defect(of: str, to: str, is_right: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    assert (forward_error(monkeypatch, of, to) < TOLERANCE) == is_right


def test_the_interpreter_notices_a_buffer_that_is_never_released(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RuntimeError, match="deadlock"):
        forward_error(monkeypatch, r"mbarrier.arrive.shared.b64[^;]*;", "")
