"""One dynamic table on one rank: which rows its ids have, and rows made anew for new ids."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from hstu.model.embedding import TableSpec
from hstu.ops.backends import triton_gap
from hstu.ops.cpu.build import KernelsUnavailable
from hstu.parallel.dynamic.check import check_slots
from hstu.parallel.dynamic.content import Sightings, TableContent, best, merged, owners
from hstu.parallel.dynamic.cpu_slots import CpuSlots
from hstu.parallel.dynamic.initial_rows import initial_rows, table_key
from hstu.parallel.dynamic.slots import NO_SLOT, Counters, Policy, SlotTable
from hstu.parallel.dynamic.torch_slots import TorchSlots

log = logging.getLogger(__name__)


class DynamicTable:
    """This rank's share of a table.

    Its last row is the default row of ids that have none: zeros, and again before the next lookup, so that what an
    optimizer does to it does not last.
    """

    def __init__(
        self,
        spec: TableSpec,
        seed: int,
        weight: Tensor,
        states: Mapping[str, Tensor],
        write_back: Callable[[], None] = lambda: None,
    ) -> None:
        """``weight`` [rows, stored_dim] and ``states``, each [rows, …]: the live shard and its optimizer's.

        ``write_back``: before ``weight`` is read or written here, puts into it what is cached of it elsewhere.
        """
        assert spec.dynamic is not None
        self.spec = spec
        self.weight = weight
        self.states = dict(states)
        self.default_slot = len(weight) - 1
        self.slots = _slots(spec, self.default_slot, weight.device)
        self.step = 0
        """Training batches so far."""
        self.counters = Counters()
        """Since they were last read."""
        self.changed = torch.zeros(len(weight), dtype=torch.int64, device=weight.device)
        """The last training batch that changed each row."""
        self._key = table_key(seed, spec.name)
        self._write_back = write_back
        self._default_was_trained = False

    def train(self, ids: Tensor) -> Tensor:
        """Rows, int64 [n], of the ids of the next training batch, which get one if they may."""
        self.step += 1
        assigned = self.slots.assign(ids, self.step)
        self.counters.add(assigned.counters)
        self._renew(assigned.new_slots, assigned.new_ids)
        rows = self._or_default(assigned.slots)
        self.changed[rows] = self.step
        return rows

    def look_up(self, ids: Tensor, *, training: bool) -> Tensor:
        """Rows, int64 [n], of ids; none gets one that has none. ``training``: the rows will be changed."""
        rows = self._or_default(self.slots.lookup(ids))
        if training:
            self.changed[rows] = self.step
        return rows

    @torch.no_grad()
    def clear_default_row(self) -> None:
        """Before every lookup."""
        if not self._default_was_trained:
            return
        self._default_was_trained = False
        self._write_back()
        for tensor in (self.weight, *self.states.values()):
            tensor[self.default_slot] = 0

    @torch.no_grad()
    def _renew(self, slots: Tensor, ids: Tensor) -> None:
        """Initial rows and no optimizer state for slots that have changed hands."""
        if len(slots):
            self._write_back()
            self.weight[slots, : self.spec.dim] = initial_rows(ids, self.spec.dim, self.spec.init_std, self._key)
            for state in self.states.values():
                state.index_fill_(0, slots, 0)

    def content(self) -> TableContent:
        """All that is worth saving; views of what is live."""
        self._write_back()
        ids, scores = self.slots.content()
        used, dim = slice(len(ids)), self.spec.dim
        states = {name: state[used, :dim] if state.dim() > 1 else state[used] for name, state in self.states.items()}
        sightings = self.slots.sightings
        return TableContent(
            policy=self.slots.policy,
            step=self.step,
            ids=ids,
            scores=scores,
            changed=self.changed[used],
            rows=self.weight[used, :dim],
            states=states,
            sightings=None if sightings is None else Sightings(*sightings.content()),
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
        self.step = kept.step
        used, dim = slice(len(kept.ids)), self.spec.dim
        self._write_back()
        self.weight[used, :dim] = kept.rows.to(self.weight)
        self.changed[used] = kept.changed.to(self.changed)
        for name, state in self.states.items():
            target = state[used, :dim] if state.dim() > 1 else state[used]
            target.copy_(kept.states[name])
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
