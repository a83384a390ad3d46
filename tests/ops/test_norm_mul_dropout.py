"""The gate behind the attention against its formula; dropout against its definition."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hstu.ops.comm import LayerComm
from hstu.ops.dropout import draw, dropout
from hstu.ops.kernels import Backend, GateConfig
from tests.ops import oracle
from tests.ops.backends import norm_mul_dropout
from tests.ops.rank_threads import RankThread, on_ranks


def inputs(tokens: int, heads: int, width: int, dtype: torch.dtype) -> list[Tensor]:
    torch.manual_seed(tokens)
    shapes = [(tokens, heads, width)] * 2 + [(heads * width,)] * 2
    return [torch.randn(shape, dtype=torch.float64).to(dtype) for shape in shapes]


@settings(deadline=None, max_examples=30)
@given(
    tokens=st.integers(0, 7),
    heads=st.integers(1, 3),
    width=st.integers(1, 5),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
)
def test_equals_the_formula_forward_and_backward(tokens: int, heads: int, width: int, dtype: torch.dtype) -> None:
    ours = [x.requires_grad_() for x in inputs(tokens, heads, width, dtype)]
    exact = [x.detach().double().requires_grad_() for x in ours]
    out = norm_mul_dropout(ours, GateConfig(0.1, 0.0))
    expected = oracle.norm_mul(exact, eps=0.1)
    assert out.dtype == dtype and out.shape == (tokens, heads * width)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.05}[dtype]
    torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)
    weight = torch.randn_like(expected)
    got = torch.autograd.grad((out.double() * weight).sum(), ours, materialize_grads=True)
    wanted = torch.autograd.grad((expected * weight).sum(), exact, allow_unused=True, materialize_grads=True)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=2 * tolerance, atol=4 * tolerance)


def test_the_gate_of_a_projection_has_the_gradients_of_silu_and_gate() -> None:
    leaves = [t.requires_grad_() for t in (*inputs(5, 2, 3, torch.float64), torch.randn(2, 3, dtype=torch.float64))]
    (x, projected, weight, bias, shift), config = leaves, GateConfig(0.1, 0.0)
    expected = norm_mul_dropout([x, torch.nn.functional.silu(projected + shift), weight, bias], config)
    got, grad = norm_mul_dropout(leaves[:4], config, shift=shift), torch.randn(5, 6, dtype=torch.float64)
    torch.testing.assert_close(got, expected)
    for a, b in zip(*(torch.autograd.grad(out, leaves, grad) for out in (got, expected)), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("p", [0.1, 0.2, 0.5, 0.9])
def test_dropout_drops_its_share_and_keeps_the_mean(p: float) -> None:
    torch.manual_seed(0)
    x = torch.ones(1000, 333, requires_grad=True)
    y = dropout(x, p, training=True)
    kept = y != 0
    assert float(kept.float().mean()) == pytest.approx(1 - p, abs=0.003)
    assert y.mean().item() == pytest.approx(1, abs=0.02)
    torch.testing.assert_close(y[kept], torch.full_like(y[kept], 1 / (1 - p)), rtol=1e-4, atol=0)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(gradient, y)  # x is 1: the gradient is the scaled mask
    for shift in (1, 2, 3, 4):  # neighbours share a 64-bit draw and must still be independent
        flat = kept.flatten().float()
        both = float((flat[shift:] * flat[:-shift]).mean())
        assert both == pytest.approx((1 - p) ** 2, abs=0.005)


def test_dropout_follows_the_seed_and_is_off_in_evaluation() -> None:
    x = torch.randn(7, 5)

    def draw(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return dropout(x, 0.5, training=True)

    assert torch.equal(draw(1), draw(1)) and not torch.equal(draw(1), draw(2))
    assert dropout(x, 0.5, training=False) is x and dropout(x, 0.0, training=True) is x
    assert dropout(torch.zeros(0, 5), 0.5, training=True).shape == (0, 5)
    assert dropout(x.bfloat16(), 0.5, training=True).dtype == torch.bfloat16


def over_two_ranks(whole: list[Tensor], weight: Tensor, backend: Backend = Backend.PYTORCH) -> list[Tensor]:
    """Output and gradients of the gate with its heads on two ranks, put together again."""
    count = 2

    def one(comm: RankThread) -> list[Tensor]:
        parts = zip(whole, (1, 1, 0, 0), strict=True)
        own = [x.detach().chunk(count, dim)[comm.rank].clone().requires_grad_() for x, dim in parts]
        out = norm_mul_dropout(own, GateConfig(0.1, 0.0, comm), backend)
        (out * weight.chunk(count, 1)[comm.rank]).sum().backward()
        return [out.detach(), *(x.grad for x in own if x.grad is not None)]

    return [
        torch.cat(parts, dim)
        for parts, dim in zip(zip(*on_ranks(one, count), strict=True), (1, 1, 1, 0, 0), strict=True)
    ]


def test_split_heads_keep_their_precision_where_the_mean_is_large() -> None:
    x, u, scale, bias = inputs(5, 4, 3, torch.float32)
    whole = [x + 3000.0, u, scale, bias]
    exact = norm_mul_dropout([part.double() for part in whole], GateConfig(0.1, 0.0))
    out, *_ = over_two_ranks(whole, torch.ones(5, 12))
    torch.testing.assert_close(out.double(), exact, rtol=2e-3, atol=2e-3)


class OfFour(LayerComm):
    """One of four ranks, as far as dropout is concerned."""

    tp_size = cp_size = 2

    def __init__(self, rank: int) -> None:
        self.rank, self.cp_rank = rank, rank // 2


def test_ranks_drop_other_elements_and_leave_the_generators_in_step() -> None:
    kept, of_inputs, after = [], [], []
    for rank in range(4):
        torch.manual_seed(3)
        kept.append(draw(torch.Size([1000 - rank]), 0.25, torch.device("cpu"), OfFour(rank).dropout_stream)[:990])
        after.append(torch.rand(3))
        torch.manual_seed(3)
        of_inputs.append(draw(torch.Size([1000 - rank]), 0.25, torch.device("cpu"), OfFour(rank).input_stream)[:990])
    assert not any(torch.equal(kept[0], other) for other in kept[1:])
    assert all(abs(float(part.float().mean()) - 0.75) < 0.05 for part in kept)
    assert all(torch.equal(after[0], other) for other in after)
    # Ranks have other inputs only where they have other tokens.
    same = [torch.equal(of_inputs[0], other) for other in of_inputs]
    assert same == [True, True, False, False] and torch.equal(of_inputs[2], of_inputs[3])
    torch.manual_seed(3)
    first, second = (draw(torch.Size([1000]), 0.25, torch.device("cpu"), OfFour(0).dropout_stream) for _ in range(2))
    assert not torch.equal(first, second), "each call draws another mask"
