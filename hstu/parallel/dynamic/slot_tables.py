"""Implementations of SlotTable, and the choice between them.

TorchSlots is the reference and runs on any device. CpuSlots is in C++. GpuSlots consists of Triton kernels, and the
host never waits for the device in it.
"""

from __future__ import annotations

import ctypes
import logging
import weakref
from abc import abstractmethod
from dataclasses import astuple
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from hstu.config.args import DynamicEmbeddingArgs
from hstu.ops.cpu.build import KernelsUnavailable, address, int32, int64, library, library_file, pointer
from hstu.ops.select import select_slot_kernels
from hstu.ops.self_check import record_passed
from hstu.parallel.dynamic.content import last_evicted
from hstu.parallel.dynamic.slots import (
    MAX_STEP,
    NO_SLOT,
    Assignment,
    Counters,
    Policy,
    SlotTable,
    counts_of,
    eviction_order,
    score,
    steps_of,
)

log = logging.getLogger(__name__)


def create_slots(table: str, args: DynamicEmbeddingArgs, capacity: int, device: torch.device) -> SlotTable:
    """The fastest implementation that this machine has, for the ``table`` of that name."""
    policy: Policy = "lfu" if args.evict_strategy == "lfu" else "lru"
    threshold = args.admission_threshold
    if device.type == "cpu":
        try:
            check_cpu_slots()
            log.info("kernel slots of table %s: cpu", table)
            return CpuSlots(capacity, policy, threshold)
        except KernelsUnavailable as reason:
            log.warning("kernel slots of table %s: pytorch (cpu: %s)", table, reason)
    elif device.type == "cuda":
        kernels, unsupported_reason = select_slot_kernels(device)
        if kernels is not None:
            log.info("kernel slots of table %s: triton", table)
            return GpuSlots(capacity, policy, threshold, device, kernels)
        log.warning("kernel slots of table %s: pytorch (triton: %s)", table, unsupported_reason)
    return TorchSlots(capacity, policy, threshold, str(device))


class ScoredSlots(SlotTable):
    """A SlotTable whose ``ids`` and ``scores``, int64 [capacity], are the state; the first ``_size`` are in use."""

    def __init__(self, capacity: int, policy: Policy, admission_threshold: int = 0, device: str = "cpu") -> None:
        super().__init__(capacity, policy, admission_threshold)
        self.ids = torch.zeros(capacity, dtype=torch.int64, device=device)
        self.scores = torch.zeros(capacity, dtype=torch.int64, device=device)
        self._size = 0
        if admission_threshold > 1:
            self.sightings = self._like(capacity, "lru")

    @abstractmethod
    def _like(self, capacity: int, policy: Policy) -> ScoredSlots:
        """Create a table of the same implementation on the same device."""

    @abstractmethod
    def _rebuild(self) -> None:
        """Follow ``ids``, ``scores`` and ``_size``, which have been overwritten."""

    def size(self) -> Tensor:
        """See SlotTable."""
        return torch.tensor([self._size], device=self.ids.device)

    def content(self) -> tuple[Tensor, Tensor]:
        """See SlotTable; views."""
        return self.ids[: self._size], self.scores[: self._size]

    def restore(self, ids: Tensor, scores: Tensor) -> None:
        """See SlotTable."""
        self._size = len(ids)
        self.ids[: self._size], self.scores[: self._size] = ids, scores
        self._rebuild()


