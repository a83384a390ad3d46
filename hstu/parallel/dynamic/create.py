"""Creates the slots of a dynamic table: in C++ on a CPU, with Triton kernels on a GPU, else in PyTorch."""

import ctypes
import logging
import weakref

import torch
from torch import Tensor

from hstu.config.args import DynamicEmbeddingArgs
from hstu.ops.cpu.build import KernelsUnavailable, int32, int64, library, pointer
from hstu.ops.select import select_slot_kernels
from hstu.parallel.dynamic.slots import POLICIES, Assignment, Policy, SlotTable, TorchSlots

log = logging.getLogger(__name__)


def create_slots(table: str, args: DynamicEmbeddingArgs, capacity: int, device: torch.device) -> SlotTable:
    """Return the fastest implementation on this machine, and log it for the table named ``table``."""
    policy: Policy = args.evict_strategy  # type: ignore[assignment]  # its choices are the policies
    threshold = args.admission_threshold
    kernels = None
    if device.type == "cpu":
        try:
            slots = CpuSlots(capacity, policy, threshold)
        except KernelsUnavailable as reason:
            log.warning("kernel slots of table %s: pytorch (cpu: %s)", table, reason)
        else:
            log.info("kernel slots of table %s: cpu", table)
            return slots
    elif device.type == "cuda":
        kernels, unsupported_reason = select_slot_kernels(device)
        if kernels is not None:
            log.info("kernel slots of table %s: triton", table)
        else:
            log.warning("kernel slots of table %s: pytorch (triton: %s)", table, unsupported_reason)
    return TorchSlots(capacity, policy, threshold, device, kernels)


class CpuSlots(SlotTable):
    """See SlotTable. C++ (hstu/ops/cpu/csrc/slots.h) on one thread. Raises KernelsUnavailable without a compiler."""

    sightings: "CpuSlots | None"

    def __init__(self, capacity: int, policy: Policy, admission_threshold: int = 0) -> None:
        super().__init__(capacity, policy, admission_threshold)
        self._records = torch.zeros(capacity, 2, dtype=torch.int64)  # id and score of a slot share a cache line
        self._library = library()
        self._library.hstu_slots_new.restype = pointer
        self._library.hstu_slots_size.restype = int64
        number = int32(POLICIES.index(policy))
        self._handle = pointer(self._library.hstu_slots_new(int64(capacity), number, _pointer(self._records)))
        weakref.finalize(self, self._library.hstu_slots_free, self._handle)
        if admission_threshold > 1:
            self.sightings = CpuSlots(capacity, "lru")
            self._library.hstu_slots_set_admission(self._handle, self.sightings._handle, int64(admission_threshold))

    def size(self) -> Tensor:
        """See SlotTable."""
        return torch.tensor([self._library.hstu_slots_size(self._handle)])

    def lookup(self, ids: Tensor) -> Tensor:
        """See SlotTable."""
        ids, slots = ids.contiguous(), torch.empty_like(ids)
        self._library.hstu_slots_lookup(self._handle, _pointer(ids), int64(len(ids)), _pointer(slots))
        return slots

    def assign(self, ids: Tensor, step: int, counts: Tensor | None = None) -> Assignment:
        """See SlotTable."""
        ids, slots = ids.contiguous(), torch.empty_like(ids)
        occurrences = None if counts is None else _pointer(counts := counts.contiguous())
        most = min(len(ids), self.capacity)
        new_slots, new_ids = (torch.empty(most, dtype=torch.int64) for _ in range(2))
        events = torch.empty(6, dtype=torch.int64)
        outputs = map(_pointer, (slots, new_slots, new_ids, events))
        batch = _pointer(ids), occurrences, int64(len(ids)), int64(step)
        self._library.hstu_slots_assign(self._handle, *batch, *outputs)
        return Assignment(slots, new_slots, new_ids, events)

    def content(self) -> tuple[Tensor, Tensor]:
        """See SlotTable; views."""
        ids, scores = self._records[: int(self.size())].unbind(1)
        return ids, scores

    def restore(self, ids: Tensor, scores: Tensor) -> None:
        """See SlotTable."""
        self._records[: len(ids)] = torch.stack([ids, scores], dim=1)
        self._library.hstu_slots_rebuild(self._handle, int64(len(ids)))


def _pointer(tensor: Tensor) -> ctypes.c_void_p:
    return pointer(tensor.data_ptr())
