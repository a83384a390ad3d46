"""Obviously correct, slow references in float64: one sequence, one pair of tokens at a time, no tricks.

Nothing here uses hstu.ops: the mask, the positions and the buckets are written down again from the words of the
model's definition. Gradients come from autograd.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class Token:
    """One token of a sequence."""

    kind: Literal["context", "history", "candidate"]
    index: int
    position: int
    group: int  # target group; -1 if no candidate
    time: int
    query_time: int


@dataclass(frozen=True)
class User:
    """One sequence: how many history items and candidates it has, and when they happened (one time an item)."""

    history: int
    candidates: int
    item_times: tuple[int, ...] = ()
    is_padding: bool = False


def tokens_of(user: User, *, contextuals: int, tokens_per_item: int, group_size: int) -> list[Token]:
    """The tokens of a sequence in order: context, then each history item (and action), then each candidate."""
    if user.is_padding:
        return []
    times = user.item_times or (0,) * (user.history + user.candidates)
    rows: list[tuple[Literal["context", "history", "candidate"], int, int]] = []
    rows += [("context", -1, times[0] if times else 0)] * contextuals
    for item in range(user.history):
        rows += [("history", -1, times[item])] * tokens_per_item
    for candidate in range(user.candidates):
        rows += [("candidate", candidate // group_size, times[user.history + candidate])] * tokens_per_item
    before_candidates = contextuals + user.history * tokens_per_item
    tokens = []
    for index, (kind, group, time) in enumerate(rows):
        has_next = index + 1 < before_candidates
        tokens.append(
            Token(
                kind=kind,
                index=index,
                position=min(index, before_candidates),
                group=group,
                time=time,
                query_time=rows[index + 1][2] if has_next else time,
            )
        )
    return tokens


def sees(query: Token, key: Token, *, is_causal: bool, contextual_mask: bool) -> bool:
    """Whether a token may look at another one of its sequence."""
    not_after = key.index <= query.index
    if query.kind == "candidate":
        return key.kind != "candidate" or (key.group == query.group and not_after)
    if key.kind == "candidate":
        return False
    if query.kind == "context" and contextual_mask:
        return True
    return not_after or not is_causal


def within_span(
    query: Token, key: Token, *, contextual_mask: bool, max_span: int | None, full_tokens: int, num_before: int
) -> bool:
    """Whether a span hides no token from another one; ``num_before``: context and history tokens of the sequence."""
    if max_span is None or key.kind in ("context", "candidate") or (query.kind == "context" and contextual_mask):
        return True
    if full_tokens > 0 and query.position >= num_before - full_tokens:
        return True
    return abs(query.position - key.position) <= max_span


def mask_of(
    tokens: list[Token], *, is_causal: bool, contextual_mask: bool, max_span: int | None = None, full_tokens: int = 0
) -> Tensor:
    """Which tokens of a sequence look at which: bool [queries, keys]."""
    num_before = sum(token.kind != "candidate" for token in tokens)
    window: dict[str, Any] = dict(max_span=max_span, full_tokens=full_tokens, num_before=num_before)
    pairs = [
        sees(i, j, is_causal=is_causal, contextual_mask=contextual_mask)
        and within_span(i, j, contextual_mask=contextual_mask, **window)
        for i in tokens
        for j in tokens
    ]
    return torch.tensor(pairs, dtype=torch.bool).view(len(tokens), len(tokens))


def bias_of(query: Token, key: Token, position_weight: Tensor, time_weight: Tensor) -> Tensor:
    """Learned bias of a pair: by clamped distance and by bucket of the logarithm of the time difference."""
    farthest = len(position_weight) // 2
    distance = max(-farthest, min(farthest, query.position - key.position))
    bucket = math.floor(math.log(max(1, abs(query.query_time - key.time))) / 0.301)
    return position_weight[distance + farthest] + time_weight[min(bucket, 127)]


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sequences: list[list[Token]],
    *,
    alpha: float,
    scaling_seqlen: int,
    is_causal: bool,
    contextual_mask: bool,
    bias: tuple[Tensor, Tensor] | None = None,
    max_span: int | None = None,
    full_tokens: int = 0,
) -> Tensor:
    """q, k, v: [T, H, d]; returns [T, H, d]."""
    outputs, first = [], 0
    for tokens in sequences:
        rows = slice(first, first + len(tokens))
        first += len(tokens)
        if not tokens:
            continue
        scores = alpha * torch.einsum("ihd,jhd->hij", q[rows], k[rows])
        if bias is not None:
            pairs = torch.stack([torch.stack([bias_of(i, j, *bias) for j in tokens]) for i in tokens])
            scores = scores + pairs
        window: dict[str, Any] = dict(max_span=max_span, full_tokens=full_tokens)
        mask = mask_of(tokens, is_causal=is_causal, contextual_mask=contextual_mask, **window)
        weights = scores * torch.sigmoid(scores) / scaling_seqlen * mask
        outputs.append(torch.einsum("hij,jhd->ihd", weights, v[rows]))
    return torch.cat(outputs) if outputs else q * 0 + k * 0 + v * 0


def norm_mul(tensors: Sequence[Tensor], eps: float) -> Tensor:
    """LayerNorm of x over the heads together, times u, row by row. x, u: [T, H, d]; returns [T, H · d]."""
    x, u, weight, bias = tensors
    rows = []
    for row, gate in zip(x.flatten(1), u.flatten(1), strict=True):
        mean = row.sum() / len(row)
        variance = ((row - mean) ** 2).sum() / len(row)
        rows.append(((row - mean) / (variance + eps) ** 0.5 * weight + bias) * gate)
    return torch.stack(rows) if rows else x.flatten(1) * u.flatten(1)
