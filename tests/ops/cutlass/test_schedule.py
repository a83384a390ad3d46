"""Compares the tiles and masks of the schedule with the mask of the reference, pair by pair."""

import itertools
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hstu.data.batches.jagged import run_starts
from hstu.ops.cutlass.schedule import (
    Rows,
    count_tiles,
    leading_rows,
    list_blocks,
    masked_tile_at,
    most_work,
    num_ctas,
    tile_at,
    tile_ranges,
    visible_columns,
    work_of,
)
from hstu.ops.kernels import AttentionConfig
from hstu.ops.layout import JaggedLayout
from tests.ops import oracle
from tests.ops.oracle import User
from tests.ops.strategies import Batch

BLOCK, TILE = 4, 3


def layout_of(users: list[User], contextuals: int, tokens_per_item: int, group_size: int) -> JaggedLayout:
    return Batch(tuple(users), contextuals, tokens_per_item, group_size).layout(with_times=False)


def masks_of(
    users: list[User], config: AttentionConfig, contextuals: int, tokens_per_item: int, group_size: int
) -> Iterator[np.ndarray]:
    """The mask of each sequence, bool [queries, keys], from the oracle."""
    for user in users:
        tokens = oracle.tokens_of(user, contextuals=contextuals, tokens_per_item=tokens_per_item, group_size=group_size)
        mask = oracle.mask_of(tokens, is_causal=config.is_causal, contextual_mask=config.contextual_mask)
        yield mask.numpy()


@settings(deadline=None, max_examples=100)
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
    blocks = set()
    lead, group = leading_rows(layout, config), layout.candidate_group_tokens
    for start, first, length, end in list_blocks(layout, config, rows, BLOCK).tolist():
        mask = masks[start] if rows is Rows.QUERIES else masks[start].T
        assert len(mask) == length
        blocks.add((start, first))
        block = mask[first : first + BLOCK]
        ranges = tile_ranges(first, length, end, lead, group, rows, BLOCK, TILE)
        num_masked, total = count_tiles(ranges)
        lefts = [int(tile_at(index, ranges)) * TILE for index in range(total)]
        needed = {left for left in range(0, length, TILE) if block[:, left : left + TILE].any()}
        assert set(lefts) == needed and len(lefts) == len(needed)  # no tile twice, no empty tile
        assert lefts[:num_masked] == [masked_tile_at(index, ranges) * TILE for index in range(num_masked)]
        for left in lefts[num_masked:]:
            assert left + TILE <= length and block[:, left : left + TILE].all()
        for left in lefts[:num_masked]:
            for row in range(first, min(first + BLOCK, length)):
                a, b, c = visible_columns(row, length, end, lead, group, rows)
                for column in range(left, left + TILE):
                    assert (column < a or b <= column < c) == (column < length and mask[row, column])
    expected = {
        (s, f) for s, n in zip(run_starts(layout.seqlens), layout.seqlens, strict=True) for f in range(0, n, BLOCK)
    }
    assert blocks == expected


def tiles_of(layout: JaggedLayout, config: AttentionConfig, rows: Rows, block: int, tile: int) -> np.ndarray:
    """The number of masked tiles and of all tiles of each block: int [blocks, 2]."""
    items = list_blocks(layout, config, rows, block)
    _, first, length, end = items.T
    lead, group = leading_rows(layout, config), layout.candidate_group_tokens
    return np.stack(count_tiles(tile_ranges(first, length, end, lead, group, rows, block, tile)), axis=1)


@pytest.mark.parametrize(("rows", "is_causal"), itertools.product(Rows, (True, False)))
def test_tiles_in_which_all_pairs_are_visible_need_no_mask(rows: Rows, is_causal: bool) -> None:
    layout = layout_of([User(2048, 0)], 0, 1, 1)
    masked, tiles = tiles_of(layout, AttentionConfig(1.0, 1, is_causal), rows, 128, 64).sum(0)
    assert (masked, tiles) == ((2 * 16, 2 * 16 * 17 // 2) if is_causal else (0, 16 * 32))


@pytest.mark.parametrize("rows", Rows)
def test_only_the_ends_of_a_large_target_group_need_a_mask(rows: Rows) -> None:
    layout = layout_of([User(128, 1024)], 0, 1, 1024)
    masked, tiles = tiles_of(layout, AttentionConfig(1.0, 1), rows, 128, 64).T
    assert np.all(masked == 2) and tiles.max() == 18


@pytest.mark.parametrize("rows", Rows)
def test_the_longest_sequence_and_its_fullest_block_come_first(rows: Rows) -> None:
    layout, config = layout_of([User(5, 0), User(40, 0), User(0, 0), User(12, 0)], 3, 1, 1), AttentionConfig(1.0, 1)
    assert list_blocks(layout, config, rows, BLOCK)[:, 2].tolist() == [43] * 11 + [15] * 4 + [8] * 2 + [3]
    assert np.all(np.diff(tiles_of(layout, config, rows, BLOCK, TILE)[:11, 1]) <= 0)


@pytest.mark.parametrize(("length", "block"), [(4099, 64), (4099, 128), (3000, 64), (6000, 128), (512, 64)])
def test_all_ctas_get_nearly_the_same_work(length: int, block: int) -> None:
    """Also where the blocks of a sequence are nearly two turns: 65 blocks of four heads on 132 processors."""
    layout, config = layout_of([User(length - 3, 0)] * 32, 3, 1, 1), AttentionConfig(1.0, 1)
    blocks = list_blocks(layout, config, Rows.KEYS, block)
    work = np.repeat(work_of(blocks, layout, config, Rows.KEYS, block, 64), 4)
    ctas = num_ctas(work, 132)
    loads = np.zeros(ctas)
    for turn, first in enumerate(range(0, len(work), ctas)):
        taken = work[first : first + ctas]
        order = np.arange(ctas)[:: -1 if turn % 2 else 1]
        np.add.at(loads, order[: len(taken)], taken)
    assert loads.max() == most_work(work, ctas) and loads.max() < 1.05 * work.sum() / 132
