"""Every kernel in the variants that training meets, as launches recorded from the wrappers themselves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hstu.ops.attention import AttentionRule, attend
from hstu.ops.backends import Backend
from hstu.ops.jagged import token_order
from hstu.ops.layer_norm import layer_norm
from hstu.ops.layout import JaggedLayout, build_layout
from hstu.ops.norm_mul_dropout import GateRule, norm_mul_dropout
from hstu.ops.ranks import Ranks
from hstu.ops.relative_bias import NUM_TIME_BUCKETS, RelativeBias
from hstu.ops.triton import attention
from hstu.ops.triton.jagged import jagged_concat
from hstu.ops.triton.launch import Launch, recorded_launches
from hstu.ops.triton.positions import add_positions
from hstu.ops.triton.slots import SlotIndex
from hstu.ops.triton.softmax_loss import PoolSoftmaxLoss, SampledSoftmaxLoss
from hstu.ops.uvqk import activate, project_uvqk

HEADS = 2
LENGTHS = np.array([48, 16])
HIDDEN = 1024


@dataclass(frozen=True)
class Variant:
    """A call of an op, forward and backward, and what it is an example of."""

    op: str
    head_dim: int
    """0 where the op has no heads."""
    description: str
    run: Callable[[], None]


def record(variant: Variant, capability: int) -> list[Launch]:
    """What the variant would launch on compute capability ``capability`` (90 for 9.0)."""
    with recorded_launches(divmod(capability, 10)) as launches:
        variant.run()
    return launches


def variants() -> list[Variant]:
    """All of them."""
    return [
        *(_attention(width, torch.bfloat16, *parts) for width in (16, 32, 64, 128, 256) for parts in ATTENTION_PARTS),
        *(_attention(width, torch.float32, *parts) for width in (64, 128) for parts in ATTENTION_PARTS[::2]),
        Variant("layer_norm", 0, f"[T, {HIDDEN}], float32 in", _run_layer_norm),
        *(_norm(width, split) for width in (64, 256) for split in (False, True)),
        Variant("uvqk", 256, f"{HIDDEN} → {HEADS} × 4 × 256, bfloat16", lambda: _run_uvqk(torch.bfloat16)),
        Variant("uvqk", 256, f"{HIDDEN} → {HEADS} × 4 × 256, float32", lambda: _run_uvqk(torch.float32)),
        Variant("activate", 256, f"{HEADS} × 4 × 256, bfloat16", _run_activate),
        Variant("jagged_concat", 0, f"[T, {HIDDEN}], float32", _run_jagged),
        Variant("add_positions", 0, f"[T, {HIDDEN}], float32", _run_positions),
        *(
            Variant(op, 0, f"[M, {width}], float32", lambda op=op, width=width: _run_softmax(op, width))  # type: ignore[misc]
            for op in ("pool_softmax_loss", "sampled_softmax_loss")
            for width in (64, 256)
        ),
        *(Variant("slots", 0, policy, lambda policy=policy: _run_slots(policy)) for policy in ("lru", "lfu")),  # type: ignore[misc]
    ]


ATTENTION_PARTS = (("causal",), ("causal", "context", "candidates"), ("causal", "bias"), ("bidirectional", "bias"))


def _attention(head_dim: int, dtype: torch.dtype, *parts: str) -> Variant:
    description = f"{', '.join(parts)}, {str(dtype).removeprefix('torch.')}"
    return Variant("hstu_attention", head_dim, description, lambda: _run_attention(head_dim, dtype, parts))


def _run_attention(head_dim: int, dtype: torch.dtype, parts: tuple[str, ...]) -> None:
    layout = _layout(contextuals=2 * ("context" in parts), candidates=4 * ("candidates" in parts))
    projected = torch.zeros(layout.num_tokens, HEADS, 4, head_dim, dtype=dtype, requires_grad=True)
    _, v, q, k = projected.unbind(2)
    bias = None
    if "bias" in parts:
        bias = RelativeBias(*(torch.zeros(n, requires_grad=True) for n in (2 * 64 - 1, NUM_TIME_BUCKETS)))
    out = attend(q, k, v, layout, AttentionRule(head_dim**-0.5, 64, "causal" in parts, True), bias, attention)
    out.backward(torch.zeros_like(out))


class _TwoAlike(Ranks):
    """Two ranks with the same heads."""

    count = 2

    def gather(self, own: Tensor) -> Tensor:
        """See :class:`Ranks`."""
        return torch.stack([own, own])


def _norm(head_dim: int, split: bool) -> Variant:
    where = "heads on 2 ranks" if split else "one rank"
    return Variant("norm_mul_dropout", head_dim, f"{HEADS} heads, {where}", lambda: _run_norm(head_dim, split))


def _run_norm(head_dim: int, split: bool) -> None:
    _, x, u, _ = _zeros(64, HEADS, 4, head_dim, dtype=torch.bfloat16).unbind(2)
    weight, bias = _zeros(HEADS * head_dim), _zeros(HEADS * head_dim)
    rule = GateRule(1e-5, 0.2, _TwoAlike() if split else Ranks())
    norm_mul_dropout(x, u, weight, bias, rule, Backend.TRITON).float().sum().backward()


def _run_layer_norm() -> None:
    layer_norm(_zeros(64, HIDDEN), _zeros(HIDDEN), _zeros(HIDDEN), 1e-5, None, Backend.TRITON).sum().backward()


def _run_uvqk(dtype: torch.dtype) -> None:
    width = HEADS * 4 * 256
    x, weight, bias = (_zeros(*shape, dtype=dtype) for shape in ((64, HIDDEN), (width, HIDDEN), (width,)))
    project_uvqk(x, weight, bias, Backend.TRITON).sum().backward()


def _run_activate() -> None:
    activate(_zeros(64, HEADS * 4 * 256, dtype=torch.bfloat16), Backend.TRITON)


def _run_jagged() -> None:
    layout = _layout(contextuals=1, candidates=0)
    items = _zeros(int(layout.num_items.sum()), HIDDEN)
    jagged_concat([_zeros(len(LENGTHS), HIDDEN), items], token_order(layout)).sum().backward()


def _run_positions() -> None:
    layout = _layout(contextuals=0, candidates=0)
    add_positions(_zeros(layout.num_tokens, HIDDEN), _zeros(8192, HIDDEN), layout.positions).sum().backward()


def _run_softmax(op: str, width: int) -> None:
    vectors = _zeros(64, width), _zeros(64, width), _zeros(48, width)
    targets, ids = torch.zeros(64, dtype=torch.int64), torch.zeros(48, dtype=torch.int64)
    if op == "pool_softmax_loss":
        PoolSoftmaxLoss.apply(*vectors, targets, ids, torch.ones(48, dtype=torch.bool), 0.05)
    else:
        SampledSoftmaxLoss.apply(*vectors, torch.zeros(64, 128, dtype=torch.int64), targets, ids, 0.05)


def _run_slots(policy: str) -> None:
    index, (ids, scores, counts) = SlotIndex(64, "cpu"), torch.zeros(3, 64, dtype=torch.int64)
    index.find(ids, ids)
    for occurrences in (None, counts):
        index.count(ids, ids, occurrences, scores, 1, lfu=policy == "lfu")
    index.insert(ids, ids)
    index.erase(ids, ids)


def _zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(shape, dtype=dtype, requires_grad=True)


def _layout(contextuals: int, candidates: int) -> JaggedLayout:
    return build_layout(
        item_lengths=LENGTHS,
        num_sequences=len(LENGTHS),
        num_contextuals=contextuals,
        num_candidates=np.full(len(LENGTHS), candidates),
        tokens_per_item=1,
        target_group_size=2,
        device=torch.device("cpu"),
        item_times=torch.zeros(int(LENGTHS.sum()), dtype=torch.int64),
    )
