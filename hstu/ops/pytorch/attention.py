"""HSTU attention in plain PyTorch, on any device and in any dtype: the reference for all kernels.

Sequences of similar length are padded to one length and computed in blocks of query rows, which backward recomputes.
Memory is bounded, and the cost follows Σ n². Padding needs no mask, because padded rows are zero. In groups without
candidates, all sequences therefore share one mask and one position bias.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hstu.data.batches.jagged import run_starts
from hstu.ops.kernels import AttentionConfig, AttentionInputs, Gradient, RelativeBias
from hstu.ops.layout import JaggedLayout, distance_index, time_buckets, to_device

MASKED = -1e30
"""Added to scores of hidden pairs: SiLU of the sum and its derivative are exactly 0."""
SCORES_PER_BLOCK = {"cpu": 2**17, "cuda": 2**26}  # CPU: a block's scores stay in cache
ROWS_PER_BLOCK = {"cpu": 64, "cuda": 1024}  # fewer rows skip more keys that are later than all of them
MOST_PAIRS_REMEMBERED = 2**25  # up to this, layers share masks and buckets; beyond, each recomputes them


@dataclass(frozen=True)
class Pairs:
    """What is added to the scores of r queries and k keys. S is 1 if all sequences share it, else b."""

    mask: Tensor  # float [S, r, k]: 0 if the query sees the key, else MASKED
    distances: Tensor | None  # int64 [S, r, k]: rows of the position weights; None without a bias
    buckets: Tensor | None  # uint8 [b, r, k]: rows of the time weights

    def added(self, tables: Sequence[Tensor]) -> Tensor:
        """Mask plus bias, [b or S, r, k]. tables: position and time weights, or none."""
        if self.distances is None or self.buckets is None:
            return self.mask
        position, time = tables  # index_select is several times as fast as position[distances]
        by_position = position.index_select(0, self.distances.flatten()).view_as(self.distances) + self.mask
        return time.index_select(0, self.buckets.flatten().long()).view_as(self.buckets) + by_position

    def add_gradients(self, grad_added: Tensor, grad_tables: Sequence[Tensor]) -> None:
        """Add to the gradients of the tables. grad_added: [b, r, k]."""
        if self.distances is None or self.buckets is None:
            return
        grad_position, grad_time = grad_tables
        grad_time.scatter_add_(0, self.buckets.flatten().long(), grad_added.flatten())
        by_distance = grad_added.sum_to_size(self.distances.shape)
        grad_position.scatter_add_(0, self.distances.flatten(), by_distance.flatten())


Block = tuple[slice, slice, Pairs]
"""Query rows of a group of padded sequences, the keys that they may see, and their pairs."""


@dataclass(kw_only=True)
class PaddedLayout(JaggedLayout):
    """A layout that also maps tokens to sequences padded to N. ``seqlens`` may be empty."""

    padded_tokens: Tensor  # int64 [B, N]: the token at each padded position; T if there is none
    places: Tensor  # int64 [T]: index of each token among the B · N padded positions
    history_ends: Tensor
    """int64 [B]: index of the first candidate token in its sequence; the sequence's length if there is none."""
    prefix_lengths: Tensor | None = None
    """int64 [B]: tokens of each sequence before those of the layout, whose keys and values are cached. None: mask and
    bias depend on distances alone, so that all sequences share one."""
    prefix_times: Tensor | None = None
    """int64 [B, P]: their times, padded at the beginning."""


def forward(inputs: AttentionInputs) -> Tensor:
    """See :data:`hstu.ops.kernels.AttentionForward`."""
    tables, alpha = _tables(inputs.bias), inputs.config.alpha
    q_rows, k_rows, v_rows = map(_with_zero_row, (inputs.q, inputs.k, inputs.v))
    out = torch.zeros_like(q_rows)
    for tokens, asking, blocks in _walk(inputs, v_rows.dtype):
        q, k, v = _pad(q_rows, asking), _pad(k_rows, tokens), _pad(v_rows, tokens)
        attended = torch.zeros_like(q)
        for r, c, pairs in blocks:
            attended[:, :, r] = _attend(q[:, :, r], k[:, :, c], v[:, :, c], pairs.added(tables), alpha)
        _unpad(attended, asking, out)
    return out[:-1].div(inputs.config.scaling_seqlen).to(inputs.v.dtype)


