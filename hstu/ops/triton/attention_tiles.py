"""One tile of HSTU attention: which keys its queries see, the mask, the bias and the scores.

Rows i are queries and columns j are keys, both counted from the start of their sequence. All functions broadcast, so
that they also serve transposed tiles.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import triton
import triton.language as tl

from hstu.ops.triton.primitives import Precision, dot

BUCKETS_PER_LOG2 = tl.constexpr(0.6931471805599453 / 0.301)
"""ln 2 / TIME_BUCKET_WIDTH, for an estimate that the thresholds correct."""
LAST_BUCKET = tl.constexpr(127)


class Batch(NamedTuple):
    """The sequences of a batch as an argument of kernels."""

    offsets: Any
    """int64 [B + 1]: first token of each sequence."""
    candidates: Any
    """int64 [B]: candidate tokens of each sequence, or None."""
    order: Any
    """int32 [B]: the sequences, longest first."""
    num_contextuals: Any
    group_tokens: Any
    """Tokens of a target group."""


class Bias(NamedTuple):
    """The relative bias as an argument of kernels; all None without a bias."""

    query_times: Any
    """int64 [T]."""
    token_times: Any
    """int64 [T]."""
    thresholds: Any
    """int64 [128]: the smallest time difference of each bucket."""
    position_weight: Any
    """float32 [2 P - 1]."""
    time_weight: Any
    """float32 [128]."""
    farthest: Any
    """P - 1."""


class Span(NamedTuple):
    """One sequence of the batch."""

    length: Any
    end: Any
    """First candidate token; the length where there is none."""
    num_contextuals: Any
    group_tokens: Any


@dataclass(frozen=True)
class Mode:
    """Constants that a kernel of attention is compiled for."""

    width: int
    """Channels of a head."""
    block_d: int
    """Columns of its tiles: a power of two."""
    causal: bool
    contextual: bool
    """The first ``num_contextuals`` tokens see all context and history."""
    candidates: bool
    bias: bool
    precision: Precision
    silu: bool = False
    """Gradients of q, k and v become those of what q, k and v are the SiLU of."""


@triton.jit
def sequence_at(batch, index, mode: tl.constexpr):
    """First token of a sequence in the batch, and its Span."""
    start = tl.load(batch.offsets + index)
    length = (tl.load(batch.offsets + index + 1) - start).to(tl.int32)
    end = length
    if mode.candidates:
        end = length - tl.load(batch.candidates + index).to(tl.int32)
    return start, Span(length, end, batch.num_contextuals, batch.group_tokens)


@triton.jit
def slot_of(sequence, start, first_row, BLOCK: tl.constexpr):
    """A number of its own for each tile of rows of the batch, below T // BLOCK + B for T tokens in B sequences.

    A sequence of n tokens has at most n // BLOCK + 1 tiles, and the number of its first tile grows by as many or more.
    """
    return start // BLOCK + sequence + first_row // BLOCK


@triton.jit
def bias_at(bias, start, mode: tl.constexpr):
    """The bias with its times from token ``start`` on."""
    if mode.bias:
        query_times, token_times, thresholds, position_weight, time_weight, farthest = bias
        own = Bias(query_times + start, token_times + start, thresholds, position_weight, time_weight, farthest)
    else:
        own = bias
    return own


@triton.jit
def visible(i, j, span, mode: tl.constexpr):
    """Whether token i may see token j."""
    if mode.causal:
        sees = j <= i
        if mode.contextual:
            sees = sees | (i < span.num_contextuals)
        sees = sees & (j < span.end)
    else:
        sees = (j < span.end) & (i >= 0)
    if mode.candidates:
        # Wherever the result counts, i and j are candidates, so the truncating division is the floor.
        same_group = (i - span.end) // span.group_tokens == (j - span.end) // span.group_tokens
        sees = sees | ((j >= span.end) & (j <= i) & same_group)
    return sees


@triton.jit
def keys_of_rows(first_row, span, mode: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Tiles of keys that rows [first_row, first_row + BLOCK_M) see.

    Returns (full, history_tiles, own, own_tiles): all of the rows see keys [0, full); the next history_tiles tiles, and
    own_tiles tiles from key ``own`` on (the target groups of the rows), need the mask.
    """
    stop_row = tl.minimum(first_row + BLOCK_M, span.length)
    full = span.end
    seen = span.end
    if mode.causal:
        full = tl.minimum(span.end, first_row + 1)
        seen = tl.minimum(span.end, stop_row)
        if mode.contextual:
            seen = tl.where(first_row < span.num_contextuals, span.end, seen)
    full = full // BLOCK_N * BLOCK_N
    history_tiles = tl.cdiv(seen - full, BLOCK_N)
    own = full + history_tiles * BLOCK_N
    own_tiles = 0
    if mode.candidates:  # noqa: SIM102  # the compiler decides this condition, the program the other
        if stop_row > span.end:
            oldest = tl.maximum(first_row, span.end)
            group_start = oldest - (oldest - span.end) % span.group_tokens
            own = tl.maximum(own, group_start // BLOCK_N * BLOCK_N)
            own_tiles = tl.maximum(tl.cdiv(stop_row - own, BLOCK_N), 0)
    return full, history_tiles, own, own_tiles


@triton.jit
def rows_of_keys(first_key, span, mode: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Tiles of rows that see keys [first_key, first_key + BLOCK_N).

    Returns (context_tiles, first, masked_tiles, full, stop): context_tiles tiles from row 0 on hold the contextual rows
    before ``first``; masked_tiles tiles from row ``first`` on need the mask; rows [full, stop) see all of the keys.
    """
    stop_key = tl.minimum(first_key + BLOCK_N, span.length)
    first = first_key
    stop = span.length
    context_tiles = 0
    if mode.causal:
        masked_stop = tl.where(stop_key <= span.end, stop_key - 1, span.length)
        if mode.contextual:
            rows = tl.minimum(span.num_contextuals, first)
            context_tiles = tl.where(first_key < span.end, tl.cdiv(rows, BLOCK_M), 0)
    else:
        first = tl.where(first_key < span.end, 0, first_key)
        masked_stop = tl.where(stop_key <= span.end, 0, span.length)
    if mode.candidates:  # noqa: SIM102
        if first_key >= span.end:
            last_group = (stop_key - 1 - span.end) // span.group_tokens
            stop = tl.minimum(span.length, span.end + (last_group + 1) * span.group_tokens)
            masked_stop = stop
    masked_tiles = tl.cdiv(tl.maximum(masked_stop - first, 0), BLOCK_M)
    return context_tiles, first, masked_tiles, first + masked_tiles * BLOCK_M, stop


@triton.jit
def time_buckets(query_time, token_time, thresholds):
    """Bucket of each time difference, exactly as hstu.ops.layout.time_buckets.

    float32 gives the bucket boundary nearest to the difference; an integer comparison with the threshold of that
    boundary decides on which side the difference lies.
    """
    delta = tl.maximum(tl.abs(query_time - token_time), 1)
    estimate = tl.log2(delta.to(tl.float32)) * BUCKETS_PER_LOG2
    boundary = tl.minimum((estimate + 0.5).to(tl.int32), LAST_BUCKET)
    return boundary - (delta < tl.load(thresholds + boundary)).to(tl.int32)


@triton.jit
def distance_index(i, j, end, farthest):
    """Row of the position weights for each pair; all candidates share the position of the first."""
    distance = tl.minimum(i, end) - tl.minimum(j, end)
    return tl.minimum(tl.maximum(distance, -farthest), farthest) + farthest


@triton.jit
def scores(a, b, i, j, alpha, span, bias, mode: tl.constexpr):
    """α a @ b + bias in float32, where a @ b is q @ kᵀ or its transpose."""
    zero = tl.zeros((a.shape[0], b.shape[1]), tl.float32)
    result = dot(a, b, zero, mode.precision) * alpha
    if mode.bias:
        query_time = tl.load(bias.query_times + i, mask=i < span.length, other=0)
        token_time = tl.load(bias.token_times + j, mask=j < span.length, other=0)
        buckets = time_buckets(query_time, token_time, bias.thresholds)
        by_position = tl.load(bias.position_weight + distance_index(i, j, span.end, bias.farthest))
        result += by_position + tl.load(bias.time_weight + buckets)
    return result
