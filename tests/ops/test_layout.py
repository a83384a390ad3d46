"""The layout against tokens written down one at a time.

The order of tokens: tests/model/test_inputs.py.
"""

from itertools import pairwise

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from hstu.ops.layout import JaggedLayout, pad_tokens, truncate_history
from hstu.ops.pytorch.operators import add_positions
from tests.ops.strategies import Batch, batches


def times_of(layout: JaggedLayout) -> tuple[Tensor, Tensor]:
    assert layout.token_times is not None and layout.query_times is not None
    return layout.token_times, layout.query_times


@given(batches())
def test_positions_times_and_lengths_equal_those_written_down_token_by_token(batch: Batch) -> None:
    layout, sequences = batch.layout(), batch.tokens()
    tokens = [token for sequence in sequences for token in sequence]
    assert layout.seqlens.tolist() == [len(sequence) for sequence in sequences]
    assert layout.seqlen_offsets.tolist() == np.cumsum([0] + [len(sequence) for sequence in sequences]).tolist()
    assert layout.num_tokens == len(tokens)
    assert layout.positions.tolist() == [token.position for token in tokens]
    token_times, query_times = times_of(layout)
    assert token_times.tolist() == [token.time for token in tokens]
    assert query_times.tolist() == [token.query_time for token in tokens]
    candidates = [sum(token.kind == "candidate" for token in sequence) for sequence in sequences]
    assert layout.num_candidate_tokens_host.tolist() == candidates
    assert (layout.num_candidate_tokens is None) == (not any(candidates))


@given(batches())
def test_only_the_last_token_of_a_sequence_asks_at_the_time_of_the_request(batch: Batch) -> None:
    requests = torch.arange(len(batch.users)) + 7
    own = batch.layout()
    (times, expected), (same_times, asked) = times_of(own), times_of(batch.layout(request_times=requests))
    for row, stop in enumerate(own.seqlen_offsets[1:].tolist()):
        if own.seqlens[row]:
            expected[stop - 1] = 7 + row
    assert torch.equal(asked, expected) and torch.equal(same_times, times)


@given(batches())
def test_queries_may_have_the_times_of_their_own_tokens(batch: Batch) -> None:
    asks, layout = torch.arange(len(batch.users)) % 2 == 0, batch.layout()
    (own, following), (_, found) = times_of(layout), times_of(batch.layout(asks_for_next=asks))
    assert torch.equal(found, torch.where(asks.repeat_interleave(torch.from_numpy(layout.seqlens)), following, own))
    assert torch.equal(*times_of(batch.layout(asks_for_next=False)))


def parts_of(num_tokens: int) -> list[range]:
    """Ranges that cut sequences anywhere, one of them empty."""
    bounds = sorted([0, 0, num_tokens // 3, num_tokens // 2, num_tokens])
    return [range(*pair) for pair in pairwise(bounds)]


@given(batches(), st.integers(1, 6))
def test_a_truncated_layout_has_the_tokens_that_are_left(batch: Batch, items: int) -> None:
    layout = batch.layout()
    shorter, tokens, left_of = truncate_history(layout, items)
    left, positions, start = [], [], 0
    for sequence in batch.tokens():
        oldest = [index for index, token in enumerate(sequence) if token.kind == "history"]
        removed = oldest[: max(0, len(oldest) - items * batch.tokens_per_item)]
        kept = [index for index in range(len(sequence)) if index not in removed]
        history_end = sum(sequence[index].kind != "candidate" for index in kept)
        left += [start + index for index in kept]
        positions += [min(index, history_end) for index in range(len(kept))]
        start += len(sequence)
    assert tokens.tolist() == left
    assert shorter.positions.tolist() == positions
    for part in parts_of(layout.num_tokens):
        own = left_of(part)
        assert tokens[own.start : own.stop].tolist() == [token for token in left if token in part]
    assert shorter.num_tokens == len(left) == shorter.seqlen_offsets[-1]
    assert shorter.num_candidate_tokens_host.tolist() == layout.num_candidate_tokens_host.tolist()
    for name in ("token_times", "query_times"):
        assert getattr(shorter, name).tolist() == getattr(layout, name)[left].tolist()


@given(batches(), st.integers(-1, 0))
def test_the_newest_items_of_a_range_of_tokens_are_known_on_the_host(batch: Batch, shift: int) -> None:
    layout = batch.layout()
    counts = layout.num_items // 2
    tokens = (layout.newest_item_tokens(torch.from_numpy(counts), int(counts.sum())) + shift).tolist()
    runs = layout.newest_item_runs(counts, shift)
    for part in parts_of(layout.num_tokens):
        own = runs.within(part)
        assert tokens[own.start : own.stop] == [token for token in tokens if token in part]


@given(batches())
def test_padding_tokens_are_a_sequence_of_their_own(batch: Batch) -> None:
    layout = batch.layout()
    padded = pad_tokens(layout, 3)
    assert padded.num_tokens == layout.num_tokens + 3
    assert padded.seqlens.tolist() == [*layout.seqlens.tolist(), 3]
    assert padded.seqlen_offsets.tolist() == [*layout.seqlen_offsets.tolist(), layout.num_tokens + 3]
    assert padded.num_candidate_tokens_host.tolist() == [*layout.num_candidate_tokens_host.tolist(), 0]
    for name in ("positions", "token_times", "query_times"):
        assert getattr(padded, name).tolist() == [*getattr(layout, name).tolist(), 0, 0, 0]
    assert pad_tokens(layout, 0) is layout


def test_positions_beyond_the_table_share_its_last_row() -> None:
    table = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    x, positions = torch.randn(5, 2, dtype=torch.float64, requires_grad=True), torch.tensor([0, 1, 2, 3, 900])
    out = add_positions(x, table, positions)
    torch.testing.assert_close(out, x + table[[0, 1, 2, 2, 2]])
    assert torch.autograd.gradcheck(lambda a, b: add_positions(a, b, positions), (x, table))
