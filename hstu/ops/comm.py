"""What the ranks that share a layer communicate: an interface, and its implementation for a single rank.

Of T tokens each context-parallel rank has a range, from the inputs to the head. The gradients by them are ``cp_size``
times as large there, because DDP averages the gradients of weights over these ranks: of the weights each rank has the
gradients by its own tokens, whose mean is then the sum over the tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

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
    cp_rank = 0
    """Index of this rank among these."""

    @property
    def size(self) -> int:
        """Number of ranks that share the layer."""
        return self.tp_size * self.cp_size

    @property
    def dropout_stream(self) -> int | None:
        """The stream of :func:`hstu.ops.dropout.draw` for what each of these ranks has its own part of."""
        return None if self.size == 1 else self.rank

    @property
    def input_stream(self) -> int | None:
        """The same for the inputs, of which the context-parallel ranks have parts."""
        return None if self.cp_size == 1 else self.cp_rank

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

    def token_ranges(self, num_tokens: int) -> list[range]:
        """The tokens of each context-parallel rank, of so many of a batch."""
        return [range(num_tokens)]

    def split_tokens(self, own: Tensor, layout: JaggedLayout) -> tuple[Tensor, JaggedLayout]:
        """What the layers compute on: the rows of this rank's range of tokens, or a part of them, and a layout.

        Both are padded at the end where ranks must have equally many. Differentiable, as are the methods below.
        """
        return own, layout

    def join_tokens(self, own: Tensor, num_tokens: int) -> Tensor:
        """The inverse of :meth:`split_tokens`: the rows of this rank's range of ``num_tokens`` tokens."""
        return own

    def take_rows(self, rows: Tensor, counts: Sequence[int]) -> Tensor:
        """This rank's part of rows that all context-parallel ranks have, ``counts[r]`` of rank r."""
        return rows

    def gather_rows(self, own: Tensor, counts: Sequence[int]) -> Tensor:
        """The inverse of :meth:`take_rows`: the rows of all context-parallel ranks, one after another."""
        return own

    def sum_over_tokens(self, own: Tensor) -> Tensor:
        """The sum over the context-parallel ranks of a scalar that each has computed from its tokens."""
        return own

    def all_reduce_over_heads(self, gradient: Tensor) -> Tensor:
        """Sum the gradient of a parameter that each tensor-parallel rank has used on its own heads."""
        return gradient

    def all_reduce_over_tokens(self, gradient: Tensor) -> Tensor:
        """Sum the gradient of a parameter that each tensor-parallel rank has used on its own tokens."""
        return gradient
