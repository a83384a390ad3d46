"""Random windows of long histories: where they lie, how often each event is in one, and on what that depends."""

from dataclasses import replace

import numpy as np
import pytest

from hstu.config.args import DatasetArgs
from hstu.data.batches.batch import HSTUBatch
from hstu.data.batches.collate import Assembler, Collator
from hstu.data.batches.loader import build_loader
from hstu.data.features.roles import FeatureRoles
from hstu.data.sampling.negatives import count_items
from hstu.data.sampling.sampler import TrainSampler, window_starts
from hstu.data.sampling.samples import SampleTable, build_samples
from hstu.data.store.reader import StoreReader
from tests.data.toy_store import ToyStore

LENGTH = 8
ARGS = DatasetArgs(dataset_name="toy", max_sequence_length=LENGTH, window_stride="random", valid_items=0)
SIZES = (5, 8, 30, 41)
STORE = ToyStore([list(range(size)) for size in SIZES], actions=[[1] * size for size in SIZES])


def samples_of(args: DatasetArgs = ARGS, **options: object) -> SampleTable:
    task = "ranking" if "max_num_candidates" in options else "retrieval"
    return build_samples(STORE, replace(args, **options), task, "train", seed=1)  # type: ignore[arg-type]


def draw(samples: SampleTable, epochs: int) -> np.ndarray:
    """First events of the windows, counted from those of the histories: [epochs, samples]."""
    rows, numbers = np.arange(len(samples)), np.arange(epochs)[:, None]
    starts = window_starts(samples.history_begin, samples.start, samples.stop, 3, numbers, rows)  # type: ignore[arg-type]
    return starts - samples.history_begin


def test_a_window_begins_anywhere_and_is_the_newest_where_too_few_events_follow() -> None:
    samples = samples_of()
    assert samples.report["in random windows"] == 2 and samples.report["truncated"] == 0
    drawn = draw(samples, 6000)
    assert (drawn[:, :2] == 0).all(), "short histories are whole"
    for row, size in ((2, 29), (3, 40)):  # without the event that is held out
        shares = np.bincount(drawn[:, row], minlength=size) / len(drawn)
        newest = size - LENGTH
        assert shares[:newest] == pytest.approx(1 / size, abs=0.01)
        assert shares[newest] == pytest.approx(LENGTH / size, abs=0.02) and not shares[newest + 1 :].any()


def test_items_are_counted_over_whole_histories_by_the_share_that_is_in_a_window() -> None:
    samples, expected = samples_of(), np.zeros(50)
    for size in SIZES:
        expected[: size - 1] += min(LENGTH / (size - 1), 1)  # the last event is held out
    found = count_items(STORE, "item", samples, random_windows=True)
    assert found == pytest.approx(expected) and found.sum() == pytest.approx(samples.lengths.sum())


def batches(world_size: int = 1, workers: int = 0, **options: object) -> list[list[list[int]]]:
    """Per global batch of four epochs: the items of each sequence, over all ranks."""
    args, samples = replace(ARGS, **options), samples_of(**options)  # type: ignore[arg-type]
    task = "ranking" if args.max_num_candidates else "retrieval"
    roles = FeatureRoles("item", "action", ())
    reader = StoreReader(STORE, samples, roles, window_seed=1 if args.has_random_windows else None)
    merged: list[list[list[int]]] = [[] for _ in range(4 * (len(samples) // 2))]
    for rank in range(world_size):
        collator = Collator(reader.read, Assembler(2 // world_size, task, roles, 50, 1))  # type: ignore[arg-type]
        sampler = TrainSampler(len(samples), 2 // world_size, rank, world_size, seed=1, shuffle=True)
        loader = build_loader(collator, sampler, workers=workers)
        for step, batch in zip(range(len(merged)), loader, strict=False):
            merged[step] += sequences(batch)
        loader.close()  # type: ignore[attr-defined]
    return merged


def sequences(batch: HSTUBatch) -> list[list[int]]:
    return [row.tolist() for row in batch.features["item"].to_dense()]


def test_windows_are_the_same_at_any_world_size_and_with_workers() -> None:
    alone = batches()
    drawn = [row for step in alone for row in step]
    assert len({tuple(row) for row in drawn}) > 6
    assert all(row == list(range(row[0], row[0] + len(row))) for row in drawn), "without gaps"
    assert batches(2) == alone
    assert batches(1, 1) == alone


def test_the_newest_items_of_a_window_are_its_candidates() -> None:
    samples = samples_of(max_num_candidates=3, train_fraction=0.99)
    roles = FeatureRoles("item", "action", ())
    reader = StoreReader(STORE, samples, roles, window_seed=1)
    collator = Collator(reader.read, Assembler(4, "ranking", roles, 50, 1))
    sampler = TrainSampler(len(samples), 4, 0, 1, seed=1, shuffle=False)
    for _, batch in zip(range(3), build_loader(collator, sampler), strict=False):
        assert batch.item_lengths.tolist() == [5, 8, 8, 8]
        assert batch.num_candidates_host.tolist() == [3] * 4 and batch.num_labels_total == 12