class TorchSlots(ScoredSlots):
    """See SlotTable. The reference, on any device: it sorts all ids after every change."""

    def __init__(self, capacity: int, policy: Policy, admission_threshold: int = 0, device: str = "cpu") -> None:
        super().__init__(capacity, policy, admission_threshold, device)
        self._rebuild()

    def _like(self, capacity: int, policy: Policy) -> TorchSlots:
        return TorchSlots(capacity, policy, device=str(self.ids.device))

    def _rebuild(self) -> None:
        self._sorted_ids, self._slot_of_sorted = self.ids[: self._size].sort()

    def lookup(self, ids: Tensor) -> Tensor:
        """See SlotTable."""
        if not self._size:
            return torch.full_like(ids, NO_SLOT)
        found = torch.searchsorted(self._sorted_ids, ids).clamp_(max=self._size - 1)
        return torch.where(self._sorted_ids[found] == ids, self._slot_of_sorted[found], NO_SLOT)

    def assign(self, ids: Tensor, step: int) -> Assignment:
        """See SlotTable."""
        distinct, counts, which = _distinct(ids)
        added = self._add(distinct, counts, step)
        occurrences = (int(counts[each].sum()) for each in (added.new, added.admitted, added.placed))
        new, admitted, placed = occurrences
        counters = Counters(
            lookups=len(ids),
            hits=len(ids) - new,
            waiting=new - admitted,
            rejections=admitted - placed,
            insertions=len(added.placed),
            evictions=len(added.evicted_ids),
        )
        return Assignment(
            added.slots[which],
            added.slots[added.placed],
            distinct[added.placed],
            added.evicted_ids,
            torch.tensor(astuple(counters), device=ids.device),
        )

    def _add(self, ids: Tensor, counts: Tensor, step: int) -> _Added:
        """Count distinct ids that occur ``counts`` times each, and give slots to new ones, as far as slots go."""
        slots = self.lookup(ids)
        known = slots != NO_SLOT
        held, new = slots[known], (~known).nonzero()[:, 0]
        self.scores[held] = score(self.policy, counts_of(self.policy, self.scores[held]) + counts[known], step)
        admitted = new
        if self.sightings is not None:
            assert isinstance(self.sightings, TorchSlots)
            admitted = new[self.sightings._sight(ids[new], counts[new], step) >= self.admission_threshold]
        scores = score(self.policy, counts[admitted], step)
        evicted = self._beaten(scores, step)
        unused = self.capacity - self._size
        index = last_evicted(ids[admitted], counts[admitted], unused + len(evicted))
        placed, evicted_ids = admitted[index], self.ids[evicted]
        first, self._size = self._size, self._size + min(unused, len(placed))
        new_slots = torch.cat([torch.arange(first, self._size, device=ids.device), evicted])
        self.ids[new_slots], self.scores[new_slots] = ids[placed], scores[index]
        slots[placed] = new_slots
        if len(placed):
            self._rebuild()
        return _Added(slots, new, admitted, placed, evicted_ids)

    def _sight(self, ids: Tensor, counts: Tensor, step: int) -> Tensor:
        """Add ``counts`` sightings of distinct ids; returns how often each was sighted, int64 [n]."""
        slots = self._add(ids, counts, step).slots
        return torch.where(slots != NO_SLOT, counts_of(self.policy, self.scores[slots]), counts)

    def _beaten(self, new: Tensor, step: int) -> Tensor:
        """Slots whose ids are evicted by new ids of these scores, the lowest score first."""
        contenders = new.sort(descending=True).values[self.capacity - self._size :]
        scores = self.scores[: self._size]
        others = (steps_of(self.policy, scores) != step).nonzero()[:, 0]  # than those of this batch
        lowest = others[eviction_order(scores[others], self.ids[others])][: len(contenders)]
        return lowest[scores[lowest] < contenders[: len(lowest)]]


class _Added(NamedTuple):
    """What became of n distinct ids."""

    slots: Tensor
    """[n]: their slots now, or NO_SLOT."""
    new: Tensor
    """Indices of the ids that had no slot."""
    admitted: Tensor
    """Those of them that admission_threshold lets in."""
    placed: Tensor
    """Those of them that got a slot, ascending."""
    evicted_ids: Tensor


