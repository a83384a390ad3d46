"""SlotTable in PyTorch: the oracle, what serves devices for which there is no kernel, and the frame of TritonSlots.

The slots in use are kept sorted by id, which costs a pass over the table for every batch that inserts. On a GPU a batch
waits for the device once, and some more times (once for each number of ids that is not known before) if it has new ids.
"""

from __future__ import annotations

from typing import NamedTuple

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

_HIGHEST = torch.iinfo(torch.int64).max


class _Placed(NamedTuple):
    """What became of n distinct ids that had no slot."""

    slots: Tensor
    """[n]: theirs now, or NO_SLOT."""
    places: Tensor
    """[k]: which of them have one."""
    new_slots: Tensor
    """[k]."""
    evicted_ids: Tensor


class TorchSlots(SlotTable):
    """See SlotTable. On any device."""

    def __init__(self, capacity: int, policy: Policy, admission_threshold: int = 0, device: str = "cpu") -> None:
        super().__init__(capacity, policy, admission_threshold, device)
        self._rebuild()

    def _like(self, capacity: int, policy: Policy) -> TorchSlots:
        return TorchSlots(capacity, policy, device=str(self.ids.device))

    def _rebuild(self) -> None:
        self._sorted_ids, self._slots = self.ids[: self.size].sort()

    def _replace(self, old_ids: Tensor, old_slots: Tensor, new_ids: Tensor, new_slots: Tensor) -> None:
        """``ids`` has changed: some of ``old_slots``, which ``old_ids`` had, and others are those of ``new_ids``."""
        self._rebuild()

    def lookup(self, ids: Tensor) -> Tensor:
        """See SlotTable."""
        if self.size == 0:
            return torch.full_like(ids, NO_SLOT)
        places = torch.searchsorted(self._sorted_ids, ids).clamp_(max=self.size - 1)
        return torch.where(self._sorted_ids[places] == ids, self._slots[places], NO_SLOT)

    def _see(self, ids: Tensor, counts: Tensor | None, step: int) -> Tensor:
        """Look up ``ids``, each of which occurs ``counts`` times (None: once), and score those that have a slot."""
        slots = self.lookup(ids)
        known = slots != NO_SLOT
        held, place = slots[known].unique(return_inverse=True)
        occurrences = torch.ones_like(place) if counts is None else counts[known]
        seen = counts_of(self.policy, self.scores[held]).index_add_(0, place, occurrences)
        self.scores[held] = score(self.policy, seen, step)
        return slots

    def assign(self, ids: Tensor, step: int) -> Assignment:
        """See SlotTable."""
        slots = self._see(ids, None, step)
        absent = (slots == NO_SLOT).nonzero()[:, 0]
        counters = Counters(lookups=len(ids), hits=len(ids) - len(absent))
        if not len(absent):
            return Assignment(slots, absent, absent, absent, counters)
        new, counts, which = _distinct(ids[absent])
        placed = self._place_admitted(new, counts, step, counters)
        slots[absent] = placed.slots[which]
        counters.insertions, counters.evictions = len(placed.places), len(placed.evicted_ids)
        return Assignment(slots, placed.new_slots, new[placed.places], placed.evicted_ids, counters)

    def _place_admitted(self, ids: Tensor, counts: Tensor, step: int, counters: Counters) -> _Placed:
        """Slots for those of distinct new ids that may have one; the others are counted."""
        if self.sightings is None:
            placed, admitted = self._place(ids, counts, step), counts
        else:
            assert isinstance(self.sightings, TorchSlots)
            passed = (self.sightings._sight(ids, counts, step) >= self.admission_threshold).nonzero()[:, 0]
            admitted = counts[passed]
            of_passed = self._place(ids[passed], admitted, step)
            slots = torch.full_like(ids, NO_SLOT).index_copy_(0, passed, of_passed.slots)
            placed = of_passed._replace(slots=slots, places=passed[of_passed.places])
        if len(admitted) < len(ids):
            counters.waiting = int(counts.sum() - admitted.sum())
        if len(placed.places) < len(admitted):
            counters.rejections = int(admitted.sum() - counts[placed.places].sum())
        return placed

    def _sight(self, ids: Tensor, counts: Tensor, step: int) -> Tensor:
        """How often distinct ids were seen that occur ``counts`` times more; int64 [n]."""
        slots = self._see(ids, counts, step)
        absent = (slots == NO_SLOT).nonzero()[:, 0]
        slots[absent] = self._place(ids[absent], counts[absent], step).slots
        return torch.where(slots != NO_SLOT, counts_of(self.policy, self.scores[slots]), counts)

    def _place(self, ids: Tensor, counts: Tensor, step: int) -> _Placed:
        """Slots for distinct ids that have none and occur ``counts`` times, or for as many as there are."""
        evicted = self._beaten(score(self.policy, counts, step), step)
        places = self._most_seen(ids, counts, self.capacity - self.size + len(evicted))
        size = min(self.capacity, self.size + len(places))
        new_slots = torch.cat([torch.arange(self.size, size, device=ids.device), evicted])
        new_ids, evicted_ids, self.size = ids[places], self.ids[evicted], size
        self.ids[new_slots], self.scores[new_slots] = new_ids, score(self.policy, counts[places], step)
        if len(places):
            self._replace(evicted_ids, evicted, new_ids, new_slots)
        slots = torch.full_like(ids, NO_SLOT).index_copy_(0, places, new_slots)
        return _Placed(slots, places, new_slots, evicted_ids)

    def _beaten(self, new: Tensor, step: int) -> Tensor:
        """Slots whose ids give way to new ids of these scores, the lowest first."""
        unused = self.capacity - self.size
        number = min(len(new) - unused, self.size)
        if number <= 0:
            return torch.empty(0, dtype=torch.int64, device=new.device)
        contenders = new.sort(descending=True).values[unused : unused + number]
        scores = self.scores[: self.size]
        is_other = steps_of(self.policy, scores) != step
        # Selecting takes a few passes over the table; only those up to the bound are put in order.
        bound = torch.where(is_other, scores, _HIGHEST).topk(number, largest=False, sorted=False).values.max()
        candidates = (is_other & (scores <= bound) & (scores < contenders[0])).nonzero()[:, 0]
        lowest = candidates[in_order(scores[candidates], self.ids[candidates])[:number]]
        beaten = scores[lowest] < contenders[: len(lowest)]  # the first ones: one side falls, the other rises
        return lowest[: int(beaten.sum())]

    def _most_seen(self, ids: Tensor, counts: Tensor, number: int) -> Tensor:
        """Places of the ``number`` most often seen ids, in the order in which they stand there."""
        if number >= len(ids):
            return torch.arange(len(ids), device=ids.device)
        return in_order(counts, ids)[len(ids) - number :].sort().values


def _distinct(ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(distinct ids in the order in which they first occur, how often each does, which of them each of ``ids`` is)."""
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
