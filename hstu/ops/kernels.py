"""Interfaces and settings of the kernels. B sequences have T tokens in all, the model D channels or H heads of d."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from hstu.ops.comm import LayerComm
from hstu.ops.layout import AttentionConfig, JaggedLayout, TokenOrder
from hstu.ops.row_update import UpdateRows

Forward = TypeVar("Forward")
Backward = TypeVar("Backward")


class RelativeBias(NamedTuple):
    """Bias tables of a layer, shared by its heads: [2 P - 1], with P the longest possible sequence, and [128].

    The bias of query i and key j is ``position_weight[P - 1 + clamp(position_i - position_j, ±(P - 1))] +
    time_weight[bucket(query_time_i - token_time_j)]``. Source: HSTU, arXiv 2402.17152, sec. 3.3.
    """

    position_weight: Tensor
    time_weight: Tensor


class Preactivation(NamedTuple):
    """A part of x Wᵀ + b whose SiLU is u, v, q or k, for a backward that also differentiates SiLU.

    value: [T, H, d], any strides, dense channels. grad_shift: [H, d] in float32 or wider; backward writes the gradient
    of b here: the gradient of ``value``, summed over tokens.
    """

    value: Tensor
    grad_shift: Tensor


class Gradient(NamedTuple):
    """Where a backward writes the gradient of u, v, q or k: [T, H, d], any strides, dense channels.

    With ``before_silu``, backward writes the gradient of ``before_silu.value`` instead; its SiLU is the input.
    """

    target: Tensor
    before_silu: Preactivation | None = None

    def write(self, grad: Tensor) -> None:
        """Write the gradient [T, H, d] of the input, in float32 or wider, with PyTorch."""
        if self.before_silu is not None:
            grad = torch.ops.aten.silu_backward(grad, self.before_silu.value.to(grad.dtype))
            self.before_silu.grad_shift.copy_(grad.sum(0))
        self.target.copy_(grad)


@dataclass(frozen=True)
class GateConfig:
    """Settings of the gated norm, which spans the heads of all ranks of ``comm``. dropout: 0 in evaluation."""

    eps: float
    dropout: float
    comm: LayerComm = field(default_factory=LayerComm)

    def combine_statistics(self, own: Tensor) -> Tensor:
        """Mean and rstd [2, T] of whole rows. ``own``: mean and variance [2, T] of this rank's channels.

        Combines variances about each rank's own mean, because a plain mean square cancels where the mean is large.
        """
        means, variances = self.comm.all_gather(own).unbind(1)
        mean = means.mean(0)
        return torch.stack([mean, torch.rsqrt((variances + (means - mean).square()).mean(0) + self.eps)])


@dataclass(frozen=True)
class AttentionInputs:
    """Inputs of attention: q, k, v [T, H, d], one dtype, any strides. With a bias, the layout has times.

    With ``queries``, q and the output have only the rows of these tokens.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    layout: JaggedLayout
    config: AttentionConfig
    bias: RelativeBias | None = None
    queries: range | None = None


AttentionForward = Callable[[AttentionInputs], Tensor]
"""Returns [T, H, d] in the dtype of v, contiguous. Scores are computed in float32 or wider."""
AttentionBackward = Callable[[Tensor, AttentionInputs, tuple[Gradient, Gradient, Gradient]], RelativeBias | None]
"""(gradient of the output [T, H, d], inputs, gradients of q, k and v to write) → the gradient of the bias."""


@dataclass(frozen=True)
class AddLayerNormInputs:
    """Inputs of x + update (None: x alone), [T, D], and of the LayerNorm of the sum, with weight and bias [D]."""

    x: Tensor
    update: Tensor | None
    weight: Tensor
    bias: Tensor
    eps: float
    dtype: torch.dtype
    """Of the norm."""


AddLayerNormForward = Callable[[AddLayerNormInputs], tuple[Tensor, Tensor, Tensor]]
"""Returns the sum, in the dtype of x; the norm of this rounded sum, in ``dtype``; its mean and rstd [2, T].
Computed in float32 or wider."""
AddLayerNormBackward = Callable[
    [Tensor, Tensor, AddLayerNormInputs, Tensor, torch.dtype | None], tuple[Tensor, Tensor | None, Tensor, Tensor]
]
"""(gradient of the norm [T, D], gradient of the sum [T, D], inputs with the sum as x and no update, mean and rstd,
dtype of the update or None) → the gradients of x, of the update, of weight and of bias.

The first two results hold the same numbers, and are one tensor if the dtypes are equal. Arguments are not changed."""


@dataclass(frozen=True)
class GateInputs:
    """Inputs of ``Dropout(LayerNorm(x) ⊙ u)``, arXiv 2402.17152, eq. 3. x, u: [T, H, d]; weight, bias: [H · d]."""

    x: Tensor
    u: Tensor
    """In the dtype of x."""
    weight: Tensor
    bias: Tensor
    config: GateConfig


GateForward = Callable[[GateInputs], tuple[Tensor, Tensor, Tensor | None]]
"""Returns gated [T, H · d] in the dtype of x, mean and rstd [2, T], and the dropout mask or a seed that repeats it
(None without dropout). The norm is computed in float32 or wider."""
GateBackward = Callable[[Tensor, GateInputs, Tensor, Tensor | None, Gradient], tuple[Tensor, Tensor, Tensor, Tensor]]
"""(gradient of gated [T, H · d], inputs, mean and rstd, dropout mask, gradient of u to write) → recomputed gated, and
the gradients of x, weight and bias."""


