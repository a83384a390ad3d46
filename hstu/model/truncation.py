"""Truncation: the layers after it process only the newest items of each sequence."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from hstu.ops.comm import LayerComm
from hstu.ops.layout import JaggedLayout, truncate_history


@dataclass(frozen=True)
class Truncation:
    """The tokens of a batch that remain after a truncation. Context-parallel ranks share them evenly again."""

    layout: JaggedLayout
    """Layout of all remaining tokens."""
    places: Tensor
    """int64 [.]: indices of this rank's tokens that remain."""
    counts: list[int]
    """Remaining tokens of each context-parallel rank, as split before the truncation."""
    shares: list[int]
    """Remaining tokens that each rank processes, as split after the truncation."""
    comm: LayerComm

    @classmethod
    def of(cls, layout: JaggedLayout, items: int, comm: LayerComm) -> Truncation:
        """Truncate the sequences of ``layout`` to their newest ``items`` items."""
        shorter, tokens, left_of = truncate_history(layout, items)
        ranges = comm.token_ranges(layout.num_tokens)
        left = [left_of(of_rank) for of_rank in ranges]
        own = left[comm.cp_rank]
        places = tokens[own.start : own.stop] - ranges[comm.cp_rank].start
        shares = comm.token_ranges(shorter.num_tokens)
        return cls(shorter, places, [len(each) for each in left], [len(each) for each in shares], comm)

    def shorten(self, x: Tensor) -> Tensor:
        """This rank's rows before the truncation → the rows that it processes after it."""
        return self.comm.take_rows(self.comm.gather_rows(x.index_select(0, self.places), self.counts), self.shares)

    def restore(self, x: Tensor, rows: Tensor) -> Tensor:
        """Returns x with its remaining rows replaced by ``rows``, the outputs of the later layers."""
        left = self.comm.take_rows(self.comm.gather_rows(rows, self.shares), self.counts)
        return x.index_copy(0, self.places, left)
