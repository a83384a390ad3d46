"""What gates the output of the attention: ``Dropout(LayerNorm(O over all heads) ⊙ U)``. Dispatcher."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from hstu.ops.backends import Backend
from hstu.ops.cpu.coverage import gate_gap
from hstu.ops.triton import coverage as triton_coverage


@dataclass(frozen=True)
class SplitHeads:
    """The heads of a row lie on several ranks, equally many on each."""

    rank: int
    """Which of them this is; each drops out in a pattern of its own."""
    gather: Callable[[Tensor], Tensor]
    """A tensor of each rank [...], of one shape → [ranks, ...] on all; no gradient flows through it."""


def norm_mul_dropout(
    x: Tensor,
    u: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    eps: float,
    dropout: float,
    training: bool,
    backend: Backend = Backend.PYTORCH,
    split_heads: SplitHeads | None = None,
) -> Tensor:
    """x, u: [T, H, d]; weight, bias: [H · d]. Returns [T, H · d] of x's type; the norm is computed in float32 at least.

    With ``split_heads`` H counts this rank's heads and the norm spans those of all ranks: they exchange two numbers a
    row, forward and backward.
    Source: HSTU, arXiv 2402.17152, eq. 3.
    """
    if backend is Backend.CPU and gate_gap(x.dtype, split=split_heads is not None) is None:
        from hstu.ops.cpu.norm_mul_dropout import norm_mul_dropout as cpu

        return cpu(x, u, weight, bias, eps, dropout if training else 0.0)
    if backend.uses_triton and triton_coverage.norm_gap(len(weight), x.dtype) is None:
        from hstu.ops.triton.norm import norm_mul_dropout as triton

        return triton(x, u, weight, bias, eps, dropout, training, split_heads)
    from hstu.ops.pytorch.norm_mul_dropout import norm_mul_dropout as pytorch

    return pytorch(x, u, weight, bias, eps, dropout, training, split_heads)
