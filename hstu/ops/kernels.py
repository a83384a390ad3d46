"""The interfaces of the kernels, what they are configured with, and :class:`Kernels`, those of a model.

The notation of shapes: B sequences of T tokens in all, H heads of d channels, D the width of the model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from hstu.ops.comm import LayerComm
from hstu.ops.layout import JaggedLayout, TokenOrder
from hstu.ops.row_update import UpdateRows

Forward = TypeVar("Forward")
Backward = TypeVar("Backward")


@dataclass
class RelativeBias:
    """The bias tables of a layer, shared by its heads: [2 P - 1], P the longest possible sequence, and [128].

    For query i and key j the bias is ``position_weight[P - 1 + clamp(position_i - position_j, ±(P - 1))] +
    time_weight[bucket(query_time_i - token_time_j)]``.
    Source: HSTU, arXiv 2402.17152, sec. 3.3 (relative attention bias).
    """

    position_weight: Tensor
    time_weight: Tensor


class Preactivation(NamedTuple):
    """One of the parts of x Wᵀ + b whose SiLU is u, v, q or k, for a backward that differentiates SiLU, too.

    value: [T, H, d], any strides, dense channels. grad_shift: [H, d] of float32 at least, where backward writes the
    gradient of b: the sum of that of ``value`` over tokens.
    """

    value: Tensor
    grad_shift: Tensor


class Gradient(NamedTuple):
    """Where a backward writes the gradient of u, v, q or k: [T, H, d], any strides, dense channels.

    With ``before_silu`` the gradient of its value is written instead, of which the differentiated input is the SiLU.
    """

    target: Tensor
    before_silu: Preactivation | None = None

    def write(self, grad: Tensor) -> None:
        """Write the gradient [T, H, d] of the input, of float32 at least, by PyTorch."""
        if self.before_silu is not None:
            grad = torch.ops.aten.silu_backward(grad, self.before_silu.value.to(grad.dtype))
            self.before_silu.grad_shift.copy_(grad.sum(0))
        self.target.copy_(grad)


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
    """What the gated norm needs besides the batch. eps: added to the variance. dropout: probability; 0 in evaluation.

    The norm spans the heads of all ranks of ``comm``, which exchange two numbers per row in forward and in backward.
    """

    eps: float
    dropout: float
    comm: LayerComm = field(default_factory=LayerComm)

    def combine_statistics(self, own: Tensor) -> Tensor:
        """Mean and rstd [2, T] of whole rows from ``own``: mean and variance [2, T] of this rank's channels.

        Variances about each rank's own mean are combined: a plain mean square would cancel where the mean is large.
        """
        means, variances = self.comm.all_gather(own).unbind(1)
        mean = means.mean(0)
        return torch.stack([mean, torch.rsqrt((variances + (means - mean).square()).mean(0) + self.eps)])


@dataclass(frozen=True)
class AttentionInputs:
    """What attention reads: q, k and v [T, H, d] of one dtype, any strides. A token attends to its sequence.

    Raises:
        ValueError: a bias, but a layout without times.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    layout: JaggedLayout
    config: AttentionConfig
    bias: RelativeBias | None = None

    def __post_init__(self) -> None:
        if self.bias is not None and self.layout.token_times is None:
            raise ValueError("a relative bias needs the times of the layout; build it with item_times")


AttentionForward = Callable[[AttentionInputs], Tensor]
"""Returns [T, H, d] of the dtype of v, contiguous. Scores are computed in float32 at least."""
AttentionBackward = Callable[[Tensor, AttentionInputs, tuple[Gradient, Gradient, Gradient]], RelativeBias | None]
"""(gradient of the output [T, H, d], inputs, where to write the gradients of q, k and v) → the gradient of the bias."""


@dataclass(frozen=True)
class AddLayerNormInputs:
    """One step of the residual stream: x + update (None: x alone), [T, D], and the LayerNorm of the sum over D.

    weight, bias: [D]. dtype: of the norm.
    """

    x: Tensor
    update: Tensor | None
    weight: Tensor
    bias: Tensor
    eps: float
    dtype: torch.dtype