def backward(grad: Tensor, inputs: AttentionInputs, grads: tuple[Gradient, Gradient, Gradient]) -> RelativeBias | None:
    """See :data:`hstu.ops.kernels.AttentionBackward`."""
    config, bias = inputs.config, inputs.bias
    tables = _tables(bias)
    grad_tables = [torch.zeros_like(table) for table in tables]
    q_rows, k_rows, v_rows = map(_with_zero_row, (inputs.q, inputs.k, inputs.v))
    grad_rows = _with_zero_row(grad).div_(config.scaling_seqlen)
    grad_q, grad_k, grad_v = (torch.zeros_like(rows) for rows in (q_rows, k_rows, v_rows))
    for tokens, asking, blocks in _walk(inputs, grad_rows.dtype):
        q, k, v, grad_out = (
            _pad(*each) for each in ((q_rows, asking), (k_rows, tokens), (v_rows, tokens), (grad_rows, asking))
        )
        of_q, of_k, of_v = map(torch.zeros_like, (q, k, v))
        for r, c, pairs in blocks:
            scores = _scores(q[:, :, r], k[:, :, c], pairs.added(tables), config.alpha)
            grad_weights = grad_out[:, :, r] @ v[:, :, c].transpose(2, 3)
            grad_scores = torch.ops.aten.silu_backward(grad_weights, scores)
            of_v[:, :, c] += F.silu(scores, inplace=True).transpose(2, 3) @ grad_out[:, :, r]
            of_k[:, :, c] += grad_scores.transpose(2, 3) @ q[:, :, r]
            of_q[:, :, r] += grad_scores @ k[:, :, c]
            pairs.add_gradients(grad_scores.sum(1) if grad_scores.shape[1] > 1 else grad_scores[:, 0], grad_tables)
        for padded, places, rows in ((of_q, asking, grad_q), (of_k, tokens, grad_k), (of_v, tokens, grad_v)):
            _unpad(padded, places, rows)
    of_rows = grad_q[:-1].mul_(config.alpha), grad_k[:-1].mul_(config.alpha), grad_v[:-1]
    for gradient, rows in zip(grads, of_rows, strict=True):
        gradient.write(rows)
    return bias and RelativeBias(*(grad.to(weight.dtype) for grad, weight in zip(grad_tables, bias, strict=True)))


def padded_forward(inputs: AttentionInputs, prefix: Tensor | None = None) -> Tensor:
    """:func:`forward` for a PaddedLayout, without host integers: torch.export traces one graph for any batch.

    prefix: keys and values of earlier tokens, float [B, 2, H, P, d]. Their padding, at the beginning, is zeros: it adds
    nothing.
    """
    layout, config, tables = inputs.layout, inputs.config, _tables(inputs.bias)
    assert isinstance(layout, PaddedLayout)
    together = _pad(_with_zero_row(torch.cat([inputs.q, inputs.k, inputs.v], dim=-1)), layout.padded_tokens)
    q, k, v = together.split([inputs.q.shape[-1], inputs.k.shape[-1], inputs.v.shape[-1]], dim=-1)
    if prefix is not None:
        k, v = (torch.cat([earlier, new], dim=2) for earlier, new in zip(prefix.unbind(1), (k, v), strict=True))
    key = ("padded attention", config, len(tables))
    if key not in layout.cache:
        pairs = _padded_pairs(inputs, layout, 0 if prefix is None else prefix.shape[3], q.dtype)
        buckets = None if pairs.buckets is None else pairs.buckets.long()  # once, not in each layer
        layout.cache[key] = replace(pairs, buckets=buckets)
    out = _attend(q, k, v, layout.cache[key].added(tables), config.alpha).transpose(1, 2).flatten(0, 1)
    return out.index_select(0, layout.places).div(config.scaling_seqlen).to(inputs.v.dtype)


