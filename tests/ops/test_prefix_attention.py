"""Attention of new tokens to cached ones: the rows that attention of the whole sequence has, in float64."""

from dataclasses import replace

import pytest
import torch

from hstu.ops.kernels import AttentionConfig, AttentionInputs, RelativeBias
from hstu.ops.layout import NUM_TIME_BUCKETS, JaggedLayout
from hstu.ops.pytorch.attention import forward as whole_attention
from hstu.ops.pytorch.prefix_attention import CachedPrefix, prefix_attention
from tests.ops.oracle import User
from tests.ops.strategies import Batch

CONTEXT, HISTORY, CANDIDATES, PAGE = 2, 14, 5, 4
TIMES = tuple(int(3.1 ** min(i, 12)) + 60 * i for i in range(HISTORY + CANDIDATES))


def layout_of(candidates: int, group_size: int) -> JaggedLayout:
    return Batch((User(HISTORY, candidates, TIMES[: HISTORY + candidates]),), CONTEXT, 1, group_size).layout()


def part_of(layout: JaggedLayout, start: int) -> JaggedLayout:
    """The layout of the tokens from ``start`` on alone."""
    assert layout.token_times is not None and layout.query_times is not None
    return replace(
        layout,
        seqlens=layout.seqlens - start,
        positions=layout.positions[start:],
        token_times=layout.token_times[start:],
        query_times=layout.query_times[start:],
        cache={},
    )


@pytest.mark.parametrize("span", [None, 3, 40])
@pytest.mark.parametrize("full", [0, 4])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(("candidates", "group_size"), [(0, 1), (CANDIDATES, 1), (CANDIDATES, 2)])
def test_new_rows_equal_those_of_the_whole_sequence(
    span: int | None, full: int, with_bias: bool, candidates: int, group_size: int
) -> None:
    generator = torch.Generator().manual_seed(1)
    config = AttentionConfig(0.4, 30, contextual_mask=candidates > 0, max_span=span, full_tokens=full)
    layout = layout_of(candidates, group_size)
    q, k, v = torch.randn(layout.num_tokens, 3, 3, 8, generator=generator, dtype=torch.float64).unbind(1)
    weights = [torch.randn(n, generator=generator, dtype=torch.float64) for n in (2 * 30 - 1, NUM_TIME_BUCKETS)]
    bias = RelativeBias(*weights) if with_bias else None
    start = CONTEXT + HISTORY - (0 if candidates else 3)
    pages = [
        (k[first : min(first + PAGE, start)].transpose(0, 1), v[first : min(first + PAGE, start)].transpose(0, 1))
        for first in range(0, start, PAGE)
    ]
    assert layout.token_times is not None
    prefix = CachedPrefix(pages, start, CONTEXT, layout.token_times[:start], CONTEXT + HISTORY)
    new = prefix_attention(
        AttentionInputs(q[start:], k[start:], v[start:], part_of(layout, start), config, bias), prefix
    )
    torch.testing.assert_close(
        new, whole_attention(AttentionInputs(q, k, v, layout, config, bias))[start:], rtol=1e-12, atol=1e-14
    )


def test_history_without_a_causal_mask_is_refused() -> None:
    layout, x = layout_of(0, 1), torch.zeros(CONTEXT + HISTORY, 1, 8)
    prefix = CachedPrefix([], 0, CONTEXT, None, CONTEXT + HISTORY)
    with pytest.raises(ValueError, match="is_causal = False: earlier tokens see appended ones"):
        prefix_attention(AttentionInputs(x, x, x, layout, AttentionConfig(1.0, 30, is_causal=False)), prefix)
