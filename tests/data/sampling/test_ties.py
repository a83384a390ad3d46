"""The order of events of equal times in training: what it is drawn from, what moves along, and what windows see."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hstu.config.args import DatasetArgs
from hstu.data.batches.batch import HSTUBatch
from hstu.data.batches.collate import Assembler, Collator
from hstu.data.batches.loader import build_loader
from hstu.data.features.roles import FeatureRoles
from hstu.data.sampling.sampler import SamplerPosition, TrainSampler, shuffled_ties
from hstu.data.sampling.samples import SampleTable, build_samples
from hstu.data.store.reader import StoreReader
from tests.data.toy_store import ToyStore

EPOCHS = 4
_RNG = np.random.default_rng(0)
TIMES = [sorted(_RNG.integers(0, 6, size).tolist()) for size in (3, 9, 20, 31)]
ITEMS = [list(range(len(row))) for row in TIMES]
STORE = ToyStore(ITEMS, actions=[[item % 10 for item in row] for row in ITEMS], times=TIMES)


def samples_of(**options: Any) -> SampleTable:
    args = DatasetArgs(dataset_name="toy", max_sequence_length=8, valid_items=0, shuffle_ties=True, **options)
    return build_samples(STORE, args, "retrieval", "train", seed=1)


@settings(deadline=None)
@given(st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=12), min_size=1, max_size=5), st.data())
def test_the_order_equals_a_plain_reference(rows: list[list[int]], data: st.DataObject) -> None:
    times = np.concatenate([sorted(row) for row in rows])
    offsets = np.cumsum([0, *map(len, rows)])
    begin, stop = offsets[:-1], offsets[1:]
    whole = shuffled_ties(times, (begin, stop), begin, stop - begin, 5, 2)
    for low, high in zip(begin, stop, strict=True):
        assert sorted(whole[low:high]) == list(range(low, high))
    assert (times[whole] == times).all()
    first = np.array([data.draw(st.integers(low, high - 1)) for low, high in zip(begin, stop, strict=True)])
    ends = np.array([data.draw(st.integers(low, high)) for low, high in zip(first, stop, strict=True)])
    cut = shuffled_ties(times, (begin, stop), first, ends - first, 5, 2)
    assert cut.tolist() == [event for low, high in zip(first, ends, strict=True) for event in whole[low:high]]


def test_all_orders_of_a_run_are_equally_likely() -> None:
    times, zero = np.array([1, 7, 7, 7, 9]), np.array([0])
    drawn = [tuple(shuffled_ties(times, (zero, zero + 5), zero, zero + 5, 1, epoch).tolist()) for epoch in range(6_000)]
    orders, counts = np.unique(drawn, axis=0, return_counts=True)
    assert len(orders) == 6 and (orders[:, [0, 4]] == [0, 4]).all()
    assert counts / 6_000 == pytest.approx(1 / 6, abs=0.02)


def batches(world_size: int = 1, workers: int = 0, consumed: int = 0, **options: Any) -> list[list[Any]]:
    """Per global batch of EPOCHS epochs, over all ranks: (user, items, actions, times, seen items) of each sequence."""
    samples, roles = samples_of(**options), FeatureRoles("item", "action", ())
    window_seed = 1 if options.get("window_stride") == "random" else None
    reader = StoreReader(
        STORE, samples, roles, wants_timestamps=True, wants_seen=True, window_seed=window_seed, ties_seed=1
    )
    merged: list[list[Any]] = [[] for _ in range(EPOCHS * -(-len(samples) // 2))]
    for rank in range(world_size):
        collator = Collator(reader.read, Assembler(2 // world_size, "retrieval", roles, 50, 1))
        position = SamplerPosition(0, consumed)
        sampler = TrainSampler(len(samples), 2 // world_size, rank, world_size, 1, True, position)
        loader = build_loader(collator, sampler, workers=workers)
        for step, batch in zip(range(len(merged) - consumed // 2), loader, strict=False):
            merged[step + consumed // 2] += sequences(batch)
        loader.close()  # type: ignore[attr-defined]
    return merged[consumed // 2 :]


def sequences(batch: HSTUBatch) -> list[Any]:
    assert batch.seen is not None and batch.items.timestamps is not None
    ends = np.cumsum(batch.item_lengths)[:-1]
    seen = np.split(batch.seen.values.numpy(), np.cumsum(batch.seen.lengths.numpy())[:-1])
    columns = [batch.features["item"].to_dense(), batch.features["action"].to_dense()]
    columns.append(np.split(batch.items.timestamps.numpy(), ends))
    rows = zip(batch.user_ids.tolist(), *columns, seen, strict=True)
    return [(user, *(np.asarray(part).tolist() for part in parts)) for user, *parts in rows if user >= 0]


@pytest.mark.parametrize("stride", [None, 5, "random"])
def test_draws_are_the_same_at_any_world_size_with_workers_and_after_a_resume(stride: Any) -> None:
    alone = batches(window_stride=stride)
    assert batches(2, window_stride=stride) == alone
    assert batches(1, 1, window_stride=stride) == alone
    assert batches(1, 0, 2, window_stride=stride) == alone[1:]


@pytest.mark.parametrize("stride", [None, 5, "random"])
def test_the_prefix_and_the_window_divide_the_history_and_actions_move_along(stride: Any) -> None:
    orders = set()
    for user, items, actions, times, seen in (row for step in batches(window_stride=stride) for row in step):
        orders.add((user, *items))
        assert actions == [item % 10 for item in items]
        assert times == [TIMES[user][item] for item in items] == sorted(times)
        assert not set(items) & set(seen) and len(set(items)) == len(items)
        assert [TIMES[user][item] for item in [*seen, *items]] == TIMES[user][: len(seen) + len(items)]
        assert len(TIMES[user]) - 1 not in items, "the held-out event stays held out"
    assert len(orders) > len(samples_of(window_stride=stride)), "orders differ between epochs"


def test_windows_of_one_epoch_label_each_event_once() -> None:
    samples = samples_of(window_stride=5)
    epoch = [row for step in batches(window_stride=5)[: -(-len(samples) // 2)] for row in step]
    for user, history in enumerate(TIMES):
        windows = sorted((row[1:] for row in epoch if row[0] == user), key=lambda row: len(row[3]))
        joined: list[int] = []
        for items, _, _, seen in windows:
            joined = [*joined[: len(seen)], *items]
        assert sorted(joined) == list(range(len(history) - 1))
