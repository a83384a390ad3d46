"""Floating-point operations and memory traffic of the operators, for MFU, benchmarks and estimates.

:func:`sequence_flops` counts a training step. It follows NVIDIA recsys-examples, so that TFLOPS and MFU compare with
its published numbers: only the HSTU layers count, without embedding tables, norms, heads, losses and recomputation.
The other functions return the cost of one operator's kernels on one rank; bytes are what these read and write if
nothing stays in a cache. ``element_size``: bytes of the compute dtype.
"""

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Integers = npt.NDArray[np.integer]
Floats = npt.NDArray[np.float64]

FLOAT32 = 4
"""Bytes per element of a parameter, gradient or optimizer state."""
PROJECTION_PASSES = 3.0
"""(Forward + backward) / forward: backward has two products, by the input and by the weight."""
ATTENTION_PASSES = 3.5
"""(Forward + backward) / forward: 2 products (QKᵀ, PV), then 5 (QKᵀ again, dV, dP, dQ, dK)."""


class Cost(NamedTuple):
    """Cost of one pass of an operator."""

    flops: float  # Arithmetic of matrix products; 0 for an operator that only moves bytes
    bytes: float  # Read from and written to memory
    launches: int = 1  # Number of kernels started


class TwoPasses(NamedTuple):
    """Costs of the forward and the backward of an operator."""

    forward: Cost
    backward: Cost


class Window(NamedTuple):
    """A window that hides far tokens from attention, as in :class:`hstu.ops.kernels.AttentionConfig`."""

    max_span: int | None  # None: there is no window
    full_tokens: int
    num_contextuals: int  # Number of tokens that all tokens see


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

    tokens (T), candidate_tokens (C): host integers [B]. With L layers of width D and H heads of width d::

        L · [ 3·2·T·D·4Hd  +  3·2·T·Hd·D  +  3.5·(4·H·T²·d − 2·H·(T−C)²·d) ]

    The terms are the uvqk projection, the output projection and the attention. A causal mask removes half of the
    attention among the T − C other tokens. ``windows`` (one per layer, or none) subtract 3.5·4·H·d per hidden pair.
    """
    total = num_layers * PROJECTION_PASSES * projection_flops(tokens, hidden_size, num_heads, head_dim)
    for window, layers in Counter(windows or [NO_WINDOW] * num_layers).items():
        attention = attention_flops(tokens, candidate_tokens, num_heads, head_dim, is_causal, window)
        total = total + layers * ATTENTION_PASSES * attention
    return np.asarray(total)


def projection_flops(tokens: Integers, hidden_size: int, num_heads: int, head_dim: int) -> Floats:
    """Forward operations of the uvqk and output projections of one layer, float64 [B]."""
    return np.asarray(2.0 * np.asarray(tokens, dtype=np.float64) * hidden_size * (5 * num_heads * head_dim))


def attention_flops(
    tokens: Integers,
    candidate_tokens: Integers,
    num_heads: int,
    head_dim: int,
    is_causal: bool = True,
    window: Window = NO_WINDOW,
) -> Floats:
    """Forward operations of the attention of one layer, float64 [B]."""
    length = np.asarray(tokens, dtype=np.float64)
    candidates = np.asarray(candidate_tokens, dtype=np.float64)
    history = length - candidates
    width = num_heads * head_dim
    masked = 2.0 * width * history**2 if is_causal else 0.0
    return np.asarray(4.0 * width * (length**2 - hidden_pairs(history, candidates, is_causal, window)) - masked)


def hidden_pairs(history: Floats, candidates: Floats, is_causal: bool, window: Window) -> Floats:
    """Token pairs that only ``window`` hides, float64 [B]. ``history`` includes context. Triangles count as h² / 2."""
    if window.max_span is None:
        return np.zeros_like(history)

    def triangle(side: Floats | float) -> Floats:
        return np.square(np.maximum(side, 0)) / 2

    beyond = np.maximum(history - window.num_contextuals - window.max_span, 0)
    hidden = triangle(beyond - window.full_tokens)  # earlier tokens; the newest rows have no limit
    if not is_causal:  # later tokens, of which the newest rows hide none either
        hidden = hidden + triangle(beyond) - triangle(np.minimum(window.full_tokens - window.max_span, beyond))
    return np.asarray(hidden + (0 if window.full_tokens else candidates * beyond))


def attention(flops: float, rows: int, width: int, element_size: int) -> TwoPasses:
    """Attention of one layer, [rows, width]. Forward moves q, k, v and the output; backward these and their gradients.

    flops: :func:`attention_flops` of all sequences.
    """
    tensor = float(element_size * rows * width)
    return TwoPasses(Cost(flops, 4 * tensor), Cost((ATTENTION_PASSES - 1) * flops, 8 * tensor, 2))


def add_layer_norm(rows: int, width: int, element_size: int, residual_size: int) -> TwoPasses:
    """Sum of the residual stream [rows, width] and the update of a layer, and LayerNorm of the sum.

    Backward also writes a rounded gradient if the dtypes differ. residual_size: bytes per element of the stream.
    """
    rounded = element_size if element_size != residual_size else 0
    forward, backward = 2 * (residual_size + element_size), 3 * residual_size + element_size + rounded
    return TwoPasses(Cost(0.0, float(forward * rows * width)), Cost(0.0, float(backward * rows * width), 2))


def norm_mul_dropout(rows: int, width: int, element_size: int) -> TwoPasses:
    """Dropout(LayerNorm(attention) ⊙ U) of [rows, width]. Backward also reads the pre-activation of U."""
    tensor = float(element_size * rows * width)
    return TwoPasses(Cost(0.0, 3 * tensor), Cost(0.0, 7 * tensor, 2))


def sampled_softmax(queries: int, draws: int, width: int) -> Cost:
    """Softmax of each query over its own ``draws`` negatives, whose rows are gathered three times."""
    return Cost(6.0 * queries * draws * width, 3.0 * FLOAT32 * queries * draws * width, launches=40)


def pool_softmax(queries: int, pool: int, width: int, is_cpp: bool = True) -> Cost:
    """Softmax of each query over a whole pool of items; the scores and both gradients are matrix products.

    is_cpp: whether C++ kernels compute it, else PyTorch's operators, which read and write a score more often.
    """
    accesses = 6.0 if is_cpp else 11.5
    return Cost(6.0 * queries * pool * width, accesses * FLOAT32 * queries * pool, launches=40)
