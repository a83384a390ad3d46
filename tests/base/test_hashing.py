import numpy as np
import pytest

from hstu.base.hashing import hash_ids, hash_strings, random_below, random_bits, splitmix64
from hstu.base.ids import codes_of


def chi_square_z(counts: np.ndarray) -> float:
    """How many standard deviations the chi-square statistic of equally likely cells is off its mean."""
    expected = counts.sum() / len(counts)
    degrees = len(counts) - 1
    return float((((counts - expected) ** 2 / expected).sum() - degrees) / np.sqrt(2 * degrees))


def test_splitmix64_gives_the_published_sequence() -> None:
    # First outputs of the reference generator with seed 1234567, whose n-th state is seed + n * gamma.
    gamma = 0x9E3779B97F4A7C15
    states = np.array([(1234567 + n * gamma) % 2**64 for n in range(3)], dtype=np.uint64)
    assert splitmix64(states).tolist() == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def test_a_counter_addresses_the_same_number_alone_and_in_a_table() -> None:
    table = random_bits(5, np.arange(4)[:, None], np.arange(6))
    assert table.shape == (4, 6)
    assert random_bits(5, 3, 2).item() == table[3, 2]
    assert len(np.unique(table)) == table.size


def test_random_below_is_uniform_and_in_range() -> None:
    bits = (random_bits(7, np.arange(200_000)) >> np.uint64(32)).astype(np.uint32)
    drawn = random_below(97, bits)
    assert drawn.dtype == np.int64
    assert drawn.min() == 0 and drawn.max() == 96
    assert abs(chi_square_z(np.bincount(drawn, minlength=97))) < 4


def test_random_below_reaches_both_ends_of_the_largest_bound() -> None:
    assert random_below(2**32, np.array([0, 2**32 - 1], dtype=np.uint32)).tolist() == [0, 2**32 - 1]


def test_hashed_ids_spread_evenly_over_the_rows() -> None:
    rows = hash_ids(np.arange(100_000), 64)
    assert rows.dtype == np.int64 and rows.min() == 0 and rows.max() == 63
    assert abs(chi_square_z(np.bincount(rows, minlength=64))) < 4


def test_negative_ids_hash_as_well() -> None:
    assert 0 <= hash_ids(np.array([-(2**63), -1]), 10).min() <= hash_ids(np.array([-(2**63), -1]), 10).max() < 10


@pytest.mark.parametrize("width", ["<U3", "<U40", object])
def test_a_string_hashes_the_same_whatever_array_holds_it(width: str | type[object]) -> None:
    alone = [hash_strings(np.array([text]))[0] for text in ("a", "ab", "ba")]
    assert hash_strings(np.array(["a", "ab", "ba"], dtype=width)).tolist() == alone
    assert len(set(alone)) == 3


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
