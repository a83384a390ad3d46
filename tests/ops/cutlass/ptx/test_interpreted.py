"""Compares the interpreted CUTLASS kernels with the PyTorch reference in float64."""

import re
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from hstu.ops.functional import hstu_attention
from hstu.ops.pytorch.operators import REFERENCE_KERNELS
from hstu.ops.self_check import small_layout as layout_with_times
from hstu.ops.types import NUM_TIME_BUCKETS, AttentionConfig, AttentionKernels, JaggedLayout, RelativeBias

pytest.importorskip("cutlass", reason="nvidia-cutlass-dsl is not installed: the CUTLASS kernels are NOT compiled here")

from hstu.ops.cutlass.attention import Kernel, Variant, variants
from hstu.ops.cutlass.bias_arguments import BiasArguments, BiasSums
from hstu.ops.cutlass.operators import OPERATORS
from tests.ops.cutlass.compiled import ptx_of
from tests.ops.cutlass.ptx.run import run_kernel

HEADS = 2
BFLOAT16_TOLERANCE = 4e-3
"""Relative to the norm: the rounding of weights and outputs to eight bits."""


def name_of(variant: Variant) -> str:
    dtype = str(variant.dtype).removeprefix("torch.")
    return f"sm_{variant.capability}-{variant.kernel}-{variant.head_dim}-{dtype}{'-bias' if variant.has_bias else ''}"


def small_layout() -> JaggedLayout:
    """Sequences of several blocks, of one block, with and without candidates, and an empty one."""
    return layout_with_times(torch.device("cpu"), (70, 0, 3, 150), (9, 0, 1, 20), num_contextuals=3, group_size=4)


