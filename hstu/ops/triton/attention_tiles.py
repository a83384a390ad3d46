"""One tile of HSTU attention: the keys that its queries see, the mask, the bias and the scores.

Rows i are queries, columns j keys, counted from the start of their sequence. The functions also serve transposed tiles.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import triton
import triton.language as tl

from hstu.ops.triton.primitives import Precision, dot

BUCKETS_PER_LOG2 = tl.constexpr(0.6931471805599453 / 0.301)
"""ln 2 / TIME_BUCKET_WIDTH, for an estimate that the thresholds correct."""
LAST_BUCKET = tl.constexpr(127)
NOWHERE = tl.constexpr(2**30)
"""A position beyond the end of every sequence."""


class Batch(NamedTuple):
    """Sequences of a batch, as a kernel argument."""

    offsets: Any  # int64 [B + 1]: first token of each sequence
    candidates: Any  # int64 [B]: number of candidate tokens of each sequence, or None
    order: Any  # int32 [B]: indices of the sequences, longest first
    num_contextuals: Any
    group_tokens: Any  # Number of tokens of a target group
    max_span: Any  # As in AttentionConfig; 0 without a window
    full_tokens: Any
    queries: Any  # int64 [2]: first and stop token of the queries; None: all tokens are


class Bias(NamedTuple):
    """Relative bias, as a kernel argument; all None without a bias."""

    query_times: Any  # int64 [T]
    token_times: Any  # int64 [T]
    thresholds: Any  # int64 [128]: smallest time difference of each bucket
    position_weight: Any  # float32 [2 P - 1]
    time_weight: Any  # float32 [128]
    farthest: Any  # P - 1


class Span(NamedTuple):
    """One sequence of the batch."""

    length: Any
    end: Any  # First candidate token; the length if there are no candidates
    num_contextuals: Any
    group_tokens: Any
    max_span: Any
    full_from: Any  # First position without ``max_span``; NOWHERE: all positions have it
    first_row: Any
    stop_row: Any  # Rows [first_row, stop_row) are queries


class KeyTiles(NamedTuple):
    """Key tiles that a tile of rows sees. Tiles in [first_full, full) need no mask; the others do."""

    first_full: Any
    full: Any
    history_tiles: Any  # From key ``full`` on
    own: Any
    own_tiles: Any  # From key ``own`` on: the target groups of the rows
    low: Any
    low_tiles: Any  # From key ``low`` to ``first_full``: the far end of the window
    context_tiles: Any  # From key 0 on, below ``low``


class RowTiles(NamedTuple):
    """Row tiles that see a tile of keys. Rows in [full, stop_full) see all of these keys; the others need a mask."""

    full: Any
    stop_full: Any
    first: Any
    masked_tiles: Any  # From row ``first`` to ``full``
    stop: Any  # End of all rows except the newest
    context_tiles: Any  # From row 0 to ``first``: contextual rows
    late: Any
    late_tiles: Any  # From row ``late`` to ``stop``: rows for which the keys lie at the far end of the window
    newest: Any
    newest_tiles: Any  # From row ``newest`` to the end of the sequence: rows without ``max_span``


@dataclass(frozen=True)
class Mode:
    """Compile-time constants of an attention kernel."""

    width: int  # Channels of a head
    block_d: int  # Columns of a tile: a power of two
    causal: bool
    contextual: bool  # Whether the first ``num_contextuals`` tokens see all context and history
    candidates: bool
    window: bool  # Whether there is a ``max_span``
    bias: bool
    precision: Precision
    silu: bool = False  # Whether backward writes the gradients of the pre-activations, not of q, k and v
    ranges: bool = False  # Whether q and the output have only the rows of ``Batch.queries``


@triton.jit
def sequence_at(batch, index, mode: tl.constexpr):
    """First token of a sequence in the batch, and its Span."""
    start = tl.load(batch.offsets + index)
    length = (tl.load(batch.offsets + index + 1) - start).to(tl.int32)
    end = length
    if mode.candidates:
        end = length - tl.load(batch.candidates + index).to(tl.int32)
    full_from = tl.where(batch.full_tokens > 0, end - batch.full_tokens, NOWHERE)
    first_row, stop_row = 0, length
    if mode.ranges:
        first_row = tl.minimum(tl.maximum(tl.load(batch.queries) - start, 0), length).to(tl.int32)
        stop_row = tl.minimum(tl.maximum(tl.load(batch.queries + 1) - start, 0), length).to(tl.int32)
    return start, Span(
        length, end, batch.num_contextuals, batch.group_tokens, batch.max_span, full_from, first_row, stop_row
    )


@triton.jit
def start_of_queries(batch, start, mode: tl.constexpr):
    """Row of q of the token ``start``; no row if the range of queries begins later."""
    if mode.ranges:
        start = start - tl.load(batch.queries)
    return start


@triton.jit
def slot_of(sequence, start, first_row, BLOCK: tl.constexpr):
    """Unique index of a row tile in the batch, below T // BLOCK + B: n tokens have at most n // BLOCK + 1 tiles."""
    return start // BLOCK + sequence + first_row // BLOCK


