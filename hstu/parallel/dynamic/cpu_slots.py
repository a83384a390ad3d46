"""SlotTable in C++ (hstu/ops/cpu/csrc/slots.h), on one thread of the CPU."""

from __future__ import annotations

import ctypes
import weakref

import torch
from torch import Tensor

from hstu.ops.cpu.library import address, int32, int64, library, pointer
from hstu.parallel.dynamic.slots import Assignment, Counters, Policy, SlotTable


class CpuSlots(SlotTable):
    """See SlotTable. Raises hstu.ops.cpu.build.KernelsUnavailable where there is no compiler."""

    def __init__(self, capacity: int, policy: Policy, admission_threshold: int = 0) -> None:
        super().__init__(capacity, policy, admission_threshold)
        records = torch.zeros(capacity, 2, dtype=torch.int64)  # the two are read together
        self.ids, self.scores = records.unbind(1)
        self._library = library()
        self._library.hstu_slots_new.restype = pointer
        self._library.hstu_slots_size.restype = int64
        lfu = int32(policy == "lfu")
        self._handle = pointer(self._library.hstu_slots_new(int64(capacity), lfu, _pointer(records)))
        weakref.finalize(self, self._library.hstu_slots_free, self._handle)
        if self.sightings is not None:
            assert isinstance(self.sightings, CpuSlots)
            self._library.hstu_slots_wait_in(self._handle, self.sightings._handle, int64(admission_threshold))

    def _like(self, capacity: int, policy: Policy) -> CpuSlots:
        return CpuSlots(capacity, policy)

    def _rebuild(self) -> None:
        self._library.hstu_slots_rebuild(self._handle, int64(self.size))

    def lookup(self, ids: Tensor) -> Tensor:
        """See SlotTable."""
        ids, slots = ids.contiguous(), torch.empty_like(ids)
        self._library.hstu_slots_lookup(self._handle, *_arguments(ids), _pointer(slots))
        return slots

    def assign(self, ids: Tensor, step: int) -> Assignment:
        """See SlotTable."""
        ids, slots = ids.contiguous(), torch.empty_like(ids)
        most = min(len(ids), self.capacity)
        new_slots, new_ids, evicted_ids = (torch.empty(most, dtype=torch.int64) for _ in range(3))
        counts = torch.empty(6, dtype=torch.int64)
        outputs = map(_pointer, (slots, new_slots, new_ids, evicted_ids, counts))
        self._library.hstu_slots_assign(self._handle, *_arguments(ids), int64(step), *outputs)
        self._read_sizes()
        counters = Counters(*counts.tolist())
        new = slice(counters.insertions)
        return Assignment(slots, new_slots[new], new_ids[new], evicted_ids[: counters.evictions], counters)

    def _read_sizes(self) -> None:
        self.size = self._library.hstu_slots_size(self._handle)
        if self.sightings is not None:
            assert isinstance(self.sightings, CpuSlots)
            self.sightings._read_sizes()


def _pointer(tensor: Tensor) -> ctypes.c_void_p:
    return pointer(address(tensor))


def _arguments(ids: Tensor) -> tuple[ctypes.c_void_p, ctypes.c_int64]:
    return _pointer(ids), int64(len(ids))
