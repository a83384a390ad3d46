"""What the ranks that share a layer communicate: an interface, and its implementation for a single rank."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from hstu.ops.layout import JaggedLayout

Pending = Callable[[], Tensor]
"""A collective that has begun: waits for it and returns its result."""


class LayerComm:
    """Communication of the ranks that share a layer. This class is the one for a single rank: no data moves.

    :class:`hstu.parallel.layer_comm.ProcessGroupComm` is the one for several ranks. Tensor-parallel ranks have the
    weights of equally many heads each, context-parallel ranks have equally many tokens each. The collectives of a layer
    carry no gradient: its backward communicates explicitly.
    """

    rank = 0
    """Index of this rank among all that share the layer; each drops other elements."""
    tp_size = 1
    """Number of ranks among which the weights of the heads are split."""
    cp_size = 1
    """Number of ranks among which the tokens are split, within the layer, too."""

    @property
    def size(self) -> int:
        """Number of ranks that share the layer."""
        return self.tp_size * self.cp_size

    def all_gather(self, own: Tensor) -> Tensor:
        """Stack one tensor [...] of each tensor-parallel rank: [tp_size, ...] on all of them."""
        return own.unsqueeze(0)

    def all_gather_tokens(self, own: Tensor) -> Pending:
        """Begin to gather the rows of the tokens that the tensor-parallel ranks share, from those of this rank."""
        return lambda: own

    def reduce_tokens(self, partial: Tensor) -> Pending:
        """Begin to sum the partial results of the tensor-parallel ranks; returns the rows of this rank's tokens.

        A reduce-scatter where each rank has its own tokens (sequence parallelism), else an all-reduce.
        """
        return lambda: partial

    def tokens_to_heads(self, own: Tensor) -> Pending:
        """Begin to exchange [T / cp_size, H, …]: all heads of this rank's tokens for [T, H / cp_size, …].

        These are the heads of which this rank computes the attention, for all tokens.
        """
        return lambda: own

    def heads_to_tokens(self, own: Tensor, out: Tensor | None = None) -> Pending:
        """Begin the inverse of :meth:`tokens_to_heads`. out: where the result is written, with any strides."""
        return lambda: own if out is None else out.copy_(own)

    def split_tokens(self, x: Tensor, layout: JaggedLayout) -> tuple[Tensor, JaggedLayout]:
        """The rows of this rank's tokens, from rows [T, D] that all ranks have, and the layout of the split tokens.

        Differentiable, as is :meth:`join_tokens`. The layout may have padding tokens at the end.
        """
        return x, layout

    def join_tokens(self, own: Tensor, num_tokens: int) -> Tensor:
        """The inverse of :meth:`split_tokens`: rows [num_tokens, D] of all ranks."""
        return own

    def all_reduce_over_heads(self, gradient: Tensor) -> Tensor:
        """Sum the gradient of a parameter that each tensor-parallel rank has used on its own heads."""
        return gradient

    def all_reduce_over_tokens(self, gradient: Tensor) -> Tensor:
        """Sum the gradient of a parameter that each tensor-parallel rank has used on its own tokens."""
        return gradient