@triton.jit
def bias_at(bias, start):
    """The bias, with times that start at token ``start``."""
    query_times, token_times, thresholds, position_weight, time_weight, farthest = bias
    return Bias(query_times + start, token_times + start, thresholds, position_weight, time_weight, farthest)


@triton.jit
def visible(i, j, span, mode: tl.constexpr):
    """Whether token i sees token j."""
    if mode.causal:
        sees = j <= i
        if mode.contextual:
            sees = sees | (i < span.num_contextuals)
        sees = sees & (j < span.end)
    else:
        sees = (j < span.end) & (i >= 0)
    if mode.window:
        position = tl.minimum(i, span.end)
        no_limit = position >= span.full_from
        if mode.contextual:
            no_limit = no_limit | (i < span.num_contextuals)
        near = j >= tl.where(no_limit, 0, position - span.max_span)
        if not mode.causal:
            near = near & (j <= tl.where(no_limit, span.end, position + span.max_span))
        near = near | (j < span.num_contextuals)
        sees = sees & near
    if mode.candidates:
        # Where the result counts, i and j are candidates, so the truncating division is the floor.
        same_group = (i - span.end) // span.group_tokens == (j - span.end) // span.group_tokens
        sees = sees | ((j >= span.end) & (j <= i) & same_group)
    return sees


