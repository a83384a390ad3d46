"""Attention with a span: PyTorch against the pair-by-pair oracle, and the other backends against PyTorch in float64."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hstu.ops.kernels import AttentionConfig, AttentionInputs, Backend, KernelShapes, RelativeBias
from hstu.ops.pytorch import attention as pytorch_attention
from hstu.ops.select import resolve_kernels
from tests.ops.backends import FULL_SIZE, INTERPRETED, TYPES, WITHOUT_A_GPU, examples
from tests.ops.oracle import User
from tests.ops.strategies import Batch, batches
from tests.ops.test_attention import compare, random_inputs
from tests.ops.test_kernels import attention_inputs, compare_attention, compiler, long_batches

__all__ = ["compiler"]


@pytest.mark.skipif(INTERPRETED, reason="PyTorch's kernels are the same")
@settings(deadline=None, max_examples=40)
@given(
    batch=batches(),
    rows=st.integers(1, 4),
    with_bias=st.booleans(),
    is_causal=st.booleans(),
    contextual_mask=st.booleans(),
    max_span=st.integers(0, 9),
    full_tokens=st.sampled_from([0, 0, 1, 2, 5, 30]),
    seed=st.integers(0, 99),
)
@pytest.mark.parametrize("backend", [Backend.PYTORCH])
def test_a_window_equals_the_oracle_forward_and_backward(
    backend: Backend, batch: Batch, rows: int, seed: int, **config: Any
) -> None:
    inputs = random_inputs(batch, heads=2, width=3, dtype=torch.float64, seed=seed)
    with pytest.MonkeyPatch.context() as patched:  # blocks that are smaller than the sequences
        patched.setattr(pytorch_attention, "ROWS_PER_BLOCK", {"cpu": rows})
        compare(batch, inputs, **config)


@pytest.mark.parametrize("backend", WITHOUT_A_GPU)
@settings(deadline=None, max_examples=examples(40))
@given(
    batch=long_batches(),
    width=st.sampled_from([3, 16, 64]),
    dtype=st.sampled_from(TYPES),
    with_bias=st.booleans(),
    is_causal=st.booleans(),
    contextual_mask=st.booleans(),
    max_span=st.sampled_from([1, 2, 15, 16, 33, 64, 100]),
    full_tokens=st.sampled_from([0, 0, 1, 17, 65, 300]),
)
def test_a_window_equals_float64(
    backend: Backend, batch: Batch, width: int, dtype: torch.dtype, with_bias: bool, **mask: Any
) -> None:
    tokens = batch.layout().num_tokens
    leaves = attention_inputs(tokens, 1, width, dtype, True, backend)[: 5 if with_bias else 3]
    config = dict(alpha=width**-0.5, scaling_seqlen=100, **mask)
    compare_attention(batch, backend, leaves, torch.randn(tokens, 1, width).to(dtype), **config)


@pytest.mark.parametrize("backend", FULL_SIZE[:2])
def test_long_sequences_with_a_window_are_right(backend: Backend) -> None:
    users = User(700, 40, tuple(range(0, 7400, 10))), User(150, 0, tuple(range(150)))
    batch = Batch(users, contextuals=2, tokens_per_item=1, group_size=4)
    tokens = batch.layout().num_tokens
    leaves = attention_inputs(tokens, 2, 64, torch.bfloat16, True, backend)
    config = dict(alpha=0.125, scaling_seqlen=100, max_span=130, full_tokens=90)
    compare_attention(batch, backend, leaves, torch.randn(tokens, 2, 64), **config)


def pairs_computed(backend: Backend, length: int, is_causal: bool) -> int:
    """Scores per head that PyTorch computes, or those of which the C++ kernels keep the time bucket."""
    users = User(length, 9, tuple(range(length + 9))), User(500, 0, tuple(range(500)))
    layout = Batch(users, contextuals=3, tokens_per_item=1, group_size=1).layout()
    config = AttentionConfig(1.0, 1, is_causal, max_span=100, full_tokens=70)
    q = torch.zeros(layout.num_tokens, 1, 1)
    bias = RelativeBias(torch.zeros(3), torch.zeros(128))
    kernels = resolve_kernels(backend, KernelShapes(1, 1, 1, 1, torch.float32, True, True)).attention
    kernels.forward(AttentionInputs(q, q, q, layout, config, bias))
    (plan,) = layout.cache.values()
    if backend is Backend.CPU:
        return int(plan.bucket_offsets[-1])
    return sum(group.size * block.num_scores for group in plan.groups for block in group.blocks)


@pytest.mark.skipif(INTERPRETED, reason="for the kernels of a CPU")
@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("backend", [Backend.PYTORCH, Backend.CPU])
def test_the_pairs_of_a_window_grow_with_the_length(backend: Backend, is_causal: bool) -> None:
    short, long = (pairs_computed(backend, length, is_causal) for length in (2_000, 8_000))
    assert long < 5 * short  # 16 without a window
