"""Layout of a jagged batch: offsets, positions, times and order of tokens; the mask; distances and time buckets."""

import functools
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from hstu.data.batches.jagged import run_offsets, run_starts, sequence_tokens

TIME_BUCKET_WIDTH = 0.301
"""Width of a time bucket in natural log seconds: ⌊ln(max(1, |Δt|)) / 0.301⌋."""
NUM_TIME_BUCKETS = 128
"""Rows of ``RelativeBias.time_weight``."""


@dataclass(frozen=True)
class AttentionConfig:
    """Attention settings that do not depend on the batch: the scale of the scores, the divisor and the mask."""

    alpha: float
    """Factor of Q Kᵀ."""
    scaling_seqlen: int
    """Divisor N: a constant, so that a result does not depend on the other sequences of the batch."""
    is_causal: bool = True
    """False: bidirectional over context and history. Candidates never see other groups or later tokens."""
    contextual_mask: bool = True
    """True: contextual tokens see all context and history."""
    max_span: int | None = None
    """Farthest visible history token, in positions before a token (and after it, if bidirectional). None: unlimited.
    Context is visible from everywhere. All candidates have the position of the first."""
    full_tokens: int = 0
    """Number of newest context and history tokens to which ``max_span`` does not apply; if > 0, nor to candidates."""

    def has_no_limit(self, position: Any, history_end: Any) -> Any:
        """Whether tokens at ``position`` see everything that the mask without ``max_span`` shows. Numbers or arrays."""
        return (self.full_tokens > 0) & (position >= history_end - self.full_tokens)


