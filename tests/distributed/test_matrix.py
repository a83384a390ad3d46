"""Every two settings of parallelism that may meet do meet in a run that must equal the single process.

All combinations, not only all pairs: ``python -m tests.distributed.matrix --all``.
"""

from itertools import combinations, product
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.distributed.matrix import FACTORS, Case, all_cases, covering, not_refused, pairs, pairwise_cases, run
from tests.distributed.tensor_cases import write_store

CASES = pairwise_cases()
NEVER_MEET = {
    ("world", 1, "tp", 2),
    ("world", 1, "tp", 4),
    ("world", 2, "tp", 4),
    ("world", 1, "cp", 2),
    ("world", 1, "cp", 4),
    ("world", 2, "cp", 4),
    ("tp", 2, "cp", 4),
    ("tp", 4, "cp", 2),
    ("tp", 4, "cp", 4),
    ("cp", 4, "by_tokens", True),
    ("world", 1, "by_tokens", True),
    ("tp", 1, "by_tokens", True),
    ("world", 1, "balanced", True),
    ("sharding", "column_wise", "optimizer", "rowwise_adagrad"),
}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("matrix") / "store"
    write_store(path)
    return str(path)


@pytest.fixture(scope="module")
def problems(store: str) -> dict[Case, list[str]]:
    return run(CASES, store)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_run_equals_the_single_process(problems: Any, case: Case) -> None:
    assert not problems[case], "\n".join(problems[case])


def test_a_moment_a_row_is_refused_where_rows_are_cut(store: str) -> None:
    refused = [case for case in all_cases() if case.is_refused]
    assert refused
    for case in refused[:: len(refused) // 9]:
        assert not not_refused(case, store), case


def test_all_pairs_of_settings_are_run() -> None:
    run_pairs = set().union(*map(pairs, CASES))
    for (left, first), (right, second) in combinations(enumerate(FACTORS), 2):
        for levels in product(FACTORS[first], FACTORS[second]):
            meet = ((left, levels[0]), (right, levels[1])) in run_pairs
            assert meet == ((first, levels[0], second, levels[1]) not in NEVER_MEET)


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
