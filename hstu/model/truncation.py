"""The layers after a truncation: the tokens that they compute on, and where their results belong."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from hstu.ops.comm import LayerComm
from hstu.ops.layout import JaggedLayout, truncate_history


@dataclass(frozen=True)
class Truncation:
    """The tokens that a truncation leaves of a batch. The context-parallel ranks share them evenly once more."""

    layout: JaggedLayout
    """Of all tokens that are left."""
    places: Tensor
    """int64 [.]: those that are left of this rank's tokens."""
    counts: list[int]
    """How many are left of the tokens of each context-parallel rank."""
    shares: list[int]
    """On how many of those that are left each of these ranks computes."""
    comm: LayerComm

    @classmethod
    def of(cls, layout: JaggedLayout, items: int, comm: LayerComm) -> Truncation:
        """The truncation of the sequences of ``layout`` to their newest ``items`` items."""
        shorter, tokens, left_of = truncate_history(layout, items)
        ranges = comm.token_ranges(layout.num_tokens)
        left = [left_of(of_rank) for of_rank in ranges]
        own = left[comm.cp_rank]
        places = tokens[own.start : own.stop] - ranges[comm.cp_rank].start
        shares = comm.token_ranges(shorter.num_tokens)
        return cls(shorter, places, [len(each) for each in left], [len(each) for each in shares], comm)

    def shorten(self, x: Tensor) -> Tensor:
        """The rows on which this rank computes, of the rows of its tokens before the truncation."""
        return self.comm.take_rows(self.comm.gather_rows(x.index_select(0, self.places), self.counts), self.shares)

    def restore(self, x: Tensor, rows: Tensor) -> Tensor:
        """x with the rows of the tokens that are left replaced by what :meth:`shorten` gave and layers changed."""
        left = self.comm.take_rows(self.comm.gather_rows(rows, self.shares), self.counts)
        return x.index_copy(0, self.places, left)
