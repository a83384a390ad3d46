"""Several samples of one history, shorter ones by chance, damaged ones left out."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hstu.config.args import DatasetArgs
from hstu.config.errors import DataError
from hstu.data.collate import Assembler, Collator, FeatureRoles, StoreReader
from hstu.data.loader import build_loader
from hstu.data.sampler import EvalSampler, TrainSampler
from hstu.data.samples import SampleTable, StochasticLength
from hstu.data.sequences import Task, build_samples
from hstu.data.skipping import SkippedSamples
from tests.data.toy_store import ToyStore


def store_of(*lengths: int) -> ToyStore:
    items = [[event % 50 for event in range(length)] for length in lengths]
    return ToyStore(items, actions=[[1] * length for length in lengths])


def table(task: Task, lengths: tuple[int, ...], **options: Any) -> SampleTable:
    args = DatasetArgs(dataset_name="toy", **options)
    return build_samples(store_of(*lengths), args, task, "train", seed=1)


def spans(samples: SampleTable) -> list[tuple[int, int, int]]:
    return list(zip(samples.start.tolist(), samples.stop.tolist(), samples.num_labels.tolist(), strict=True))


def test_a_long_history_gives_windows_back_to_its_first_event() -> None:
    samples = table("retrieval", (12,), max_sequence_length=4, window_stride=3, valid_items=1)  # trained on: 10 events
    assert spans(samples) == [(6, 10, 3), (3, 7, 3), (0, 4, 3)]
    assert samples.report == {"users": 1, "samples": 3, "dropped_short": 0, "truncated": 0, "events": 12}


def test_without_the_option_there_is_one_sample_of_the_newest() -> None:
    samples = table("retrieval", (12,), max_sequence_length=4)
    assert spans(samples) == [(6, 10, 3)]
    assert samples.report["truncated"] == 1


def test_each_window_has_its_own_candidates() -> None:
    samples = table(
        "ranking", (9, 40), max_sequence_length=5, window_stride=4, max_num_candidates=2, train_fraction=0.9
    )
    assert (samples.num_candidates == samples.num_labels).all() and (samples.num_labels == 2).all()
    assert len(samples) > 2


@given(st.lists(st.integers(1, 60), min_size=1, max_size=6), st.integers(2, 20), st.data())
def test_every_event_is_a_label_exactly_once(lengths: list[int], length: int, data: st.DataObject) -> None:
    stride = data.draw(st.integers(1, length - 1))
    options = {"max_sequence_length": length, "window_stride": stride}
    for task, unlabelled in (("retrieval", 1), ("ranking", 0)):
        split = {"valid_items": 0} if task == "retrieval" else {"split": "user_holdout", "train_fraction": 0.999}
        store = store_of(*lengths)
        samples = build_samples(store, DatasetArgs(dataset_name="toy", **options, **split), task, "train", 1)
        times = np.zeros(store.num_events, dtype=int)
        for start, stop, labels in spans(samples):
            assert 0 < stop - start <= length and 0 < labels <= stop - start - unlabelled
            times[stop - labels : stop] += 1
        for begin, end in zip(store.bounds[:-1], store.bounds[1:], strict=True):
            trained = end - 1 if task == "retrieval" else end  # the last event is held out
            if trained - begin > unlabelled and begin in samples.history_begin:
                assert (times[begin + unlabelled : trained] == 1).all()
                assert times[begin : begin + unlabelled].sum() == 0


def shortened(alpha: float, lengths: np.ndarray, epoch: int = 0, longest: int = 100) -> np.ndarray:
    args = DatasetArgs(dataset_name="toy", max_sequence_length=longest, stochastic_length_alpha=alpha)
    stochastic = StochasticLength.of(args, seed=3, unlabelled=1)
    assert stochastic is not None
    kept, labels = stochastic.shorten(lengths, lengths - 1, epoch, np.arange(len(lengths)))
    assert (labels == kept - 1).all()
    return kept


def test_the_share_of_whole_samples_is_that_of_the_paper() -> None:
    kept = shortened(1.5, np.full(200_000, 80))  # s = 100 ^ 0.75 = 31.6
    assert set(kept.tolist()) == {32, 80}
    assert (kept == 80).mean() == pytest.approx((32 / 80) ** 2, abs=0.005)
    assert (shortened(1.5, np.arange(1, 33)) == np.arange(1, 33)).all(), "short samples stay whole"
    assert (shortened(2.0, np.full(50, 100)) == 100).all()


def test_draws_differ_by_epoch_and_not_by_what_else_is_in_the_batch() -> None:
    lengths = np.full(1000, 90)
    one, other = shortened(1.5, lengths, 0), shortened(1.5, lengths, 1)
    assert (one != other).any()
    args = DatasetArgs(dataset_name="toy", max_sequence_length=100, stochastic_length_alpha=1.5)
    stochastic = StochasticLength.of(args, 3, 1)
    assert stochastic is not None
    alone = [stochastic.shorten(lengths[:1], lengths[:1] - 1, 0, np.array([n]))[0][0] for n in range(100)]
    assert alone == one[:100].tolist()


def batches(world_size: int, workers: int) -> list[tuple[list[int], list[int]]]:
    """Per global batch: lengths and items of its samples over all ranks."""
    store = store_of(*range(20, 60))
    args = DatasetArgs(dataset_name="toy", max_sequence_length=30, stochastic_length_alpha=1.4, shuffle=True)
    samples = build_samples(store, args, "retrieval", "train", 1)
    roles = FeatureRoles("item", "action", ())
    reader = StoreReader(store, samples, roles, stochastic_length=StochasticLength.of(args, 1, 1))
    merged: list[tuple[list[int], list[int]]] = []
    for rank in range(world_size):
        collator = Collator(reader, Assembler(8 // world_size, "retrieval", roles, 50, 1))
        sampler = TrainSampler(len(samples), 8 // world_size, rank, world_size, seed=1, shuffle=True)
        loader = build_loader(collator, sampler, workers=workers)
        for step, batch in zip(range(12), loader, strict=False):  # more than two epochs
            if rank == 0:
                merged.append(([], []))
            merged[step][0].extend(batch.item_lengths[: batch.real_batch_size].tolist())
            merged[step][1].extend(batch.features["item"].values().tolist())
        loader.close()  # type: ignore[attr-defined]
    return merged


def test_stochastic_lengths_are_the_same_at_any_world_size_and_with_workers() -> None:
    alone = batches(1, 0)
    assert len({length for lengths, _ in alone for length in lengths}) > 2
    assert batches(2, 0) == alone
    assert batches(1, 1) == alone


def damaged_loader(limit: int, workers: int = 0) -> tuple[SkippedSamples, list[list[int]]]:
    store = store_of(4, 5, 6, 7, 8)
    store.arrays["item"][[6, 20]] = 77  # users 1 and 3; 50 items
    samples = build_samples(store, DatasetArgs(dataset_name="toy", max_sequence_length=9), "retrieval", "test", 1)
    roles, skipped = FeatureRoles("item", None, ()), SkippedSamples(limit)
    collator = Collator(StoreReader(store, samples, roles), Assembler(2, "retrieval", roles, 50, 1), skipped)
    loader = build_loader(collator, EvalSampler(len(samples), 2, 0, 1), workers=workers)
    return skipped, [batch.user_ids.tolist() for batch in loader]


@pytest.mark.parametrize("workers", [0, 2])
def test_damaged_samples_are_left_out_and_counted_over_workers(workers: int, caplog: pytest.LogCaptureFixture) -> None:
    skipped, users = damaged_loader(limit=2, workers=workers)
    assert users == [[0, -1], [2, -1], [4, -1]]
    assert skipped.count == 2
    if not workers:
        assert "left out (1 of at most 2): toy: item = 77 of user 101" in caplog.text


@pytest.mark.parametrize("workers", [0, 1])
def test_more_damaged_samples_than_allowed_end_the_run(workers: int) -> None:
    with pytest.raises(DataError, match=r"item = 77 of user 103 .* damaged sample 2, TrainerArgs\.max_bad_rows = 1"):
        damaged_loader(limit=1, workers=workers)


def test_nothing_is_logged_where_nothing_is_wrong(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        batches(1, 0)
    assert not caplog.records
