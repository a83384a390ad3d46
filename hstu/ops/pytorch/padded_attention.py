"""HSTU attention on sequences padded to one length: no host integers, no loop over sequences, any device.

It takes more memory than attention.py (all scores of all heads at once), but a compiler can trace it with dynamic
shapes: torch.export sees one graph for any batch. It has no backward.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from hstu.ops.kernels import AttentionConfig, RelativeBias
from hstu.ops.layout import JaggedLayout, distance_index, time_buckets
from hstu.ops.pytorch.attention import is_visible


@dataclass(kw_only=True)
class PaddedLayout(JaggedLayout):
    """A layout that also says where tokens go when sequences are padded to N. ``seqlens`` may be empty."""

    padded_tokens: Tensor
    """int64 [B, N]: the token at each padded place; T where there is none."""
    places: Tensor
    """int64 [T]: the place of each token among the B · N padded ones."""
    history_ends: Tensor
    """int64 [B]: place in its sequence of the first candidate token; the sequence's length if there is none."""


def forward(
    q: Tensor, k: Tensor, v: Tensor, layout: JaggedLayout, config: AttentionConfig, bias: RelativeBias | None
) -> Tensor:
    """See :class:`hstu.ops.kernels.AttentionForward`. ``layout``: a PaddedLayout."""
    assert isinstance(layout, PaddedLayout)
    queries, keys, values = (_pad(rows, layout.padded_tokens) for rows in (q, k, v))
    scores = queries @ keys.transpose(2, 3) * config.alpha
    end = layout.history_ends[:, None, None]
    place = torch.arange(layout.padded_tokens.shape[1], device=q.device)
    i, j = place[None, :, None], place[None, None, :]
    if bias is not None:
        scores = scores + _bias(i, j, end, layout, bias)[:, None]
    weights = F.silu(scores) * is_visible(i, j, end, layout, config)[:, None]
    out = (weights @ values).transpose(1, 2).flatten(0, 1)  # [B · N, H, d]
    return out.index_select(0, layout.places).div(config.scaling_seqlen).to(v.dtype)


def _bias(i: Tensor, j: Tensor, end: Tensor, layout: PaddedLayout, bias: RelativeBias) -> Tensor:
    """[B, N, N] what is added to the scores."""
    position_weight, time_weight = bias.position_weight, bias.time_weight
    distance = distance_index(torch.minimum(i, end), torch.minimum(j, end), len(position_weight))
    assert layout.query_times is not None and layout.token_times is not None
    query_times, token_times = (
        F.pad(times, (0, 1))[layout.padded_tokens] for times in (layout.query_times, layout.token_times)
    )
    buckets = time_buckets(query_times[:, :, None] - token_times[:, None, :])
    return position_weight[distance] + time_weight[buckets.long()]


def _pad(rows: Tensor, padded_tokens: Tensor) -> Tensor:
    """[T, H, d] → [B, H, N, d] in float32 at least, zeros where there is no token."""
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
    with_zeros = F.pad(rows, (0, 0, 0, 0, 0, 1))
    return with_zeros[padded_tokens].transpose(1, 2)
