"""Configurations, batch layout and interfaces of the operators; imports no other file of this package.

The notation of shapes: B sequences of T tokens in all, H heads of d channels, D the width of the model.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

NUM_TIME_BUCKETS = 128
"""Rows of the time weight of a relative bias."""


@dataclass
class JaggedLayout:
    """Where each token of one jagged batch sits; build it with :func:`hstu.ops.layout.build_layout`.

    Tokens of B sequences lie one after another, without padding, in tensors of T rows. Sequence s is

        [context_1 … context_C] [item_1 (action_1) … item_n (action_n)] [candidate_1 (action) … candidate_m (action)]

    The host (numpy) copies of the integers exist so that no operator waits for the device to learn a size.
    """

    seqlen_offsets: Tensor
    """int64 [B + 1]: sequence s holds the tokens ``seqlen_offsets[s]:seqlen_offsets[s + 1]``."""
    seqlens: np.ndarray
    """int64 [B], host: tokens of each sequence, context and candidates included."""
    num_contextuals: int
    """C: the first C tokens of every sequence that is not empty."""
    num_candidate_tokens: Tensor | None
    """int64 [B]: how many tokens at the end of each sequence are candidates. None: no sequence has any."""
    num_candidate_tokens_host: np.ndarray
    """int64 [B], host: the same, zeros where there are none."""
    candidate_group_tokens: int
    """Tokens of one target group: target_group_size × tokens_per_item."""
    tokens_per_item: int
    """2 where an action token follows each item token, else 1."""
    positions: Tensor
    """int64 [T]: position in the sequence from 0; all candidate tokens share the position of the first."""
    token_times: Tensor | None = None
    """int64 [T], seconds: when a token happened (context: the first event; 0 where there is none)."""
    query_times: Tensor | None = None
    """int64 [T], seconds: time of the next token of context + history; its own for the last and for candidates."""
    cache: dict[Hashable, Any] = field(default_factory=dict, repr=False, compare=False)
    """What operators derive from the layout once and use again in each layer and in backward."""

    @property
    def batch_size(self) -> int:
        """Sequences B, empty ones included."""
        return len(self.seqlens)

    @property
    def num_tokens(self) -> int:
        """Tokens T of the whole batch."""
        return int(self.seqlens.sum())

    @property
    def num_items(self) -> np.ndarray:
        """int64 [B], host: items of each sequence, candidates included."""
        return np.maximum(self.seqlens - self.num_contextuals, 0) // self.tokens_per_item

    def newest_item_tokens(self, count: Tensor, total: int) -> Tensor:
        """Token index of the newest ``count[s]`` items of each sequence s, oldest first: int64 [total].

        count: int64 [B] on the device; ``total`` is its sum, known on the host. The token before an item's is the
        newest one of the previous step: the previous item's action, or that item.
        """
        sequence = torch.repeat_interleave(count, output_size=total)
        index = torch.arange(total, device=count.device) - (count.cumsum(0) - count)[sequence]
        return self.seqlen_offsets[1:][sequence] - (count[sequence] - index) * self.tokens_per_item

    def newest_tokens(self) -> Tensor:
        """Index of each sequence's last token: int64 [B]; for an empty sequence that of another one, or -1."""
        return self.seqlen_offsets[1:] - 1


@dataclass(frozen=True)
class TokenOrder:
    """A permutation: token t is row ``source[t]`` of the concatenated parts. Both int64 [T]."""

    source: Tensor
    inverse: Tensor


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


Pending = Callable[[], Tensor]
"""A collective that has begun: waits for it and returns its result."""


class TensorParallelComm:
    """Communication of the ranks that share a layer. This class is the one for a single rank: no data moves.

    :class:`hstu.parallel.tensor.ProcessGroupComm` is the one for several ranks, each with equally many heads.
    The collectives of a layer carry no gradient: its backward communicates explicitly.
    """

    rank = 0
    """Index of this rank; each rank drops other elements."""
    size = 1
    """Number of ranks."""

    def all_gather(self, own: Tensor) -> Tensor:
        """Stack one tensor [...] of each rank: [size, ...] on all ranks."""
        return own.unsqueeze(0)

    def all_gather_tokens(self, own: Tensor) -> Pending:
        """Begin to gather the rows of all tokens, in rank order, from the rows of this rank's tokens."""
        return lambda: own

    def reduce_tokens(self, partial: Tensor) -> Pending:
        """Begin to sum the partial results of all ranks for all tokens; returns the rows of this rank's tokens.

        A reduce-scatter where each rank has its own tokens (sequence parallelism), else an all-reduce.
        """
        return lambda: partial

    def split_tokens(self, x: Tensor, layout: JaggedLayout) -> tuple[Tensor, JaggedLayout]:
        """The rows of this rank's tokens, from rows [T, D] that all ranks have, and the layout of the split tokens.

        Differentiable, as is :meth:`join_tokens`. The layout may have padding tokens at the end.
        """
        return x, layout

    def join_tokens(self, own: Tensor, num_tokens: int) -> Tensor:
        """The inverse of :meth:`split_tokens`: rows [num_tokens, D] of all ranks."""
        return own

    def all_reduce_over_heads(self, gradient: Tensor) -> Tensor:
        """Sum the gradient of a parameter that each rank has used on its own heads."""
        return gradient

    def all_reduce_over_tokens(self, gradient: Tensor) -> Tensor:
        """Sum the gradient of a parameter that each rank has used on its own tokens."""
        return gradient


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


