"""Selects this rank's tokens of labelled items. With context parallelism each rank has a range of all tokens."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from hstu.data.batches.batch import HSTUBatch
from hstu.ops.comm import LayerComm
from hstu.ops.layout import JaggedLayout, TokenRuns


class OwnRows(NamedTuple):
    """This rank's slice of a selection of the batch's tokens."""

    own: slice
    counts: list[int]
    """Number of selected tokens on each context-parallel rank."""
    first_token: int
    """Index in the batch of this rank's first token."""


def own_rows(runs: TokenRuns, layout: JaggedLayout, comm: LayerComm) -> OwnRows:
    """Select the tokens of ``runs`` that belong to this rank."""
    ranges = comm.token_ranges(layout.num_tokens)
    of_ranks = [runs.within(of_rank) for of_rank in ranges]
    own = of_ranks[comm.cp_rank]
    return OwnRows(slice(own.start, own.stop), [len(each) for each in of_ranks], ranges[comm.cp_rank].start)


def labelled_rows(
    tokens: Tensor, layout: JaggedLayout, batch: HSTUBatch, comm: LayerComm, shift: int = 0
) -> tuple[Tensor, OwnRows]:
    """Rows [m, D] of this rank's ``tokens`` [., D] that lie ``shift`` after labelled items, and their labels' slice."""
    places = layout.newest_item_tokens(batch.num_labels, total=batch.num_labels_total) + shift
    if comm.cp_size == 1:
        return tokens.index_select(0, places), OwnRows(slice(None), [batch.num_labels_total], 0)
    labels = own_rows(layout.newest_item_runs(batch.num_labels_host, shift), layout, comm)
    return tokens.index_select(0, places[labels.own] - labels.first_token), labels
