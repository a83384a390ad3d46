"""HSTU attention against the pair-by-pair oracle in float64, forward and backward, new tokens to cached ones too."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from hstu.ops.kernels import AttentionConfig, AttentionInputs, RelativeBias
from hstu.ops.layout import NUM_TIME_BUCKETS, JaggedLayout
from hstu.ops.pytorch import attention as pytorch_attention
from hstu.ops.pytorch.attention import PaddedLayout
from hstu.ops.pytorch.attention import forward as whole_attention
from tests.ops import oracle
from tests.ops.backends import hstu_attention
from tests.ops.oracle import User
from tests.ops.strategies import Batch, batches

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-2}


def random_inputs(batch: Batch, heads: int, width: int, dtype: torch.dtype, seed: int) -> list[Tensor]:
    """q, k, v, position weights, time weights, and the gradient of the output."""
    generator = torch.Generator().manual_seed(seed)
    num_tokens = sum(len(tokens) for tokens in batch.tokens())
    shapes = [(num_tokens, heads, width)] * 3 + [(2 * 8 - 1,), (NUM_TIME_BUCKETS,), (num_tokens, heads, width)]
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def forward_and_gradients(attend: Callable[..., Tensor], inputs: list[Tensor], with_bias: bool) -> list[Tensor]:
    *leaves, grad_out = [x.detach().clone().requires_grad_() for x in inputs]
    out = attend(*leaves)
    used = leaves if with_bias else leaves[:3]
    return [out.detach(), *torch.autograd.grad(out, used, grad_out.detach(), materialize_grads=True)]


def compare(batch: Batch, inputs: list[Tensor], *, with_bias: bool, **mask: Any) -> None:
    config = dict(alpha=0.37, scaling_seqlen=7, **mask)
    layout, sequences = batch.layout(), batch.tokens()

    def ours(q: Tensor, k: Tensor, v: Tensor, position: Tensor, time: Tensor) -> Tensor:
        return hstu_attention(q, k, v, layout, **config, bias=RelativeBias(position, time) if with_bias else None)

    def reference(q: Tensor, k: Tensor, v: Tensor, position: Tensor, time: Tensor) -> Tensor:
        return oracle.attention(q, k, v, sequences, **config, bias=(position, time) if with_bias else None)

    tolerance = TOLERANCE[inputs[0].dtype]
    got = forward_and_gradients(ours, inputs, with_bias)
    expected = forward_and_gradients(reference, [x.double() for x in inputs], with_bias)
    for name, a, b in zip(["out", "q", "k", "v", "position", "time"], got, expected, strict=False):
        assert a.dtype == inputs[0].dtype
        scale = max(1.0, float(b.abs().max())) if b.numel() else 1.0
        torch.testing.assert_close(a.double(), b, rtol=0, atol=tolerance * scale, msg=name)


@settings(deadline=None, max_examples=100)
@given(
    batch=batches(),
    heads=st.integers(1, 2),
    dtype=st.sampled_from(list(TOLERANCE)),
    seed=st.integers(0, 99),
    blocks=st.sampled_from([(2**17, 64), (40, 3), (1, 1)]),
    remembered=st.sampled_from([0, 2**25]),
    with_bias=st.booleans(),
    is_causal=st.booleans(),
    contextual_mask=st.booleans(),
    max_span=st.none() | st.integers(0, 9),
    full_tokens=st.sampled_from([0, 0, 1, 2, 5, 30]),
)
def test_equals_the_oracle_forward_and_backward(
    batch: Batch, heads: int, dtype: torch.dtype, seed: int, blocks: tuple[int, int], remembered: int, **config: Any
) -> None:
    inputs = random_inputs(batch, heads, width=3, dtype=dtype, seed=seed)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(pytorch_attention, "SCORES_PER_BLOCK", {"cpu": blocks[0]})
        patched.setattr(pytorch_attention, "ROWS_PER_BLOCK", {"cpu": blocks[1]})
        patched.setattr(pytorch_attention, "MOST_PAIRS_REMEMBERED", remembered)
        compare(batch, inputs, **config)


@pytest.mark.parametrize("with_bias", [False, True])
def test_attention_of_a_projection_has_the_gradients_of_silu_and_attention(with_bias: bool) -> None:
    users = (User(4, 2, (0, 5, 5, 90, 4000, 10**6)), User(0, 0), User(7, 0, (1, 2, 4, 8, 16, 10**5, 10**9)))
    batch = Batch(users, contextuals=2, tokens_per_item=1, group_size=1)
    layout, config = batch.layout(), dict[str, Any](alpha=0.37, scaling_seqlen=7)
    *_, position, time, grad = random_inputs(batch, heads=2, width=4, dtype=torch.float64, seed=0)
    projected, shift = (torch.randn(shape, dtype=torch.float64) for shape in ((layout.num_tokens, 2, 3, 4), (2, 3, 4)))
    leaves = [x.requires_grad_() for x in (projected, shift, *((position, time) if with_bias else ()))]
    bias = RelativeBias(position, time) if with_bias else None
    (v, q, k), (of_v, of_q, of_k) = (x.unbind(2) for x in (torch.nn.functional.silu(projected + shift), projected))
    expected = hstu_attention(q, k, v, layout, **config, bias=bias)
    got = hstu_attention(of_q, of_k, of_v, layout, **config, bias=bias, shift=shift)
    torch.testing.assert_close(got, expected)
    for a, b in zip(*(torch.autograd.grad(out, leaves, grad) for out in (got, expected)), strict=True):
        torch.testing.assert_close(a, b)


def test_nothing_but_its_inputs_is_kept_for_backward() -> None:
    batch = Batch((User(60, 0), User(50, 0)), contextuals=0, tokens_per_item=1, group_size=1)
    q, k, v, *_ = random_inputs(batch, heads=2, width=4, dtype=torch.float32, seed=0)
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        hstu_attention(q.requires_grad_(), k, v, batch.layout(), alpha=1.0, scaling_seqlen=60)
    assert [x.data_ptr() for x in kept] == [v.data_ptr(), q.data_ptr(), k.data_ptr()]


def test_cost_follows_the_sum_of_squares_and_memory_is_bounded() -> None:
    lengths = [2000, *np.random.default_rng(0).integers(1, 200, 127).tolist()]
    layout = Batch(tuple(User(n, 0) for n in lengths), contextuals=0, tokens_per_item=1, group_size=1).layout()
    q = torch.zeros(layout.num_tokens, 1, 1)
    hstu_attention(q, q, q, layout, alpha=1.0, scaling_seqlen=2000)
    (groups,) = layout.cache.values()
    blocks = [len(tokens) * pairs.mask[0].numel() for tokens, _, blocks in groups for _, _, pairs in blocks]
    pairs = sum(n * n for n in lengths)
    assert 0.5 * pairs < sum(blocks) < 0.7 * pairs  # causal: little more than half of Σ n²
    assert sum(blocks) < 0.01 * len(lengths) * max(lengths) ** 2
    assert max(blocks) <= max(pytorch_attention.SCORES_PER_BLOCK["cpu"], 64 * max(lengths))


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize(
    "mask", [{}, {"is_causal": False}, {"contextual_mask": False}, {"max_span": 2, "full_tokens": 3}]
)
def test_attention_on_padded_sequences_equals_that_on_jagged_ones(mask: dict[str, Any], has_bias: bool) -> None:
    users = (User(3, 2, (1, 5, 5, 90, 4000)), User(1, 0, (7,)), User(5, 4, tuple(range(0, 900, 100))))
    batch = Batch(users, contextuals=2, tokens_per_item=2, group_size=2)
    layout = batch.layout()
    q, k, v, position, time, _ = random_inputs(batch, 2, 4, torch.float32, seed=0)
    sequence, index = np.divmod(np.arange(3 * layout.seqlens.max()), layout.seqlens.max())
    is_token = index < layout.seqlens[sequence]
    padded = np.full(len(index), layout.num_tokens)
    padded[is_token] = np.arange(layout.num_tokens)
    of_padded = PaddedLayout(
        **vars(replace(layout, cache={})),
        padded_tokens=torch.from_numpy(padded.reshape(3, -1)),
        places=torch.from_numpy(np.flatnonzero(is_token)),
        history_ends=torch.from_numpy(layout.seqlens - layout.num_candidate_tokens_host),
    )
    bias = RelativeBias(position, time) if has_bias else None
    config = AttentionConfig(alpha=0.5, scaling_seqlen=10, **mask)
    expected = pytorch_attention.forward(AttentionInputs(q, k, v, layout, config, bias))
    found = pytorch_attention.padded_forward(AttentionInputs(q, k, v, of_padded, config, bias))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


CONTEXT, HISTORY, CANDIDATES = 2, 14, 5
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
def test_tokens_after_cached_keys_and_values_equal_those_of_the_whole_sequence(
    span: int | None, full: int, with_bias: bool, candidates: int, group_size: int
) -> None:
    generator = torch.Generator().manual_seed(1)
    config = AttentionConfig(0.4, 30, contextual_mask=candidates > 0, max_span=span, full_tokens=full)
    layout = layout_of(candidates, group_size)
    q, k, v = torch.randn(layout.num_tokens, 3, 3, 8, generator=generator, dtype=torch.float64).unbind(1)
    weights = [torch.randn(n, generator=generator, dtype=torch.float64) for n in (2 * 30 - 1, NUM_TIME_BUCKETS)]
    bias = RelativeBias(*weights) if with_bias else None
    start, padding = CONTEXT + HISTORY - (0 if candidates else 3), 2
    new = torch.arange(layout.num_tokens - start)
    assert layout.token_times is not None
    of_new = PaddedLayout(
        **vars(part_of(layout, start)),
        padded_tokens=new[None],
        places=new,
        history_ends=torch.tensor([CONTEXT + HISTORY]),
        prefix_lengths=torch.tensor([start]),
        prefix_times=functional.pad(layout.token_times[:start], (padding, 0))[None],
    )
    prefix = torch.stack([k[:start], v[:start]]).transpose(1, 2)[None]  # [1, 2, H, start, d]
    found = pytorch_attention.padded_forward(
        AttentionInputs(q[start:], k[start:], v[start:], of_new, config, bias),
        functional.pad(prefix, (0, 0, padding, 0)),
    )
    expected = whole_attention(AttentionInputs(q, k, v, layout, config, bias))[start:]
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