class SeenItems(NamedTuple):
    """Hides pool entry s from query m if its user has it by the target: ``first[sequences[m], s] <= positions[m]``."""

    first: Tensor
    """int32 [B, S], contiguous: first position of an entry's item in a sequence; negative for items before it,
    NEVER_SEEN for items that it does not have."""
    sequences: Tensor  # int32 [M]: sequence of each query
    positions: Tensor  # int32 [M]: position of each query's target in its sequence


NEVER_SEEN = 2**31 - 1
"""Value in SeenItems.first for an item that the sequence does not have."""


@dataclass(frozen=True)
class Negatives:
    """Negatives of M queries with one target each, apart from their vectors; all queries share a pool of S entries."""

    target_ids: Tensor
    """integer [M]. Pool entries with the id of a query's target are not its negatives."""
    pool_ids: Tensor
    """integer [S]. An id that occurs k times in the pool counts k times."""
    temperature: float
    """τ > 0."""
    log_weights: Tensor | None = None
    """float [S]: log w of each entry, −∞ for entries that no query uses. None: all w are 1."""
    seen: SeenItems | None = None
    """Hides the items of each user, targets included; ids are not compared. None: only targets are hidden."""
    draws: Tensor | None = None
    """integer [M, R]: pool rows in [0, S), the negatives of each query. None: the whole pool."""


Loss = tuple[Tensor, Sequence[Tensor]]
SoftmaxLoss = Callable[[Sequence[Tensor], Negatives, bool], Loss]
"""((queries, positives, pool), negatives, whether gradients are wanted) → the loss, and its gradients by the vectors or
none. See :func:`hstu.ops.functional.softmax_loss`; vectors are float32 or float64."""


@dataclass(frozen=True)
class KernelPair(Generic[Forward, Backward]):
    """Forward and backward of an operator of one backend."""

    forward: Forward
    backward: Backward
    differentiates_silu: bool = True
    """Whether backward serves ``Gradient.before_silu``. If not, the layer differentiates SiLU in another pass."""
    serves_ranges: bool = False
    """Whether attention serves ``AttentionInputs.queries``."""


AttentionKernels = KernelPair[AttentionForward, AttentionBackward]
AddLayerNormKernels = KernelPair[AddLayerNormForward, AddLayerNormBackward]
GateKernels = KernelPair[GateForward, GateBackward]


@dataclass(frozen=True)
class ProjectionKernels:
    """Projection to u, v, q and k of one backend. Its backward is matrix products, which all backends share."""

    forward: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
    """x [T, D], weight [W, D], bias [W] of one dtype → x Wᵀ + b and SiLU of it, each [T, W], W = H · 4 · d."""
    activate: Callable[[Tensor], Tensor]
    """SiLU with the same bits as ``forward``, for recomputation."""


class Backend(StrEnum):
    """Kernel implementations."""

    PYTORCH = "pytorch"  # Reference, on any device and in any dtype
    CUTLASS = "cutlass"  # Attention on NVIDIA GPUs; Triton serves the other operators
    TRITON = "triton"  # NVIDIA GPUs
    CPU = "cpu"  # C++ with the vector instructions of the processor; replaces ``cutlass`` and ``triton`` on CPUs


@dataclass(frozen=True)
class KernelShapes:
    """Properties of a model that decide which backends can serve an operator. Heads are counted per rank."""

    head_dim: int
    num_heads: int
    hidden_size: int
    item_dim: int
    """Width of the vectors that retrieval compares."""
    dtype: torch.dtype
    """Dtype of matrix products and attention."""
    has_bias: bool = False
    """Whether attention has a relative bias."""
    has_window: bool = False
    """Whether attention of some layer has a ``max_span``."""
    has_ranges: bool = False
    """Whether context-parallel ranks outnumber the heads, so that attention gets ranges of queries."""


@dataclass(frozen=True)
class ServedBy:
    """Backend that serves an operator."""

    backend: Backend
    reason: str | None = None
    """Why it is not the requested backend; None: it is."""
    is_refused: bool = False
    """Whether a better kernel exists for these shapes but cannot run, or is wrong, on this machine."""

    def __str__(self) -> str:
        return self.backend.value if self.reason is None else f"{self.backend.value} ({self.reason})"


@dataclass(frozen=True)
class Kernels:
    """One kernel per operator. Autograd differentiates ``l2_normalize``, ``jagged_concat`` and ``add_positions``."""

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
    """Concatenates parts [·, D] with T rows in all and reorders the rows: tokens [T, D]."""
    add_positions: Callable[[Tensor, Tensor, Tensor], Tensor]
    """x [T, D] + table[min(positions, P - 1)]; table: [P, D], positions: int64 [T]."""
    update_rows: UpdateRows
    """Optimizer step of tables."""
    served_by: Mapping[str, ServedBy]
    """Operator → its backend."""


OPERATORS = tuple(name for name in Kernels.__dataclass_fields__ if name != "served_by")
"""Names of the operators, in the order in which they are logged."""
SLOTS = "slots"
"""Name of the kernels that look up ids in dynamic tables, in self checks and log lines."""
