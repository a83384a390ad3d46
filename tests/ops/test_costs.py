from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hstu.ops import costs
from hstu.ops.costs import Window, hidden_pairs, sequence_flops
from tests.ops import oracle
from tests.ops.oracle import User

TINY: dict[str, Any] = dict(num_layers=2, hidden_size=8, num_heads=2, head_dim=4)  # Hd = 8


def test_one_causal_sequence_counted_by_hand() -> None:
    # T = 10 tokens, 4 of them candidates'; per layer:
    uvqk = 3 * 2 * 10 * 8 * (4 * 8)  # [10, 8] x [8, 32], three passes: 15360
    output = 3 * 2 * 10 * 8 * 8  # 3840
    attention = 3.5 * (4 * 2 * 10 * 10 * 4 - 2 * 2 * 6 * 6 * 4)  # 3.5 * (3200 - 576) = 9184
    assert (uvqk, output, attention) == (15360, 3840, 9184)
    assert sequence_flops(np.array([10]), np.array([4]), **TINY).sum() == 2 * (15360 + 3840 + 9184)
    # Without a causal mask nothing is taken off the attention.
    bidirectional = sequence_flops(np.array([10]), np.array([4]), **TINY, is_causal=False).sum()
    assert bidirectional == 2 * (15360 + 3840 + 3.5 * 3200)


def test_the_published_fixed_length_step_gives_the_published_rate() -> None:
    # L8 D1024 H4x256, 32 sequences of 4099 tokens: 187 ms a step are 341.6 TFLOPS.
    flops = sequence_flops(
        np.full(32, 4099), np.zeros(32, int), num_layers=8, hidden_size=1024, num_heads=4, head_dim=256
    ).sum()
    assert flops / 0.187 / 1e12 == pytest.approx(341.6, rel=0.005)


@given(st.lists(st.tuples(st.integers(0, 9000), st.integers(0, 50)), max_size=8))
def test_a_batch_costs_what_its_sequences_cost_and_empty_ones_cost_nothing(lengths: list[tuple[int, int]]) -> None:
    tokens = np.array([history + candidates for history, candidates in lengths], dtype=np.int32)
    candidates = np.array([candidates for _, candidates in lengths], dtype=np.int32)
    one_by_one = sum(
        sequence_flops(tokens[i : i + 1], candidates[i : i + 1], **TINY).sum() for i in range(len(lengths))
    )
    padded = sequence_flops(np.append(tokens, 0), np.append(candidates, 0), **TINY).sum()
    assert padded == pytest.approx(one_by_one)


@given(
    st.integers(0, 40), st.integers(0, 5), st.integers(0, 3), st.integers(1, 45), st.sampled_from([0, 0, 1, 20, 60]),
    st.booleans(),
)  # fmt: skip
@settings(max_examples=20, deadline=None)
def test_the_pairs_that_a_window_hides(
    items: int, candidates: int, contextuals: int, span: int, full: int, is_causal: bool
) -> None:
    tokens = oracle.tokens_of(User(items, candidates), contextuals=contextuals, tokens_per_item=1, group_size=1)
    mask: dict[str, Any] = dict(is_causal=is_causal, contextual_mask=True)
    hidden = oracle.mask_of(tokens, **mask) & ~oracle.mask_of(tokens, **mask, max_span=span, full_tokens=full)
    window = Window(span, full, contextuals)
    counted = hidden_pairs(np.array([contextuals + items]), np.array([candidates]), is_causal, window).item()
    assert abs(counted - int(hidden.sum())) <= items + candidates  # half of the diagonals


def test_with_a_window_the_cost_grows_with_the_length() -> None:
    tokens, none = np.array([10_000, 20_000, 30_000]), np.zeros(3, int)
    one, two, three = sequence_flops(tokens, none, **TINY, windows=[Window(256, 128, 3)] * 2)
    assert three - two == pytest.approx(two - one)
    flops = [costs.attention_flops(tokens, none, 2, 4, window=Window(span, 0, 0)).sum() for span in (None, 256)]
    whole, windowed = (sum(cost.flops for cost in costs.attention(forward, 1, 1, 2)) for forward in flops)
    both = sequence_flops(tokens, none, **TINY, windows=[Window(None, 0, 0), Window(256, 0, 0)]).sum()
    assert sequence_flops(tokens, none, **TINY).sum() - both == pytest.approx(whole - windowed)


@pytest.mark.parametrize("is_causal", [True, False])
def test_the_operators_of_a_layer_add_up_to_the_reported_count(is_causal: bool) -> None:
    tokens, candidates = np.array([10, 3]), np.array([4, 0])
    products = 3 * 2 * 13 * (8 * 4 * 8 + 8 * 8)  # a forward and two products backward of both projections
    forward = costs.attention_flops(tokens, candidates, 2, 4, is_causal).sum()
    layer = products + sum(cost.flops for cost in costs.attention(forward, 13, 8, 2))
    assert 2 * layer == sequence_flops(tokens, candidates, **TINY, is_causal=is_causal).sum()