@dataclass(frozen=True)
class GateConfig:
    """What the gated norm needs besides the batch."""

    eps: float
    """Added to the variance."""
    dropout: float
    """Probability; 0 in evaluation."""
    comm: TensorParallelComm = field(default_factory=TensorParallelComm)
    """The norm spans the heads of all ranks, which exchange two numbers per row in forward and in backward."""

    def combine_statistics(self, own: Tensor) -> Tensor:
        """Mean and rstd [2, T] of whole rows from ``own``: mean and variance [2, T] of this rank's channels.

        Variances about each rank's own mean are combined: a plain mean square would cancel where the mean is large.
        """
        means, variances = self.comm.all_gather(own).unbind(1)
        mean = means.mean(0)
        return torch.stack([mean, torch.rsqrt((variances + (means - mean).square()).mean(0) + self.eps)])


class LayerWeights(NamedTuple):
    """Parameters of a layer, in any dtype; those with heads are this rank's. Rows lie as [head, (u v q k), channel]."""

    input_norm_weight: Tensor
    """[D]."""
    input_norm_bias: Tensor
    """[D]."""
    uvqk_weight: Tensor
    """[H · 4 · d, D]."""
    uvqk_bias: Tensor
    """[H · 4 · d]."""
    position_weight: Tensor | None
    """The field of :class:`RelativeBias`; None: the layer has no bias."""
    time_weight: Tensor | None
    """The field of :class:`RelativeBias`; None: the layer has no bias."""
    output_norm_weight: Tensor
    """[H · d]."""
    output_norm_bias: Tensor
    """[H · d]."""
    out_weight: Tensor
    """[D, H · d]."""


@dataclass
class SavedActivations:
    """What backward needs besides the input x + update, in this order; None: it is recomputed, or there is none.

    Backward deletes each field after its last use, so that the memory can be used again.
    """

    input_statistics: Tensor
    """Mean and rstd of this rank's tokens, [2, T]."""
    normalized: Tensor | None
    """This rank's tokens, [T, D]."""
    projected: Tensor
    """[T, H · 4 · d]."""
    activated: Tensor | None
    """SiLU(projected), [T, H · 4 · d]."""
    attended: Tensor
    """[T, H, d]."""
    output_statistics: Tensor
    """Mean and rstd over the heads of all ranks, [2, T]."""
    dropout_mask: Tensor | None
    """bool [T, H · d], or a seed int64 []."""


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


@dataclass(frozen=True)
class RowUpdate:
    """One step of the optimizer of a table, for the rows that have a gradient. Other rows keep weights and states.

    With g the gradient of a row, summed over its look-ups, and w ← w · (1 - lr · weight_decay) before the update:

    - adam, at step t: m ← β1 m + (1 - β1) g, v ← β2 v + (1 - β2) g²,
      w ← w - lr · (m / (1 - β1ᵗ)) / (√(v / (1 - β2ᵗ)) + ε)
    - adagrad: s ← s + g², w ← w - lr · g / (√s + ε)
    - sgd: w ← w - lr · g

    adam is FBGEMM's (OptimType.ADAM, whose weight decay is decoupled). torch.optim.SparseAdam differs: it adds ε to the
    uncorrected √v.
    """

    optimizer: Literal["adam", "adagrad", "sgd"]
    learning_rate: float
    eps: float = 0.0
    betas: tuple[float, float] = (0.0, 0.0)
    step: int = 1
    """t, counted from 1."""
    max_gradient: float | None = None
    """Absolute value to which g is clamped."""
    weight_decay: float = 0.0

    @property
    def kept(self) -> float:
        """What weight decay leaves of a weight, as a factor."""
        return 1 - self.learning_rate * self.weight_decay


class UpdateRows(Protocol):
    """Apply a :class:`RowUpdate` in place."""

    def __call__(
        self,
        gradient: Tensor,
        weight: Tensor,
        states: Sequence[Tensor],
        update: RowUpdate,
        found_inf: Tensor | None = None,
    ) -> None:
        """weight: [rows, D]; states: m and v of adam, s of adagrad, none of sgd, each as weight.

        gradient: sparse COO [rows, D] in which rows may repeat, or dense, where rows of zeros have no gradient.
        Repeated rows are summed in the order in which they occur, so the bits do not depend on the place of a row.
        ``found_inf``: scalar on the device; where it is not 0, nothing changes.
        """


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


@dataclass(frozen=True)
class ServedBy:
    """Which backend serves an operator."""

    backend: Backend
    reason: str | None = None
    """Why it is another backend than the requested one; None: it is the requested one."""

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

    The operators below the first four are differentiable functions, ``update_rows`` apart. Printed, it lists the
    backend of each operator.
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

    def __str__(self) -> str:
        if set(self.served_by.values()) == {ServedBy(Backend.PYTORCH)}:
            return f"all operators: {Backend.PYTORCH.value}"
        return ", ".join(f"{operator}: {served}" for operator, served in self.served_by.items())


OPERATORS = tuple(name for name in Kernels.__dataclass_fields__ if name != "served_by")
"""Names of the operators, in the order in which they are logged."""


@dataclass(frozen=True)
class HSTULayerConfig:
    """What a layer needs besides the batch and its weights."""

    head_dim: int
    attention: AttentionConfig
    eps: float
    """Of both norms."""
    kernels: Kernels
    dropout: float = 0.0
    """Probability; 0 in evaluation."""
    recompute_normalized: bool = False
    """Backward recomputes ``SavedActivations.normalized``."""
    recompute_activated: bool = False
    """Backward recomputes ``SavedActivations.activated``."""
    recompute_all: bool = False
    """Backward recomputes everything; only the input is kept."""
    comm: TensorParallelComm = field(default_factory=TensorParallelComm)
    """Communication with the ranks that hold the other heads."""