AddLayerNormForward = Callable[[AddLayerNormInputs], tuple[Tensor, Tensor, Tensor]]
"""Returns the sum, rounded to the dtype of x; the norm of the rounded sum in ``dtype``; its mean and rstd [2, T].

Computed in float32 at least."""
AddLayerNormBackward = Callable[
    [Tensor, Tensor, AddLayerNormInputs, Tensor, torch.dtype | None], tuple[Tensor, Tensor | None, Tensor, Tensor]
]
"""(gradient of the norm [T, D], gradient of the sum [T, D], inputs with the sum as x and without an update, mean and
rstd, dtype of the update: None where there was none) → the gradients of x, of the update, of weight and of bias.

The first two results are the same numbers, and one tensor where the dtypes are equal. Arguments are not changed."""


@dataclass(frozen=True)
class GateInputs:
    """What the gated norm reads: ``Dropout(LayerNorm(x over all heads) ⊙ u)``. Source: arXiv 2402.17152, eq. 3.

    x, u: [T, H, d] of one dtype. weight, bias: [H · d].
    """

    x: Tensor
    u: Tensor
    weight: Tensor
    bias: Tensor
    config: GateConfig


GateForward = Callable[[GateInputs], tuple[Tensor, Tensor, Tensor | None]]
"""Returns gated [T, H · d] of x's dtype, mean and rstd [2, T], and the dropout mask or the seed that repeats it (None
where nothing is dropped). The norm is computed in float32 at least."""
GateBackward = Callable[[Tensor, GateInputs, Tensor, Tensor | None, Gradient], tuple[Tensor, Tensor, Tensor, Tensor]]
"""(gradient of gated [T, H · d], inputs, mean and rstd, dropout mask, where to write the gradient of u) → gated,
recomputed, and the gradients of x, weight and bias."""


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
class Negatives:
    """What the queries of a softmax over items are compared with besides their targets, apart from the pool's vectors.

    M queries with a target each, and a pool of S entries that all queries share.
    """

    target_ids: Tensor
    """integer [M]. Pool entries with the id of a query's target are not its negatives."""
    pool_ids: Tensor
    """integer [S]. An id that occurs k times in the pool counts k times."""
    temperature: float
    """τ > 0."""
    log_weights: Tensor | None = None
    """float [S], log w of each entry, −∞ for entries that no query uses; None: all w are 1."""
    seen: SeenItems | None = None
    """Hides the items that the users have, the targets among them; ids are not compared. None: only the targets."""
    draws: Tensor | None = None
    """integer [M, R], rows of the pool in [0, S): each query's negatives. None: the whole pool."""


SoftmaxLoss = Callable[[Tensor, Tensor, Tensor, Negatives], Tensor]
"""See :func:`hstu.ops.functional.softmax_loss`; checked arguments, vectors float32 or float64."""


@dataclass(frozen=True)
class KernelPair(Generic[Forward, Backward]):
    """Forward and backward of an operator of one backend."""

    forward: Forward
    backward: Backward
    differentiates_silu: bool = True
    """Whether backward serves a ``Gradient.before_silu``. Otherwise the layer differentiates SiLU in a further pass."""


AttentionKernels = KernelPair[AttentionForward, AttentionBackward]
AddLayerNormKernels = KernelPair[AddLayerNormForward, AddLayerNormBackward]
GateKernels = KernelPair[GateForward, GateBackward]


@dataclass(frozen=True)
class ProjectionKernels:
    """The projection to u, v, q and k of one backend. Its backward is matrix products, the same for all.

    The kernels that make the gradients of u, v, q and k differentiate SiLU.
    """

    forward: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
    """x [T, D], weight [W, D], bias [W] of one dtype → x Wᵀ + b and SiLU of it, each [T, W], W = H · 4 · d."""
    activate: Callable[[Tensor], Tensor]
    """SiLU with the bits of ``forward``, to recompute it."""


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
    """The properties of a model that decide which backend can serve an operator. Those of heads are of one rank."""

    head_dim: int
    num_heads: int
    hidden_size: int
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
class Kernels:
    """The kernels of a model, one per operator; build it with :func:`hstu.ops.select.select_kernels`.

    The operators below the first four are differentiable functions, ``update_rows`` apart.
    """

    attention: AttentionKernels
    add_layer_norm: AddLayerNormKernels
    project_uvqk: ProjectionKernels
    norm_mul_dropout: GateKernels
    sampled_softmax_loss: SoftmaxLoss
    """Against ``Negatives.draws``."""
    l2_normalize: Callable[[Tensor, float], Tensor]
    """Vectors [n, E] in float32 (float64 stays), each divided by the larger of its L2 norm and epsilon."""
    pool_softmax_loss: SoftmaxLoss
    """Against the whole pool."""
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
