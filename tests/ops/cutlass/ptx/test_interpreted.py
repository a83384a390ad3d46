"""Compares the interpreted CUTLASS kernels, called as in a layer, with the PyTorch reference in float64."""

import re
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hstu.ops.functional import hstu_attention
from hstu.ops.kernels import AttentionConfig, AttentionInputs, Gradient, RelativeBias
from hstu.ops.layout import NUM_TIME_BUCKETS, JaggedLayout
from hstu.ops.pytorch.operators import REFERENCE_KERNELS
from hstu.ops.self_check import small_layout

pytest.importorskip("cutlass", reason="nvidia-cutlass-dsl is not installed: the CUTLASS kernels are NOT compiled here")

from hstu.ops.cutlass.attention import Kernel, Variant
from hstu.ops.cutlass.bias import BiasArguments, BiasSums
from hstu.ops.cutlass.operators import OPERATORS
from hstu.ops.support import CUTLASS_BIAS_HEAD_DIMS, CUTLASS_HEAD_DIMS
from tests.ops.cutlass.ptx.run import ptx_of, run_kernel

TOLERANCE = 4e-3
"""Relative to the norm: the rounding of weights and outputs to eight bits."""
LAYOUT = small_layout(torch.device("cpu"), (3, 0, 135), (1, 0, 20), num_contextuals=3, group_size=4)
"""Sequences of several blocks, of one block, with candidates, and an empty one."""
SHORT = small_layout(torch.device("cpu"), (3, 0, 90), (1, 0, 20), num_contextuals=3, group_size=4)
"""Sequences of one block and one tile each: takes a third of the time."""


def interpret(patch: pytest.MonkeyPatch, capability: int, ptx_of: Callable[[Variant], str] = ptx_of) -> None:
    """Run launches on the interpreter, as on a GPU of this compute capability."""

    def launch(
        kernel: Kernel,
        inputs: list[Tensor],
        outs: list[Gradient],
        layout: JaggedLayout,
        config: AttentionConfig,
        bias: BiasArguments | None = None,
        sums: BiasSums | None = None,
    ) -> None:
        before = [out.before_silu for out in outs if out.before_silu is not None]
        variant = Variant(kernel, inputs[0].dtype, inputs[0].shape[2], capability, bias is not None, bool(before))
        values = [each.value for each in before]
        computed = run_kernel(variant, ptx_of(variant), inputs, values, layout, config, bias, sums)
        targets = [*(out.target for out in outs), *(each.grad_shift for each in before)]
        for target, result in zip(targets, computed, strict=True):
            target.copy_(result)

    patch.setattr("hstu.ops.cutlass.attention._launch", launch)
    patch.setattr("hstu.ops.cutlass.attention._capability", lambda device: capability)


def errors(
    layout: JaggedLayout, heads: int, head_dim: int, has_bias: bool, dtype: torch.dtype, **mask: bool
) -> list[float]:
    """The norm of the error of O, dQ, dK, dV, their sums over tokens and the gradients of a bias, relative to each."""
    torch.manual_seed(0)
    config = AttentionConfig(head_dim**-0.5, 150, **mask)
    projected = torch.randn(layout.num_tokens, heads, 3, head_dim).to(dtype)
    grad = torch.randn(layout.num_tokens, heads, head_dim).to(dtype)
    # Fewer positions than tokens.
    tables = [torch.randn(2 * 100 - 1), torch.randn(NUM_TIME_BUCKETS)] if has_bias else []

    leaves = [each.requires_grad_() for each in (projected, torch.zeros(heads, 3, head_dim), *tables)]
    bias = RelativeBias(*leaves[2:]) if has_bias else None
    v, q, k = projected.unbind(2)
    out = hstu_attention(AttentionInputs(q, k, v, layout, config, bias), OPERATORS["attention"], leaves[1])
    gradient, *others = torch.autograd.grad(out, leaves, grad)
    ours = [out, *gradient.unbind(2), *others]

    # v, q and k are rounded, as in a layer: that is no error of a kernel.
    v, q, k = (each.detach().double().requires_grad_() for each in F.silu(projected).unbind(2))
    exact_tables = [table.detach().double().requires_grad_() for table in tables]
    bias = RelativeBias(*exact_tables) if has_bias else None
    right = hstu_attention(AttentionInputs(q, k, v, layout, config, bias), REFERENCE_KERNELS.attention)
    (*of_activated,) = torch.autograd.grad(right, [v, q, k, *exact_tables], grad.double())
    before = projected.detach().double().requires_grad_()
    (of_projected,) = torch.autograd.grad(F.silu(before), before, torch.stack(of_activated[:3], 2))
    exact = [right, *of_projected.unbind(2), of_projected.sum(0), *of_activated[3:]]
    return [
        float((a.detach().double() - b.detach()).norm() / b.detach().norm()) for a, b in zip(ours, exact, strict=True)
    ]


CAUSAL = {"is_causal": True, "contextual_mask": True}
slow = partial(pytest.param, marks=pytest.mark.slow)
EVERY_KERNEL = [
    slow(capability, LAYOUT, 2 if head_dim == 64 else 1, head_dim, has_bias, torch.bfloat16, CAUSAL)
    for capability in (90, 80)
    for has_bias, head_dims in ((False, CUTLASS_HEAD_DIMS), (True, CUTLASS_BIAS_HEAD_DIMS))
    for head_dim in head_dims
]
OTHER_MASKS = [
    slow(capability, LAYOUT, 1, 32, has_bias, torch.float16, mask)
    for capability in (90, 80)
    for has_bias, mask in ((False, {"contextual_mask": False}), (True, {"is_causal": False}))
]


@pytest.mark.parametrize(
    ("capability", "layout", "heads", "head_dim", "has_bias", "dtype", "mask"),
    [(90, SHORT, 1, 32, False, torch.bfloat16, CAUSAL), *EVERY_KERNEL, *OTHER_MASKS],
)
def test_attention_and_its_gradients_equal_the_reference(
    capability: int,
    layout: JaggedLayout,
    heads: int,
    head_dim: int,
    has_bias: bool,
    dtype: torch.dtype,
    mask: dict[str, bool],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    interpret(monkeypatch, capability)
    assert max(errors(layout, heads, head_dim, has_bias, dtype, **mask)) < TOLERANCE


def forward_error(monkeypatch: pytest.MonkeyPatch, of: str, to: str) -> float:
    """The error of O where the PTX of its kernel is changed."""
    ptx = ptx_of(Variant(Kernel.FORWARD, torch.bfloat16, 32, 90))
    broken, count = re.subn(of, to, ptx)
    assert count
    interpret(monkeypatch, 90, lambda variant: broken)
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
