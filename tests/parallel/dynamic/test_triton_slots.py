"""The kernels of dynamic tables on a GPU: slots equal those of a dictionary, id for id, and of C++ in long streams."""

from types import ModuleType

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hstu.ops.kernels import Backend
from hstu.parallel.dynamic.hashing import initial_rows, normal_quantiles, unmix
from hstu.parallel.dynamic.rows import InitialRows, RowBlock, Rows
from hstu.parallel.dynamic.slot_tables import GpuSlots, TorchSlots
from hstu.parallel.dynamic.slots import MAX_COUNT, NO_SLOT, Policy, SlotTable, counts_of, score
from tests.ops.backends import INTERPRETED, device_of, examples, needs_gpu
from tests.parallel.dynamic.dictionary import DictionaryTable
from tests.parallel.dynamic.test_slots import IDS, THRESHOLDS, assert_holds

kernels: ModuleType = pytest.importorskip("hstu.ops.triton.slots", reason="NEEDS TRITON: pip install -e '.[cpu]'")

pytestmark = [] if INTERPRETED else list(needs_gpu)
DEVICE = device_of(Backend.TRITON)


def gpu_slots(capacity: int, policy: Policy, threshold: int = 0) -> GpuSlots:
    return GpuSlots(capacity, policy, threshold, DEVICE, kernels)


def on_device(ids: object) -> Tensor:
    return torch.as_tensor(ids, dtype=torch.int64).to(DEVICE)


def restarted(table: GpuSlots) -> GpuSlots:
    """Another table with the content of ``table``, as after loading a checkpoint."""
    other = gpu_slots(table.capacity, table.policy, table.admission_threshold)
    other.restore(*table.content())
    if table.sightings is not None and other.sightings is not None:
        other.sightings.restore(*table.sightings.content())
    return other


@pytest.mark.parametrize("policy", ["lru", "lfu"])
@settings(max_examples=examples(50), deadline=None)
@given(
    stream=st.lists(st.lists(IDS, max_size=30), max_size=6),
    capacity=st.integers(1, 20),
    threshold=THRESHOLDS,
    first_step=st.sampled_from([1, 500, 300_000]),
)
def test_streams_have_the_same_result_as_in_a_dictionary(
    policy: Policy, stream: list[list[int]], capacity: int, threshold: int, first_step: int
) -> None:
    model = DictionaryTable(capacity, policy, threshold)
    table = gpu_slots(capacity, policy, threshold)
    for step, batch in enumerate(stream, first_step):
        expected = model.assign(batch, step)
        made = table.assign(on_device(batch), step).trimmed()
        assert made.new_ids.tolist() == expected["placed"]
        assert sorted(made.evicted_ids.tolist()) == sorted(expected["evicted"])
        assert made.slots.tolist() == table.lookup(on_device(batch)).tolist()
        assert made.new_slots.tolist() == table.lookup(made.new_ids).tolist()
        assert made.counters.waiting == sum(batch.count(id_) for id_ in expected["waiting"])
        assert made.counters.rejections == sum(batch.count(id_) for id_ in expected["rejected"])
        assert_holds(table, model)


@pytest.mark.parametrize("policy", ["lru", "lfu"])
def test_long_streams_equal_those_of_pytorch_and_go_on_from_a_checkpoint(policy: Policy) -> None:
    """Long enough for the index to be refilled; on a GPU hundreds of programs run at once."""
    capacity, batch, steps = (20, 60, 16) if INTERPRETED else (50_000, 200_000, 60)
    rng = np.random.default_rng(0)
    ours, oracle = gpu_slots(capacity, policy, 2), TorchSlots(capacity, policy, 2)
    evictions = refills = 0
    for step in range(1, steps + 1):
        ids = torch.from_numpy(rng.zipf(1.2, batch) % (8 * capacity) - 7)
        taken = int(ours._slots.numbers[1])
        made, expected = ours.assign(ids.to(DEVICE), step).trimmed(), oracle.assign(ids, step)
        refills += int(ours._slots.numbers[1]) < taken
        assert torch.equal(made.new_ids.cpu(), expected.new_ids) and made.counters == expected.counters
        assert torch.equal((made.slots == NO_SLOT).cpu(), expected.slots == NO_SLOT)
        assert all(map(torch.equal, by_id(ours), by_id(oracle)))
        evictions += made.counters.evictions
        if step == steps // 2:
            ours = restarted(ours)
    assert evictions > capacity / 4 and (refills or policy == "lfu")


def by_id(table: SlotTable) -> tuple[Tensor, Tensor]:
    ids, scores = (part.cpu() for part in table.content())
    order = ids.argsort()
    return ids[order], scores[order]


