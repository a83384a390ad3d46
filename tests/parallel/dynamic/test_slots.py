"""The C++ and the PyTorch implementation of SlotTable equal a dictionary, id for id."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hstu.config.args import DynamicEmbeddingArgs
from hstu.ops import select
from hstu.ops.cpu.build import KernelsUnavailable
from hstu.parallel.dynamic import slot_tables
from hstu.parallel.dynamic.hashing import unmix
from hstu.parallel.dynamic.slot_tables import CpuSlots, ScoredSlots, TorchSlots, create_slots
from hstu.parallel.dynamic.slots import NO_SLOT, Policy, SlotTable, counts_of, steps_of
from tests.parallel.dynamic.dictionary import DictionaryTable

KINDS = [TorchSlots, CpuSlots]
EXTREMES = [0, -1, 1, 2**63 - 1, -(2**63), 2**62, -(2**31), 2**32]
IDS = st.integers(-20, 60) | st.sampled_from(EXTREMES) | st.integers(-(2**63), 2**63 - 1)
STREAMS = st.lists(st.lists(IDS, max_size=40), max_size=12)
THRESHOLDS = st.sampled_from([0, 1, 2, 3, 5])


def assert_holds(table: SlotTable, model: DictionaryTable) -> None:
    ids, scores = table.content()
    counts, steps = counts_of(table.policy, scores), steps_of(table.policy, scores)
    held = {id_: list(pair) for id_, *pair in zip(ids.tolist(), counts.tolist(), steps.tolist(), strict=True)}
    assert held == model.held
    assert table.lookup(ids).tolist() == list(range(len(ids)))


@pytest.mark.parametrize("policy", ["lru", "lfu"])
@settings(max_examples=60, deadline=None)
@given(stream=STREAMS, capacity=st.integers(1, 50), threshold=THRESHOLDS, restart=st.integers(0, 12))
def test_streams_have_the_same_result_as_in_a_dictionary(
    policy: Policy, stream: list[list[int]], capacity: int, threshold: int, restart: int
) -> None:
    model = DictionaryTable(capacity, policy, threshold)
    tables = [kind(capacity, policy, threshold) for kind in KINDS]
    for step, batch in enumerate(stream, 1):
        expected = model.assign(batch, step)
        ids = torch.tensor(batch, dtype=torch.int64)
        done = [table.assign(ids, step) for table in tables]
        for table, made in zip(tables, done, strict=True):
            assert made.new_ids.tolist() == expected["placed"]
            assert made.evicted_ids.tolist() == expected["evicted"]
            assert made.slots.tolist() == table.lookup(ids).tolist()
            assert {id_ for id_, slot in zip(batch, made.slots.tolist(), strict=True) if slot == NO_SLOT} == {
                *expected["waiting"],
                *expected["rejected"],
            }
            assert made.counters.waiting == sum(batch.count(id_) for id_ in expected["waiting"])
            assert made.counters.rejections == sum(batch.count(id_) for id_ in expected["rejected"])
            assert_holds(table, model)
        assert done[0].slots.equal(done[1].slots) and done[0].new_slots.equal(done[1].new_slots)
        assert done[0].counters == done[1].counters
        if step == restart:
            tables = [restarted(table) for table in tables]


def restarted(table: ScoredSlots) -> ScoredSlots:
    """Another table with the content of ``table``, as after loading a checkpoint."""
    other = type(table)(table.capacity, table.policy, table.admission_threshold)
    other.restore(*table.content())
    if table.sightings is not None and other.sightings is not None:
        other.sightings.restore(*table.sightings.content())
    return other


@pytest.mark.parametrize("policy", ["lru", "lfu"])
def test_long_streams_under_pressure_agree(policy: Policy) -> None:
    """With enough ids to rebuild the eviction order many times."""
    rng = np.random.default_rng(0)
    tables = [kind(5000, policy, 2) for kind in KINDS]
    for step in range(1, 60):
        ids = torch.from_numpy(rng.zipf(1.2, 4000) % 40_000 - 1000)
        first, second = (table.assign(ids, step) for table in tables)
        assert first.slots.equal(second.slots) and first.evicted_ids.equal(second.evicted_ids)
        assert first.counters == second.counters
    assert first.counters.evictions > 50 and first.counters.waiting > 100


@pytest.mark.parametrize("policy", ["lru", "lfu"])
def test_ids_whose_hashes_begin_alike_are_told_apart(policy: Policy) -> None:
    """The C++ index keeps the first half of a hash."""
    rng = np.random.default_rng(2)
    alike = torch.cat([unmix(torch.arange(30) + (begin << 32)) for begin in (0, 7, 2**31 - 1)])
    tables = [kind(40, policy) for kind in KINDS]
    for step in range(1, 30):
        ids = alike[torch.from_numpy(rng.integers(0, len(alike), 50))]
        first, second = (table.assign(ids, step) for table in tables)
        assert first.slots.equal(second.slots) and first.evicted_ids.equal(second.evicted_ids)
        assert tables[0].lookup(alike).equal(tables[1].lookup(alike))
    assert tables[1].size().tolist() == [40]


@pytest.mark.parametrize("kind", KINDS)
def test_ids_without_a_slot_are_not_found_and_looking_changes_nothing(kind: type[ScoredSlots]) -> None:
    table = kind(4, "lru")
    assert table.lookup(torch.tensor([0, -1])).tolist() == [NO_SLOT] * 2
    table.assign(torch.tensor([7, 0, 7]), 1)
    before = [part.clone() for part in table.content()]
    assert table.lookup(torch.tensor([0, 1, 7, -(2**63)])).tolist() == [1, NO_SLOT, 0, NO_SLOT]
    assert all(map(torch.equal, before, table.content()))
    assert table.lookup(torch.empty(0, dtype=torch.int64)).tolist() == []


def evicted(table: SlotTable, stream: Sequence[Sequence[int]]) -> list[list[int]]:
    return [table.assign(torch.tensor(batch), step).evicted_ids.tolist() for step, batch in enumerate(stream, 1)]


@pytest.mark.parametrize("kind", KINDS)
def test_lru_and_lfu_differ_as_their_names_say(kind: type[ScoredSlots]) -> None:
    stream = [[1, 1, 1], [2], [3]]
    assert evicted(kind(2, "lru"), stream) == [[], [], [1]]
    assert evicted(kind(2, "lfu"), stream) == [[], [], [2]]


@pytest.mark.parametrize("kind", KINDS)
def test_under_lfu_rare_new_ids_do_not_evict_frequent_ones(kind: type[ScoredSlots]) -> None:
    table = kind(3, "lfu")
    table.assign(torch.tensor([1, 1, 1, 2, 2, 3]), 1)
    made = table.assign(torch.tensor([7, 8, 8, 8]), 2)
    assert made.evicted_ids.tolist() == [3] and made.new_ids.tolist() == [8]
    assert made.counters.rejections == 1
    assert table.assign(torch.tensor([9]), 3).evicted_ids.tolist() == []


@pytest.mark.parametrize("kind", KINDS)
def test_the_order_of_ids_in_a_batch_does_not_decide_which_stay(kind: type[ScoredSlots]) -> None:
    rng = np.random.default_rng(1)
    straight, shuffled = kind(30, "lfu"), kind(30, "lfu")
    for step in range(1, 20):
        batch = rng.integers(0, 60, 50)
        straight.assign(torch.from_numpy(batch), step)
        shuffled.assign(torch.from_numpy(rng.permutation(batch)), step)
        assert set(straight.content()[0].tolist()) == set(shuffled.content()[0].tolist())


def test_compiled_slots_are_not_used_where_they_differ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slot_tables, "library_file", lambda: tmp_path / "kernels.so")
    slot_tables.check_cpu_slots()
    passed = tmp_path / "kernels.slots_checked"
    assert passed.exists()
    passed.unlink()
    monkeypatch.setattr(slot_tables, "CpuSlots", lambda capacity, *rest: CpuSlots(capacity - 1, *rest))
    with pytest.raises(KernelsUnavailable, match="slots of dynamic tables"):
        slot_tables.check_cpu_slots()
    assert not passed.exists()


def test_a_gpu_uses_the_kernels_of_triton_and_where_that_cannot_run_pytorch_with_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("triton", reason="NEEDS TRITON: pip install -e '.[cpu]'")
    from hstu.ops.triton import slots as kernels

    args = DynamicEmbeddingArgs(
        feature_names=["item"], table_name="item", item_vocab_size_or_capacity=9, evict_strategy="lfu"
    )
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(slot_tables, "TorchSlots", lambda *arguments: arguments)
    monkeypatch.setattr(slot_tables, "GpuSlots", lambda *arguments: arguments)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    refused: dict[str, str] = {}
    monkeypatch.setattr(select, "refusals", lambda kernels, device, shapes, operators: refused)
    caplog.set_level("WARNING")
    assert create_slots("item", args, 9, gpu) == (9, "lfu", 0, gpu, kernels) and not caplog.records
    refused["slots"] = "the driver is too old"
    assert create_slots("item", args, 9, gpu) == (9, "lfu", 0, "cuda:0")
    assert "kernel slots of table item: pytorch (triton: the driver is too old)" in caplog.text
