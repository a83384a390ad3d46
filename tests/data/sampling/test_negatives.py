"""How often an item is expected among the negatives."""

import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hstu.config.args import DatasetArgs
from hstu.data.sampling import negatives as module
from hstu.data.sampling.negatives import Negatives, count_items, expected_log_counts
from hstu.data.sampling.samples import build_samples
from tests.conftest import write_small_store


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

    def expected(negatives: Negatives, batches: int = batches) -> list[float]:
        return np.exp(expected_log_counts(negatives, counts, batches)).tolist()

    assert expected(Negatives("in_batch")) == pytest.approx(in_batch)
    assert expected(Negatives("in_batch", 5)) == pytest.approx(5 * in_batch)
    assert expected(Negatives("uniform", 6)) == pytest.approx([2, 2, 2])
    assert expected(Negatives("mixed", 6, shared=True)) == pytest.approx(in_batch + 2)
    assert expected(Negatives("in_batch"))[2] < 1
    assert expected(Negatives("in_batch"), batches=1) == [1, 1, 1]