def bias_of(num_positions: int) -> RelativeBias:
    """Weights of the size of scores."""
    torch.manual_seed(1)
    return RelativeBias(torch.randn(2 * num_positions - 1), torch.randn(NUM_TIME_BUCKETS))


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Launches run on the interpreter, as on an H100."""

    def launch(kernel: Kernel, inputs: list[Tensor], outs: list[Tensor], *others: Any) -> None:
        _, _, head_dim = inputs[0].shape
        has_bias = any(isinstance(other, BiasArguments) for other in others)
        variant = Variant(kernel, inputs[0].dtype, head_dim, 90, has_bias)
        for out, computed in zip(outs, run_kernel(variant, ptx_of(variant), inputs, *others), strict=True):
            out.copy_(computed)

    monkeypatch.setattr("hstu.ops.cutlass.attention._launch", launch)


def slices(layout: JaggedLayout, head_dim: int, dtype: torch.dtype, heads: int = HEADS) -> tuple[Tensor, ...]:
    """q, k and v as views of one tensor, as in a layer, and the gradient of the output."""
    torch.manual_seed(0)
    _, q, k, v = torch.randn(layout.num_tokens, heads, 4, head_dim).to(dtype).unbind(2)
    return q, k, v, torch.randn(layout.num_tokens, heads, head_dim).to(dtype)


def errors(ours: Sequence[Tensor], exact: Sequence[Tensor]) -> list[float]:
    """The norm of each error relative to the norm of the exact tensor."""
    return [float((a.double() - b).norm() / b.norm()) for a, b in zip(ours, exact, strict=True)]


def results_of(
    inputs: Sequence[Tensor],
    grad: Tensor,
    layout: JaggedLayout,
    config: AttentionConfig,
    bias: RelativeBias | None,
    kernels: AttentionKernels,
) -> list[Tensor]:
    """O, dQ, dK, dV and the gradients of the weights of the bias."""
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    if bias is not None:
        bias = RelativeBias(bias.position_weight.requires_grad_(), bias.time_weight.requires_grad_())
        leaves += [bias.position_weight, bias.time_weight]
    out = hstu_attention(*leaves[:3], layout, config, bias, kernels)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(out))]


def exact_results(
    inputs: Sequence[Tensor], grad: Tensor, layout: JaggedLayout, config: AttentionConfig, bias: RelativeBias | None
) -> list[Tensor]:
    """As ``results_of`` the reference, in float64."""
    if bias is not None:
        bias = RelativeBias(bias.position_weight.detach().double(), bias.time_weight.detach().double())
    inputs = [tensor.double() for tensor in inputs]
    return results_of(inputs, grad, layout, config, bias, REFERENCE_KERNELS.attention)


def errors_of(variant: Variant, ptx: str, config: AttentionConfig) -> list[float]:
    """The errors of the outputs of one kernel."""
    layout = small_layout()
    q, k, v, grad = slices(layout, variant.head_dim, variant.dtype)
    bias = bias_of(100) if variant.has_bias else None  # fewer positions than tokens
    out, grad_q, grad_k, grad_v, *of_weights = exact_results((q, k, v), grad, layout, config, bias)
    inputs, exact = {
        Kernel.FORWARD: ([q, k, v], [out]),
        Kernel.QUERIES: ([q, grad, k, v], [grad_q, *of_weights]),
        Kernel.KEYS: ([k, v, q, grad], [grad_k, grad_v][: variant.num_outputs]),
        Kernel.VALUES: ([k, q, grad], [grad_v]),
    }[variant.kernel]
    if bias is None:
        return errors(run_kernel(variant, ptx, inputs, layout, config), exact)
    arguments = BiasArguments.of(bias, layout)
    sums = BiasSums.zeros(arguments, grad, v, layout) if variant.kernel is Kernel.QUERIES else None
    ours = run_kernel(variant, ptx, inputs, layout, config, arguments, sums)
    if sums is not None:
        gradients = sums.gradients(bias, config)
        ours += [gradients.position_weight, gradients.time_weight]
    return errors(ours, exact)


def check(variant: Variant, *, is_causal: bool, contextual_mask: bool) -> None:
    config = AttentionConfig(variant.head_dim**-0.5, 150, is_causal, contextual_mask)
    assert max(errors_of(variant, ptx_of(variant), config)) < BFLOAT16_TOLERANCE


def compare_with_the_reference(head_dim: int, heads: int = HEADS, bias: RelativeBias | None = None) -> None:
    layout, config = small_layout(), AttentionConfig(head_dim**-0.5, 150)
    *inputs, grad = slices(layout, head_dim, torch.bfloat16, heads)
    ours = results_of(inputs, grad, layout, config, bias, OPERATORS["attention"])
    assert max(errors(ours, exact_results(inputs, grad, layout, config, bias))) < BFLOAT16_TOLERANCE


@pytest.mark.usefixtures("interpreted")
def test_attention_and_its_gradients_equal_the_reference() -> None:
    compare_with_the_reference(head_dim=64)


@pytest.mark.usefixtures("interpreted")
def test_attention_with_a_relative_bias_and_all_its_gradients_equal_the_reference() -> None:
    compare_with_the_reference(head_dim=32, heads=1, bias=bias_of(200))


@pytest.mark.slow
@pytest.mark.usefixtures("interpreted")
def test_wide_heads_equal_the_reference() -> None:
    compare_with_the_reference(head_dim=256)


FORWARD = Variant(Kernel.FORWARD, torch.bfloat16, 64, 90)


@pytest.mark.slow
@pytest.mark.parametrize("variant", variants(), ids=name_of)
def test_all_kernels_equal_the_reference(variant: Variant) -> None:
    check(variant, is_causal=True, contextual_mask=True)


@pytest.mark.slow
@pytest.mark.parametrize(("is_causal", "contextual_mask"), [(True, False), (False, True)])
@pytest.mark.parametrize("variant", variants((torch.float16,), head_dims=(32,)), ids=name_of)
def test_other_masks_and_float16_equal_the_reference(variant: Variant, is_causal: bool, contextual_mask: bool) -> None:
    check(variant, is_causal=is_causal, contextual_mask=contextual_mask)


@pytest.mark.parametrize(
    ("of", "to"),
    [
        (r"wgmma.wait_group.sync.aligned \t1;", "wgmma.wait_group.sync.aligned 2;"),  # uses a result too early
        (r"setp.le.s32", "setp.lt.s32"),  # masks one pair too many
    ],
)
def test_the_interpreter_notices_a_defect(of: str, to: str) -> None:
    variant = FORWARD
    ptx = ptx_of(variant)
    broken, count = re.subn(of, to, ptx)
    assert count
    assert not max(errors_of(variant, broken, AttentionConfig(0.125, 150))) < BFLOAT16_TOLERANCE


def test_the_interpreter_notices_a_buffer_that_is_never_released() -> None:
    variant = FORWARD
    broken, count = re.subn(r"mbarrier.arrive.shared.b64[^;]*;", "", ptx_of(variant))
    assert count
    with pytest.raises(RuntimeError, match="deadlock"):
        errors_of(variant, broken, AttentionConfig(0.125, 150))
