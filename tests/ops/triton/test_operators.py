"""Triton's projection and rows against float64, its dropout and its split heads."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from hstu.ops.functional import project_uvqk
from hstu.ops.kernels import Backend, GateConfig, RelativeBias
from hstu.ops.layout import NUM_TIME_BUCKETS, TokenOrder
from tests.ops.backends import TOLERANCE, device_of, hstu_attention, kernels_of, norm_mul_dropout
from tests.ops.oracle import User
from tests.ops.strategies import Batch
from tests.ops.test_kernels import assert_near, differentiate, to
from tests.ops.test_norm_mul_dropout import over_two_ranks


def compare(
    function: Callable[..., Tensor], leaves: list[Tensor], grad_out: Tensor, dtype: torch.dtype = torch.float32
) -> None:
    """``function(backend, *leaves)`` by Triton and by PyTorch in float64: result and gradients."""
    leaves, grad_out = to(leaves, "cpu", dtype), grad_out.to(dtype)
    device = device_of(Backend.TRITON)
    got = differentiate(partial(function, Backend.TRITON), to(leaves, device), grad_out.to(device))
    exact = differentiate(partial(function, Backend.PYTORCH), to(leaves, "cpu", torch.float64), grad_out.double())
    assert_near(got, exact, 1.5 * TOLERANCE[Backend.TRITON][dtype])


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "hidden", "heads", "width"), [(0, 8, 1, 4), (1, 33, 1, 5), (150, 64, 2, 16)])
def test_the_projection_equals_float64(dtype: torch.dtype, tokens: int, hidden: int, heads: int, width: int) -> None:
    torch.manual_seed(tokens)

    def run(backend: Backend, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        kernels = kernels_of(backend).project_uvqk
        projected, activated = kernels.forward(x, weight, bias)
        assert torch.equal(kernels.activate(projected), activated)
        return project_uvqk(x, weight, bias, kernels)

    leaves = [torch.randn(tokens, hidden), torch.randn(4 * heads * width, hidden) / hidden**0.5]
    compare(run, [*leaves, torch.randn(4 * heads * width)], torch.randn(tokens, 4 * heads * width), dtype)


@pytest.mark.parametrize("rows", [(0, 0), (1, 0, 70), (5, 127, 130)])
def test_jagged_concat_moves_rows_and_their_gradients_exactly(device: torch.device, rows: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    source = torch.randperm(sum(rows))
    order = TokenOrder(source.to(device), source.argsort().to(device))
    parts = [torch.randn(20, n).to(device).t().requires_grad_() for n in rows]  # columns lie apart
    results = []
    for backend in (Backend.TRITON, Backend.PYTORCH):
        tokens = kernels_of(backend).jagged_concat(parts, order)
        results.append([tokens, *torch.autograd.grad(tokens.sin().sum(), parts)])
    assert all(torch.equal(ours, right) for ours, right in zip(*results, strict=True))


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("tokens", [0, 1, 129])
def test_positions_equal_float64_and_far_ones_share_the_last(tokens: int) -> None:
    torch.manual_seed(0)
    positions = torch.randint(40, (tokens,))
    compare(
        lambda backend, x, table: kernels_of(backend).add_positions(x, table, positions.to(x.device)),
        [torch.randn(tokens, 70), torch.randn(30, 70)],
        torch.randn(tokens, 70),
    )


def test_a_gradient_that_is_not_finite_stays_so_in_the_gradients_of_the_bias(device: torch.device) -> None:
    layout = Batch((User(5, 0, (1, 2, 3, 4, 5)),), 0, 1, 1).layout(device=device)
    q, k, v = (torch.ones(5, 1, 16, device=device) for _ in range(3))
    tables = [torch.zeros(n, device=device, requires_grad=True) for n in (9, NUM_TIME_BUCKETS)]
    out = hstu_attention(
        q, k, v, layout, alpha=1.0, scaling_seqlen=5, bias=RelativeBias(*tables), backend=Backend.TRITON
    )
    for bad in (float("nan"), float("inf")):
        grads = torch.autograd.grad(out, tables, torch.full_like(out, bad), retain_graph=True)
        assert not any(grad.isfinite().any() for grad in grads)


TOKENS, HEADS, WIDTH = 20, 2, 150


def inputs(device: torch.device) -> list[Tensor]:
    """x, u (a view), weight, bias."""
    torch.manual_seed(0)
    x, u = torch.randn(TOKENS, HEADS, 2, WIDTH).to(device).unbind(2)
    tensors = [x, u, torch.rand(HEADS * WIDTH).to(device) + 0.5, torch.rand(HEADS * WIDTH).to(device)]
    return [tensor.requires_grad_() for tensor in tensors]


def gate(*tensors: Tensor, dropout: float = 0.3, seed: int = 1) -> Tensor:
    torch.manual_seed(seed)
    return norm_mul_dropout(tensors, GateConfig(1e-5, dropout), Backend.TRITON)


@pytest.mark.parametrize("dropout", [0.1, 0.5])
def test_dropout_keeps_the_share_and_the_mean_and_scales_what_stays(device: torch.device, dropout: float) -> None:
    tensors = inputs(device)
    out, whole = gate(*tensors, dropout=dropout), gate(*tensors, dropout=0.0)
    kept = out != 0
    count = kept.numel()
    deviation = (dropout * (1 - dropout) / count) ** 0.5
    assert abs(float(kept.float().mean()) - (1 - dropout)) < 4 * deviation
    by_column = kept.float().mean(0)
    assert float((by_column - (1 - dropout)).abs().max()) < 5 * (dropout * (1 - dropout) / TOKENS) ** 0.5
    neighbours = (kept[:, 1:] & kept[:, :-1]).float().mean()
    assert abs(float(neighbours) - (1 - dropout) ** 2) < 0.02, "neighbours are independent"
    torch.testing.assert_close(out[kept], whole[kept] / (1 - dropout))


def test_another_seed_drops_others_and_the_same_seed_the_same(device: torch.device) -> None:
    tensors = inputs(device)
    assert torch.equal(gate(*tensors, seed=1), gate(*tensors, seed=1))
    assert not torch.equal(gate(*tensors, seed=1) == 0, gate(*tensors, seed=2) == 0)


def test_backward_drops_what_forward_dropped(device: torch.device) -> None:
    x, u, weight, bias = inputs(device)
    out = gate(x, u, weight, bias)
    grad_u, grad_bias = torch.autograd.grad(out.sum(), [u, bias])
    normalised = gate(x, torch.ones_like(u), weight, bias, dropout=0.0).view_as(u)
    stays = (out != 0).view_as(u) / 0.7
    torch.testing.assert_close(grad_u, stays * normalised, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(grad_bias, (stays * u).sum(0).flatten(), rtol=1e-3, atol=1e-3)


def test_checkpointing_repeats_the_dropout_bit_for_bit(device: torch.device) -> None:
    tensors = inputs(device)
    plain = torch.autograd.grad(gate(*tensors).sin().sum(), tensors)
    again = torch.autograd.grad(checkpoint(gate, *tensors, use_reentrant=False).sin().sum(), tensors)
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


def test_heads_on_two_ranks_give_the_norm_over_all_of_them(device: torch.device) -> None:
    tensors, slope = inputs(device), torch.randn(TOKENS, HEADS * WIDTH, generator=torch.Generator().manual_seed(0))
    out = norm_mul_dropout(tensors, GateConfig(0.1, 0.0), Backend.TRITON)
    whole = [out, *torch.autograd.grad(out, tensors, slope.to(device))]
    for ours, exact in zip(over_two_ranks(tensors, slope.to(device), Backend.TRITON), whole, strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-3, atol=1e-3)
