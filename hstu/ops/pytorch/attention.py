"""HSTU attention in plain PyTorch, on any device, in bounded memory and at a cost proportional to Σ n².

Sequences are sorted by length and cut into groups of similar ones, padded to the longest of the group; a group is
worked on in blocks of query rows, each against the keys it may see: with a window, those of context and the window.
Only q, k and v are kept for backward, which computes the scores again block by block.

Two things make it fast:

- Padding needs no mask. Padded rows of q, k, v and of the output's gradient are zero, so whatever a padded pair
  scores is multiplied by zero on its way into any result. In groups without candidates all sequences therefore share
  one mask and one position bias.
- The mask is added to the scores rather than multiplied: ``SiLU(MASKED)`` and its derivative are exactly 0.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hstu.data.batches.jagged import run_starts
from hstu.ops.kernels import AttentionConfig, AttentionInputs, Gradient, RelativeBias
from hstu.ops.layout import JaggedLayout, distance_index, time_buckets, to_device

MASKED = -1e30
SCORES_PER_BLOCK = {"cpu": 2**17, "cuda": 2**26}  # CPU: the score matrices of a block stay in its cache
ROWS_PER_BLOCK = {"cpu": 64, "cuda": 1024}  # fewer rows skip more of the keys that a causal row cannot see
MOST_PAIRS_REMEMBERED = 2**25  # of masks and buckets that are kept from layer to layer; beyond, they are made again


@dataclass
class Terms:
    """What is added to a block's scores, apart from the weights. S is 1 where all sequences share it, else b."""

    mask: Tensor
    """float [S, r, k]: 0 where the query may see the key, else MASKED."""
    distance: Tensor | None
    """int64 [S · r · k]: rows of the position weights."""
    buckets: Tensor | None
    """uint8 [b · r · k]: rows of the time weights."""


@dataclass
class Block:
    """Query rows [start, stop) of a group and its keys [first_key, stop_key). Rows may have several blocks."""

    start: int
    stop: int
    first_key: int
    stop_key: int
    terms: Terms | None = None

    @property
    def rows(self) -> slice:
        """The queries."""
        return slice(self.start, self.stop)

    @property
    def keys(self) -> slice:
        """The keys."""
        return slice(self.first_key, self.stop_key)

    @property
    def num_scores(self) -> int:
        """Scores of one head of one sequence."""
        return (self.stop - self.start) * (self.stop_key - self.first_key)


@dataclass
class Group:
    """b sequences of similar lengths, padded to n tokens."""

    tokens: Tensor
    """int64 [b · n]: token of each padded place; T (one past the last) where there is none."""
    size: int
    length: int
    history_end: Tensor
    """int64 [S, 1, 1]: first candidate token; S is 1 (and this n) where the mask does not depend on it."""
    blocks: list[Block] = field(default_factory=list)


@dataclass
class Plan:
    """How the sequences of a layout are grouped."""

    groups: list[Group]
    remembers: bool


def forward(inputs: AttentionInputs) -> Tensor:
    """See :data:`hstu.ops.kernels.AttentionForward`."""
    config, weights = inputs.config, _in_compute_type(inputs.bias)
    q_rows, k_rows, v_rows = map(_with_zero_row, (inputs.q, inputs.k, inputs.v))
    out = torch.zeros_like(v_rows)
    for group, blocks in _walk(inputs.layout, config, weights, heads=q_rows.shape[1], dtype=out.dtype):
        q_pad, k_pad, v_pad = (_pad(rows, group) for rows in (q_rows, k_rows, v_rows))
        out_pad = torch.zeros_like(v_pad)
        for block, terms in blocks:
            scores = _scores(q_pad[:, block.rows], k_pad[:, block.keys], terms, weights, config.alpha)
            out_pad[:, block.rows] += F.silu(scores, inplace=True) @ v_pad[:, block.keys]
        _unpad(out_pad, group, out)
    return out[:-1].div(config.scaling_seqlen).to(inputs.v.dtype)


