"""The C++ and the PyTorch implementation of SlotTable equal a dictionary, id for id; on a GPU by Triton's index."""

from collections import Counter
from collections.abc import Sequence
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hstu.base.hashing import splitmix64
from hstu.config.args import DynamicEmbeddingArgs
from hstu.ops import select
from hstu.parallel.dynamic import create
from hstu.parallel.dynamic.create import CpuSlots, create_slots
from hstu.parallel.dynamic.hashing import unmix
from hstu.parallel.dynamic.slots import (
    MAX_COUNT,
    NO_SLOT,
    POLICIES,
    Assignment,
    Counters,
    Policy,
    SlotTable,
    TorchSlots,
    counts_of,
    score,
    steps_of,
)

KINDS = [TorchSlots, CpuSlots]
EXTREMES = [0, -1, 1, 2**63 - 1, -(2**63), 2**62, -(2**31), 2**32]
IDS = st.integers(-20, 60) | st.sampled_from(EXTREMES) | st.integers(-(2**63), 2**63 - 1)
STREAMS = st.lists(st.lists(IDS, max_size=40), max_size=12)
THRESHOLDS = st.sampled_from([0, 1, 2, 3, 5])


@cache
def hash_of(id_: int) -> int:
    return int(splitmix64(id_)[0])


class DictionaryTable:
    """A SlotTable as a Python dictionary, one id after another.

    ``held``: id → [count, last step] of the ids that have a slot.
    """

    def __init__(self, capacity: int, policy: str, admission_threshold: int = 0) -> None:
        self.capacity, self.policy, self.threshold = capacity, policy, admission_threshold
        self.held: dict[int, list[int]] = {}
        self.sightings = DictionaryTable(capacity, "lru") if admission_threshold > 1 else None

    def worth(self, count: int, step: int) -> tuple[int, int]:
        return (step, count) if self.policy == "lru" else (count, step)

    def order(self, id_: int) -> tuple[int, ...]:
        return (*self.worth(*self.held[id_]), hash_of(id_))

    def expire(self, step: int, limit: int) -> list[int]:
        """Forget ids that none of the ``limit`` batches before ``step`` had."""
        gone = [id_ for id_, (_, last) in self.held.items() if step - 1 - last >= limit]
        for id_ in gone:
            del self.held[id_]
        if self.sightings is not None:
            self.sightings.expire(step, limit)
        return gone

    def assign(self, ids: Sequence[int], step: int) -> dict[str, list[int]]:
        return self.add(Counter(ids), step)

    def add(self, counts: Counter[int], step: int) -> dict[str, list[int]]:
        new = []
        for id_, count in counts.items():
            if id_ in self.held:
                self.held[id_] = [self.held[id_][0] + count, step]
            else:
                new.append(id_)
        waiting = [] if self.sightings is None else self.too_rare(new, counts, step)
        admitted = [id_ for id_ in new if id_ not in waiting]
        others = sorted((id_ for id_, (_, last) in self.held.items() if last != step), key=self.order)
        contenders = sorted((self.worth(counts[id_], step) for id_ in admitted), reverse=True)
        contenders = contenders[self.capacity - len(self.held) :]
        others = [] if self.policy == "none" else others
        evicted = [id_ for id_, worth in zip(others, contenders, strict=False) if self.worth(*self.held[id_]) < worth]
        for id_ in evicted:
            del self.held[id_]
        room = self.capacity - len(self.held)
        by_worth = sorted(admitted, key=lambda id_: (counts[id_], hash_of(id_)))
        rejected = by_worth[: max(0, len(admitted) - room)]
        placed = [id_ for id_ in admitted if id_ not in rejected]
        for id_ in placed:
            self.held[id_] = [counts[id_], step]
        return {"placed": placed, "evicted": evicted, "waiting": waiting, "rejected": rejected}

    def too_rare(self, new: list[int], counts: Counter[int], step: int) -> list[int]:
        assert self.sightings is not None
        self.sightings.add(Counter({id_: counts[id_] for id_ in new}), step)
        sighted = {id_: self.sightings.held.get(id_, [counts[id_]])[0] for id_ in new}
        return [id_ for id_ in new if sighted[id_] < self.threshold]


