"""The interfaces of the kernels, what they are configured with, and :class:`Kernels`, those of a model.

The notation of shapes: B sequences of T tokens in all, H heads of d channels, D the width of the model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from hstu.ops.comm import LayerComm
from hstu.ops.layout import JaggedLayout, TokenOrder
from hstu.ops.row_update import UpdateRows


@dataclass
class RelativeBias:
    """The two bias tables of a layer, shared by its heads.

    For query i and key j the bias is ``position_weight[P - 1 + clamp(position_i - position_j, ±(P - 1))] +
    time_weight[bucket(query_time_i - token_time_j)]``.
    Source: HSTU, arXiv 2402.17152, sec. 3.3 (relative attention bias).
    """

    position_weight: Tensor
    """[2 P - 1], P the longest possible sequence of tokens."""
    time_weight: Tensor
    """[NUM_TIME_BUCKETS]."""


class Preactivation(NamedTuple):
    """One of the parts of x Wᵀ + b whose SiLU is u, v, q or k, for a backward that differentiates SiLU, too."""

    value: Tensor
    """[T, H, d], any strides, dense channels."""
    grad_shift: Tensor
    """[H, d] of float32 at least. Backward writes the gradient of b to it: the sum of that of ``value`` over tokens."""


@dataclass(frozen=True)
class AttentionConfig:
    """What attention needs besides the batch: the scale of the scores, the divisor and the kind of mask."""

    alpha: float
    """Factor of Q Kᵀ."""
    scaling_seqlen: int
    """Divisor N: a constant, so that a result never depends on the other sequences of the batch."""
    is_causal: bool = True
    """False: bidirectional over context and history. Candidates never see another group, nor later tokens."""
    contextual_mask: bool = True
    """True: contextual tokens see all context and history."""
    max_span: int | None = None
    """The farthest history token that a token sees, in positions before it (if bidirectional, after it, too). Context
    is seen from everywhere. All candidates have the position of the first. None: no limit."""
    full_tokens: int = 0
    """With ``max_span``: the newest tokens of context and history that have no such limit; above 0, candidates have
    none either."""

    def has_no_limit(self, position: Any, history_end: Any) -> Any:
        """Whether the tokens at ``position`` see all that the mask without ``max_span`` shows. Numbers or arrays."""
        return (self.full_tokens > 0) & (position >= history_end - self.full_tokens)


@dataclass(frozen=True)
class GateConfig:
    """What the gated norm needs besides the batch."""

    eps: float
    """Added to the variance."""
    dropout: float
    """Probability; 0 in evaluation."""
    comm: LayerComm = field(default_factory=LayerComm)
    """The norm spans the heads of all ranks, which exchange two numbers per row in forward and in backward."""

    def combine_statistics(self, own: Tensor) -> Tensor:
        """Mean and rstd [2, T] of whole rows from ``own``: mean and variance [2, T] of this rank's channels.

        Variances about each rank's own mean are combined: a plain mean square would cancel where the mean is large.
        """
        means, variances = self.comm.all_gather(own).unbind(1)
        mean = means.mean(0)
        return torch.stack([mean, torch.rsqrt((variances + (means - mean).square()).mean(0) + self.eps)])


class AttentionForward(Protocol):
    """Attention of each token to its sequence of ``layout``; ``bias`` needs the times of the layout."""

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, layout: JaggedLayout, config: AttentionConfig, bias: RelativeBias | None
    ) -> Tensor:
        """q, k, v: [T, H, d] of one dtype, any strides. Returns [T, H, d] of that dtype, contiguous.

        Scores are computed in float32 at least.
        """


class AttentionBackward(Protocol):
    """Gradients of attention; arguments as in :class:`AttentionForward`."""

    def __call__(
        self,
        grad: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        layout: JaggedLayout,
        config: AttentionConfig,
        bias: RelativeBias | None,
        grads: tuple[Tensor, Tensor, Tensor],
        before_silu: tuple[Preactivation, Preactivation, Preactivation] | None = None,
    ) -> RelativeBias | None:
        """Write the gradients of q, k and v to ``grads`` (any strides, dense channels); return that of the bias.

        With ``before_silu``, of which q, k and v are the SiLU, the gradients written are those of its values.
        """


class AddLayerNormForward(Protocol):
    """One step of the residual stream: x + update, and the LayerNorm of the sum, over the last dimension."""

    def __call__(
        self, x: Tensor, update: Tensor | None, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x, update: [T, D]; weight, bias: [D]. Without an update the sum is x.

        Returns the sum, rounded to the dtype of x; the norm of the rounded sum in ``dtype``; its mean and rstd [2, T].
        Computed in float32 at least.
        """


