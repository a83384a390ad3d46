"""Communication among the ranks that share a layer: the interface, and its implementation for a single rank.

Each context-parallel rank holds a range of the T tokens. It scales their gradients by ``cp_size``, because DDP averages
weight gradients over these ranks: the average is then the sum over tokens.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from hstu.ops.layout import AttentionConfig, JaggedLayout

Pending = Callable[[], Tensor]
"""A collective in progress: waits for it and returns its result."""
TokenSets = Sequence[Sequence[range]]
"""Tokens of the batch that each group of context-parallel ranks has for attention: ascending ranges per group."""


@dataclass(frozen=True, eq=False)
class AttentionShare:
    """What a rank computes of the attention of a batch, for some of the heads."""

    layout: JaggedLayout
    """Layout of the tokens whose keys and values the rank has."""
    config: AttentionConfig
    """Settings for this layout."""
    queries: range | None = None
    """Tokens of ``layout`` for which it computes the output; None: all."""
    queries_of: TokenSets = ()
    keys_of: TokenSets = ()
    keeps: bool = True
    """Whether q, k and v are kept for backward."""

    @property
    def parts(self) -> list[tuple[slice | int, TokenSets]]:
        """What is exchanged: parts of dimension 2 of [T, H, (v q k), d], and whose tokens each group gets."""
        if self.queries is None:
            return [(slice(None), self.keys_of)]
        return [(slice(0, 3, 2), self.keys_of), (1, self.queries_of)]

    def unpack(self, parts: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """v, q and k, or their gradients, in the tensors that :attr:`parts` lists."""
        if self.queries is None:
            return parts[0].unbind(2)
        (v, k), q = parts[0].unbind(2), parts[1]
        return v, q, k


class LayerComm:
    """Communication among the ranks that share a layer. This class serves a single rank: no data moves.

    :class:`hstu.parallel.layer_comm.ProcessGroupComm` serves several ranks. Tensor-parallel ranks split the heads
    evenly, context-parallel ranks the tokens. The collectives carry no gradient: backward communicates explicitly.
    """

    rank = 0  # Index of this rank among all ranks of the layer; each draws its own dropout mask
    tp_size = 1  # Number of tensor-parallel ranks, which split the heads and their weights
    cp_size = 1  # Number of context-parallel ranks, which split the tokens
    cp_rank = 0  # Index of this rank among the context-parallel ranks

    @property
    def dropout_stream(self) -> int | None:
        """Stream of :func:`hstu.ops.dropout.draw` for tensors of which each rank of the layer holds its own part."""
        return None if self.tp_size * self.cp_size == 1 else self.rank

    @property
    def input_stream(self) -> int | None:
        """Stream for the inputs, of which each context-parallel rank holds its own part."""
        return None if self.cp_size == 1 else self.cp_rank

    def all_gather(self, own: Tensor) -> Tensor:
        """Stack one tensor [...] per tensor-parallel rank: [tp_size, ...] on each of them."""
        return own.unsqueeze(0)

    def all_gather_tokens(self, own: Tensor) -> Pending:
        """Begin to gather the token rows that the tensor-parallel ranks split. ``own``: the rows of this rank."""
        return lambda: own

    def reduce_tokens(self, partial: Tensor) -> Pending:
        """Begin to sum tensor-parallel results: a reduce-scatter with sequence parallelism, else an all-reduce."""
        return lambda: partial

    def share_attention(
        self, layout: JaggedLayout, config: AttentionConfig, heads: int, has_bias: bool, ranges: bool
    ) -> AttentionShare:
        """What this rank computes of the attention of ``heads`` heads of the tokens that :meth:`split_tokens` split.

        ranges: whether the kernels serve ranges of queries.
        """
        return AttentionShare(layout, config)

    def tokens_to_heads(self, own: Tensor, tokens: TokenSets) -> Pending:
        """Begin to exchange own tokens [T / cp_size, H, …] for the ``tokens`` of this rank's group, some heads each."""
        return lambda: own

    def heads_to_tokens(self, own: Tensor, tokens: TokenSets, out: Tensor | None = None) -> Pending:
        """Begin the inverse of :meth:`tokens_to_heads`; several groups' rows of a token are added.

        out: where to write the result, any strides.
        """
        return lambda: own if out is None else out.copy_(own)

    def token_ranges(self, num_tokens: int) -> list[range]:
        """Token range of each context-parallel rank in a batch of ``num_tokens`` tokens."""
        return [range(num_tokens)]

    def split_tokens(self, own: Tensor, layout: JaggedLayout) -> tuple[Tensor, JaggedLayout]:
        """Rows of this rank's range of tokens, or a part of them, on which its layers compute; and their layout.

        Both are padded at the end where ranks need equally many tokens. Differentiable, as are the methods below.
        """
        return own, layout

    def join_tokens(self, own: Tensor, num_tokens: int) -> Tensor:
        """Invert :meth:`split_tokens`: return the rows of this rank's range of ``num_tokens`` tokens."""
        return own

    def take_rows(self, rows: Tensor, counts: Sequence[int]) -> Tensor:
        """This rank's part of rows that all context-parallel ranks hold; rank r gets ``counts[r]`` rows."""
        return rows

    def gather_rows(self, own: Tensor, counts: Sequence[int]) -> Tensor:
        """Invert :meth:`take_rows`: concatenate the rows of all context-parallel ranks."""
        return own

    def sum_over_tokens(self, own: Tensor) -> Tensor:
        """Sum over the context-parallel ranks of a scalar that each rank computes from its own tokens."""
        return own

    def all_reduce_over_heads(self, gradient: Tensor) -> Tensor:
        """Sum the gradient of a parameter that each tensor-parallel rank applies to its own heads."""
        return gradient

    def all_reduce_over_tokens(self, gradient: Tensor) -> Tensor:
        """Sum the gradient of a parameter that each tensor-parallel rank applies to its own tokens."""
        return gradient
