"""Token sequences from the rows of their features: jagged concatenation and interleaving. Dispatcher."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from hstu.ops.backends import Backend
from hstu.ops.layout import JaggedLayout, offsets_of, places, to_device
from hstu.ops.triton import coverage as triton_coverage


@dataclass(frozen=True)
class TokenOrder:
    """A permutation: token t is row ``source[t]`` of the concatenated parts. Both int64 [T]."""

    source: Tensor
    inverse: Tensor


def token_order(layout: JaggedLayout) -> TokenOrder:
    """The order that makes ``layout`` out of the rows [context_1 … context_C, items, actions (if tokens)].

    Each contextual part has one row a real sequence, the other parts have one row an item, all in batch order.
    """
    sequence, place = places(layout.seqlens)
    num_contextuals, stride = layout.num_contextuals, layout.tokens_per_item
    num_items = layout.num_items
    num_real = int(np.count_nonzero(layout.seqlens)) if num_contextuals else 0
    item, part = np.divmod(np.maximum(place - num_contextuals, 0), stride)
    item_row = num_contextuals * num_real + part * num_items.sum() + offsets_of(num_items)[sequence] + item
    source = np.where(place < num_contextuals, place * num_real + sequence, item_row)
    inverse = np.empty_like(source)
    inverse[source] = np.arange(len(source))
    device = layout.positions.device
    return TokenOrder(to_device(source, device), to_device(inverse, device))


def jagged_concat(parts: Sequence[Tensor], order: TokenOrder, backend: Backend = Backend.PYTORCH) -> Tensor:
    """Rows of ``parts`` (each [·, D], T rows together) as tokens [T, D] in ``order``."""
    if backend.uses_triton and triton_coverage.type_gap(parts[0].dtype) is None:
        from hstu.ops.triton.jagged import jagged_concat as triton

        return triton(parts, order)
    from hstu.ops.pytorch.jagged import jagged_concat as pytorch

    return pytorch(parts, order)