@pytest.mark.parametrize("policy", ["lru", "lfu"])
def test_the_same_batches_give_the_same_slots_in_any_order_of_programs(policy: Policy) -> None:
    rng = np.random.default_rng(1)
    batches = [rng.integers(0, 90, 50) for _ in range(6)]
    results = []
    for _ in range(2):
        table = gpu_slots(30, policy)
        made = [table.assign(on_device(batch), step).slots for step, batch in enumerate(batches, 1)]
        results.append([*made, *table.content()])
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("policy", ["lru", "lfu"])
@pytest.mark.parametrize("count", [1, 5000])
def test_ids_of_equal_or_close_scores_give_way_by_score_then_by_hash(policy: Policy, count: int) -> None:
    """Counts whose bins hold several values, and more equal scores than the digits of the code can separate."""
    capacity = 40
    alike = unmix(torch.arange(capacity) + (7 << 40))  # hashes that begin with the same 24 bits
    counts = torch.full((capacity,), count) - torch.arange(capacity).clamp(max=count - 1) % 3
    tables: list[SlotTable] = [gpu_slots(capacity, policy), TorchSlots(capacity, policy)]
    for table in tables:
        table.restore(alike.to(DEVICE if table is tables[0] else "cpu"), score(policy, counts, 1).to(DEVICE))
    new = torch.arange(10).repeat_interleave(torch.arange(10) * 3 + 1)
    ours, oracle = tables[0].assign(new.to(DEVICE), 2).trimmed(), tables[1].assign(new, 2)
    assert ours.new_ids.tolist() == oracle.new_ids.tolist() and ours.counters == oracle.counters
    assert sorted(ours.evicted_ids.tolist()) == sorted(oracle.evicted_ids.tolist())


def test_ids_that_are_looked_for_at_the_same_place_are_all_found_beyond_the_last_entry_too() -> None:
    capacity = 24
    last_place = unmix(torch.arange(-2 * capacity, 0)).to(DEVICE)  # their hashes begin with 58 ones
    table = gpu_slots(capacity, "lru")
    table.assign(last_place[:capacity], 1)
    taken = table._slots.entries.cpu() >= 0
    assert taken.sum() == capacity and taken[-1] and taken[: capacity - 1].all()
    assert table.lookup(last_place).tolist() == [*range(capacity), *[NO_SLOT] * capacity]
    table.assign(torch.cat([last_place[::2], last_place[capacity::2]])[:capacity], 2)
    assert sorted(table.lookup(last_place[:capacity:2]).tolist()) == list(range(0, capacity, 2))
    assert set(table.lookup(last_place[capacity::2]).tolist()) == set(range(1, capacity, 2))


def test_counts_stop_at_the_most_there_may_be() -> None:
    table = gpu_slots(3, "lfu")
    table.restore(on_device([5, 0, -9]), score("lfu", on_device([MAX_COUNT - 10, 2, 8]), 1))
    for step in (2, 3):
        table.assign(on_device([5, 0] * 100), step)
    scores = table.content()[1]
    assert counts_of("lfu", scores).tolist() == [MAX_COUNT, 202, 8] and (scores[:2] & 3 == 3).all()


@pytest.mark.parametrize("dim", [1, 6, 70])
def test_new_rows_have_their_initial_values_in_whichever_block_they_are_and_no_state(dim: int) -> None:
    blocks = [
        RowBlock(torch.full((size, dim + 2), 9.0, device=DEVICE), {"sum": torch.ones(size, device=DEVICE)})
        for size in (7, 20)
    ]
    rows = Rows(blocks, dim)
    slots, ids = on_device([25, 0, 6, 7, 3, 4]), on_device([-1, 5, 2**62, -(2**63), 8, 9])
    number = on_device([5])
    rows.start(slots, number, kernels, InitialRows(ids, 12345, 0.02))
    values, states = torch.cat([block.weight for block in blocks]), torch.cat([b.states["sum"] for b in blocks])
    assert torch.equal(values[slots[:5], :dim], initial_rows(ids[:5], dim, 0.02, 12345))
    untouched = torch.ones(27, dtype=torch.bool, device=DEVICE).index_fill(0, slots[:5], False)
    assert (values[untouched] == 9).all() and (values[:, dim:] == 9).all() and torch.equal(states > 0, untouched)
    rows.start(slots[5:], number[:0].new_ones(1), kernels, None)
    assert not blocks[0].weight[4].any() and normal_quantiles(DEVICE).device.type == DEVICE.type
