import numpy as np
import pytest

from hstu.base.ids import codes_of


@pytest.mark.parametrize(
    ("known", "ids", "codes"),
    [
        ([3, 5, 9], [9, 4, 3, 10, -1], [2, -1, 0, -1, -1]),
        (["a", "b"], ["b", "", "c"], [1, -1, -1]),
        ([], [1, 2], [-1, -1]),
        ([7], [], []),
    ],
)
def test_the_code_of_an_id_is_its_place_and_that_of_an_unknown_one_minus_one(
    known: list, ids: list, codes: list
) -> None:
    kind = object if known and isinstance(known[0], str) else np.int64
    found = codes_of(np.array(ids, dtype=kind), np.array(known, dtype=kind))
    assert found.dtype == np.int64
    assert found.tolist() == codes