def _padded_pairs(inputs: AttentionInputs, layout: PaddedLayout, num_earlier: int, dtype: torch.dtype) -> Pairs:
    """Pairs of the tokens of a PaddedLayout with ``num_earlier`` padded tokens of the prefix, and with each other."""
    tokens, ends = layout.padded_tokens, layout.history_ends[:, None, None]
    j = torch.arange(num_earlier + tokens.shape[1], device=tokens.device)[None]
    i, times = j[:, num_earlier:], _times_of(inputs, tokens)
    if layout.prefix_times is not None and times is not None:
        times = times[0], torch.cat([layout.prefix_times, times[1]], dim=1)
    if layout.prefix_lengths is None:
        ends = ends + num_earlier
    else:
        padding = num_earlier - layout.prefix_lengths[:, None]
        i, j = i - padding, j - padding
    return _pairs_of(inputs, i[:, :, None], j[:, None], ends, times, dtype)


def _attend(q: Tensor, k: Tensor, v: Tensor, added: Tensor, alpha: float) -> Tensor:
    """SiLU(α q kᵀ + added) v, [b, H, r, d], for q [b, H, r, d], k and v [b, H, k, d], added [b or 1, r, k]."""
    return F.silu(_scores(q, k, added, alpha), inplace=True) @ v


def _scores(q: Tensor, k: Tensor, added: Tensor, alpha: float) -> Tensor:
    return ((q * alpha) @ k.transpose(2, 3)).add_(added[:, None])


def is_visible(i: Tensor, j: Tensor, end: Tensor, layout: JaggedLayout, config: AttentionConfig) -> Tensor:
    """bool [S, r, k]: whether token i of a sequence sees token j; ``end`` is its first candidate token."""
    before = j <= i
    in_history = before if config.is_causal else torch.ones_like(before)
    if config.contextual_mask:
        in_history = in_history | (i < layout.num_contextuals)
    if config.max_span is not None:
        position = torch.minimum(i, end)
        near = (position - j).abs() <= config.max_span
        no_limit = config.has_no_limit(position, end) | (j < layout.num_contextuals)
        if config.contextual_mask:
            no_limit = no_limit | (i < layout.num_contextuals)
        in_history = in_history & (near | no_limit)
    group_i, group_j = ((x - end).div(layout.candidate_group_tokens, rounding_mode="floor") for x in (i, j))
    return torch.where(j < end, in_history, before & (group_i == group_j))


# -- jagged rows to padded groups and back -----------------------------------------------------------------------


def _with_zero_row(x: Tensor) -> Tensor:
    """[T + 1, H, d] in float32 at least; padded positions read the last row, which is zero."""
    return F.pad(x.to(torch.promote_types(x.dtype, torch.float32)), (0, 0, 0, 0, 0, 1))


def _pad(rows: Tensor, tokens: Tensor) -> Tensor:
    """[T + 1, H, d] → [b, H, n, d]."""
    return rows.index_select(0, tokens.flatten()).unflatten(0, tokens.shape).transpose(1, 2).contiguous()


def _unpad(padded: Tensor, tokens: Tensor, rows: Tensor) -> None:
    """[b, H, n, d] → its rows of [T + 1, H, d]. Padded positions go to the last row."""
    rows.index_copy_(0, tokens.flatten(), padded.transpose(1, 2).flatten(0, 1))


def _tables(bias: RelativeBias | None) -> list[Tensor]:
    return [weight.to(torch.promote_types(weight.dtype, torch.float32)) for weight in bias or ()]


# -- groups and blocks -------------------------------------------------------------------------------------------


def _walk(inputs: AttentionInputs, dtype: torch.dtype) -> Iterable[tuple[Tensor, Tensor, Iterable[Block]]]:
    """For each group of sequences, its rows of k and of q, int64 [b, n] with T for padding, and its blocks."""
    layout, heads = inputs.layout, inputs.q.shape[1]
    num_weights = 0 if inputs.bias is None else len(inputs.bias.position_weight)
    key = ("attention", inputs.config, num_weights, heads, dtype, inputs.queries)
    if key in layout.cache:
        return layout.cache[key]
    of_groups = groups(layout, inputs.config, heads, inputs.queries)
    walk = ((each.tokens, each.asking, _blocks(inputs, each, dtype)) for each in of_groups)
    if (layout.seqlens**2).sum() > MOST_PAIRS_REMEMBERED:
        return walk
    layout.cache[key] = [(tokens, asking, [*blocks]) for tokens, asking, blocks in walk]
    return layout.cache[key]


