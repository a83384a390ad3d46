"""Draws from the corpus by popularity, and how often an item is expected among the negatives."""

import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hstu.base.hashing import random_bits
from hstu.config.args import DatasetArgs
from hstu.data.sampling import negatives as module
from hstu.data.sampling.negatives import ItemDistribution, Negatives, count_items, expected_log_counts
from hstu.data.sampling.samples import build_samples
from tests.conftest import write_small_store

DRAWS = 200_000


def draw(corpus: ItemDistribution, seed: int = 3) -> np.ndarray:
    return corpus.items((random_bits(seed, np.arange(DRAWS)) >> np.uint64(32)).astype(np.uint32))


def mass_of_columns(corpus: ItemDistribution) -> np.ndarray:
    """The probability of each code as the alias table has it."""
    assert corpus._columns is not None
    kept, other = corpus._columns
    share = np.where(other == np.arange(corpus.size), 1.0, kept / 2.0**32)
    return (share + np.bincount(other, 1 - share, minlength=corpus.size)) / corpus.size


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from([0.0, 1e-9, 1.0, 1.0, 3.5, 7.0, 1e4]) | st.floats(0, 100), min_size=1, max_size=60))
def test_the_alias_table_has_the_probabilities_of_the_weights(weights: list[float]) -> None:
    if sum(weights) <= 0:
        return
    corpus = ItemDistribution(len(weights), np.array(weights))
    np.testing.assert_allclose(corpus.probabilities(), np.array(weights) / sum(weights), rtol=1e-12)
    np.testing.assert_allclose(mass_of_columns(corpus), corpus.probabilities(), rtol=0, atol=2.0**-31)


def test_draws_by_popularity_follow_the_counts_and_leave_out_what_never_occurs() -> None:
    counts = np.array([900, 1, 0, 30, 2, 0, 400, 5, 60, 700])
    corpus = ItemDistribution(10, counts**0.75)
    found = np.bincount(draw(corpus), minlength=10)
    drawn = counts > 0
    expected = DRAWS * corpus.probabilities()[drawn]
    assert not found[~drawn].any()
    chi_square = ((found[drawn] - expected) ** 2 / expected).sum()
    assert chi_square < 24.3  # exceeded with probability 0.001 at 7 degrees of freedom


@settings(max_examples=12, deadline=None)
@given(
    lengths=st.lists(st.integers(2, 30), min_size=1, max_size=8),
    stride=st.sampled_from([None, 3]),
    block=st.sampled_from([1, 7, 1 << 24]),
)
def test_items_are_counted_once_for_each_training_sample_that_has_them(
    lengths: list[int], stride: int | None, block: int
) -> None:
    rng = np.random.default_rng(0)
    args = DatasetArgs(dataset_name="toy", max_sequence_length=8, window_stride=stride)
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_EVENTS_PER_BLOCK", block)
        items = [rng.integers(0, 9, length).tolist() for length in lengths]
        store = write_small_store(Path(folder) / "store", items, num_items=9)
        samples = build_samples(store, args, "retrieval", "train", 0)
        codes, expected = store.sequence("item_id"), np.zeros(9, dtype=np.int64)
        for start, stop in zip(samples.start, samples.stop, strict=True):
            np.add.at(expected, codes[start:stop], 1)
        assert count_items(store, "item_id", samples).tolist() == expected.tolist()
        assert expected.sum() == samples.report["events"]


def test_expected_counts_of_each_kind() -> None:
    counts, batches = np.array([0, 1, 8]), 4
    in_batch = 1 - 0.75 ** np.array([1, 1, 8])  # what is in a batch occurs
    by_count = np.array([0, 1, 8]) ** 0.75 / (1 + 8**0.75)
    popular = ItemDistribution(3, counts**0.75)

    def expected(negatives: Negatives, corpus: ItemDistribution) -> list[float]:
        return np.exp(expected_log_counts(negatives, corpus, counts, batches)).tolist()

    uniform = ItemDistribution(3)
    assert expected(Negatives("in_batch"), uniform) == pytest.approx(in_batch)
    assert expected(Negatives("in_batch", 5), uniform) == pytest.approx(5 * in_batch)
    assert expected(Negatives("uniform", 6), uniform) == pytest.approx([2, 2, 2])
    assert expected(Negatives("popularity", 6, exponent=0.75), popular)[1:] == pytest.approx(6 * by_count[1:])
    assert expected(Negatives("mixed", 6, shared=True), uniform) == pytest.approx(in_batch + 2)
    assert expected(Negatives("in_batch"), uniform)[2] < 1
    one_batch = np.exp(expected_log_counts(Negatives("in_batch"), uniform, counts, 1))
    assert one_batch.tolist() == [1, 1, 1]
