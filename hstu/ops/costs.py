"""Floating-point operations and memory traffic of the operators: the one place for MFU, benchmarks and estimates.

``sequence_flops`` is the reported count of a training step. It follows NVIDIA recsys-examples, so that TFLOPS and MFU
compare with its published numbers: the arithmetic of the HSTU layers alone, without embedding tables, norms, heads,
losses and recomputation.

The other functions return the costs of an operator with a kernel of its own on one rank (:mod:`hstu.ops.fake` reports
them in a step that computes nothing). Bytes are those that the kernels read and write if nothing stays in a cache.
``element_size``: bytes of the compute type. What a loss costs includes its gradients, which forward computes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Integers = npt.NDArray[np.integer]
Floats = npt.NDArray[np.float64]

FLOAT32 = 4
"""Bytes of a parameter, a gradient and an optimizer state."""
PROJECTION_PASSES = 3.0
"""Forward and backward over forward: backward has two products, by the input and by the weight."""
ATTENTION_PASSES = 3.5
"""Forward and backward over forward: 2 products (QKᵀ, PV), then 5 (QKᵀ again, dV, dP, dQ, dK)."""


class Cost(NamedTuple):
    """One pass of an operator."""

    flops: float
    """Arithmetic of matrix products; 0 for an operator that only moves bytes."""
    bytes: float
    """Read from and written to memory."""
    launches: int = 1
    """Kernels started."""


class TwoPasses(NamedTuple):
    """An operator with a backward."""

    forward: Cost
    backward: Cost


class Window(NamedTuple):
    """What hides far tokens from attention, as in :class:`hstu.ops.kernels.AttentionConfig`."""

    max_span: int | None
    """None: nothing is hidden."""
    full_tokens: int
    num_contextuals: int
    """Tokens that are seen from everywhere."""


NO_WINDOW = Window(None, 0, 0)


def sequence_flops(
    tokens: Integers,
    candidate_tokens: Integers,
    *,
    num_layers: int,
    hidden_size: int,
    num_heads: int,
    head_dim: int,
    is_causal: bool = True,
    windows: Sequence[Window] = (),
) -> Floats:
    """Floating-point operations of training (forward and backward) on each sequence, float64 [B].

    tokens, candidate_tokens: host integers [B], T and C below. With L layers of width D and H heads of width d::

        L · [ 3·2·T·D·4Hd  +  3·2·T·Hd·D  +  3.5·(4·H·T²·d − 2·H·(T−C)²·d) ]

    The terms are the uvqk projection, the output projection and the attention. A causal mask removes half of the
    attention among the T − C tokens that are not candidates; without one nothing is subtracted. Without candidates
    this is a·T + b·T² with a = 30·L·D·Hd and b = 7·L·Hd (14·L·Hd, if not causal). ``windows``, one per layer if there
    are any, take off 3.5·4·H·d for each pair that they hide.
    """
    total = num_layers * PROJECTION_PASSES * projection_flops(tokens, hidden_size, num_heads, head_dim)
    for window, layers in Counter(windows or [NO_WINDOW] * num_layers).items():
        attention = attention_flops(tokens, candidate_tokens, num_heads, head_dim, is_causal, window)
        total = total + layers * ATTENTION_PASSES * attention
    return np.asarray(total)


def projection_flops(tokens: Integers, hidden_size: int, num_heads: int, head_dim: int) -> Floats:
    """Forward of the uvqk and the output projection of one layer, float64 [B]."""
    return np.asarray(2.0 * np.asarray(tokens, dtype=np.float64) * hidden_size * (5 * num_heads * head_dim))


def attention_flops(
    tokens: Integers,
    candidate_tokens: Integers,
    num_heads: int,
    head_dim: int,
    is_causal: bool = True,
    window: Window = NO_WINDOW,
) -> Floats:
    """Forward of the attention of one layer, float64 [B]."""
    length = np.asarray(tokens, dtype=np.float64)
    candidates = np.asarray(candidate_tokens, dtype=np.float64)
    history = length - candidates
    width = num_heads * head_dim
    masked = 2.0 * width * history**2 if is_causal else 0.0
    return np.asarray(4.0 * width * (length**2 - hidden_pairs(history, candidates, is_causal, window)) - masked)


def hidden_pairs(history: Floats, candidates: Floats, is_causal: bool, window: Window) -> Floats:
    """Pairs of a token and one that it would see without ``window``, float64 [B]; the masked half counts as h² / 2.

    history, candidates: tokens of context and history, and of the candidates.
    """
    if window.max_span is None:
        return np.zeros_like(history)

    def triangle(side: Floats | float) -> Floats:
        return np.square(np.maximum(side, 0)) / 2

    beyond = np.maximum(history - window.num_contextuals - window.max_span, 0)
    hidden = triangle(beyond - window.full_tokens)  # earlier tokens; the newest rows have no limit
    if not is_causal:  # later tokens, of which the newest rows hide none either
        hidden = hidden + triangle(beyond) - triangle(np.minimum(window.full_tokens - window.max_span, beyond))
    return np.asarray(hidden + (0 if window.full_tokens else candidates * beyond))


def attention(
    tokens: Integers,
    candidate_tokens: Integers,
    num_heads: int,
    head_dim: int,
    element_size: int,
    is_causal: bool = True,
    window: Window = NO_WINDOW,
) -> TwoPasses:
    """Attention of one layer over sequences of ``tokens`` tokens each.

    Forward moves q, k, v and the output; backward those, their gradients and the gradient of the output.
    """
    forward = float(attention_flops(tokens, candidate_tokens, num_heads, head_dim, is_causal, window).sum())
    tensor = float(element_size * int(np.sum(tokens)) * num_heads * head_dim)
    return TwoPasses(Cost(forward, 4 * tensor), Cost((ATTENTION_PASSES - 1) * forward, 8 * tensor, 2))


def add_layer_norm(rows: int, width: int, element_size: int, residual_size: int) -> TwoPasses:
    """Residual stream [rows, width] plus the update of a layer, and LayerNorm of the sum: one kernel each way.

    Forward reads the stream and the update and writes their sum and its norm. Backward reads the sum and the gradients
    of both, and writes the gradient of the stream, and again, rounded, for the update unless the types are equal.
    residual_size: bytes of a number of the stream.
    """
    rounded = element_size if element_size != residual_size else 0
    forward, backward = 2 * (residual_size + element_size), 3 * residual_size + element_size + rounded
    return TwoPasses(Cost(0.0, float(forward * rows * width)), Cost(0.0, float(backward * rows * width), 2))


def norm_mul_dropout(rows: int, width: int, element_size: int) -> TwoPasses:
    """Dropout(LayerNorm(attention) ⊙ U) of [rows, width]: one kernel each way.

    Forward reads attention and U and writes the product. Backward reads both, the gradient of the product and the
    pre-activation of U, and writes the product again and both gradients.
    """
    tensor = float(element_size * rows * width)
    return TwoPasses(Cost(0.0, 3 * tensor), Cost(0.0, 7 * tensor, 2))


def sampled_softmax(queries: int, draws: int, width: int) -> Cost:
    """Softmax of each query over ``draws`` negatives of its own, whose rows are gathered three times."""
    return Cost(6.0 * queries * draws * width, 3.0 * FLOAT32 * queries * draws * width, launches=40)


def pool_softmax(queries: int, pool: int, width: int) -> Cost:
    """Softmax of each query over a whole pool of items: the scores and both gradients are products of matrices."""
    return Cost(6.0 * queries * pool * width, 6.0 * FLOAT32 * queries * pool, launches=40)
