"""Dynamic tables by the index of Triton kernels: slots equal those of a dictionary, and of PyTorch in long streams."""

from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hstu.ops.kernels import Backend
from hstu.parallel.dynamic.hashing import initial_rows, quantiles_of, unmix
from hstu.parallel.dynamic.rows import RowBlock, Rows
from hstu.parallel.dynamic.slots import NO_SLOT, Policy, TorchSlots
from tests.ops.backends import INTERPRETED, device_of, examples, needs_gpu
from tests.parallel.dynamic.test_slots import (
    IDS,
    THRESHOLDS,
    DictionaryTable,
    assert_alike,
    assert_holds,
    assert_is,
    counters_of,
)

kernels: ModuleType = pytest.importorskip("hstu.ops.triton.slots", reason="NEEDS TRITON: pip install -e '.[cpu,dev]'")

pytestmark = [] if INTERPRETED else list(needs_gpu)
DEVICE = device_of(Backend.TRITON)


def gpu_slots(capacity: int, policy: Policy, threshold: int = 0) -> TorchSlots:
    return TorchSlots(capacity, policy, threshold, DEVICE, kernels)


def on_device(ids: object) -> Tensor:
    return torch.as_tensor(ids, dtype=torch.int64).to(DEVICE)


@pytest.mark.parametrize("policy", ["lru", "lfu"])
@settings(max_examples=examples(30), deadline=None)
@given(stream=st.lists(st.lists(IDS, max_size=30), max_size=6), capacity=st.integers(1, 20), threshold=THRESHOLDS)
def test_streams_have_the_same_result_as_in_a_dictionary(
    policy: Policy, stream: list[list[int]], capacity: int, threshold: int
) -> None:
    model = DictionaryTable(capacity, policy, threshold)
    table = gpu_slots(capacity, policy, threshold)
    for step, batch in enumerate(stream, 1):
        expected = model.assign(batch, step)
        assert_is(table.assign(on_device(batch), step), expected, table, batch)
        assert_holds(table, model)


@pytest.mark.parametrize("policy", ["lru", "lfu"])
def test_long_streams_equal_those_of_pytorch_and_go_on_from_a_checkpoint(policy: Policy) -> None:
    """Long enough for the index to be refilled; on a GPU hundreds of programs run at once."""
    capacity, batch, steps = (20, 60, 16) if INTERPRETED else (50_000, 200_000, 60)
    rng = np.random.default_rng(0)
    ours, oracle = gpu_slots(capacity, policy, 2), TorchSlots(capacity, policy, 2)
    index: Any = ours._index
    evictions = refills = 0
    for step in range(1, steps + 1):
        taken = int(index.taken)
        made = assert_alike(ours, oracle, torch.from_numpy(rng.zipf(1.2, batch) % (8 * capacity) - 7), step)
        refills += int(index.taken) < taken
        evictions += counters_of(made).evictions
        if step == steps // 2:
            ours.restore(*(part.clone() for part in ours.content()))
            index = ours._index
    assert evictions > capacity / 4 and (refills or policy == "lfu")


def test_ids_that_are_looked_for_at_the_same_place_are_all_found_beyond_the_last_entry_too() -> None:
    capacity = 24
    last_place = unmix(torch.arange(2**63 - 2 * capacity, 2**63 - 1)).to(DEVICE)  # their keys begin with 57 ones
    table = gpu_slots(capacity, "lru")
    table.assign(last_place[:capacity], 1)
    index: Any = table._index
    taken = index.entries.cpu() >= 0
    assert taken.sum() == capacity and taken[-1] and taken[: capacity - 1].all()
    found = table.lookup(last_place).tolist()
    assert sorted(found[:capacity]) == [*range(capacity)] and set(found[capacity:]) == {NO_SLOT}
    table.assign(torch.cat([last_place[::2], last_place[capacity::2]])[:capacity], 2)
    assert table.lookup(last_place[:capacity:2]).tolist() == found[:capacity:2]
    assert sorted(table.lookup(last_place[capacity::2]).tolist()) == sorted(found[1:capacity:2])


@pytest.mark.parametrize("dim", [1, 6, 70])
def test_new_rows_have_their_initial_values_in_whichever_block_they_are_and_no_state(dim: int) -> None:
    blocks = [
        RowBlock(torch.full((size, dim + 2), 9.0, device=DEVICE), {"sum": torch.ones(size, device=DEVICE)})
        for size in (7, 20)
    ]
    rows = Rows(blocks, dim)
    slots, ids = on_device([25, 0, 6, 7, 3, 4]), on_device([-1, 5, 2**62, -(2**63), 8, 9])
    number = on_device([5])
    normal = quantiles_of("normal", DEVICE)
    rows.start(slots, number, kernels, ids, table_key=12345, init_std=0.02, quantiles=normal)
    values, states = torch.cat([block.weight for block in blocks]), torch.cat([b.states["sum"] for b in blocks])
    assert torch.equal(values[slots[:5], :dim], initial_rows(ids[:5], dim, 0.02, 12345, normal))
    untouched = torch.ones(27, dtype=torch.bool, device=DEVICE).index_fill(0, slots[:5], False)
    assert (values[untouched] == 9).all() and (values[:, dim:] == 9).all() and torch.equal(states > 0, untouched)
    rows.start(slots[5:], number[:0].new_ones(1), kernels)
    assert not blocks[0].weight[4].any() and normal.device.type == DEVICE.type