def _distinct(ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(distinct ids by first occurrence, how often each occurs, index of each of ``ids`` among them)."""
    ordered, order = ids.sort(stable=True)
    begins = torch.ones_like(ordered, dtype=torch.bool)
    torch.ne(ordered[1:], ordered[:-1], out=begins[1:])
    starts = begins.nonzero()[:, 0]
    counts = starts.diff(append=starts.new_full((1,), len(ids)))
    first = order[starts]
    by_occurrence = first.argsort()
    number = torch.empty_like(by_occurrence)
    number[by_occurrence] = torch.arange(len(first), device=ids.device)
    which = torch.empty_like(order)
    which[order] = number[begins.cumsum(0) - 1]
    return ids[first[by_occurrence]], counts[by_occurrence], which


class CpuSlots(ScoredSlots):
    """See SlotTable. In C++ (hstu/ops/cpu/csrc/slots.h), on one thread.

    Raises hstu.ops.cpu.build.KernelsUnavailable where there is no compiler.
    """

    def __init__(self, capacity: int, policy: Policy, admission_threshold: int = 0) -> None:
        super().__init__(capacity, policy, admission_threshold)
        records = torch.zeros(capacity, 2, dtype=torch.int64)  # id and score of a slot share a cache line
        self.ids, self.scores = records.unbind(1)
        self._library = library()
        self._library.hstu_slots_new.restype = pointer
        self._library.hstu_slots_size.restype = int64
        lfu = int32(policy == "lfu")
        self._handle = pointer(self._library.hstu_slots_new(int64(capacity), lfu, _pointer(records)))
        weakref.finalize(self, self._library.hstu_slots_free, self._handle)
        if self.sightings is not None:
            assert isinstance(self.sightings, CpuSlots)
            self._library.hstu_slots_set_admission(self._handle, self.sightings._handle, int64(admission_threshold))

    def _like(self, capacity: int, policy: Policy) -> CpuSlots:
        return CpuSlots(capacity, policy)

    def _rebuild(self) -> None:
        self._library.hstu_slots_rebuild(self._handle, int64(self._size))

    def lookup(self, ids: Tensor) -> Tensor:
        """See SlotTable."""
        ids, slots = ids.contiguous(), torch.empty_like(ids)
        self._library.hstu_slots_lookup(self._handle, _pointer(ids), int64(len(ids)), _pointer(slots))
        return slots

    def assign(self, ids: Tensor, step: int) -> Assignment:
        """See SlotTable."""
        ids, slots = ids.contiguous(), torch.empty_like(ids)
        most = min(len(ids), self.capacity)
        new_slots, new_ids, evicted_ids = (torch.empty(most, dtype=torch.int64) for _ in range(3))
        counts = torch.empty(6, dtype=torch.int64)
        outputs = map(_pointer, (slots, new_slots, new_ids, evicted_ids, counts))
        self._library.hstu_slots_assign(self._handle, _pointer(ids), int64(len(ids)), int64(step), *outputs)
        self._read_sizes()
        return Assignment(slots, new_slots, new_ids, evicted_ids, counts).trimmed()

    def _read_sizes(self) -> None:
        self._size = self._library.hstu_slots_size(self._handle)
        if self.sightings is not None:
            assert isinstance(self.sightings, CpuSlots)
            self.sightings._read_sizes()


def _pointer(tensor: Tensor) -> ctypes.c_void_p:
    return pointer(address(tensor))


class GpuSlots(SlotTable):
    """See SlotTable. By the kernels of hstu/ops/triton/slots.py; only ``content`` waits for the device."""

    sightings: GpuSlots | None

    def __init__(
        self, capacity: int, policy: Policy, admission_threshold: int, device: torch.device, kernels: ModuleType
    ) -> None:
        super().__init__(capacity, policy, admission_threshold)
        self.kernels = kernels
        self._slots = kernels.DeviceSlots(capacity, policy == "lfu", device)
        if admission_threshold > 1:
            self.sightings = GpuSlots(capacity, "lru", 0, device, kernels)

    def size(self) -> Tensor:
        """See SlotTable."""
        size: Tensor = self._slots.size
        return size

    def lookup(self, ids: Tensor) -> Tensor:
        """See SlotTable."""
        slots: Tensor = self._slots.find(ids)
        return slots

    def assign(self, ids: Tensor, step: int) -> Assignment:
        """See SlotTable."""
        sightings = None if self.sightings is None else self.sightings._slots
        done = self._slots.assign(ids, step, sightings, self.admission_threshold)
        return Assignment(done.slots, done.new_slots, done.new_ids, done.evicted_ids, done.counters)

    def content(self) -> tuple[Tensor, Tensor]:
        """See SlotTable. The scores are a copy."""
        size = int(self.size())
        seen = self._slots.seen[:size]
        counts, steps = (seen >> 32) & MAX_STEP, seen & MAX_STEP
        return self._slots.ids[:size], score(self.policy, counts, steps)

    def restore(self, ids: Tensor, scores: Tensor) -> None:
        """See SlotTable."""
        self._slots.restore(ids, (counts_of(self.policy, scores) << 32) + steps_of(self.policy, scores))


def check_cpu_slots() -> None:
    """Compare CpuSlots with TorchSlots once per machine, as compilers have defects; takes some hundredths of a second.

    Raises KernelsUnavailable where there is no compiler, or where the two differ.
    """
    passed = library_file().with_suffix(".slots_checked")
    if passed.exists():
        return
    policies: tuple[Policy, ...] = ("lru", "lfu")
    for policy in policies:
        for threshold in (0, 2):
            _compare(policy, threshold, capacity=300, batches=30)
    record_passed(passed)


def _compare(policy: Policy, threshold: int, capacity: int, batches: int) -> None:
    generator = torch.Generator().manual_seed(0)
    tables = CpuSlots(capacity, policy, threshold), TorchSlots(capacity, policy, threshold)
    for step in range(1, batches + 1):
        ids = torch.randn(200, generator=generator).mul(capacity).long()
        compiled, expected = (table.assign(ids, step) for table in tables)
        same = all(
            torch.equal(getattr(compiled, name), getattr(expected, name))
            for name in ("slots", "new_slots", "new_ids", "evicted_ids")
        )
        if not same or compiled.counters != expected.counters:
            raise KernelsUnavailable(
                f"the C++ slots of dynamic tables ({policy}) differ from PyTorch's; please report this with the "
                "output of `c++ --version`"
            )
