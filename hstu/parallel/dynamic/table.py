"""One dynamic table on one rank: which rows its ids have, and rows made anew for new ids."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from hstu.model.embedding import TableSpec
from hstu.ops.backends import triton_gap
from hstu.ops.cpu.build import KernelsUnavailable
from hstu.parallel.dynamic.check import check_slots
from hstu.parallel.dynamic.content import Sightings, TableContent, best, merged, owners
from hstu.parallel.dynamic.cpu_slots import CpuSlots
from hstu.parallel.dynamic.initial_rows import initial_rows, table_key
from hstu.parallel.dynamic.rows import Rows
from hstu.parallel.dynamic.slots import NO_SLOT, Counters, Policy, SlotTable
from hstu.parallel.dynamic.times import StepTimes
from hstu.parallel.dynamic.torch_slots import TorchSlots

log = logging.getLogger(__name__)


class DynamicTable:
    """This rank's share of a table.

    Its last row is the default row of ids that have none: zeros, and again before the next lookup, so that what an
    optimizer does to it does not last.
    """

    def __init__(self, spec: TableSpec, seed: int, rows: Rows) -> None:
        """``rows``: the live ones, all zero."""
        self.spec = spec
        self.rows = rows
        self.default_slot = len(rows) - 1
        self.slots = _slots(spec, self.default_slot, rows.device)
        self.step = 0
        """Training batches so far."""
        self.counters = Counters()
        """Since they were last read."""
        self.changed = torch.zeros(len(rows), dtype=torch.int64, device=rows.device)
        """The last training batch that changed each row."""
        self.times = StepTimes()
        """When it had seen how many of them."""
        self._key = table_key(seed, spec.name)
        self._default = torch.tensor([self.default_slot], device=rows.device)
        self._default_was_trained = False

    def train(self, ids: Tensor) -> Tensor:
        """Rows, int64 [n], of the ids of the next training batch, which get one if they may."""
        self.step += 1
        assigned = self.slots.assign(ids, self.step)
        self.counters.add(assigned.counters)
        self._renew(assigned.new_slots, assigned.new_ids)
        rows = self._or_default(assigned.slots)
        self.changed[rows] = self.step
        self.times.note(self.step - 1)  # this one's update is still to come
        return rows

    def look_up(self, ids: Tensor, *, training: bool) -> Tensor:
        """Rows, int64 [n], of ids; none gets one that has none. ``training``: the rows will be changed."""
        rows = self._or_default(self.slots.lookup(ids))
        if training:
            self.changed[rows] = self.step
        return rows

    def bring_near(self, ids: Tensor) -> None:
        """Expect a lookup of ``ids``, int64 [n], in the next step. Nothing changes but the time that it takes.

        Ids of a batch keep their slots in it: where they lie now, they are looked up.
        """
        self.rows.bring_near(self.slots.lookup(ids))

    def clear_default_row(self) -> None:
        """Before every lookup."""
        if self._default_was_trained:
            self._default_was_trained = False
            self.rows.begin(self._default, self._default.new_zeros(1, self.spec.dim, dtype=torch.float32))

    def _renew(self, slots: Tensor, ids: Tensor) -> None:
        """Initial rows and no optimizer state for slots that have changed hands."""
        if len(slots):
            self.rows.begin(slots, initial_rows(ids, self.spec.dim, self.spec.init_std, self._key))

    def content(self) -> TableContent:
        """All that is worth saving; views of what is live, where it lies in one piece."""
        self.times.note(self.step, saving=True)
        ids, scores = self.slots.content()
        rows, states = self.rows.first(len(ids))
        sightings = self.slots.sightings
        return TableContent(
            policy=self.slots.policy,
            step=self.step,
            ids=ids,
            scores=scores,
            changed=self.changed[: len(ids)],
            rows=rows,
            states=states,
            sightings=None if sightings is None else Sightings(*sightings.content()),
            times=self.times.entries,
        )

    @torch.no_grad()
    def restore(self, parts: Sequence[TableContent], rank: int, world_size: int) -> int:
        """Hold what this rank owns of the ``parts`` of a whole table, and nothing else.

        Returns how many ids there was no room for: those that would be evicted first.
        """
        args = self.spec.dynamic
        assert args is not None

        def own(ids: Tensor) -> Tensor:
            return owners(ids, args, self.slots.capacity, world_size) == rank

        content = merged([part.chosen(own(part.ids)) for part in parts]).scored_by(self.slots.policy)
        kept = content.chosen(best(content.ids, content.scores, self.slots.capacity))
        self.slots.restore(kept.ids, kept.scores)
        self.step, self.times = kept.step, StepTimes(kept.times)
        self.rows.put_first(kept.rows, kept.states)
        self.changed[: len(kept.ids)] = kept.changed.to(self.changed)
        if self.slots.sightings is not None and kept.sightings is not None:
            sighted = own(kept.sightings.ids)
            ids, scores = kept.sightings.ids[sighted], kept.sightings.scores[sighted]
            newest = best(ids, scores, self.slots.sightings.capacity)
            self.slots.sightings.restore(ids[newest], scores[newest])
        return len(content.ids) - len(kept.ids)

    def _or_default(self, slots: Tensor) -> Tensor:
        absent = slots == NO_SLOT
        self._default_was_trained |= bool(absent.any())
        return torch.where(absent, self.default_slot, slots)


def _slots(spec: TableSpec, capacity: int, device: torch.device) -> SlotTable:
    assert spec.dynamic is not None
    policy: Policy = "lfu" if spec.dynamic.evict_strategy == "lfu" else "lru"
    threshold = spec.dynamic.admission_threshold
    if device.type == "cpu":
        try:
            check_slots()
            return CpuSlots(capacity, policy, threshold)
        except KernelsUnavailable as reason:
            log.warning("table %s: PyTorch looks up its ids, there are no C++ kernels: %s", spec.name, reason)
    elif device.type == "cuda":
        if (gap := triton_gap(device)) is None:
            from hstu.parallel.dynamic.triton_slots import TritonSlots  # Triton may not be installed elsewhere

            return TritonSlots(capacity, policy, threshold, str(device))
        log.warning("table %s: PyTorch looks up its ids, Triton cannot: %s", spec.name, gap)
    return TorchSlots(capacity, policy, threshold, str(device))
