"""Compares the interpreted CUTLASS kernels with the PyTorch reference in float64."""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hstu.ops.functional import hstu_attention
from hstu.ops.layout import build_layout
from hstu.ops.pytorch.operators import REFERENCE_KERNELS
from hstu.ops.types import AttentionConfig, JaggedLayout

pytest.importorskip("cutlass", reason="nvidia-cutlass-dsl is not installed: the CUTLASS kernels are NOT compiled here")

from hstu.ops.cutlass.attention import Kernel, Variant, variants
from hstu.ops.cutlass.operators import OPERATORS
from tests.ops.cutlass.compiled import ptx_of
from tests.ops.cutlass.ptx.run import run_kernel

HEADS = 2
BFLOAT16_TOLERANCE = 4e-3
"""Relative to the norm: the rounding of weights and outputs to eight bits."""


def name_of(variant: Variant) -> str:
    dtype = str(variant.dtype).removeprefix("torch.")
    return f"sm_{variant.capability}-{variant.kernel}-{variant.head_dim}-{dtype}"


def small_layout() -> JaggedLayout:
    """Sequences of several blocks, of one block, with and without candidates, and an empty one."""
    return build_layout(
        item_lengths=np.array([70, 0, 3, 150]),
        num_sequences=4,
        num_contextuals=3,
        num_candidates=np.array([9, 0, 1, 20]),
        tokens_per_item=1,
        target_group_size=4,
        device=torch.device("cpu"),
    )


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Launches run on the interpreter, as on an H100."""

    def launch(kernel: Kernel, inputs: list[Tensor], outs: list[Tensor], *layout_and_config: Any) -> None:
        _, _, head_dim = inputs[0].shape
        variant = Variant(kernel, inputs[0].dtype, head_dim, 90)
        for out, computed in zip(outs, run_kernel(variant, ptx_of(variant), inputs, *layout_and_config), strict=True):
            out.copy_(computed)

    monkeypatch.setattr("hstu.ops.cutlass.attention._launch", launch)


def slices(layout: JaggedLayout, head_dim: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """q, k and v as views of one tensor, as in a layer, and the gradient of the output."""
    torch.manual_seed(0)
    _, q, k, v = torch.randn(layout.num_tokens, HEADS, 4, head_dim).to(dtype).unbind(2)
    return q, k, v, torch.randn(layout.num_tokens, HEADS, head_dim).to(dtype)


def errors(ours: Sequence[Tensor], exact: Sequence[Tensor]) -> list[float]:
    """The norm of each error relative to the norm of the exact tensor."""
    return [float((a.double() - b).norm() / b.norm()) for a, b in zip(ours, exact, strict=True)]


def expected_of(
    q: Tensor, k: Tensor, v: Tensor, grad: Tensor, layout: JaggedLayout, config: AttentionConfig
) -> list[Tensor]:
    """O, dQ, dK, dV in float64."""
    leaves = [tensor.double().requires_grad_() for tensor in (q, k, v)]
    out = hstu_attention(*leaves, layout, config, None, REFERENCE_KERNELS.attention)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad.double())]


def errors_of(variant: Variant, ptx: str, config: AttentionConfig) -> list[float]:
    """The errors of the outputs of one kernel."""
    layout = small_layout()
    q, k, v, grad = slices(layout, variant.head_dim, variant.dtype)
    out, grad_q, grad_k, grad_v = expected_of(q, k, v, grad, layout, config)
    inputs, exact = {
        Kernel.FORWARD: ([q, k, v], [out]),
        Kernel.QUERIES: ([q, grad, k, v], [grad_q]),
        Kernel.KEYS: ([k, v, q, grad], [grad_k, grad_v][: variant.num_outputs]),
        Kernel.VALUES: ([k, q, grad], [grad_v]),
    }[variant.kernel]
    return errors(run_kernel(variant, ptx, inputs, layout, config), exact)


def check(variant: Variant, *, is_causal: bool, contextual_mask: bool) -> None:
    config = AttentionConfig(variant.head_dim**-0.5, 150, is_causal, contextual_mask)
    assert max(errors_of(variant, ptx_of(variant), config)) < BFLOAT16_TOLERANCE


def compare_with_the_reference(head_dim: int) -> None:
    layout, config = small_layout(), AttentionConfig(head_dim**-0.5, 150)
    *inputs, grad = slices(layout, head_dim, torch.bfloat16)
    leaves = [tensor.requires_grad_() for tensor in inputs]
    out = hstu_attention(*leaves, layout, config, None, OPERATORS["attention"])
    ours = [out.detach(), *torch.autograd.grad(out, leaves, grad)]
    assert max(errors(ours, expected_of(*inputs, grad, layout, config))) < BFLOAT16_TOLERANCE


@pytest.mark.usefixtures("interpreted")
def test_attention_and_its_gradients_equal_the_reference() -> None:
    compare_with_the_reference(head_dim=64)


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
