"""HSTU attention on sequences padded to one length: no host integers, no loop over sequences, any device.

It takes more memory than attention.py (all scores of all heads at once), but a compiler can trace it with dynamic
shapes: torch.export sees one graph for any batch. It has no backward.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from hstu.ops.kernels import AttentionConfig, AttentionInputs, RelativeBias
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


@dataclass(frozen=True)
class _Pairs:
    """What all layers read of each pair of tokens, computed once per layout."""

    visible: Tensor
    """float32 [B, N, N]: 1 where token i of a sequence sees token j, else 0."""
    distances: Tensor | None
    """int64 [B · N · N]: row of the position weight."""
    buckets: Tensor | None
    """int64 [B · N · N]: row of the time weight."""


def forward(inputs: AttentionInputs) -> Tensor:
    """See :data:`hstu.ops.kernels.AttentionForward`. Its layout is a PaddedLayout."""
    layout, config, bias = inputs.layout, inputs.config, inputs.bias
    assert isinstance(layout, PaddedLayout)
    pairs = _pairs(layout, config, 0 if bias is None else len(bias.position_weight))
    queries, keys, values = (_pad(rows, layout.padded_tokens) for rows in (inputs.q, inputs.k, inputs.v))
    scores = (queries * config.alpha) @ keys.transpose(2, 3)
    if bias is not None:
        scores += _bias(pairs, bias)[:, None]
    weights = F.silu(scores, inplace=True).mul_(pairs.visible[:, None])  # in place: scores are what takes memory
    out = (weights @ values).transpose(1, 2).flatten(0, 1)  # [B · N, H, d]
    return out.index_select(0, layout.places).div(config.scaling_seqlen).to(inputs.v.dtype)


def _pairs(layout: PaddedLayout, config: AttentionConfig, num_weights: int) -> _Pairs:
    key = ("padded attention", config, num_weights)
    if key not in layout.cache:
        layout.cache[key] = _make_pairs(layout, config, num_weights)
    pairs: _Pairs = layout.cache[key]
    return pairs


def _make_pairs(layout: PaddedLayout, config: AttentionConfig, num_weights: int) -> _Pairs:
    end = layout.history_ends[:, None, None]
    place = torch.arange(layout.padded_tokens.shape[1], device=end.device)
    i, j = place[None, :, None], place[None, None, :]
    visible = is_visible(i, j, end, layout, config).float()
    if not num_weights:
        return _Pairs(visible, None, None)
    distance = distance_index(torch.minimum(i, end), torch.minimum(j, end), num_weights)
    assert layout.query_times is not None and layout.token_times is not None
    query_times, token_times = (
        F.pad(times, (0, 1))[layout.padded_tokens] for times in (layout.query_times, layout.token_times)
    )
    buckets = time_buckets(query_times[:, :, None] - token_times[:, None, :])
    return _Pairs(visible, distance.flatten(), buckets.long().flatten())


def _bias(pairs: _Pairs, bias: RelativeBias) -> Tensor:
    """[B, N, N] what is added to the scores."""
    assert pairs.distances is not None and pairs.buckets is not None
    of_distances = bias.position_weight.index_select(0, pairs.distances)  # several times as fast as weight[index]
    return of_distances.add_(bias.time_weight.index_select(0, pairs.buckets)).view_as(pairs.visible)


def _pad(rows: Tensor, padded_tokens: Tensor) -> Tensor:
    """[T, H, d] → [B, H, N, d] in float32 at least, zeros where there is no token."""
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
    with_zeros = F.pad(rows, (0, 0, 0, 0, 0, 1))
    return with_zeros[padded_tokens].transpose(1, 2)
