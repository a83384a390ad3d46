"""The compiled kernels, run instruction by instruction where there is no GPU, against the oracle in float64."""

from __future__ import annotations

import functools
import re

import numpy as np
import pytest
import torch
from torch import Tensor

from hstu.ops.attention import AttentionRule
from hstu.ops.layout import JaggedLayout, build_layout
from hstu.ops.pytorch.attention import attention

pytest.importorskip("cutlass", reason="nvidia-cutlass-dsl is not installed: the CUTLASS kernels are NOT compiled here")

from hstu.ops.cutlass.kernels import Kernel, Variant, compile_ahead, variants
from tests.ops.cutlass.interpreted import run_kernel

HEADS = 2
BFLOAT16_TOLERANCE = 4e-3
"""Of the norm: the rounding of weights and outputs to eight bits."""


def name_of(variant: Variant) -> str:
    dtype = str(variant.dtype).removeprefix("torch.")
    return f"sm_{variant.capability}-{variant.kernel}-{variant.head_dim}-{dtype}"


@functools.cache
def ptx_of(variant: Variant) -> str:
    return compile_ahead(variant)[0]


def small_layout() -> JaggedLayout:
    """Sequences of several blocks, of one, of less than one row of candidates, and an empty one."""
    return build_layout(
        item_lengths=np.array([70, 0, 3, 150]),
        num_sequences=4,
        num_contextuals=3,
        num_candidates=np.array([9, 0, 1, 20]),
        tokens_per_item=1,
        target_group_size=4,
        device=torch.device("cpu"),
    )


def inputs_and_outputs(variant: Variant, layout: JaggedLayout, rule: AttentionRule) -> tuple[list[Tensor], list[Tensor]]:
    """What the kernel is given, and what it should give, in float64."""
    torch.manual_seed(0)
    q, k, v, grad = (torch.randn(layout.num_tokens, HEADS, variant.head_dim).to(variant.dtype) for _ in range(4))
    leaves = [tensor.double().requires_grad_() for tensor in (q, k, v)]
    out = attention(*leaves, layout, rule, None)
    grad_q, grad_k, grad_v = torch.autograd.grad(out, leaves, grad.double())
    inputs = {
        Kernel.FORWARD: [q, k, v],
        Kernel.QUERIES: [q, k, grad, v],
        Kernel.KEYS: [k, q, v, grad],
        Kernel.VALUES: [k, q, grad],
    }
    outputs = {
        Kernel.FORWARD: [out.detach()],
        Kernel.QUERIES: [grad_q],
        Kernel.KEYS: [grad_k, grad_v],
        Kernel.VALUES: [grad_v],
    }
    return inputs[variant.kernel], outputs[variant.kernel][: variant.num_outputs]


def errors_of(variant: Variant, ptx: str, rule: AttentionRule) -> list[float]:
    """Of each output, relative, by norm."""
    layout = small_layout()
    inputs, expected = inputs_and_outputs(variant, layout, rule)
    outs = run_kernel(variant, ptx, inputs, layout, rule)
    return [float((ours.double() - exact).norm() / exact.norm()) for ours, exact in zip(outs, expected, strict=True)]


def check(variant: Variant, *, is_causal: bool, contextual_mask: bool) -> None:
    rule = AttentionRule(variant.head_dim**-0.5, 150, is_causal, contextual_mask)
    assert max(errors_of(variant, ptx_of(variant), rule)) < BFLOAT16_TOLERANCE


SMALL = [Variant(kernel, torch.bfloat16, 64, 90) for kernel in (Kernel.FORWARD, Kernel.QUERIES, Kernel.KEYS)]


@pytest.mark.parametrize("variant", SMALL, ids=name_of)
def test_kernels_equal_the_reference(variant: Variant) -> None:
    check(variant, is_causal=True, contextual_mask=True)


@pytest.mark.slow
@pytest.mark.parametrize("variant", [v for v in variants() if v not in SMALL], ids=name_of)
def test_all_kernels_equal_the_reference(variant: Variant) -> None:
    check(variant, is_causal=True, contextual_mask=True)


@pytest.mark.slow
@pytest.mark.parametrize(("is_causal", "contextual_mask"), [(True, False), (False, True)])
@pytest.mark.parametrize("variant", variants((torch.float16,), head_dims=(32,)), ids=name_of)
def test_other_masks_and_float16_equal_the_reference(
    variant: Variant, is_causal: bool, contextual_mask: bool
) -> None:
    check(variant, is_causal=is_causal, contextual_mask=contextual_mask)


@pytest.mark.parametrize(
    ("of", "to"),
    [
        (r"wgmma.wait_group.sync.aligned \t1;", "wgmma.wait_group.sync.aligned 2;"),  # a result used too early
        (r"setp.le.s32", "setp.lt.s32"),  # a mask that hides a pair too many
    ],
)
def test_the_interpreter_notices_a_defect(of: str, to: str) -> None:
    variant = SMALL[0]
    ptx = ptx_of(variant)
    broken, count = re.subn(of, to, ptx)
    assert count
    assert not max(errors_of(variant, broken, AttentionRule(0.125, 150))) < BFLOAT16_TOLERANCE


def test_the_interpreter_notices_a_buffer_that_is_never_given_back() -> None:
    variant = SMALL[0]
    broken, count = re.subn(r"mbarrier.arrive.shared.b64[^;]*;", "", ptx_of(variant))
    assert count
    with pytest.raises(RuntimeError, match="deadlock"):
        errors_of(variant, broken, AttentionRule(0.125, 150))
