"""Where weights lie in a buffer that ranks share, and which parts of them a rank has."""

import math

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from hstu.parallel.flat_weights import ALIGNMENT, FlatLayout, boxes


@given(st.lists(st.integers(0, 3000), min_size=1, max_size=6), st.integers(1, 5))
def test_each_element_belongs_to_one_rank_and_no_rank_has_more_than_its_range(numels: list[int], ranks: int) -> None:
    layout = FlatLayout.of({str(index): numel for index, numel in enumerate(numels)}, ranks)
    owned = [layout.owned(rank) for rank in range(ranks)]
    for name, numel in layout.numels.items():
        assert [element for of_rank in owned for element in of_rank[name]] == list(range(numel))
        assert all(len(of_rank[name]) == 0 or of_rank[name].start % ALIGNMENT == 0 for of_rank in owned)
    assert all(sum(map(len, of_rank.values())) <= layout.range_size for of_rank in owned)
    assert layout.range_size % ALIGNMENT == 0
    assert ranks * layout.range_size <= sum(numels) + ALIGNMENT * (len(numels) + ranks)


@given(st.lists(st.integers(1, 6), max_size=3), st.data())
def test_boxes_hold_the_elements_in_their_order(size: list[int], data: st.DataObject) -> None:
    whole = np.arange(math.prod(size)).reshape(size)
    start = data.draw(st.integers(0, whole.size))
    stop = data.draw(st.integers(start, whole.size))
    found = []
    for offset, shape in boxes(size, start, stop):
        box = whole[tuple(slice(first, first + n) for first, n in zip(offset, shape, strict=True))]
        assert box.shape == shape
        found += box.ravel().tolist()
    assert found == list(range(start, stop))


def test_a_range_of_a_matrix_is_a_part_of_a_row_whole_rows_and_a_part_of_a_row() -> None:
    assert [*boxes((5, 4), 3, 18)] == [((0, 3), (1, 1)), ((1, 0), (3, 4)), ((4, 0), (1, 2))]
    assert [*boxes((5, 4), 9, 11)] == [((2, 1), (1, 2))]
