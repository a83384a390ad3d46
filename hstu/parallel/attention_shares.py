"""Which queries, keys and heads of a batch each context-parallel rank takes for attention.

The p = u · r ranks form r groups of u. A group has a contiguous range of the queries, and each of its ranks has some of
the heads (Ulysses, arXiv 2309.14509). u divides the heads. HSTU's attention is a sum over keys without a softmax, so a
rank that has the keys and values which its queries see computes their outputs, and gradients of keys and values from
several groups add up. A ring (arXiv 2310.01889) passes on the same bytes, but all of them, to every rank.

Ranges have equal work: under a causal mask, ranges with later queries of a history are shorter. Keys that no query of
the range sees are not sent: those of other sequences, later ones, and those before a window.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import torch

from hstu.data.batches.jagged import run_starts
from hstu.ops.comm import AttentionShare
from hstu.ops.kernels import AttentionConfig
from hstu.ops.layout import JaggedLayout, with_tokens

MOST_KEPT = 1.5
"""A layer keeps q, k and v of attention for backward up to this multiple of those that its rank projects; else backward
exchanges them again. A query and a key then cost 5 and 6 vectors of a head in forward and backward, in place of 4."""


@dataclass(frozen=True)
class Keys:
    """The keys of a range of queries."""

    tokens: tuple[range, ...]
    """One range, or the context of the first sequence and a range behind the history that no query sees."""
    first: int
    last: int
    """First and last sequence."""
    config: AttentionConfig
    """The same mask in sequences without the other tokens."""


def share_attention(
    layout: JaggedLayout, config: AttentionConfig, heads: int, has_bias: bool, ranks: int, rank: int, ranges: bool
) -> AttentionShare | None:
    """The share of ``rank`` with the number of groups for which the busiest rank receives the least. None: one group.

    layout: T tokens, of which each rank holds T / ``ranks``. ranges: whether the kernels serve ranges of queries.
    """
    size = layout.num_tokens // ranks
    work = np.cumsum(_visible_keys(layout, config))
    plans: list[tuple[int, list[range], list[Keys], bool]] = []
    for groups in range(1, ranks + 1):
        per_group = ranks // groups
        if ranks % groups or heads % per_group or not (groups == 1 or ranges or heads % ranks):
            continue
        bounds = [0, *np.searchsorted(work, work[-1] * np.arange(1, groups) / groups).tolist(), layout.num_tokens]
        queries = [range(*pair) for pair in pairwise(bounds)]
        keys = [keys_of(layout, config, has_bias, each) for each in queries]
        largest = max(len(q) + 2 * sum(map(len, k.tokens)) for q, k in zip(queries, keys, strict=True))
        keeps = largest * (heads // per_group) <= MOST_KEPT * 3 * size * heads
        of_query, of_key = (4, 4) if keeps else (5, 6)
        received = [
            of_query * _from_others([queries[one // per_group]], one, size)
            + of_key * _from_others(keys[one // per_group].tokens, one, size)
            for one in range(ranks)
        ]
        plans.append((max(received) * (heads // per_group), queries, keys, keeps))
    _, queries, keys, keeps = min(plans, key=lambda plan: plan[0])
    if len(queries) == 1:
        return None
    group = rank * len(queries) // ranks
    own = keys[group]
    first = sum(map(len, own.tokens)) - (own.tokens[-1].stop - queries[group].start)
    rows = range(first, first + len(queries[group]))
    part = _part_of(layout, own)
    return AttentionShare(part, own.config, rows, [[each] for each in queries], [each.tokens for each in keys], keeps)


def keys_of(layout: JaggedLayout, config: AttentionConfig, has_bias: bool, queries: range) -> Keys:
    """The keys that ``queries`` see, and further ones where the rest would not have the same mask and bias."""
    if not queries:
        return Keys((queries,), 0, -1, config)
    starts = run_starts(layout.seqlens)
    stops = starts + layout.seqlens
    first, last = (int(np.searchsorted(stops, token, side="right")) for token in (queries[0], queries[-1]))
    ends = stops - layout.num_candidate_tokens_host
    context, span, full_tokens = layout.num_contextuals, config.max_span, config.full_tokens

    def sees_all(sequence: int) -> bool:
        """Whether a query of this sequence sees all keys that the mask without a window shows."""
        newest = min(queries[-1], int(stops[sequence]) - 1, int(ends[sequence]))
        leads = config.contextual_mask and max(queries[0], int(starts[sequence])) < starts[sequence] + context
        return span is None or leads or bool(config.has_no_limit(newest, int(ends[sequence])))

    low, end, stop = int(starts[first]), int(ends[last]), queries.stop
    context_end = low + context
    if span is not None and not sees_all(first) and not (has_bias and context):
        nearest = min(queries[0], int(ends[first])) - span
        low = nearest if nearest > context_end else low
    leads = config.contextual_mask and max(queries[0], int(starts[last])) < starts[last] + context
    if leads or (not config.is_causal and sees_all(last)):
        stop = max(stop, end)
    elif not config.is_causal and span is not None:
        stop = max(stop, min(end, max(queries.stop + span, int(starts[last]) + context)))
    if span is not None and full_tokens and stop < end:  # the newest tokens of a shorter history would be others
        if first == last and not sees_all(last):
            config = replace(config, full_tokens=0)
        else:
            stop = end
    is_cut = low > starts[first]
    tokens = (range(context_end - context, context_end),) if is_cut and context else ()
    return Keys((*tokens, range(low, stop)), first, last, config)


def _part_of(layout: JaggedLayout, keys: Keys) -> JaggedLayout:
    """Layout of ``keys`` alone."""
    sequences = slice(keys.first, keys.last + 1)
    seqlens, candidates = layout.seqlens[sequences].copy(), layout.num_candidate_tokens_host[sequences].copy()
    if len(seqlens):
        behind = int(layout.seqlens[: keys.last + 1].sum()) - keys.tokens[-1].stop
        seqlens[-1] -= behind
        candidates[-1] = max(0, candidates[-1] - behind)
        seqlens[0] -= seqlens.sum() - sum(map(len, keys.tokens))

    def left(tensor: torch.Tensor) -> torch.Tensor:
        return torch.cat([tensor[tokens.start : tokens.stop] for tokens in keys.tokens])

    return with_tokens(layout, seqlens, candidates, left)


def _visible_keys(layout: JaggedLayout, config: AttentionConfig) -> np.ndarray:
    """About how many keys each token sees: int64 [T]."""
    length = np.repeat(layout.seqlens, layout.seqlens)
    index = np.arange(len(length)) - np.repeat(run_starts(layout.seqlens), layout.seqlens)
    visible = index + 1 if config.is_causal else length
    return visible if config.max_span is None else np.minimum(visible, config.max_span + layout.num_contextuals + 1)


def _from_others(tokens: Sequence[range], rank: int, size: int) -> int:
    """Number of ``tokens`` that other ranks hold."""
    return sum(len(each) - len(within(each, range(rank * size, (rank + 1) * size))) for each in tokens)


def within(tokens: range, bounds: range) -> range:
    """The ``tokens`` that lie within ``bounds``."""
    start = min(max(tokens.start, bounds.start), bounds.stop)
    return range(start, max(start, min(tokens.stop, bounds.stop)))