@dataclass(frozen=True)
class TokenRuns:
    """Tokens of a batch: ``count[s]`` tokens of sequence s, from ``first[s]`` on, ``stride`` apart. On the host."""

    first: np.ndarray  # int64 [B]
    count: np.ndarray  # int64 [B]
    stride: int = 1

    def within(self, tokens: range) -> range:
        """Indices of the runs' tokens, numbered in order, that lie within ``tokens``."""
        bounds = tokens.start, tokens.stop
        return range(*(int(np.clip(-((self.first - bound) // self.stride), 0, self.count).sum()) for bound in bounds))


@dataclass
class JaggedLayout:
    """Layout of the tokens of one jagged batch; built by :func:`build_layout`.

    Tokens of B sequences lie one after another, without padding, in tensors of T rows. Sequence s is

        [context_1 … context_C] [item_1 (action_1) … item_n (action_n)] [candidate_1 (action) … candidate_m (action)]

    Integers have host (numpy) copies, so that operators read sizes without waiting for the device.
    """

    seqlen_offsets: Tensor
    """int64 [B + 1]: sequence s holds the tokens ``seqlen_offsets[s]:seqlen_offsets[s + 1]``."""
    seqlens: np.ndarray
    """int64 [B], host: tokens of each sequence, context and candidates included."""
    num_contextuals: int
    """C: number of context tokens at the start of each sequence that is not empty."""
    num_candidate_tokens: Tensor | None
    """int64 [B]: number of candidate tokens at the end of each sequence. None: no sequence has any."""
    num_candidate_tokens_host: np.ndarray
    """int64 [B], host: the same numbers; zeros where there are none."""
    candidate_group_tokens: int
    """Tokens of one target group: target_group_size × tokens_per_item."""
    tokens_per_item: int
    """2 where an action token follows each item token, else 1."""
    positions: Tensor
    """int64 [T]: position in the sequence from 0; all candidate tokens share the position of the first."""
    token_times: Tensor | None = None
    """int64 [T], seconds: time of each token (context: of the first event; 0 without events)."""
    query_times: Tensor | None = None
    """int64 [T], seconds: time of the next context or history token, see build_layout; of candidates their own."""
    cache: dict[Hashable, Any] = field(default_factory=dict, repr=False, compare=False)
    """Results of :meth:`cached`."""

    def cached(self, key: Hashable, derive: Callable[[], Any]) -> Any:
        """``derive()``, called once per ``key``: what operators reuse in each layer and in backward."""
        if key not in self.cache:
            self.cache[key] = derive()
        return self.cache[key]

    @property
    def batch_size(self) -> int:
        """Number of sequences B, including empty ones."""
        return len(self.seqlens)

    @property
    def num_tokens(self) -> int:
        """Number of tokens T."""
        return int(self.seqlens.sum())

    @property
    def longest_first(self) -> np.ndarray:
        """int64 [B], host: indices of the sequences by falling length; equally long ones keep their order."""
        return np.argsort(-self.seqlens, kind="stable")

    @property
    def num_items(self) -> np.ndarray:
        """int64 [B], host: items of each sequence, candidates included."""
        return np.maximum(self.seqlens - self.num_contextuals, 0) // self.tokens_per_item

    def newest_item_tokens(self, count: Tensor, total: int) -> Tensor:
        """Token indices of the newest ``count[s]`` items of each sequence s, oldest first: int64 [total].

        count: int64 [B] on the device. total: its sum. The token before an item is the previous item or its action.
        """
        return newest_elements(self.seqlen_offsets[1:], count, total, self.tokens_per_item)

    def newest_item_runs(self, count: np.ndarray, shift: int = 0) -> TokenRuns:
        """Tokens of :meth:`newest_item_tokens`, shifted by ``shift``. count: int64 [B] on the host."""
        ends = np.cumsum(self.seqlens)
        return TokenRuns(ends - count * self.tokens_per_item + shift, count, self.tokens_per_item)


@dataclass(frozen=True)
class TokenOrder:
    """Permutation: token t is row ``source[t]`` of the concatenated parts. Both int64 [tokens]."""

    source: Tensor
    inverse: Tensor


def newest_elements(ends: Tensor, count: Tensor, total: int, stride: int = 1) -> Tensor:
    """Every ``stride``-th position before ``ends[s]``, ``count[s]`` in all, ascending: int64 [sum of count = total]."""
    run = torch.repeat_interleave(count, output_size=total)
    return ends[run] - (count.cumsum(0)[run] - torch.arange(total, device=count.device)) * stride


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
    asks_for_next: bool | Tensor = True,
    request_times: Tensor | None = None,
) -> JaggedLayout:
    """Lay out a batch on ``device``.

    item_lengths: int64 [B] host, items per sequence, candidates included. The first ``num_sequences`` sequences are
    real and have context; the others are empty padding. num_candidates: int64 [B] host, or None.
    item_times: int64 [Σ item_lengths] seconds on ``device``, or None. asks_for_next: the query time of a history token
    is the time of the next token; False: its own time; bool [B] on ``device``: so for each sequence. request_times:
    int64 [B] seconds on ``device``, query time of the last token of each sequence; None: its own time.
    """
    is_real = np.arange(len(item_lengths)) < num_sequences
    seqlens = sequence_tokens(item_lengths, num_contextuals, tokens_per_item, has_context=is_real)
    candidates = np.zeros_like(seqlens) if num_candidates is None else (num_candidates * tokens_per_item)
    candidates = candidates.astype(np.int64)
    sequence, index, history_end = _token_indices(seqlens, candidates, device)
    token_times = query_times = None
    if item_times is not None:
        num_items = len(item_times)
        first_items, no_items = _on_device(device, run_starts(item_lengths), item_lengths == 0)
        item = (index - num_contextuals).clamp_(min=0).div_(tokens_per_item, rounding_mode="floor")
        item += first_items[sequence]
        item.masked_fill_(no_items[sequence].bool(), num_items)  # context of a user with no event
        token_times = torch.cat([item_times, item_times.new_zeros(1)])[item]
        token = torch.arange(len(index), device=device)
        asks = asks_for_next[sequence] if isinstance(asks_for_next, Tensor) else asks_for_next
        query_times = token_times[token + ((index + 1 < history_end) & asks)]
        if request_times is not None:
            filled = np.flatnonzero(seqlens > 0)
            last_tokens, filled_on_device = _on_device(device, np.cumsum(seqlens)[filled] - 1, filled)
            query_times = query_times.index_copy(0, last_tokens, request_times[filled_on_device])
    return JaggedLayout(
        seqlen_offsets=to_device(run_offsets(seqlens), device),
        seqlens=seqlens,
        num_contextuals=num_contextuals,
        num_candidate_tokens=to_device(candidates, device) if candidates.any() else None,
        num_candidate_tokens_host=candidates,
        candidate_group_tokens=target_group_size * tokens_per_item,
        tokens_per_item=tokens_per_item,
        positions=torch.minimum(index, history_end),
        token_times=token_times,
        query_times=query_times,
    )


def _token_indices(seqlens: np.ndarray, candidates: np.ndarray, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Per token: its sequence, its position, and the position of the first candidate; int64 [T], on the device."""
    total = int(seqlens.sum())
    lengths, starts, history_ends = _on_device(device, seqlens, run_starts(seqlens), seqlens - candidates)
    sequence = torch.repeat_interleave(lengths, output_size=total)
    return sequence, torch.arange(total, device=device) - starts[sequence], history_ends[sequence]


def pad_tokens(layout: JaggedLayout, padding: int) -> JaggedLayout:
    """Append ``padding`` tokens, which form one more sequence."""
    if padding == 0:
        return layout
    seqlens, candidates = np.append(layout.seqlens, padding), np.append(layout.num_candidate_tokens_host, 0)
    return with_tokens(layout, seqlens, candidates, lambda of_tokens: functional.pad(of_tokens, (0, padding)))


def with_tokens(
    layout: JaggedLayout, seqlens: np.ndarray, candidates: np.ndarray, convert: Callable[[Tensor], Tensor]
) -> JaggedLayout:
    """Layout of more or fewer tokens. candidates: int64 [B]; convert: a tensor of the old tokens → of the new ones."""
    device = layout.positions.device
    return replace(
        layout,
        seqlen_offsets=to_device(run_offsets(seqlens), device),
        seqlens=seqlens,
        num_candidate_tokens=to_device(candidates, device) if candidates.any() else None,
        num_candidate_tokens_host=candidates,
        positions=convert(layout.positions),
        token_times=None if layout.token_times is None else convert(layout.token_times),
        query_times=None if layout.query_times is None else convert(layout.query_times),
        cache={},
    )


def truncate_history(layout: JaggedLayout, items: int) -> tuple[JaggedLayout, Tensor, Callable[[range], range]]:
    """Layout of the context, the newest ``items`` items of each history, and the candidates.

    Returns (the shorter layout; the index in the whole layout of each of its T' tokens: int64 [T'], ascending;
    a function that maps a range of tokens of the whole layout to the range of the T' tokens within it).
    Positions are relative to the shorter sequences; times are unchanged.
    """
    context = np.where(layout.seqlens > 0, layout.num_contextuals, 0)
    history = layout.seqlens - context - layout.num_candidate_tokens_host
    removed = np.maximum(history - items * layout.tokens_per_item, 0)
    seqlens = layout.seqlens - removed
    device, old_starts = layout.positions.device, run_starts(layout.seqlens)
    sequence, index, history_end = _token_indices(seqlens, layout.num_candidate_tokens_host, device)
    starts_on_device, removed_on_device = _on_device(device, old_starts, removed)
    behind_context = index >= layout.num_contextuals
    tokens = starts_on_device[sequence] + index + behind_context * removed_on_device[sequence]
    shorter = with_tokens(layout, seqlens, layout.num_candidate_tokens_host, lambda of_tokens: of_tokens[tokens])
    shorter.positions = torch.minimum(index, history_end)
    runs = TokenRuns(old_starts, context), TokenRuns(old_starts + context + removed, seqlens - context)

    def left(of_whole: range) -> range:
        contexts, others = (run.within(of_whole) for run in runs)
        return range(contexts.start + others.start, contexts.stop + others.stop)

    return shorter, tokens, left


def part_rows(layout: JaggedLayout, tokens: range) -> list[range]:
    """Rows of each part of :func:`token_order` that ``tokens`` consist of."""
    starts, stride = run_starts(layout.seqlens), layout.tokens_per_item
    starts_of_real = starts[layout.seqlens > 0]
    contexts = [TokenRuns(starts_of_real + c, np.ones_like(starts_of_real)) for c in range(layout.num_contextuals)]
    first_items = starts + layout.num_contextuals
    return [
        runs.within(tokens)
        for runs in (*contexts, *(TokenRuns(first_items + part, layout.num_items, stride) for part in range(stride)))
    ]


def token_order(layout: JaggedLayout, tokens: range | None = None) -> TokenOrder:
    """Order of the tokens for the concatenated parts [context_1 … context_C, items, actions (if they are tokens)].

    A contextual part has one row per real sequence, another part one row per item, of ``tokens`` alone if given.
    """
    num_contextuals, stride, num_items = layout.num_contextuals, layout.tokens_per_item, layout.num_items
    device, starts = layout.positions.device, run_starts(layout.seqlens)
    tokens = range(layout.num_tokens) if tokens is None else tokens
    rows_of_parts, starts = part_rows(layout, tokens), starts - tokens.start
    starts_of_real = starts[layout.seqlens > 0]
    contexts = [starts_of_real[rows.start : rows.stop] + c for c, rows in enumerate(rows_of_parts[:num_contextuals])]
    first_tokens, lengths = _on_device(device, starts + num_contextuals - stride * run_starts(num_items), num_items)
    total = int(num_items.sum())
    items = torch.repeat_interleave(first_tokens, lengths, output_size=total)
    items = items.add_(torch.arange(total, device=device), alpha=stride)
    of_items = [items[rows.start : rows.stop] for rows in rows_of_parts[num_contextuals:]]
    parts = [own + part if part else own for part, own in enumerate(of_items)]
    inverse = torch.cat([to_device(np.concatenate([np.empty(0, np.int64), *contexts]), device), *parts])
    source = torch.empty_like(inverse)
    source.scatter_(0, inverse, torch.arange(len(inverse), device=device))
    return TokenOrder(source, inverse)


def time_buckets(delta_s: Tensor) -> Tensor:
    """Bucket of each time difference (int64 seconds, any sign): uint8 of the same shape."""
    # float64 is exact for any real timestamp, so that all devices agree on the bucket.
    log = delta_s.abs().clamp_(min=1).double().log_()
    return log.div_(TIME_BUCKET_WIDTH).clamp_(max=NUM_TIME_BUCKETS - 1).to(torch.uint8)


@functools.cache
def bucket_thresholds(device: torch.device) -> Tensor:
    """int64 [128]: smallest time difference of each bucket, by bisection of the formula itself, on the CPU."""
    low = torch.zeros(NUM_TIME_BUCKETS, dtype=torch.int64)  # always below the bucket
    high = torch.full_like(low, 1 << 62)
    wanted = torch.arange(NUM_TIME_BUCKETS)
    for _ in range(63):
        middle = low + (high - low) // 2
        reached = time_buckets(middle) >= wanted
        high, low = torch.where(reached, middle, high), torch.where(reached, low, middle)
    return high.to(device)


def fixed_point_scale(grad: Tensor, v: Tensor, pairs: int) -> Tensor:
    """float32 [1]: factor with which any sum of ``pairs`` score gradients fits in 62 bits; not finite if they are not.

    |dL/dscore| ≤ ‖grad‖ ‖v‖ · max |SiLU'| < 1.1 ‖grad‖ ‖v‖, before the division by N.
    """
    largest = [torch.linalg.vector_norm(x, dim=-1, dtype=torch.float32).amax() for x in (grad, v)]
    bound = (largest[0] * largest[1] * 1.1).clamp_min(1e-12) * float(pairs)
    return (2.0**62 / bound).view(1)


def distance_index(position_i: Tensor, position_j: Tensor, num_weights: int) -> Tensor:
    """Row of ``position_weight`` for each pair: int64, broadcast shape. num_weights: 2 P - 1."""
    farthest = num_weights // 2
    return (position_i - position_j).clamp_(-farthest, farthest).add_(farthest)


def _on_device(device: torch.device, *arrays: np.ndarray) -> tuple[Tensor, ...]:
    """Move int64 arrays of one shape to ``device`` in one copy."""
    return to_device(np.stack(arrays, dtype=np.int64, casting="unsafe"), device).unbind()


def to_device(array: np.ndarray, device: torch.device) -> Tensor:
    """Copy a host array to ``device``, via pinned memory: an unpinned copy waits for the queued work of the stream."""
    tensor = torch.from_numpy(array)
    return (tensor if device.type == "cpu" else tensor.pin_memory()).to(device, non_blocking=True)
