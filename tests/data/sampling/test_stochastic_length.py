"""Stochastic length: its shares, and the same draws however a run is spread."""

import numpy as np
import pytest

from hstu.config.args import DatasetArgs
from hstu.data.batches.collate import Assembler, Collator
from hstu.data.batches.loader import build_loader
from hstu.data.features.roles import FeatureRoles
from hstu.data.sampling.sampler import TrainSampler
from hstu.data.sampling.samples import build_samples
from hstu.data.sampling.stochastic_length import StochasticLength
from hstu.data.store.reader import StoreReader
from tests.data.toy_store import store_of


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
