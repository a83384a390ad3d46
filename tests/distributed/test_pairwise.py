from __future__ import annotations

from itertools import product

from hypothesis import given
from hypothesis import strategies as st

from tests.distributed.pairwise import covering, pairs


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 3), st.booleans(), st.integers(0, 1)), min_size=1))
def test_every_pair_of_the_rows_that_may_be_is_in_a_chosen_row(rows: list[tuple[int, ...]]) -> None:
    chosen = covering(rows)
    assert set(chosen) <= set(rows)
    assert set().union(*map(pairs, chosen)) == set().union(*map(pairs, rows))


def test_few_rows_cover_all_pairs() -> None:
    rows = list(product(range(4), range(3), range(3), range(2), range(2), range(2)))
    chosen = covering(rows)
    assert 12 <= len(chosen) <= 16, "4 × 3 is the least"
    assert len(rows) == 288
    assert covering(rows) == chosen
