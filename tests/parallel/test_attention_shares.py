"""Ranges of queries with only the keys that they see compute what whole sequences do, for batches drawn at random."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hstu.ops.functional import hstu_attention
from hstu.ops.kernels import AttentionConfig, AttentionInputs, AttentionKernels, Backend, RelativeBias
from hstu.ops.layout import JaggedLayout, pad_tokens
from hstu.ops.pytorch.operators import REFERENCE_KERNELS
from hstu.parallel.attention_shares import share_attention, within
from tests.ops.backends import BACKENDS, INTERPRETED, kernels_of
from tests.ops.oracle import User
from tests.ops.strategies import Batch, batches

HEADS, WIDTH, LONGEST = 2, 3, 40
KERNELS = REFERENCE_KERNELS.attention


def split(layout: JaggedLayout, ranks: int) -> JaggedLayout:
    """The layout with as many tokens as the ranks can share, as ProcessGroupComm.split_tokens pads it."""
    return pad_tokens(layout, ranks * -(-max(layout.num_tokens, 1) // ranks) - layout.num_tokens)


def random_inputs(
    layout: JaggedLayout, config: AttentionConfig, has_bias: bool, dtype: torch.dtype = torch.float64
) -> AttentionInputs:
    torch.manual_seed(0)
    q, k, v = torch.randn(3, layout.num_tokens, HEADS, WIDTH, dtype=torch.float64).to(dtype)
    tables = [torch.randn(size, dtype=torch.float64).to(dtype) for size in (2 * LONGEST - 1, 128)]
    return AttentionInputs(q, k, v, layout, config, RelativeBias(*tables) if has_bias else None)


def results(inputs: AttentionInputs, slope: Tensor, kernels: AttentionKernels = KERNELS) -> list[Tensor]:
    """The output and the gradients of q, k, v and the bias."""
    leaves = [inputs.q, inputs.k, inputs.v, *(inputs.bias or ())]
    leaves = [each.clone().requires_grad_() for each in leaves]
    q, k, v, *tables = leaves
    out = hstu_attention(replace(inputs, q=q, k=k, v=v, bias=RelativeBias(*tables) if tables else None), kernels)
    return [out.detach(), *torch.autograd.grad(out, leaves, slope)]


def together(inputs: AttentionInputs, slope: Tensor, ranks: int) -> list[Tensor]:
    """:func:`results`, put together from those of ``ranks`` ranks, each of which has all heads."""
    total = [torch.zeros_like(each) for each in (slope, inputs.q, inputs.k, inputs.v)]
    tables = [] if inputs.bias is None else [torch.zeros_like(each) for each in inputs.bias]
    for rank in range(ranks):
        # An odd number of heads has no common divisor with 2 and 4 ranks, and 5 none with 3: a group is one rank.
        share = share_attention(inputs.layout, inputs.config, 5, inputs.bias is not None, ranks, rank, True)
        assert share is not None and share.queries is not None
        asking, keys = (
            torch.tensor([t for each in tokens[rank] for t in each], dtype=torch.int64)
            for tokens in (share.queries_of, share.keys_of)
        )
        assert share.layout.num_tokens == len(keys)
        assert torch.equal(keys[share.queries.start : share.queries.stop], asking)
        part = AttentionInputs(
            inputs.q[asking], inputs.k[keys], inputs.v[keys], share.layout, share.config, inputs.bias, share.queries
        )
        out, grad_q, grad_k, grad_v, *others = results(part, slope[asking])
        for whole, index, rows in zip(total, (asking, asking, keys, keys), (out, grad_q, grad_k, grad_v), strict=True):
            whole.index_add_(0, index, rows)
        for whole, own in zip(tables, others, strict=True):
            whole += own
    return [*total, *tables]


@settings(max_examples=150, derandomize=True, database=None, deadline=None)
@given(
    batch=batches(),
    ranks=st.integers(2, 4),
    is_causal=st.booleans(),
    contextual_mask=st.booleans(),
    has_bias=st.booleans(),
    max_span=st.none() | st.integers(1, 6),
    full_tokens=st.integers(0, 4),
)
def test_shares_add_up_to_the_attention_of_whole_sequences(
    batch: Batch, ranks: int, has_bias: bool, **options: Any
) -> None:
    config = AttentionConfig(0.6, LONGEST, **options)
    inputs = random_inputs(split(batch.layout(), ranks), config, has_bias)
    slope = torch.randn_like(inputs.q)
    for ours, exact in zip(together(inputs, slope, ranks), results(inputs, slope), strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-10, atol=1e-10)


def one_history(tokens: int) -> JaggedLayout:
    return Batch((User(tokens, 0),), contextuals=0, tokens_per_item=1, group_size=1).layout()


def test_ranges_of_a_long_history_have_equal_work() -> None:
    layout = one_history(4096)
    shares = [share_attention(layout, AttentionConfig(1, 1), 1, False, 4, rank, True) for rank in range(4)]
    asking = [share.queries_of[rank][0] for rank, share in enumerate(shares) if share]
    pairs = [sum(token + 1 for token in each) for each in asking]
    assert max(pairs) < 1.01 * np.mean(pairs)
    assert [share.layout.num_tokens for share in shares if share] == [each.stop for each in asking]


@pytest.mark.parametrize(
    ("span", "bias", "groups", "keys"),
    [(None, False, 1, 4096), (16, False, 4, 16), (16, True, 4, 16), (4096, False, 1, 4096)],
)
def test_a_window_fetches_only_the_tokens_before_its_range(
    span: int | None, bias: bool, groups: int, keys: int
) -> None:
    layout = one_history(4096)
    share = share_attention(layout, AttentionConfig(1, 1, max_span=span), 4, bias, 4, 1, True)
    assert (share is None) == (groups == 1)
    if share is not None:
        assert len(share.queries_of) == groups
        assert share.queries is not None and share.queries.start == keys


def test_short_sequences_exchange_only_those_that_two_ranks_share() -> None:
    layout = Batch((User(30, 2),) * 64, contextuals=0, tokens_per_item=1, group_size=1).layout()
    share = share_attention(layout, AttentionConfig(1, 1), 4, False, 4, 2, True)
    assert share is not None
    held = range(2 * 512, 3 * 512)
    assert len(share.queries_of) == 4
    assert sum(len(each) - len(within(each, held)) for each in share.keys_of[2]) <= 64


def test_kernels_without_ranges_get_whole_sequences_if_the_heads_allow() -> None:
    layout = one_history(64)
    assert share_attention(layout, AttentionConfig(1, 1, max_span=2), 4, False, 4, 1, False) is None


MASKS: list[dict[str, Any]] = [
    *({}, {"is_causal": False}, {"max_span": 20}, {"max_span": 9, "full_tokens": 12, "is_causal": False})
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16][: 1 if INTERPRETED else 2])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("mask", MASKS[:: 3 if INTERPRETED else 1], ids=str)
def test_kernels_compute_ranges_of_queries_alone(
    mask: dict[str, Any], has_bias: bool, backend: Backend, dtype: torch.dtype
) -> None:
    if INTERPRETED and has_bias != bool(mask):
        pytest.skip("takes long to interpret")
    kernels = kernels_of(backend, WIDTH, has_bias=has_bias).attention
    users = (User(40, 5, tuple(range(0, 4500, 100))), User(0, 0), User(3, 1, (1, 5, 90, 4000)), User(30, 0))
    layout = Batch(users, contextuals=2, tokens_per_item=1, group_size=2).layout()
    inputs = random_inputs(layout, AttentionConfig(0.6, LONGEST, **mask), has_bias, dtype)
    tokens, slope = layout.num_tokens, torch.randn_like(inputs.q)
    bias = None if inputs.bias is None else RelativeBias(*(each.double() for each in inputs.bias))
    exact = replace(inputs, q=inputs.q.double(), k=inputs.k.double(), v=inputs.v.double(), bias=bias)
    for start, stop in [(0, 33), (33, 34), (34, 60), (60, tokens), (tokens, tokens)][:: 2 if INTERPRETED else 1]:
        rows, queries = slice(start, stop), range(start, stop)
        found = results(replace(inputs, q=inputs.q[rows], queries=queries), slope[rows], kernels)
        expected = results(replace(exact, q=exact.q[rows], queries=queries), slope[rows].double())
        for ours, theirs in zip(found, expected, strict=True):
            size = float(theirs.abs().max()) if theirs.numel() else 1.0
            tolerance = 2e-5 if dtype == torch.float32 else 3e-2
            torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=tolerance * max(size, 1e-3))