@triton.jit
def keys_of_rows(first_row, span, mode: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """KeyTiles of rows [first_row, first_row + BLOCK_M)."""
    stop_row = tl.minimum(first_row + BLOCK_M, span.stop_row)
    full = span.end
    seen = span.end
    if mode.causal:
        full = tl.minimum(span.end, first_row + 1)
        seen = tl.minimum(span.end, stop_row)
        if mode.contextual:
            seen = tl.where(first_row < span.num_contextuals, span.end, seen)
    first_full, low, low_tiles, context_tiles = 0, 0, 0, 0
    if mode.window:
        oldest, newest = tl.minimum(first_row, span.end), tl.minimum(stop_row - 1, span.end)
        some_see_all = newest >= span.full_from
        if mode.contextual:
            some_see_all = some_see_all | (first_row < span.num_contextuals)
        low = tl.where(some_see_all, 0, tl.maximum(oldest - span.max_span, 0)) // BLOCK_N * BLOCK_N
        first_full = tl.where(oldest >= span.full_from, 0, tl.maximum(newest - span.max_span, 0))
        first_full = tl.cdiv(first_full, BLOCK_N) * BLOCK_N
        if not mode.causal:
            full = tl.where(oldest >= span.full_from, full, tl.minimum(full, oldest + span.max_span + 1))
            near = tl.maximum(newest + span.max_span + 1, span.num_contextuals)
            seen = tl.where(some_see_all, seen, tl.minimum(seen, near))
        context_tiles = tl.cdiv(tl.minimum(span.num_contextuals, low), BLOCK_N)
    full = full // BLOCK_N * BLOCK_N
    if mode.window:
        full = tl.where(full <= first_full, low, full)
        first_full = tl.minimum(first_full, full)
        low_tiles = (first_full - low) // BLOCK_N
    history_tiles = tl.cdiv(tl.maximum(seen - full, 0), BLOCK_N)
    own = full + history_tiles * BLOCK_N
    own_tiles = 0
    if mode.candidates:  # noqa: SIM102  # decided at compile time, the other condition at run time
        if stop_row > span.end:
            oldest_candidate = tl.maximum(first_row, span.end)
            group_start = oldest_candidate - (oldest_candidate - span.end) % span.group_tokens
            own = tl.maximum(own, group_start // BLOCK_N * BLOCK_N)
            own_tiles = tl.maximum(tl.cdiv(stop_row - own, BLOCK_N), 0)
    return KeyTiles(first_full, full, history_tiles, own, own_tiles, low, low_tiles, context_tiles)


@triton.jit
def num_masked_keys(tiles):
    """Number of key tiles that need a mask."""
    return tiles.history_tiles + tiles.own_tiles + tiles.low_tiles + tiles.context_tiles


@triton.jit
def masked_keys_at(index, tiles, mode: tl.constexpr, BLOCK_N: tl.constexpr):
    """First key of the ``index``-th key tile that needs a mask."""
    first_key = tiles.full + index * BLOCK_N
    if mode.candidates:
        own = index - tiles.history_tiles
        first_key = tl.where(own < 0, first_key, tiles.own + own * BLOCK_N)
    if mode.window:
        low = index - (tiles.history_tiles + tiles.own_tiles)
        first_key = tl.where(low >= 0, tiles.low + low * BLOCK_N, first_key)
        first_key = tl.where(low >= tiles.low_tiles, (low - tiles.low_tiles) * BLOCK_N, first_key)
    return first_key


@triton.jit
def rows_of_keys(first_key, span, mode: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """RowTiles of keys [first_key, first_key + BLOCK_N)."""
    stop_key = tl.minimum(first_key + BLOCK_N, span.length)
    first = first_key
    stop = span.length
    context_tiles, late, late_tiles, newest, newest_tiles = 0, 0, 0, 0, 0
    if mode.causal:
        masked_stop = tl.where(stop_key <= span.end, stop_key - 1, span.length)
    else:
        farthest = 0
        if mode.window:
            farthest = tl.where(first_key < span.num_contextuals, 0, tl.maximum(first_key - span.max_span, 0))
            farthest = tl.maximum(tl.minimum(farthest, span.full_from), 0)
        first = tl.where(first_key < span.end, farthest, first_key)
        masked_stop = 0
        if mode.window:
            masked_stop = stop_key - 1 - span.max_span
        masked_stop = tl.where(stop_key <= span.end, masked_stop, span.length)
    if mode.contextual:
        rows = tl.minimum(span.num_contextuals, first)
        context_tiles = tl.where(first_key < span.end, tl.cdiv(rows, BLOCK_M), 0)
    if mode.window:
        is_context = (first_key < span.num_contextuals) | (first_key >= span.end)
        stop = tl.where((stop_key + span.max_span > span.end) | is_context, stop, stop_key + span.max_span)
    if mode.candidates:  # noqa: SIM102
        if first_key >= span.end:
            last = stop_key - 1
            stop = tl.minimum(span.length, last - (last - span.end) % span.group_tokens + span.group_tokens)
            masked_stop = stop
    masked_tiles = tl.cdiv(tl.maximum(masked_stop - first, 0), BLOCK_M)
    full = first + masked_tiles * BLOCK_M
    stop_full = stop
    if mode.window:
        near = first_key + span.max_span
        stop_full = tl.where(near >= span.end, stop, tl.minimum(stop, near + 1))
        late = tl.maximum(full, stop_full)
        late_tiles = tl.cdiv(tl.maximum(stop - late, 0), BLOCK_M)
        newest = tl.maximum(span.full_from, stop)
        newest_tiles = tl.where(first_key < span.end, tl.cdiv(tl.maximum(span.length - newest, 0), BLOCK_M), 0)
    if mode.ranges:
        full = tl.maximum(full, span.first_row)
        stop_full = tl.minimum(stop_full, span.stop_row)
    return RowTiles(
        full, stop_full, first, masked_tiles, stop, context_tiles, late, late_tiles, newest, newest_tiles
    )  # fmt: skip


@triton.jit
def masked_rows_at(index, tiles, span, mode: tl.constexpr, BLOCK_M: tl.constexpr):
    """(first row, stop) of the ``index``-th row tile that needs a mask; it has at most BLOCK_M rows."""
    masked = index - tiles.context_tiles
    first_row = tiles.first + masked * BLOCK_M
    stop_row = tiles.stop
    if mode.contextual:
        first_row = tl.where(masked < 0, index * BLOCK_M, first_row)
        stop_row = tl.where(masked < 0, tiles.first, stop_row)
    if mode.window:
        late = masked - tiles.masked_tiles
        first_row = tl.where(late >= 0, tiles.late + late * BLOCK_M, first_row)
        newest = late - tiles.late_tiles
        first_row = tl.where(newest >= 0, tiles.newest + newest * BLOCK_M, first_row)
        stop_row = tl.where(newest >= 0, span.length, stop_row)
    if mode.ranges:
        stop_row = tl.minimum(tl.minimum(stop_row, first_row + BLOCK_M), span.stop_row)
        first_row = tl.maximum(first_row, span.first_row)
    return first_row, stop_row


@triton.jit
def tiles_on_diagonal(diagonal, span, mode: tl.constexpr, BLOCK: tl.constexpr):
    """Row tiles on a diagonal (row tile − key tile) with visible pairs, two runs: (first, count, late, late_count)."""
    tiles = tl.cdiv(span.length, BLOCK)
    stop = tl.minimum(tiles, tiles + diagonal)
    context_tiles = tl.cdiv(span.num_contextuals, BLOCK)
    if mode.causal:  # noqa: SIM102  # decided at compile time, the other condition at run time
        if diagonal < 0:  # only contextual rows see later keys
            stop = tl.minimum(stop, context_tiles)
    first = tl.maximum(diagonal, 0)
    count = tl.maximum(stop - first, 0)
    late, late_count = 0, 0
    if mode.window:  # noqa: SIM102
        if (tl.abs(diagonal) - 1) * BLOCK >= span.max_span:  # only context, and rows without a span
            count = tl.minimum(count, context_tiles)
            late = tl.maximum(tl.minimum(span.full_from, span.end), 0) // BLOCK
            late = tl.maximum(late, first + count)
            late_count = tl.maximum(stop - late, 0)
    if mode.ranges:
        low, high = span.first_row // BLOCK, tl.cdiv(span.stop_row, BLOCK)
        late_count = tl.maximum(tl.minimum(late + late_count, high) - tl.maximum(late, low), 0)
        count = tl.maximum(tl.minimum(first + count, high) - tl.maximum(first, low), 0)
        first, late = tl.maximum(first, low), tl.maximum(late, low)
    return first, count, late, late_count


@triton.jit
def time_buckets(query_time, token_time, thresholds):
    """Exact bucket of each time difference: float32 estimates the boundary, a comparison with its threshold decides."""
    delta = tl.maximum(tl.abs(query_time - token_time), 1)
    estimate = tl.log2(delta.to(tl.float32)) * BUCKETS_PER_LOG2
    boundary = tl.minimum((estimate + 0.5).to(tl.int32), LAST_BUCKET)
    return boundary - (delta < tl.load(thresholds + boundary)).to(tl.int32)


@triton.jit
def distance_index(i, j, end, farthest):
    """Row of the position weights for each pair; all candidates have the position of the first."""
    distance = tl.minimum(i, end) - tl.minimum(j, end)
    return tl.minimum(tl.maximum(distance, -farthest), farthest) + farthest


# The next two functions turn attributes of a Mode into compile-time constants. Triton 3.6 treats an attribute of a
# constant as a Python object, and rejects it in a shape and, unless it is a number, as an argument.


@triton.jit
def zeros(ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """A tile of float32 zeros."""
    return tl.zeros((ROWS, COLUMNS), tl.float32)


@triton.jit
def product(a, b, accumulator, mode: tl.constexpr):
    """accumulator + a @ b in float32."""
    precision: tl.constexpr = mode.precision
    return dot(a, b, accumulator, precision)


@triton.jit
def scores(a, b, i, j, alpha, span, bias, mode: tl.constexpr):
    """α a @ b + bias in float32, where a @ b is q @ kᵀ or its transpose."""
    zero = tl.zeros((a.shape[0], b.shape[1]), tl.float32)
    result = product(a, b, zero, mode) * alpha
    if mode.bias:
        query_time = tl.load(bias.query_times + i, mask=i < span.length, other=0)
        token_time = tl.load(bias.token_times + j, mask=j < span.length, other=0)
        buckets = time_buckets(query_time, token_time, bias.thresholds)
        by_position = tl.load(bias.position_weight + distance_index(i, j, span.end, bias.farthest))
        result += by_position + tl.load(bias.time_weight + buckets)
    return result