class Group(NamedTuple):
    """b sequences padded to n tokens."""

    tokens: Tensor  # int64 [b, n]: row of k and v; T for padding
    asking: Tensor  # int64 [b, n]: row of q; the number of queries for padding and for tokens that are no queries
    end: Tensor  # int64 [S, 1, 1]: index of the first candidate; S = 1 if the mask does not depend on it, else b
    rows: range  # Indices of all queries


def groups(layout: JaggedLayout, config: AttentionConfig, heads: int, queries: range | None = None) -> Iterator[Group]:
    """Groups of sequences, the longest first. queries: see :class:`AttentionInputs`."""
    device = layout.positions.device
    budget = max(SCORES_PER_BLOCK[device.type] // heads, 1)
    starts, order = run_starts(layout.seqlens), layout.longest_first
    order = order[layout.seqlens[order] > 0]
    while len(order):
        length = int(layout.seqlens[order[0]])
        size = max(budget // (min(length, ROWS_PER_BLOCK[device.type]) * length), 1)
        members, order = order[:size], order[size:]
        lengths, candidates = layout.seqlens[members], layout.num_candidate_tokens_host[members]
        index = np.arange(length)
        tokens = np.where(index < lengths[:, None], starts[members, None] + index, layout.num_tokens)
        depends = candidates.any() or (config.max_span is not None and config.full_tokens > 0)
        history_end = lengths - candidates if depends else np.array([length])
        tokens_on_device, rows = to_device(tokens, device), range(length)
        asking = tokens_on_device
        if queries is not None:
            is_query = (tokens >= queries.start) & (tokens < queries.stop)
            asking = to_device(np.where(is_query, tokens - queries.start, len(queries)), device)
            found = np.flatnonzero(is_query.any(0))
            rows = range(found[0], found[-1] + 1) if len(found) else range(0)
        yield Group(tokens_on_device, asking, to_device(history_end, device)[:, None, None], rows)


def _blocks(inputs: AttentionInputs, group: Group, dtype: torch.dtype) -> Iterator[Block]:
    config, layout, (tokens, _, end, queries) = inputs.config, inputs.layout, group
    step = ROWS_PER_BLOCK[tokens.device.type]
    for start in queries[::step]:
        rows = slice(start, min(start + step, queries.stop))
        sees_later = not config.is_causal or (config.contextual_mask and start < layout.num_contextuals)
        keys = slice(0, tokens.shape[1] if sees_later else rows.stop)
        index = torch.arange(tokens.shape[1], device=tokens.device)
        times = _times_of(inputs, tokens)
        if times is not None:
            times = times[0][:, rows], times[1][:, keys]
        i, j = index[None, rows, None], index[None, None, keys]
        yield rows, keys, _pairs_of(inputs, i, j, end, times, dtype)


def _times_of(inputs: AttentionInputs, tokens: Tensor) -> tuple[Tensor, Tensor] | None:
    """int64 [b, n]: times of padded tokens as queries and as keys. None without a bias."""
    if inputs.bias is None:
        return None
    layout = inputs.layout
    assert layout.query_times is not None and layout.token_times is not None
    return F.pad(layout.query_times, (0, 1))[tokens], F.pad(layout.token_times, (0, 1))[tokens]


def _pairs_of(
    inputs: AttentionInputs, i: Tensor, j: Tensor, end: Tensor, times: tuple[Tensor, Tensor] | None, dtype: torch.dtype
) -> Pairs:
    """Pairs of queries at ``i`` [S, r, 1] and keys at ``j`` [S, 1, k], with their times [b, r] and [b, k]."""
    hidden = ~is_visible(i, j, end, inputs.layout, inputs.config)
    mask = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, MASKED)
    if inputs.bias is None or times is None:
        return Pairs(mask, None, None)
    distances = distance_index(torch.minimum(i, end), torch.minimum(j, end), len(inputs.bias.position_weight))
    return Pairs(mask, distances, time_buckets(times[0][:, :, None] - times[1][:, None]))