def assert_holds(table: SlotTable, model: DictionaryTable) -> None:
    ids, scores = table.content()
    counts, steps = counts_of(table.policy, scores), steps_of(table.policy, scores)
    held = {id_: list(pair) for id_, *pair in zip(ids.tolist(), counts.tolist(), steps.tolist(), strict=True)}
    assert held == model.held
    assert table.lookup(ids).tolist() == list(range(len(ids)))


def counters_of(made: Assignment) -> Counters:
    return Counters(*made.counts.tolist())


def assert_is(made: Assignment, expected: dict[str, list[int]], table: SlotTable, batch: list[int]) -> None:
    """``made`` is what the dictionary has done with the batch."""
    new_ids, new_slots = (each[: counters_of(made).insertions] for each in (made.new_ids, made.new_slots))
    assert sorted(new_ids.tolist()) == sorted(expected["placed"])
    assert counters_of(made).evictions == len(expected["evicted"])
    assert new_slots.tolist() == table.lookup(new_ids).tolist()
    assert made.slots.tolist() == table.lookup(torch.tensor(batch, dtype=torch.int64).to(made.slots)).tolist()
    assert counters_of(made).lookups == len(batch) and counters_of(made).insertions == len(expected["placed"])
    assert counters_of(made).waiting == sum(batch.count(id_) for id_ in expected["waiting"])
    assert counters_of(made).rejections == sum(batch.count(id_) for id_ in expected["rejected"])


@pytest.mark.parametrize("policy", POLICIES)
@settings(max_examples=60, deadline=None)
@given(
    stream=STREAMS, capacity=st.integers(1, 50), threshold=THRESHOLDS, restart=st.integers(0, 12),
    limit=st.integers(1, 12),
)  # fmt: skip
def test_streams_have_the_same_result_as_in_a_dictionary(
    policy: Policy, stream: list[list[int]], capacity: int, threshold: int, restart: int, limit: int
) -> None:
    model = DictionaryTable(capacity, policy, threshold)
    tables = [kind(capacity, policy, threshold) for kind in KINDS]
    counting = [kind(capacity, policy, threshold) for kind in KINDS]
    for step, batch in enumerate(stream, 1):
        expired = model.expire(step, limit)
        for table in (*tables, *counting):
            assert_forgets(table, expired, step - limit)
        expected = model.assign(batch, step)
        ids, counts = torch.tensor(batch, dtype=torch.int64).unique(return_counts=True)
        only_looked_up = torch.arange(-3, 3)
        for table in counting:
            entries = torch.cat([ids, only_looked_up]), step, torch.cat([counts, 0 * only_looked_up])
            assert counters_of(table.assign(*entries)).lookups == len(batch)
            assert_holds(table, model)
        for table in tables:
            made = table.assign(torch.tensor(batch, dtype=torch.int64), step)
            assert_is(made, expected, table, batch)
            assert_holds(table, model)
        if step == restart:
            tables = [restarted(table) for table in tables]


def assert_forgets(table: SlotTable, expired: list[int], since: int) -> None:
    """``table`` frees the slots of these ids, and says which slots the others have then."""
    before = table.content()[0].clone()
    freed, source, target = table.free_unseen(since)
    if table.sightings is not None:
        table.sightings.free_unseen(since)
    assert freed == len(expired)
    moved = before.clone()
    moved[target] = before[source]
    assert table.content()[0].tolist() == moved[: len(before) - freed].tolist()


def restarted(table: SlotTable) -> SlotTable:
    """Another table with the content of ``table``, as after loading a checkpoint."""
    other = type(table)(table.capacity, table.policy, table.admission_threshold)
    other.restore(*table.content())
    if table.sightings is not None and other.sightings is not None:
        other.sightings.restore(*table.sightings.content())
    return other


