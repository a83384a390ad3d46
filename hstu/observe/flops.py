"""The floating-point operations of a training step, counted as NVIDIA recsys-examples counts them.

The same count lets our TFLOPS and MFU be compared with its published ones. It is the arithmetic of the HSTU stack
alone: no embedding tables, norms, heads or losses, and no recomputation.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

# One forward and two backward products a weight matrix (by the input, by the weight).
_PASSES_OF_A_LINEAR = 3.0
# Forward 2 products (QK^T, PV); backward 5 (QK^T again, dV, dP, dQ, dK): 7 / 2.
_PASSES_OF_ATTENTION = 3.5


def sequence_tokens(
    item_lengths: npt.NDArray[np.integer],
    num_candidates: npt.NDArray[np.integer],
    num_contextuals: int,
    interleaved: bool,
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Tokens of each sequence, and how many of them are candidates'; both int64 [B].

    item_lengths: items of each sequence, candidates included. num_contextuals: context tokens of a non-empty
    sequence. interleaved: each item is followed by its action's token.
    """
    per_item = 2 if interleaved else 1
    items = np.asarray(item_lengths, dtype=np.int64)
    tokens = items * per_item + np.where(items > 0, num_contextuals, 0)
    return tokens, np.asarray(num_candidates, dtype=np.int64) * per_item


def sequence_flops(
    tokens: npt.NDArray[np.integer],
    candidate_tokens: npt.NDArray[np.integer],
    *,
    num_layers: int,
    hidden_size: int,
    num_heads: int,
    head_dim: int,
    is_causal: bool = True,
) -> npt.NDArray[np.float64]:
    """Floating-point operations of training (forward and backward) on each sequence, float64 [B].

    tokens, candidate_tokens: [B] host integers, T and C below. With L layers of width D and H heads of width d::

        L · [ 3·2·T·D·4Hd  +  3·2·T·Hd·D  +  3.5·(4·H·T²·d − 2·H·(T−C)²·d) ]

    the uvqk projection, the output projection and the attention, of which a causal mask leaves half over the
    T − C tokens that are no candidates. Not causal: nothing is taken off. Without candidates that is a·T + b·T² with
    a = 30·L·D·Hd and b = 7·L·Hd (14·L·Hd, if not causal).
    """
    length = np.asarray(tokens, dtype=np.float64)
    history = length - np.asarray(candidate_tokens, dtype=np.float64)
    width = num_heads * head_dim
    linears = _PASSES_OF_A_LINEAR * 2.0 * length * hidden_size * (4 * width + width)
    masked = 2.0 * width * history**2 if is_causal else 0.0
    attention = _PASSES_OF_ATTENTION * (4.0 * width * length**2 - masked)
    return np.asarray(num_layers * (linears + attention), dtype=np.float64)


def step_flops(
    tokens: npt.NDArray[np.integer],
    candidate_tokens: npt.NDArray[np.integer],
    *,
    num_layers: int,
    hidden_size: int,
    num_heads: int,
    head_dim: int,
    is_causal: bool = True,
) -> float:
    """Floating-point operations of one training step over a batch: the sum of its ``sequence_flops``."""
    return float(
        sequence_flops(
            tokens,
            candidate_tokens,
            num_layers=num_layers,
            hidden_size=hidden_size,
            num_heads=num_heads,
            head_dim=head_dim,
            is_causal=is_causal,
        ).sum()
    )
