"""Dropout of Triton's norm: its statistics, that backward and recomputation repeat it; split heads."""

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from hstu.ops.comm import LayerComm
from hstu.ops.kernels import Backend, GateConfig
from tests.ops.backends import norm_mul_dropout

TOKENS, HEADS, WIDTH = 20, 2, 150


def inputs(device: torch.device) -> list[Tensor]:
    """x, u (a view), weight, bias."""
    torch.manual_seed(0)
    x, u = torch.randn(TOKENS, HEADS, 2, WIDTH).to(device).unbind(2)
    tensors = [x, u, torch.rand(HEADS * WIDTH).to(device) + 0.5, torch.rand(HEADS * WIDTH).to(device)]
    return [tensor.requires_grad_() for tensor in tensors]


def gate(*tensors: Tensor, dropout: float = 0.3, seed: int = 1, comm: LayerComm | None = None) -> Tensor:
    torch.manual_seed(seed)
    return norm_mul_dropout(tensors, GateConfig(1e-5, dropout, comm or LayerComm()), Backend.TRITON)


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
    """Both ranks in one process: what all_gather returns is computed from the whole rows."""
    x, u, weight, bias = inputs(device)
    whole = torch.autograd.grad(gate(x, u, weight, bias, dropout=0.0).sin().sum(), [x, u, weight, bias])
    slope = torch.cos(gate(x, u, weight, bias, dropout=0.0)).detach().view_as(x)
    rows = x.detach().flatten(1)
    mean = rows.mean(1, keepdim=True)
    normalised = (rows - mean) * torch.rsqrt((rows - mean).square().mean(1, keepdim=True) + 1e-5)
    scaled = ((slope * u).flatten(1) * weight).detach()

    def gather(own: Tensor) -> Tensor:
        halves = [half.flatten(1) for half in rows.view_as(x).split(1, dim=1)]
        statistics = torch.stack([torch.stack([h.mean(1), h.var(1, correction=0)]) for h in halves])
        parts = zip(scaled.chunk(2, 1), normalised.chunk(2, 1), strict=True)
        sums = torch.stack([torch.stack([s.mean(1), (s * n).mean(1)]) for s, n in parts])
        both = statistics if torch.allclose(own, statistics[0], atol=1e-4) else sums
        torch.testing.assert_close(own, both[0], rtol=1e-3, atol=1e-4)
        return both

    own = [x[:, :1], u[:, :1], weight[:WIDTH], bias[:WIDTH]]
    own = [tensor.detach().requires_grad_() for tensor in own]
    comm = LayerComm()
    comm.tp_size, comm.all_gather = 2, gather  # type: ignore[method-assign]
    out = gate(*own, dropout=0.0, comm=comm)
    grads = torch.autograd.grad(out, own, slope[:, 0])
    for ours, exact in zip(grads, whole, strict=True):
        exact = exact[:, :1] if exact.dim() == 3 else exact[:WIDTH]
        torch.testing.assert_close(ours, exact, rtol=1e-3, atol=1e-3)
