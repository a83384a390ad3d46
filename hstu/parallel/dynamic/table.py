"""One dynamic table on one rank: which rows its ids have, and rows made anew for new ids."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from hstu.model.embedding import TableSpec
from hstu.ops.cpu.build import KernelsUnavailable
from hstu.parallel.dynamic.cpu_slots import CpuSlots
from hstu.parallel.dynamic.initial_rows import initial_rows, table_key
from hstu.parallel.dynamic.slots import NO_SLOT, Counters, SlotTable
from hstu.parallel.dynamic.torch_slots import TorchSlots

log = logging.getLogger(__name__)


class DynamicTable:
    """This rank's share of a table.

    Its last row is the default row of ids that have none: zeros, and again before every lookup, so that what an
    optimizer does to it does not last.
    """

    def __init__(self, spec: TableSpec, seed: int, weight: Tensor, states: Sequence[Tensor]) -> None:
        """``weight`` [rows, stored_dim] and ``states`` [rows, …]: the live shard and its optimizer's state."""
        assert spec.dynamic is not None
        self.spec = spec
        self.weight = weight
        self.states = list(states)
        self.default_slot = len(weight) - 1
        self.slots = _slots(spec, self.default_slot, weight.device)
        self.step = 0
        """Training batches so far."""
        self.counters = Counters()
        """Since they were last read."""
        self._key = table_key(seed, spec.name)

    def train(self, ids: Tensor) -> Tensor:
        """Rows, int64 [n], of the ids of the next training batch, which get one if they may."""
        self.step += 1
        assigned = self.slots.assign(ids, self.step)
        self.counters.add(assigned.counters)
        self._renew(assigned.new_slots, assigned.new_ids)
        return self._or_default(assigned.slots)

    def look_up(self, ids: Tensor) -> Tensor:
        """Rows, int64 [n], of ids; none gets one that has none."""
        return self._or_default(self.slots.lookup(ids))

    @torch.no_grad()
    def clear_default_row(self) -> None:
        """Before every lookup."""
        for tensor in (self.weight, *self.states):
            tensor[self.default_slot] = 0

    @torch.no_grad()
    def _renew(self, slots: Tensor, ids: Tensor) -> None:
        """Initial rows and no optimizer state for slots that have changed hands."""
        if len(slots):
            self.weight[slots, : self.spec.dim] = initial_rows(ids, self.spec.dim, self.spec.init_std, self._key)
            for state in self.states:
                state.index_fill_(0, slots, 0)

    def _or_default(self, slots: Tensor) -> Tensor:
        return torch.where(slots == NO_SLOT, self.default_slot, slots)


def _slots(spec: TableSpec, capacity: int, device: torch.device) -> SlotTable:
    assert spec.dynamic is not None
    policy, threshold = spec.dynamic.evict_strategy, spec.dynamic.admission_threshold
    assert policy in ("lru", "lfu")
    if device.type == "cpu":
        try:
            return CpuSlots(capacity, policy, threshold)
        except KernelsUnavailable as reason:
            log.warning("table %s: PyTorch looks up its ids, there are no C++ kernels: %s", spec.name, reason)
    return TorchSlots(capacity, policy, threshold, str(device))
