"""mask_seen against a loop over the items of each user: any ids, repeats, histories that begin before the sequence."""

from collections import defaultdict

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hstu.data.batches.batch import PADDING_ID
from hstu.model.retrieval import find_seen
from hstu.ops.kernels import NEVER_SEEN, Backend
from tests.helpers import make_batch
from tests.model.test_retrieval import (
    DIM,
    HISTORIES,
    KINDS,
    assert_same_loss_and_gradients,
    loss_by_loop,
    make_model,
    run,
)
from tests.ops.backends import kernels_of

LARGEST = int(np.iinfo(np.int64).max)
IDS = st.integers(-3, 6) | st.sampled_from([LARGEST, -LARGEST])
USERS = st.lists(st.tuples(st.lists(IDS, max_size=4), st.lists(IDS, max_size=7)), min_size=1, max_size=4)


@settings(max_examples=40, deadline=None)
@given(USERS, st.lists(IDS | st.just(PADDING_ID), max_size=12))
def test_every_entry_of_a_pool_has_the_place_at_which_each_user_first_had_its_item(
    users: list[tuple[list[int], list[int]]], pool: list[int]
) -> None:
    before, items = [[*row] for row in zip(*users, strict=True)]
    batch = make_batch(items, task="retrieval", seen_lists=before)
    ends = np.cumsum(batch.item_lengths)
    targets = [end - back for end, row in zip(ends, items, strict=True) for back in range(len(row) - 1, 0, -1)]
    seen = find_seen(torch.tensor(pool, dtype=torch.int64), torch.tensor(targets, dtype=torch.int64), batch, "item")
    expected = []
    for earlier, row in zip(before, items, strict=True):
        first = defaultdict(lambda: NEVER_SEEN, {item: row.index(item) for item in row} | dict.fromkeys(earlier, -1))
        expected.append([first[item] for item in pool])
    assert seen.first.shape == (len(users), len(pool)) and seen.first.tolist() == expected
    places = [(user, place) for user, row in enumerate(items) for place in range(1, len(row))]
    assert list(zip(seen.sequences.tolist(), seen.positions.tolist(), strict=True)) == places


BEFORE = [[0, 7, 9], [], [1], [11, 11, 3], []]
"""What the users of HISTORIES had before."""
SEEN_OF_STEP = [
    {*before, *items[:place]} for before, items in zip(BEFORE, HISTORIES, strict=True) for place in range(1, len(items))
]


@pytest.mark.parametrize("backend", [Backend.PYTORCH, Backend.CPU])
@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradients_equal_a_loop_that_leaves_out_what_the_user_has_seen(kind: str, backend: Backend) -> None:
    options, negatives_of_step = KINDS[kind]
    model, table = make_model(kernels=kernels_of(backend, DIM))
    model.mask_seen = True
    batch = make_batch(HISTORIES, task="retrieval", seen_lists=BEFORE, **options)
    loss = run(model, table, batch).loss_sum

    def unseen(step: int) -> list[int]:
        return [item for item in negatives_of_step(step) if item not in SEEN_OF_STEP[step]]

    expected = loss_by_loop(model, table, unseen)
    assert_same_loss_and_gradients(loss, expected, [table, *model.parameters()])
    without_earlier = make_batch(HISTORIES, task="retrieval", **options)
    assert not torch.isclose(run(model, table, without_earlier).loss_sum, loss)
