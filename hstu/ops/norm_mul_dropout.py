"""What gates the output of the attention: ``Dropout(LayerNorm(O over all heads) ⊙ U)``. Dispatcher."""

from __future__ import annotations

from torch import Tensor

from hstu.ops.backends import Backend


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
) -> Tensor:
    """x, u: [T, H, d]; weight, bias: [H · d]. Returns [T, H · d] of x's type; the norm is computed in float32 at least.

    Source: HSTU, arXiv 2402.17152, eq. 3.
    """
    if backend is Backend.PYTORCH:
        from hstu.ops.pytorch.norm_mul_dropout import norm_mul_dropout as pytorch

        return pytorch(x, u, weight, bias, eps, dropout, training)
    raise NotImplementedError(f"norm_mul_dropout has no {backend.value} kernel")
