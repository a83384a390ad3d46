"""Compares the tiles and masks of the schedule with the mask of the reference, pair by pair."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hstu.data.jagged import run_starts
from hstu.ops.cutlass.schedule import Rows, leading_rows, make_schedule, visible_columns
from hstu.ops.layout import build_layout, pad_tokens
from hstu.ops.types import AttentionConfig, JaggedLayout
from tests.ops import oracle
from tests.ops.oracle import User

BLOCK, TILE = 4, 3


def layout_of(users: list[User], contextuals: int, tokens_per_item: int, group_size: int) -> JaggedLayout:
    return build_layout(
        item_lengths=np.array([user.history + user.candidates for user in users]),
        num_sequences=len(users),
        num_contextuals=contextuals,
        num_candidates=np.array([user.candidates for user in users]),
        tokens_per_item=tokens_per_item,
        target_group_size=group_size,
        device=torch.device("cpu"),
    )


def masks_of(users: list[User], config: AttentionConfig, contextuals: int, tokens_per_item: int, group_size: int):  # type: ignore[no-untyped-def]
    """The mask of each sequence, bool [queries, keys], from the oracle."""
    for user in users:
        tokens = oracle.tokens_of(user, contextuals=contextuals, tokens_per_item=tokens_per_item, group_size=group_size)
        yield np.array(
            [
                [
                    oracle.sees(query, key, is_causal=config.is_causal, contextual_mask=config.contextual_mask)
                    for key in tokens
                ]
                for query in tokens
            ],
            dtype=bool,
        ).reshape(len(tokens), len(tokens))


@settings(deadline=None, max_examples=150)
@given(
    users=st.lists(st.builds(User, st.integers(0, 9), st.integers(0, 6)), min_size=1, max_size=3),
    contextuals=st.integers(0, 5),
    tokens_per_item=st.integers(1, 2),
    group_size=st.integers(1, 3),
    is_causal=st.booleans(),
    contextual_mask=st.booleans(),
    rows=st.sampled_from(Rows),
)
def test_tiles_cover_every_visible_pair_once_and_mask_the_others(
    users: list[User],
    contextuals: int,
    tokens_per_item: int,
    group_size: int,
    is_causal: bool,
    contextual_mask: bool,
    rows: Rows,
) -> None:
    config = AttentionConfig(1.0, 1, is_causal, contextual_mask)
    shape = contextuals, tokens_per_item, group_size
    layout = layout_of(users, *shape)
    masks = dict(zip(run_starts(layout.seqlens), masks_of(users, config, *shape), strict=False))
    schedule = make_schedule(layout, config, rows, BLOCK, TILE)
    blocks = set()
    for start, first, length, end, at, num_masked, num_tiles, _ in schedule.items.tolist():
        mask = masks[start] if rows is Rows.QUERIES else masks[start].T
        assert len(mask) == length
        blocks.add((start, first))
        block = mask[first : first + BLOCK]
        lefts = schedule.tiles[at : at + num_tiles].tolist()
        needed = {left for left in range(0, length, TILE) if block[:, left : left + TILE].any()}
        assert set(lefts) == needed and len(lefts) == len(needed)  # no tile twice, no empty tile
        for left in lefts[num_masked:]:
            assert left + TILE <= length and block[:, left : left + TILE].all()
        for left in lefts[:num_masked]:
            for row in range(first, min(first + BLOCK, length)):
                a, b, c = visible_columns(
                    row, length, end, leading_rows(layout, config), layout.candidate_group_tokens, rows
                )
                for column in range(left, left + TILE):
                    assert (column < a or b <= column < c) == (column < length and mask[row, column])
    expected = {
        (s, f) for s, n in zip(run_starts(layout.seqlens), layout.seqlens, strict=True) for f in range(0, n, BLOCK)
    }
    assert blocks == expected


@pytest.mark.parametrize(("rows", "is_causal"), itertools.product(Rows, (True, False)))
def test_tiles_in_which_all_pairs_are_visible_need_no_mask(rows: Rows, is_causal: bool) -> None:
    layout = layout_of([User(2048, 0)], 0, 1, 1)
    schedule = make_schedule(layout, AttentionConfig(1.0, 1, is_causal), rows, 128, 64)
    masked, tiles = schedule.items[:, 5].sum(), schedule.items[:, 6].sum()
    assert (masked, tiles) == ((2 * 16, 2 * 16 * 17 // 2) if is_causal else (0, 16 * 32))


def test_the_longest_sequence_and_its_fullest_block_come_first() -> None:
    layout = layout_of([User(5, 0), User(40, 0), User(0, 0), User(12, 0)], 0, 1, 1)
    schedule = make_schedule(layout, AttentionConfig(1.0, 1), Rows.QUERIES, BLOCK, TILE)
    assert schedule.items[:, 2].tolist() == [40] * 10 + [12] * 3 + [5] * 2
    assert np.all(np.diff(schedule.items[:10, 6]) <= 0)


def test_a_sequence_of_padding_has_blocks_as_any_other() -> None:
    layout = pad_tokens(layout_of([User(5, 2)], 1, 1, 1), 3)
    schedule = make_schedule(layout, AttentionConfig(1.0, 1), Rows.KEYS, BLOCK, TILE)
    assert schedule.items[-1, :4].tolist() == [8, 0, 3, 3]