def backward(grad: Tensor, inputs: AttentionInputs, grads: tuple[Gradient, Gradient, Gradient]) -> RelativeBias | None:
    """See :data:`hstu.ops.kernels.AttentionBackward`."""
    config, bias, heads = inputs.config, inputs.bias, inputs.q.shape[1]
    weights = _in_compute_type(bias)
    grad_weights = None if weights is None else tuple(torch.zeros_like(weight) for weight in weights)
    q_rows, k_rows, v_rows = map(_with_zero_row, (inputs.q, inputs.k, inputs.v))
    grad_rows = _with_zero_row(grad).div_(config.scaling_seqlen)
    grad_q, grad_k, grad_v = (torch.zeros_like(rows) for rows in (q_rows, k_rows, v_rows))
    for group, blocks in _walk(inputs.layout, config, weights, heads, dtype=grad_rows.dtype):
        q_pad, k_pad, v_pad, grad_pad = (_pad(rows, group) for rows in (q_rows, k_rows, v_rows, grad_rows))
        grad_q_pad, grad_k_pad, grad_v_pad = map(torch.zeros_like, (q_pad, k_pad, v_pad))
        for block, terms in blocks:
            rows, keys = block.rows, block.keys
            scores = _scores(q_pad[:, rows], k_pad[:, keys], terms, weights, config.alpha)
            grad_scores = grad_pad[:, rows] @ v_pad[:, keys].transpose(1, 2)
            grad_scores = torch.ops.aten.silu_backward(grad_scores, scores)
            weighted = F.silu(scores, inplace=True)
            # Not baddbmm_: into a slice it multiplies one sequence at a time.
            grad_v_pad[:, keys] += weighted.transpose(1, 2) @ grad_pad[:, rows]
            grad_k_pad[:, keys] += grad_scores.transpose(1, 2) @ q_pad[:, rows]
            grad_q_pad[:, rows] += grad_scores @ k_pad[:, keys]
            if grad_weights is not None:
                _add_weight_gradients(grad_scores, terms, grad_weights, heads)
        _unpad(grad_q_pad, group, grad_q)
        _unpad(grad_k_pad, group, grad_k)
        _unpad(grad_v_pad, group, grad_v)
    scaled = grad_q[:-1].mul_(config.alpha), grad_k[:-1].mul_(config.alpha), grad_v[:-1]
    for gradient, written in zip(scaled, grads, strict=True):
        written.write(gradient)
    if bias is None or grad_weights is None:
        return None
    position, time = grad_weights
    return RelativeBias(position.to(bias.position_weight.dtype), time.to(bias.time_weight.dtype))


# -- scores ------------------------------------------------------------------------------------------------------


def _scores(q: Tensor, k: Tensor, terms: Terms, weights: tuple[Tensor, Tensor] | None, alpha: float) -> Tensor:
    """α q kᵀ + bias, MASKED where a query may not look: [b · H, r, k] for q [b · H, r, d] and k [b · H, k, d]."""
    added = terms.mask
    if weights is not None:
        position_weight, time_weight = weights
        assert terms.distance is not None and terms.buckets is not None
        by_position = position_weight.index_select(0, terms.distance).view_as(added).add_(added)
        added = time_weight.index_select(0, terms.buckets.long()).view(-1, *added.shape[1:]).add_(by_position)
    heads = len(q) // len(added)
    if len(added) == 1 or heads == 1:
        return torch.baddbmm(added, q, k.transpose(1, 2), alpha=alpha)
    return added.repeat_interleave(heads, dim=0).baddbmm_(q, k.transpose(1, 2), alpha=alpha)


def _add_weight_gradients(grad_scores: Tensor, terms: Terms, grad_weights: tuple[Tensor, ...], heads: int) -> None:
    """Add a block's share to the gradients of the position and time weights. grad_scores: [b · H, r, k]."""
    grad_position, grad_time = grad_weights
    assert terms.distance is not None and terms.buckets is not None
    if heads > 1:
        grad_scores = grad_scores.view(-1, heads, *grad_scores.shape[1:]).sum(1)
    grad_time.scatter_add_(0, terms.buckets.long(), grad_scores.reshape(-1))
    if len(terms.mask) == 1:
        grad_scores = grad_scores.sum(0)
    grad_position.scatter_add_(0, terms.distance, grad_scores.reshape(-1))


