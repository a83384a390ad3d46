"""Slots with the hash index of a GPU: equal to a dictionary, id for id, and to the sorted index, bit for bit."""

from dataclasses import asdict
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hstu.ops.types import Backend
from hstu.parallel.dynamic.hashing import unmix
from hstu.parallel.dynamic.slot_tables import TorchSlots
from hstu.parallel.dynamic.slots import NO_SLOT, Policy
from tests.ops.backends import INTERPRETED, device_of, examples, needs_gpu
from tests.parallel.dynamic.dictionary import DictionaryTable
from tests.parallel.dynamic.test_slots import IDS, THRESHOLDS, assert_holds

pytest.importorskip("triton", reason="NEEDS TRITON: pip install -e '.[cpu]'")


from hstu.ops.triton.slots import SlotIndex

pytestmark = [] if INTERPRETED else list(needs_gpu)
DEVICE = device_of(Backend.TRITON)
HashedSlots = partial(TorchSlots, device=str(DEVICE), index=SlotIndex)
PARTS = ("slots", "new_slots", "new_ids", "evicted_ids")


def on_device(ids: object) -> torch.Tensor:
    return torch.as_tensor(ids, dtype=torch.int64).to(DEVICE)


@pytest.mark.parametrize("policy", ["lru", "lfu"])
@settings(max_examples=examples(50))
@given(stream=st.lists(st.lists(IDS, max_size=30), max_size=8), capacity=st.integers(1, 20), threshold=THRESHOLDS)
def test_streams_have_the_same_result_as_in_a_dictionary(
    policy: Policy, stream: list[list[int]], capacity: int, threshold: int
) -> None:
    model = DictionaryTable(capacity, policy, threshold)
    table = HashedSlots(capacity, policy, threshold)
    for step, batch in enumerate(stream, 1):
        expected = model.assign(batch, step)
        made = table.assign(on_device(batch), step)
        assert made.new_ids.tolist() == expected["placed"]
        assert made.evicted_ids.tolist() == expected["evicted"]
        assert made.slots.tolist() == table.lookup(on_device(batch)).tolist()
        assert made.counters.waiting == sum(batch.count(id_) for id_ in expected["waiting"])
        assert made.counters.rejections == sum(batch.count(id_) for id_ in expected["rejected"])
        assert_holds(table, model)


@pytest.mark.parametrize("policy", ["lru", "lfu"])
def test_long_streams_equal_those_of_pytorch_bit_for_bit_and_go_on_from_a_checkpoint(policy: Policy) -> None:
    """Long enough for the index to be rebuilt; on a GPU a hundred programs run at once."""
    capacity, batch, steps = (20, 60, 20) if INTERPRETED else (5000, 20_000, 60)
    rng = np.random.default_rng(0)
    ours, oracle = HashedSlots(capacity, policy, 2), TorchSlots(capacity, policy, 2)
    evictions = rebuilds = 0
    for step in range(1, steps + 1):
        ids = torch.from_numpy(rng.zipf(1.2, batch) % (8 * capacity) - 7)
        taken = ours._index._taken
        made, expected = ours.assign(ids.to(DEVICE), step), oracle.assign(ids, step)
        rebuilds += ours._index._taken < taken
        assert all(torch.equal(getattr(made, name).cpu(), getattr(expected, name)) for name in PARTS)
        assert asdict(made.counters) == asdict(expected.counters)
        assert all(map(torch.equal, [part.cpu() for part in ours.content()], oracle.content()))
        evictions += made.counters.evictions
        if step == steps // 2:
            ours, before = HashedSlots(capacity, policy, 2), ours
            assert ours.sightings is not None and before.sightings is not None
            ours.restore(*before.content())
            ours.sightings.restore(*before.sightings.content())
    assert evictions > capacity / 4 and (rebuilds or policy == "lfu")


def test_ids_that_are_looked_for_at_the_same_place_are_all_found_beyond_the_last_entry_too() -> None:
    capacity = 24
    last_place = unmix(torch.arange(-2 * capacity, 0)).to(DEVICE)  # their hashes begin with 58 ones
    index, slots = SlotIndex(capacity, DEVICE), torch.arange(capacity, device=DEVICE)
    held = last_place[:capacity]
    index.insert(held, slots)
    taken = index.entries.cpu() >= 0
    assert taken.sum() == capacity and taken[-1] and taken[: capacity - 1].all()
    assert index.find(last_place, held).tolist() == [*range(capacity), *[NO_SLOT] * capacity]
    index.erase(held[::2], slots[::2])
    assert index.find(held, held).tolist() == [slot if slot % 2 else NO_SLOT for slot in range(capacity)]
    index.insert(last_place[capacity::2], slots[::2])
    changed = held.clone()
    changed[::2] = last_place[capacity::2]
    assert index.find(changed, changed).tolist() == slots.tolist()


def test_occurrences_are_counted_by_every_program_once_and_stop_at_the_most_there_may_be() -> None:
    index, ids = SlotIndex(3, DEVICE), on_device([5, 0, -9])
    scores = on_device([(2**31 - 10 << 32) + 1, (2 << 32) + 1, (8 << 32) + 1])
    index.insert(ids, torch.arange(3, device=DEVICE))
    batch = on_device([5, 0, 4] * 100)
    assert index.count(batch, ids, None, scores, 9, lfu=True).tolist() == [0, 1, NO_SLOT] * 100
    assert scores.tolist() == [(2**31 - 1 << 32) + 9, (102 << 32) + 9, (8 << 32) + 1]
    counts = on_device([1000, 2000])
    index.count(on_device([-9, 77]), ids, counts, scores, 10, lfu=True)
    assert scores[2].item() == (1008 << 32) + 10 and not index.occurrences.any()


def test_ids_and_scores_may_lie_between_others() -> None:
    table, expected = HashedSlots(20, "lru"), TorchSlots(20, "lru")
    table.ids, table.scores = torch.zeros(20, 2, dtype=torch.int64, device=DEVICE).unbind(1)
    for step in range(1, 6):
        ids = torch.arange(7 * step, 7 * step + 10)
        assert table.assign(ids.to(DEVICE), step).slots.tolist() == expected.assign(ids, step).slots.tolist()
    assert table.scores.tolist() == expected.scores.tolist()
