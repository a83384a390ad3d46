"""Compares the interpreted CUTLASS kernels with the PyTorch reference in float64."""

import re
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hstu.ops.functional import hstu_attention, projected_attention
from hstu.ops.kernels import AttentionConfig, AttentionInputs, AttentionKernels, RelativeBias
from hstu.ops.layout import NUM_TIME_BUCKETS, JaggedLayout
from hstu.ops.pytorch.operators import REFERENCE_KERNELS
from hstu.ops.self_check import small_layout as layout_with_times

pytest.importorskip("cutlass", reason="nvidia-cutlass-dsl is not installed: the CUTLASS kernels are NOT compiled here")

from hstu.ops.cutlass.attention import Gradient, Kernel, Variant, variants
from hstu.ops.cutlass.bias_arguments import BiasArguments, BiasSums
from hstu.ops.cutlass.operators import OPERATORS
from tests.ops.cutlass.compiled import ptx_of
from tests.ops.cutlass.ptx.run import run_kernel

HEADS = 2
CAPABILITY = 90
"""Of the GPU whose launches are interpreted."""
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

    def launch(kernel: Kernel, inputs: list[Tensor], outs: list[Gradient], *others: Any) -> None:
        _, _, head_dim = inputs[0].shape
        before = [out.before_silu for out in outs if out.before_silu is not None]
        has_bias = any(isinstance(other, BiasArguments) for other in others)
        variant = Variant(kernel, inputs[0].dtype, head_dim, CAPABILITY, has_bias, bool(before))
        values = [each.value for each in before]
        computed = run_kernel(variant, ptx_of(variant), inputs, *others, before_silu=values)
        targets = [*(out.target for out in outs), *(each.grad_shift for each in before)]
        for target, result in zip(targets, computed, strict=True):
            target.copy_(result)

    monkeypatch.setattr("hstu.ops.cutlass.attention._launch", launch)
    monkeypatch.setattr("hstu.ops.cutlass.attention._capability", lambda device: CAPABILITY)


def slices(layout: JaggedLayout, head_dim: int, dtype: torch.dtype, heads: int = HEADS) -> tuple[Tensor, ...]:
    """What q, k and v are the SiLU of, as views of one tensor as in a layer, and the gradient of the output."""
    torch.manual_seed(0)
    _, q, k, v = torch.randn(layout.num_tokens, heads, 4, head_dim).to(dtype).unbind(2)
    return q, k, v, torch.randn(layout.num_tokens, heads, head_dim).to(dtype)


def errors(ours: Sequence[Tensor], exact: Sequence[Tensor]) -> list[float]:
    """The norm of each error relative to the norm of the exact tensor."""
    return [float((a.double() - b).norm() / b.norm()) for a, b in zip(ours, exact, strict=True)]


def results_of(
    projected: Sequence[Tensor],
    grad: Tensor,
    layout: JaggedLayout,
    config: AttentionConfig,
    bias: RelativeBias | None,
    kernels: AttentionKernels,
) -> list[Tensor]:
    """As ``exact_results``, by ``kernels``."""
    of_q, of_k, of_v = projected
    leaves = [torch.stack([of_v, of_q, of_k], 2), torch.zeros(of_q.shape[1], 3, of_q.shape[2])]
    leaves += [] if bias is None else [bias.position_weight.detach(), bias.time_weight.detach()]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    bias = None if bias is None else RelativeBias(*leaves[2:])
    out = projected_attention(*leaves[:2], layout, config, bias, kernels)
    gradient, sums, *of_weights = torch.autograd.grad(out, leaves, grad.to(out))
    return [out.detach(), *(gradient[:, :, i] for i in (1, 2, 0)), *(sums[:, i] for i in (1, 2, 0)), *of_weights]


def exact_results(
    projected: Sequence[Tensor],
    grad: Tensor,
    layout: JaggedLayout,
    config: AttentionConfig,
    bias: RelativeBias | None,
) -> list[Tensor]:
    """O, the gradients of what q, k and v are the SiLU of, their sums over tokens, and those of the bias, in float64.

    q, k and v are rounded, as in a layer: that is no error of a kernel.
    """
    leaves = [F.silu(each).double().requires_grad_() for each in projected]
    if bias is not None:
        bias = RelativeBias(*(table.detach().double().requires_grad_() for table in vars(bias).values()))
        leaves += vars(bias).values()
    out = hstu_attention(AttentionInputs(*leaves[:3], layout, config, bias), REFERENCE_KERNELS.attention)
    (*grads,) = torch.autograd.grad(out, leaves, grad.double())
    before = [each.double().requires_grad_() for each in projected]
    of_projected = torch.autograd.grad([F.silu(each) for each in before], before, grads[:3])
    return [out.detach(), *of_projected, *(each.sum(0) for each in of_projected), *grads[3:]]


def errors_of(variant: Variant, ptx: str, config: AttentionConfig) -> list[float]:
    """The errors of the outputs of one kernel."""
    layout = small_layout()
    *projected, grad = slices(layout, variant.head_dim, variant.dtype)
    bias = bias_of(100) if variant.has_bias else None  # fewer positions than tokens
    exact = exact_results(projected, grad, layout, config, bias)
    out, grad_q, grad_k, grad_v, sum_q, sum_k, sum_v, *of_weights = exact
    (before_q, before_k, before_v), (q, k, v) = projected, map(F.silu, projected)
    count = variant.num_outputs
    inputs, before, exact = {
        Kernel.FORWARD: ([q, k, v], [], [out]),
        Kernel.QUERIES: ([q, grad, k, v], [before_q], [grad_q, sum_q, *of_weights]),
        Kernel.KEYS: (
            [k, v, q, grad],
            [before_k, before_v][:count],
            [*[grad_k, grad_v][:count], *[sum_k, sum_v][:count]],
        ),
        Kernel.VALUES: ([k, q, grad], [before_v], [grad_v, sum_v]),
    }[variant.kernel]
    if bias is None:
        return errors(run_kernel(variant, ptx, inputs, layout, config, before_silu=before), exact)
    arguments = BiasArguments.of(bias, layout)
    sums = BiasSums.zeros(arguments, grad, v, layout) if variant.kernel is Kernel.QUERIES else None
    ours = run_kernel(variant, ptx, inputs, layout, config, arguments, sums, before)
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


@pytest.mark.slow
@pytest.mark.usefixtures("interpreted")
def test_attention_with_a_relative_bias_and_all_its_gradients_equal_the_reference() -> None:
    compare_with_the_reference(head_dim=32, heads=1, bias=bias_of(200))


@pytest.mark.slow
@pytest.mark.usefixtures("interpreted")
def test_attention_of_given_queries_keys_and_values_equals_the_reference() -> None:
    """The kernels without SiLU, which benchmarks of attention alone run."""
    layout, config = small_layout(), AttentionConfig(32**-0.5, 150)
    *inputs, grad = slices(layout, 32, torch.bfloat16, heads=1)

    def results(kernels: AttentionKernels, dtype: torch.dtype) -> list[Tensor]:
        leaves = [tensor.detach().to(dtype).requires_grad_() for tensor in inputs]
        out = hstu_attention(AttentionInputs(*leaves, layout, config), kernels)
        return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(dtype))]

    ours, exact = results(OPERATORS["attention"], torch.bfloat16), results(REFERENCE_KERNELS.attention, torch.float64)
    assert max(errors(ours, exact)) < BFLOAT16_TOLERANCE


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