# -- jagged rows to padded groups and back -----------------------------------------------------------------------


def _with_zero_row(x: Tensor) -> Tensor:
    """[T, H, d] in the compute type, with a row of zeros behind: what padded places read."""
    out = x.new_empty((len(x) + 1, *x.shape[1:]), dtype=_compute_type(x.dtype))
    out[:-1] = x
    out[-1] = 0
    return out


def _pad(rows: Tensor, group: Group) -> Tensor:
    """[T + 1, H, d] → [b · H, n, d]."""
    padded = rows.index_select(0, group.tokens).view(group.size, group.length, *rows.shape[1:])
    return padded.transpose(1, 2).reshape(-1, group.length, rows.shape[2])


def _unpad(padded: Tensor, group: Group, rows: Tensor) -> None:
    """[b · H, n, d] → its rows of [T + 1, H, d]; the last row takes what padded places hold."""
    _, heads, width = rows.shape
    padded = padded.view(group.size, heads, group.length, width).transpose(1, 2)
    rows.index_copy_(0, group.tokens, padded.reshape(-1, heads, width))


def _compute_type(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _in_compute_type(bias: RelativeBias | None) -> tuple[Tensor, Tensor] | None:
    if bias is None:
        return None
    position, time = bias.position_weight, bias.time_weight
    return position.to(_compute_type(position.dtype)), time.to(_compute_type(time.dtype))


# -- the plan ----------------------------------------------------------------------------------------------------


def _walk(
    layout: JaggedLayout, config: AttentionConfig, weights: tuple[Tensor, Tensor] | None, heads: int, dtype: torch.dtype
) -> Iterator[tuple[Group, Iterator[tuple[Block, Terms]]]]:
    """Iterate over the groups of sequences, and in each over its blocks of scores with their masks and bias terms.

    The first call for a layout makes the plan; the layout's cache keeps plan and terms for other layers and backward.
    """
    num_weights = 0 if weights is None else len(weights[0])
    key = ("attention", config, num_weights, heads, dtype)
    if key not in layout.cache:
        layout.cache[key] = _make_plan(layout, config, heads)
    plan: Plan = layout.cache[key]

    def blocks_of(group: Group) -> Iterator[tuple[Block, Terms]]:
        for block in group.blocks:
            terms = block.terms or _make_terms(group, block, layout, config, num_weights, dtype)
            if plan.remembers:
                block.terms = terms
            yield block, terms

    for group in plan.groups:
        yield group, blocks_of(group)


def _make_plan(layout: JaggedLayout, config: AttentionConfig, heads: int) -> Plan:
    device = layout.positions.device
    budget = max(SCORES_PER_BLOCK[device.type] // heads, 1)
    order = np.argsort(-layout.seqlens, kind="stable")
    order = order[layout.seqlens[order] > 0]
    offsets = run_starts(layout.seqlens)
    groups, first = [], 0
    while first < len(order):
        length = int(layout.seqlens[order[first]])
        rows = min(length, ROWS_PER_BLOCK[device.type])
        if config.max_span is not None:
            rows = min(rows, max(config.max_span, ROWS_PER_BLOCK["cpu"]))
        members = order[first : first + max(budget // (rows * length), 1)]
        groups.append(_make_group(layout, config, members, offsets, length))
        groups[-1].blocks = _make_blocks(layout, config, members, length, rows)
        first += len(members)
    pairs = sum(g.size * block.num_scores for g in groups for block in g.blocks)
    return Plan(groups, remembers=pairs <= MOST_PAIRS_REMEMBERED)


def _make_group(
    layout: JaggedLayout, config: AttentionConfig, members: np.ndarray, offsets: np.ndarray, length: int
) -> Group:
    place = np.arange(length)
    tokens = np.where(place < layout.seqlens[members, None], offsets[members, None] + place, layout.num_tokens)
    candidates = layout.num_candidate_tokens_host[members]
    depends = candidates.any() or (config.max_span is not None and config.full_tokens > 0)
    history_end = layout.seqlens[members] - candidates if depends else np.array([length])
    device = layout.positions.device
    return Group(
        tokens=to_device(tokens.reshape(-1), device),
        size=len(members),
        length=length,
        history_end=to_device(history_end, device)[:, None, None],
    )


def _make_blocks(
    layout: JaggedLayout, config: AttentionConfig, members: np.ndarray, length: int, rows: int
) -> list[Block]:
    lengths = layout.seqlens[members]
    ends = lengths - layout.num_candidate_tokens_host[members]
    blocks = []
    for start in range(0, length, rows):
        stop = min(start + rows, length)
        first, last = _key_range(start, stop, lengths, ends, config)
        if config.contextual_mask and start < layout.num_contextuals:
            first, last = 0, length
        elif first <= layout.num_contextuals:
            first, last = 0, last if config.is_causal else max(last, layout.num_contextuals)
        if first > 0 and layout.num_contextuals:
            blocks.append(Block(start, stop, 0, layout.num_contextuals))
        blocks.append(Block(start, stop, first, min(last, length)))
    return blocks


def _key_range(
    start: int, stop: int, lengths: np.ndarray, ends: np.ndarray, config: AttentionConfig
) -> tuple[int, int]:
    """Range of keys with all that rows [start, stop) see, but for context and what contextual rows see.

    lengths, ends: tokens of each sequence of the group, and those before its candidates.
    """
    longest = int(lengths.max())
    no_limit = config.max_span is None or config.has_no_limit(np.minimum(stop - 1, ends), ends)[start < lengths].any()
    if config.max_span is None or no_limit:
        return 0, stop if config.is_causal else longest
    first = int(np.minimum(start, ends[start < lengths]).min()) - config.max_span
    return max(first, 0), stop if config.is_causal else stop + config.max_span


def _make_terms(
    group: Group, block: Block, layout: JaggedLayout, config: AttentionConfig, num_weights: int, dtype: torch.dtype
) -> Terms:
    device = layout.positions.device
    i = torch.arange(block.start, block.stop, device=device)[None, :, None]
    j = torch.arange(block.first_key, block.stop_key, device=device)[None, None, :]
    end = group.history_end
    hidden = ~is_visible(i, j, end, layout, config)
    mask = torch.zeros(hidden.shape, dtype=dtype, device=device).masked_fill_(hidden, MASKED)
    if not num_weights:
        return Terms(mask, None, None)
    distance = distance_index(torch.minimum(i, end), torch.minimum(j, end), num_weights)
    assert layout.query_times is not None and layout.token_times is not None
    tokens = group.tokens.clamp(max=layout.num_tokens - 1).view(group.size, group.length)
    query_times = layout.query_times[tokens[:, block.rows]]
    token_times = layout.token_times[tokens[:, block.keys]]
    buckets = time_buckets(query_times[:, :, None] - token_times[:, None, :])
    return Terms(mask, distance.reshape(-1), buckets.reshape(-1))


def is_visible(i: Tensor, j: Tensor, end: Tensor, layout: JaggedLayout, config: AttentionConfig) -> Tensor:
    """bool [S, r, k]: whether token i of a sequence may look at token j; ``end`` is its first candidate token."""
    before = j <= i
    in_history = before if config.is_causal else torch.ones_like(before)
    if config.contextual_mask:
        in_history = in_history | (i < layout.num_contextuals)
    if config.max_span is not None:
        in_history = in_history & _within_span(i, j, end, layout, config, config.max_span)
    group_tokens = layout.candidate_group_tokens
    group_i = (i - end).div(group_tokens, rounding_mode="floor")
    group_j = (j - end).div(group_tokens, rounding_mode="floor")
    return torch.where(j < end, in_history, before & (group_i == group_j))


def _within_span(i: Tensor, j: Tensor, end: Tensor, layout: JaggedLayout, config: AttentionConfig, span: int) -> Tensor:
    """bool [S, r, k]: whether token j of context and history is not too far from token i."""
    position = torch.minimum(i, end)
    near = (position - j).abs() <= span
    no_limit = config.has_no_limit(position, end)
    if config.contextual_mask:
        no_limit = no_limit | (i < layout.num_contextuals)
    return near | no_limit | (j < layout.num_contextuals)