class AddLayerNormBackward(Protocol):
    """Gradients of the sum and its LayerNorm."""

    def __call__(
        self,
        grad: Tensor,
        grad_total: Tensor,
        total: Tensor,
        weight: Tensor,
        bias: Tensor,
        statistics: Tensor,
        update_dtype: torch.dtype | None,
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        """grad, grad_total: [T, D], gradients of the norm and of the sum; they are not changed.

        total, statistics: the sum, and its mean and rstd, from forward. update_dtype: dtype of the update, None: there
        was none. Returns the gradients of x, of the update, of weight and of bias. The first two are the same numbers,
        and one tensor where the dtypes are equal.
        """


class GateForward(Protocol):
    """``Dropout(LayerNorm(x over all heads) ⊙ u)``. Source: HSTU, arXiv 2402.17152, eq. 3."""

    def __call__(
        self, x: Tensor, u: Tensor, weight: Tensor, bias: Tensor, config: GateConfig
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """x, u: [T, H, d] of one dtype; weight, bias: [H · d].

        Returns gated [T, H · d] of x's dtype, mean and rstd [2, T], and the dropout mask or the seed that repeats it
        (None where nothing is dropped). The norm is computed in float32 at least.
        """


class GateBackward(Protocol):
    """Gradients of the gated norm; arguments as in :class:`GateForward`."""

    def __call__(
        self,
        grad: Tensor,
        x: Tensor,
        u: Tensor,
        weight: Tensor,
        bias: Tensor,
        config: GateConfig,
        statistics: Tensor,
        dropout_mask: Tensor | None,
        grad_u: Tensor,
        before_silu: Preactivation | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Returns gated, recomputed, and the gradients of x, weight and bias; writes that of u to ``grad_u``.

        With ``before_silu``, of which u is the SiLU, the gradient written is that of its value.
        """


@dataclass(frozen=True)
class AttentionKernels:
    """Attention of one backend."""

    forward: AttentionForward
    backward: AttentionBackward
    differentiates_silu: bool = True
    """Whether backward takes ``before_silu``. Otherwise the layer differentiates SiLU in a pass of its own."""


@dataclass(frozen=True)
class AddLayerNormKernels:
    """The residual stream and its LayerNorm of one backend."""

    forward: AddLayerNormForward
    backward: AddLayerNormBackward


@dataclass(frozen=True)
class ProjectionKernels:
    """The projection to u, v, q and k of one backend. Its backward is matrix products, the same for all.

    The kernels that make the gradients of u, v, q and k differentiate SiLU.
    """

    forward: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
    """x [T, D], weight [W, D], bias [W] of one dtype → x Wᵀ + b and SiLU of it, each [T, W], W = H · 4 · d."""
    activate: Callable[[Tensor], Tensor]
    """SiLU with the bits of ``forward``, to recompute it."""


@dataclass(frozen=True)
class GateKernels:
    """The gated norm of one backend."""

    forward: GateForward
    backward: GateBackward
    differentiates_silu: bool = True
    """As in :class:`AttentionKernels`."""


class Backend(StrEnum):
    """Kernel implementations."""

    PYTORCH = "pytorch"
    """Reference, on any device and in any dtype."""
    CUTLASS = "cutlass"
    """Attention on NVIDIA GPUs; Triton serves the other operators."""
    TRITON = "triton"
    """NVIDIA GPUs."""
    CPU = "cpu"
    """C++ for the vector instructions of the processor: what ``cutlass`` and ``triton`` mean where there is no GPU."""


@dataclass(frozen=True)
class KernelShapes:
    """The properties of a model that decide which backend can serve an operator."""

    head_dim: int
    """d."""
    num_heads: int
    """H of one rank."""
    hidden_size: int
    """D."""
    item_dim: int
    """Width of the vectors that retrieval compares."""
    dtype: torch.dtype
    """Of matrix products and attention."""
    has_bias: bool = False
    """Whether attention has a relative bias."""
    has_window: bool = False
    """Whether attention of some layer has a ``max_span``."""


@dataclass(frozen=True)
class ServedBy:
    """Which backend serves an operator."""

    backend: Backend
    reason: str | None = None
    """Why it is another backend than the requested one; None: it is the requested one."""
    is_refused: bool = False
    """Whether a better kernel exists for these shapes but cannot run on this machine or is wrong on it."""

    def __str__(self) -> str:
        return self.backend.value if self.reason is None else f"{self.backend.value} ({self.reason})"


@dataclass(frozen=True)
class SeenItems:
    """Which entries of a pool are no negatives of a query: the items that its user has up to the target.

    Entry s is hidden from query m if ``first[sequences[m], s] <= places[m]``. This hides the target itself, too,
    because it is an item of the sequence.
    """

    first: Tensor
    """int32 [B, S], contiguous: the first place in a sequence at which it has the item of an entry; below 0 for items
    before the sequence, NEVER_SEEN for others."""
    sequences: Tensor
    """int32 [M]: the sequence of each query."""
    places: Tensor
    """int32 [M]: the place of each query's target in its sequence."""


NEVER_SEEN = 2**31 - 1
"""In SeenItems.first: the sequence does not have the item."""


@dataclass(frozen=True)
class Kernels:
    """The kernels of a model, one per operator; build it with :func:`hstu.ops.select.select_kernels`.

    The operators below the first four are differentiable functions, ``update_rows`` apart.
    """

    attention: AttentionKernels
    add_layer_norm: AddLayerNormKernels
    project_uvqk: ProjectionKernels
    norm_mul_dropout: GateKernels
    sampled_softmax_loss: Callable[..., Tensor]
    """See :func:`hstu.ops.functional.sampled_softmax_loss`; checked arguments, vectors float32 or float64."""
    l2_normalize: Callable[[Tensor, float], Tensor]
    """Vectors [n, E] in float32 (float64 stays), each divided by the larger of its L2 norm and epsilon."""
    pool_softmax_loss: Callable[..., Tensor]
    """See :func:`hstu.ops.functional.pool_softmax_loss`; checked arguments, vectors float32 or float64."""
    jagged_concat: Callable[[Sequence[Tensor], TokenOrder], Tensor]
    """Rows of the parts (each [·, D], T rows together) as tokens [T, D] in the given order."""
    add_positions: Callable[[Tensor, Tensor, Tensor], Tensor]
    """x [T, D] + table[min(positions, P - 1)]; table: [P, D], positions: int64 [T]."""
    update_rows: UpdateRows
    """The optimizers of tables."""
    served_by: Mapping[str, ServedBy]
    """Operator → its backend."""


OPERATORS = tuple(name for name in Kernels.__dataclass_fields__ if name != "served_by")
"""Names of the operators, in the order in which they are logged."""
SLOTS = "slots"
"""Name of the kernels that look up the ids of dynamic tables, in self checks and log lines."""
