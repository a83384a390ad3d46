"""HSTU attention of new tokens to the cached keys and values of earlier tokens, and to each other.

HSTU attention has no softmax: each row is Σ SiLU(score) V / N with constant N. The sum is computed page by page of the
cache, without recomputing earlier tokens. Forward only. Source: M-FALCON, arXiv 2402.17152, sec. 3.4.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hstu.ops.kernels import AttentionConfig, AttentionInputs
from hstu.ops.layout import JaggedLayout, distance_index, time_buckets
from hstu.ops.pytorch.attention import MASKED, forward


@dataclass(frozen=True)
class CachedPrefix:
    """The first tokens of one sequence: its context, and its history before the new tokens."""

    pages: Sequence[tuple[Tensor, Tensor]]  # Consecutive keys and values, [H, b, d] each
    num_tokens: int
    num_contextuals: int  # The first tokens; a window never hides them
    times: Tensor | None  # int64 [num_tokens], seconds; None without a relative bias
    history_end: int
    """Number of context and history tokens, including appended ones: the position of the first candidate."""


def prefix_attention(inputs: AttentionInputs, prefix: CachedPrefix) -> Tensor:
    """:data:`hstu.ops.kernels.AttentionForward` for new tokens of the sequence that begins with ``prefix``.

    The layout has only the n new tokens, with their positions in the whole sequence. They are all candidates, or all
    history that directly follows the prefix. Computed in float32, or in float64 if q is float64. Memory: n scores per
    head and token of a page and, with a bias, n numbers per prefix token (1 if new tokens share one position and time).
    Raises ValueError for history without a causal mask, because earlier tokens would see the new tokens.
    """
    layout, config, bias = inputs.layout, inputs.config, inputs.bias
    if not (layout.num_candidate_tokens is not None or config.is_causal):
        raise ValueError("is_causal = False: earlier tokens see appended ones, so their keys and values change")
    dtype = torch.float64 if inputs.q.dtype == torch.float64 else torch.float32
    tables = None if bias is None else (bias.position_weight.to(dtype), bias.time_weight.to(dtype))
    q, k, v = (x.to(dtype) for x in (inputs.q, inputs.k, inputs.v))
    later = max(0, prefix.history_end - prefix.num_tokens - len(q))  # history tokens after the new ones
    own, among = replace(config, scaling_seqlen=1, full_tokens=max(0, config.full_tokens - later)), layout
    if layout.num_candidate_tokens is not None:  # each group is a sequence: it sees no other
        sizes = np.diff([*range(0, len(q), layout.candidate_group_tokens), len(q)])
        groups = partial(replace, layout, seqlens=sizes, num_candidate_tokens_host=sizes, cache={})
        among = layout.cached("target groups", groups)
    attended = forward(replace(inputs, q=q, k=k, v=v, layout=among, config=own)).transpose(0, 1).contiguous()
    queries = q.transpose(0, 1)
    added = _prefix_terms(inputs, tables, prefix, dtype)
    start = 0
    for page_keys, page_values in prefix.pages:
        stop = start + page_keys.shape[1]
        if not _is_hidden(start, stop, layout, config, prefix):
            terms = added if added.shape[-1] == 1 else added[..., start:stop]
            scores = torch.baddbmm(terms, queries, page_keys.to(dtype).transpose(1, 2), alpha=config.alpha)
            attended.baddbmm_(F.silu(scores, inplace=True), page_values.to(dtype))
        start = stop
    return attended.div_(config.scaling_seqlen).transpose(0, 1).to(inputs.v.dtype).contiguous()


def _prefix_terms(
    inputs: AttentionInputs, tables: tuple[Tensor, Tensor] | None, prefix: CachedPrefix, dtype: torch.dtype
) -> Tensor:
    """What is added to the scores of the prefix: [r, P], with r = 1 if it serves all rows, or [1, 1] of zeros."""
    layout, config, device = inputs.layout, inputs.config, inputs.layout.positions.device
    rows = layout.positions[:1] if layout.num_candidate_tokens is not None else layout.positions
    keys = torch.arange(prefix.num_tokens, device=device)
    added = torch.zeros(1, 1, dtype=dtype, device=device)
    if tables is not None:
        position, time = tables
        added = position[distance_index(rows[:, None], keys, len(position))] + time[_buckets(layout, prefix)]
    if config.max_span is not None:
        no_limit = (keys < prefix.num_contextuals) | config.has_no_limit(rows[:, None], prefix.history_end)
        added = added.masked_fill((rows[:, None] - keys > config.max_span) & ~no_limit, MASKED)
    return added


def _buckets(layout: JaggedLayout, prefix: CachedPrefix) -> Tensor:
    """int64 [r, P]: time buckets of new tokens and prefix, shared by all layers."""
    if "prefix_buckets" not in layout.cache:
        assert layout.query_times is not None and prefix.times is not None, "a relative bias has times"
        times = layout.query_times
        if layout.num_candidate_tokens is not None and bool((times == times[0]).all()):
            times = times[:1]  # one request: one logarithm per prefix token
        layout.cache["prefix_buckets"] = time_buckets(times[:, None] - prefix.times).long()
    buckets: Tensor = layout.cache["prefix_buckets"]
    return buckets


def _is_hidden(start: int, stop: int, layout: JaggedLayout, config: AttentionConfig, prefix: CachedPrefix) -> bool:
    """Whether no new token sees the tokens [start, stop) of the prefix."""
    if config.max_span is None or start < prefix.num_contextuals:
        return False
    first, newest = prefix.num_tokens, prefix.num_tokens + layout.num_tokens - 1
    if layout.num_candidate_tokens is not None:
        first = newest = prefix.history_end
    has_limit = not config.has_no_limit(newest, prefix.history_end)
    return has_limit and first - (stop - 1) > config.max_span
