"""SlotTable in PyTorch: the oracle, and what serves devices for which there is no kernel.

The slots in use are kept sorted by id, which costs a pass over the table for every batch that inserts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hstu.parallel.dynamic.slots import (
    NO_SLOT,
    Assignment,
    Counters,
    Policy,
    SlotTable,
    counts_of,
    in_order,
    score,
    steps_of,
)


class TorchSlots(SlotTable):
    """See SlotTable. On any device."""

    def __init__(self, capacity: int, policy: Policy, admission_threshold: int = 0, device: str = "cpu") -> None:
        super().__init__(capacity, policy, admission_threshold, device)
        self._rebuild()

    def _like(self, capacity: int, policy: Policy) -> TorchSlots:
        return TorchSlots(capacity, policy, device=str(self.ids.device))

    def _rebuild(self) -> None:
        self._sorted_ids, self._slots = self.ids[: self.size].sort()

    def lookup(self, ids: Tensor) -> Tensor:
        """See SlotTable."""
        if self.size == 0:
            return torch.full_like(ids, NO_SLOT)
        places = torch.searchsorted(self._sorted_ids, ids).clamp_(max=self.size - 1)
        return torch.where(self._sorted_ids[places] == ids, self._slots[places], NO_SLOT)

    def assign(self, ids: Tensor, step: int) -> Assignment:
        """See SlotTable."""
        distinct, inverse, counts = ids.unique(return_inverse=True, return_counts=True)
        places = torch.arange(len(ids), device=ids.device)
        first = torch.full_like(distinct, len(ids)).scatter_reduce_(0, inverse, places, "amin")
        by_occurrence = first.argsort()
        ids_in_order, counts = distinct[by_occurrence], counts[by_occurrence]
        rank_of_distinct = torch.empty_like(by_occurrence).scatter_(0, by_occurrence, places[: len(by_occurrence)])
        assigned = self._assign_distinct(ids_in_order, counts, step)
        slots = assigned.slots[rank_of_distinct][inverse]
        return Assignment(slots, assigned.new_slots, assigned.new_ids, assigned.evicted_ids, assigned.counters)

    def _assign_distinct(self, ids: Tensor, counts: Tensor, step: int) -> Assignment:
        """The same for distinct ids that occur ``counts`` times each."""
        slots = self.lookup(ids)
        known = slots != NO_SLOT
        held = slots[known]
        seen = counts_of(self.policy, self.scores[held]) + counts[known]
        self.scores[held] = score(self.policy, seen, step)
        new = (~known).nonzero()[:, 0]
        admitted = new[self._admits(ids[new], counts[new], step)]
        evicted = self._beaten(score(self.policy, counts[admitted], step), step)
        placed = self._most_seen(ids, counts, admitted, self.capacity - self.size + len(evicted))
        evicted_ids = self.ids[evicted]
        unused = torch.arange(self.size, self.capacity, device=ids.device)[: len(placed)]
        new_slots = torch.cat([unused, evicted])
        self.size += len(unused)
        self.ids[new_slots], self.scores[new_slots] = ids[placed], score(self.policy, counts[placed], step)
        slots[placed] = new_slots
        if len(placed):
            self._rebuild()
        counters = Counters(
            lookups=int(counts.sum()),
            hits=int(counts[known].sum()),
            waiting=int(counts[new].sum() - counts[admitted].sum()),
            rejections=int(counts[admitted].sum() - counts[placed].sum()),
            insertions=len(placed),
            evictions=len(evicted),
        )
        return Assignment(slots, new_slots, ids[placed], evicted_ids, counters)

    def _admits(self, ids: Tensor, counts: Tensor, step: int) -> Tensor:
        if self.sightings is None:
            return torch.ones_like(ids, dtype=torch.bool)
        assert isinstance(self.sightings, TorchSlots)
        slots = self.sightings._assign_distinct(ids, counts, step).slots
        sighted = torch.where(slots != NO_SLOT, counts_of("lru", self.sightings.scores[slots]), counts)
        return sighted >= self.admission_threshold

    def _beaten(self, new: Tensor, step: int) -> Tensor:
        """Slots whose ids give way to new ids of these scores, the lowest first."""
        contenders = new.sort(descending=True).values[self.capacity - self.size :]
        others = (steps_of(self.policy, self.scores[: self.size]) != step).nonzero()[:, 0]
        lowest = others[in_order(self.scores[others], self.ids[others])[: len(contenders)]]
        beaten = self.scores[lowest] < contenders[: len(lowest)]  # the first ones: one side falls, the other rises
        return lowest[: int(beaten.sum())]

    def _most_seen(self, ids: Tensor, counts: Tensor, new: Tensor, number: int) -> Tensor:
        """The ``number`` most often seen of ``new``, in the order in which they stand there."""
        if number >= len(new):
            return new
        kept = in_order(counts[new], ids[new])[len(new) - number :]
        return new[kept.sort().values]
