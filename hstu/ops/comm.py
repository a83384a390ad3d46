"""What the ranks that share a layer communicate: an interface, and its implementation for a single rank."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from hstu.ops.layout import JaggedLayout

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
