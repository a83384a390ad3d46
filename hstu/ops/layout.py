"""The positions, times and order of the tokens of a jagged batch; see :class:`hstu.ops.types.JaggedLayout`."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from torch import Tensor

from hstu.data.jagged import run_indices, run_offsets, run_starts, sequence_tokens
from hstu.ops.types import NUM_TIME_BUCKETS, JaggedLayout, TokenOrder

TIME_BUCKET_WIDTH = 0.301
"""Width of a time bucket in natural log seconds: ⌊ln(max(1, |Δt|)) / 0.301⌋."""


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
    request_times: Tensor | None = None,
) -> JaggedLayout:
    """Lay out a batch on ``device``.

    item_lengths: int64 [B] host, items of each sequence, candidates included. The first ``num_sequences`` sequences
    are real and carry context; the others are padding and empty. num_candidates: int64 [B] host, or None.
    item_times: int64 [Σ item_lengths] seconds on ``device``, or None. request_times: int64 [B] seconds on ``device``,
    when the last token of each sequence asks; None: at its own time.
    """
    is_real = np.arange(len(item_lengths)) < num_sequences
    seqlens = sequence_tokens(item_lengths, num_contextuals, tokens_per_item, has_context=is_real)
    candidates = np.zeros_like(seqlens) if num_candidates is None else (num_candidates * tokens_per_item)
    candidates = candidates.astype(np.int64)
    sequence, position = run_indices(seqlens)
    history_end = np.repeat(seqlens - candidates, seqlens)

    def on_device(array: np.ndarray) -> Tensor:
        return to_device(array, device)

    token_times = query_times = None
    if item_times is not None:
        item = np.maximum(position - num_contextuals, 0) // tokens_per_item + run_starts(item_lengths)[sequence]
        item = np.where((item_lengths > 0)[sequence], item, item_lengths.sum())  # context of a user with no event
        next_token = np.arange(len(position)) + (position + 1 < history_end)
        token_times = torch.cat([item_times, item_times.new_zeros(1)])[on_device(item)]
        query_times = token_times[on_device(next_token)]
        if request_times is not None:
            filled = seqlens > 0
            last_token = on_device(np.cumsum(seqlens)[filled] - 1)
            query_times = query_times.index_copy(0, last_token, request_times[on_device(np.flatnonzero(filled))])
    return JaggedLayout(
        seqlen_offsets=on_device(run_offsets(seqlens)),
        seqlens=seqlens,
        num_contextuals=num_contextuals,
        num_candidate_tokens=on_device(candidates) if candidates.any() else None,
        num_candidate_tokens_host=candidates,
        candidate_group_tokens=target_group_size * tokens_per_item,
        tokens_per_item=tokens_per_item,
        positions=on_device(np.minimum(position, history_end) if candidates.any() else position),
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


def token_order(layout: JaggedLayout) -> TokenOrder:
    """The order of ``layout`` for the concatenated parts [context_1 … context_C, items, actions (if they are tokens)].

    Each contextual part has one row per real sequence, each other part one row per item, all in batch order.
    """
    num_contextuals, stride, num_items = layout.num_contextuals, layout.tokens_per_item, layout.num_items
    starts = run_starts(layout.seqlens)
    contexts = np.arange(num_contextuals)[:, None] + starts[layout.seqlens > 0]
    first_tokens = np.repeat(starts + num_contextuals - stride * run_starts(num_items), num_items)
    first_tokens += stride * np.arange(len(first_tokens))
    inverse = np.concatenate([contexts.reshape(-1), *(first_tokens + part for part in range(stride))])
    source = np.empty_like(inverse)
    source[inverse] = np.arange(len(inverse))
    device = layout.positions.device
    return TokenOrder(to_device(source, device), to_device(inverse, device))


def time_buckets(delta_s: Tensor) -> Tensor:
    """Bucket of each time difference (int64 seconds, any sign): uint8 of the same shape."""
    # float64 is exact for any real time stamp, so that all devices agree on the bucket.
    log = delta_s.abs().clamp_(min=1).double().log_()
    return log.div_(TIME_BUCKET_WIDTH).clamp_(max=NUM_TIME_BUCKETS - 1).to(torch.uint8)


def distance_index(position_i: Tensor, position_j: Tensor, num_weights: int) -> Tensor:
    """Row of ``position_weight`` (of ``num_weights`` = 2 P - 1 rows) for each pair: int64, broadcast shape."""
    farthest = num_weights // 2
    return (position_i - position_j).clamp_(-farthest, farthest).add_(farthest)


def to_device(array: np.ndarray, device: torch.device) -> Tensor:
    """Copy a host array to ``device`` without waiting for the work that the device has queued.

    A copy from memory that is not pinned waits for the work that the stream has queued.
    """
    tensor = torch.from_numpy(array)
    return (tensor if device.type == "cpu" else tensor.pin_memory()).to(device, non_blocking=True)
