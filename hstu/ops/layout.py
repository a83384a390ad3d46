"""Where each token of a jagged batch sits: lengths, offsets, positions, candidates, times.

Tokens of B sequences lie one after another, without padding, in tensors of T rows. Sequence s is

    [context_1 … context_C] [item_1 (action_1) … item_n (action_n)] [candidate_1 (action) … candidate_m (action)]

The host (numpy) copies of the integers exist so that no operator ever has to ask the device for a size.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass
class JaggedLayout:
    """One jagged batch of token sequences; see the module's picture. Make one with :func:`build_layout`."""

    seqlen_offsets: Tensor
    """int64 [B + 1]: sequence s holds the tokens ``seqlen_offsets[s]:seqlen_offsets[s + 1]``."""
    seqlens: np.ndarray
    """int64 [B], host: tokens of each sequence, context and candidates included."""
    num_contextuals: int
    """C: the first C tokens of every sequence that is not empty."""
    num_candidate_tokens: Tensor | None
    """int64 [B]: the last so many tokens of a sequence are candidates. None: no sequence has any."""
    num_candidate_tokens_host: np.ndarray
    """int64 [B], host: the same, zeros where there are none."""
    candidate_group_tokens: int
    """Tokens of one target group: target_group_size × tokens_per_item."""
    tokens_per_item: int
    """2 where an action token follows each item token, else 1."""
    positions: Tensor
    """int64 [T]: place in the sequence from 0; all candidate tokens share that of the first."""
    token_times: Tensor | None = None
    """int64 [T], seconds: when a token happened (context: the first event; 0 where there is none)."""
    query_times: Tensor | None = None
    """int64 [T], seconds: time of the next token of context + history; its own for the last and for candidates."""
    cache: dict[Hashable, Any] = field(default_factory=dict, repr=False, compare=False)
    """What operators derive from the layout once and use again in each layer and in backward."""

    @property
    def batch_size(self) -> int:
        """Sequences B, empty ones included."""
        return len(self.seqlens)

    @property
    def num_tokens(self) -> int:
        """Tokens T of the whole batch."""
        return int(self.seqlens.sum())

    @property
    def num_items(self) -> np.ndarray:
        """int64 [B], host: items of each sequence, candidates included."""
        return np.maximum(self.seqlens - self.num_contextuals, 0) // self.tokens_per_item

    def newest_item_tokens(self, count: Tensor, total: int) -> Tensor:
        """Token index of the newest ``count[s]`` items of each sequence s, oldest first: int64 [total].

        count: int64 [B] on the device; ``total`` is its sum, which the device is not asked for. The token before an
        item's is the newest one of the step before: the previous item's action, or that item.
        """
        sequence = torch.repeat_interleave(count, output_size=total)
        place = torch.arange(total, device=count.device) - (count.cumsum(0) - count)[sequence]
        return self.seqlen_offsets[1:][sequence] - (count[sequence] - place) * self.tokens_per_item

    def newest_tokens(self) -> Tensor:
        """Index of each sequence's last token: int64 [B]; for an empty sequence that of another one, or -1."""
        return self.seqlen_offsets[1:] - 1


def build_layout(
    *,
    item_lengths: np.ndarray,
    num_sequences: int,
    num_contextuals: int,
    num_candidates: np.ndarray | None,
    tokens_per_item: int,
    target_group_size: int,
    device: torch.device,
    item_times: Tensor | None = None,
) -> JaggedLayout:
    """Lay out a batch on ``device``.

    item_lengths: int64 [B] host, items of each sequence, candidates included. The first ``num_sequences`` sequences
    are real and carry context; the others are padding and empty. num_candidates: int64 [B] host, or None.
    item_times: int64 [Σ item_lengths] seconds on ``device``, or None.
    """
    is_real = np.arange(len(item_lengths)) < num_sequences
    seqlens = (num_contextuals * is_real + item_lengths * tokens_per_item).astype(np.int64)
    candidates = np.zeros_like(seqlens) if num_candidates is None else (num_candidates * tokens_per_item)
    candidates = candidates.astype(np.int64)
    sequence, place = places(seqlens)
    history_end = (seqlens - candidates)[sequence]

    def on_device(array: np.ndarray) -> Tensor:
        return to_device(array, device)

    token_times = query_times = None
    if item_times is not None:
        item = np.maximum(place - num_contextuals, 0) // tokens_per_item + offsets_of(item_lengths)[sequence]
        item = np.where((item_lengths > 0)[sequence], item, item_lengths.sum())  # context of a user with no event
        next_token = np.arange(len(place)) + (place + 1 < history_end)
        token_times = torch.cat([item_times, item_times.new_zeros(1)])[on_device(item)]
        query_times = token_times[on_device(next_token)]
    return JaggedLayout(
        seqlen_offsets=on_device(np.append(offsets_of(seqlens), seqlens.sum())),
        seqlens=seqlens,
        num_contextuals=num_contextuals,
        num_candidate_tokens=on_device(candidates) if candidates.any() else None,
        num_candidate_tokens_host=candidates,
        candidate_group_tokens=target_group_size * tokens_per_item,
        tokens_per_item=tokens_per_item,
        positions=on_device(np.minimum(place, history_end)),
        token_times=token_times,
        query_times=query_times,
    )


def pad_tokens(layout: JaggedLayout, padding: int) -> JaggedLayout:
    """The layout with ``padding`` further tokens, which form a sequence of their own at the end."""
    if padding == 0:
        return layout

    def longer(tensor: Tensor | None, count: int) -> Tensor | None:
        return None if tensor is None else torch.cat([tensor, tensor.new_zeros(count)])

    positions = longer(layout.positions, padding)
    assert positions is not None
    return dataclasses.replace(
        layout,
        seqlen_offsets=torch.cat([layout.seqlen_offsets, layout.seqlen_offsets[-1:] + padding]),
        seqlens=np.append(layout.seqlens, padding),
        num_candidate_tokens=longer(layout.num_candidate_tokens, 1),
        num_candidate_tokens_host=np.append(layout.num_candidate_tokens_host, 0),
        positions=positions,
        token_times=longer(layout.token_times, padding),
        query_times=longer(layout.query_times, padding),
        cache={},
    )


def to_device(array: np.ndarray, device: torch.device) -> Tensor:
    """A host array as a tensor on ``device``, without waiting for what the device still has to do.

    A copy from memory that is not page-locked is queued behind the stream's work and holds the host up until then.
    """
    tensor = torch.from_numpy(array)
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)


def offsets_of(lengths: np.ndarray) -> np.ndarray:
    """Start of each run when runs of these lengths lie one after another: int64 [B]."""
    lengths = np.asarray(lengths, dtype=np.int64)
    return np.cumsum(lengths) - lengths


def places(lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each element of runs of these lengths: its run, and its place in it. Both int64 [Σ lengths]."""
    run = np.repeat(np.arange(len(lengths)), lengths)
    return run, np.arange(len(run)) - offsets_of(lengths)[run]
