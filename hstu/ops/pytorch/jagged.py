"""See :mod:`hstu.ops.jagged`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from hstu.ops.jagged import TokenOrder


def jagged_concat(parts: Sequence[Tensor], order: TokenOrder) -> Tensor:
    """See :func:`hstu.ops.jagged.jagged_concat`."""
    return _Permute.apply(torch.cat(list(parts)), order.source, order.inverse)


class _Permute(torch.autograd.Function):
    """Rows in another order. The gradient of a permutation is its inverse: a gather, not a scatter-add."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, source: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(source, inverse)
        return x.index_select(0, source)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        source, inverse = ctx.saved_tensors
        return _Permute.apply(grad, inverse, source), None, None