def assert_alike(first: SlotTable, second: SlotTable, ids: torch.Tensor, step: int) -> Assignment:
    """Both tables treat a batch alike; returns what the first one made of it."""
    ours, oracle = first.assign(ids.to(first.size().device), step), second.assign(ids, step)
    assert counters_of(ours) == counters_of(oracle)
    assert torch.equal((ours.slots == NO_SLOT).cpu(), oracle.slots == NO_SLOT)
    contents = [torch.stack(table.content()).cpu() for table in (first, second)]
    assert torch.equal(*(content[:, content[0].argsort()] for content in contents))
    return ours


@pytest.mark.parametrize("policy", POLICIES)
def test_long_streams_under_pressure_agree(policy: Policy) -> None:
    """With enough ids to rebuild the eviction order of C++ many times."""
    rng = np.random.default_rng(0)
    ours, oracle = (kind(5000, policy, 2) for kind in KINDS)
    evictions = waiting = 0
    for step in range(1, 60):
        made = assert_alike(ours, oracle, torch.from_numpy(rng.zipf(1.2, 4000) % 40_000 - 1000), step)
        evictions, waiting = counters_of(made).evictions, counters_of(made).waiting
    assert (evictions > 50 or policy == "none") and waiting > 100


@pytest.mark.parametrize("policy", POLICIES)
def test_ids_whose_hashes_begin_alike_are_told_apart(policy: Policy) -> None:
    """The C++ index keeps the first half of a hash."""
    rng = np.random.default_rng(2)
    alike = torch.cat([unmix(torch.arange(30) + (begin << 32)) for begin in (0, 7, 2**31 - 1)])
    ours, oracle = (kind(40, policy) for kind in KINDS)
    for step in range(1, 30):
        assert_alike(ours, oracle, alike[torch.from_numpy(rng.integers(0, len(alike), 50))], step)
        assert torch.equal(ours.lookup(alike) == NO_SLOT, oracle.lookup(alike) == NO_SLOT)
    assert ours.size() == oracle.size() == 40


def test_counts_stop_at_the_most_there_may_be() -> None:
    table = TorchSlots(3, "lfu")
    table.restore(torch.tensor([5, 0, -9]), score("lfu", torch.tensor([MAX_COUNT - 10, 2, 8]), 1))
    for step in (2, 3):
        table.assign(torch.tensor([5, 0] * 100), step)
    scores = table.content()[1]
    assert counts_of("lfu", scores).tolist() == [MAX_COUNT, 202, 8] and (scores[:2] & 3 == 3).all()


@pytest.mark.parametrize("kind", KINDS)
def test_ids_without_a_slot_are_not_found_and_looking_changes_nothing(kind: type[SlotTable]) -> None:
    table = kind(4, "lru")
    assert table.lookup(torch.tensor([0, -1])).tolist() == [NO_SLOT] * 2
    table.assign(torch.tensor([7, 0, 7]), 1)
    before = [part.clone() for part in table.content()]
    found = table.lookup(torch.tensor([0, 1, 7, -(2**63)])).tolist()
    assert sorted(found[::2]) == [0, 1] and found[1::2] == [NO_SLOT] * 2
    assert all(map(torch.equal, before, table.content()))
    assert table.lookup(torch.empty(0, dtype=torch.int64)).tolist() == []


def test_a_gpu_uses_the_kernels_of_triton_and_where_that_cannot_run_pytorch_with_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("triton", reason="NEEDS TRITON: pip install -e '.[cpu,dev]'")
    from hstu.ops.triton import slots as kernels

    args = DynamicEmbeddingArgs(
        feature_names=["item"], table_name="item", item_vocab_size_or_capacity=9, evict_strategy="lfu"
    )
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(create, "TorchSlots", lambda *arguments: arguments)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    refused: dict[str, str] = {}
    monkeypatch.setattr(select, "refusals", lambda kernels, device, shapes, operators: refused)
    caplog.set_level("WARNING")
    assert create_slots("item", args, 9, gpu) == (9, "lfu", 0, gpu, kernels) and not caplog.records
    refused["slots"] = "the driver is too old"
    assert create_slots("item", args, 9, gpu) == (9, "lfu", 0, gpu, None)
    assert "kernel slots of table item: pytorch (triton: the driver is too old)" in caplog.text
