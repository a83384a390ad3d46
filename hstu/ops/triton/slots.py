"""The slots of a dynamic table in GPU memory: finds them, gives them to new ids and takes them away, without the host.

The rules are those of hstu/parallel/dynamic/slots.py. Nothing here reads a value from the device. All sizes that depend
on ids stay there; the host launches each kernel for the most that a batch can need, and a kernel that has less to do
ends early.

The index maps ids to slots: a hash table with open addressing and linear probing, of four to eight int32 entries per
slot. An entry is a slot or EMPTY. Ids are stored by slot, so every int64 is a valid id. When a slot changes its id, its
old entry stays and no longer matches. Once half of the entries are taken, the index is emptied and filled again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from hstu.ops.triton.launch import launcher
from hstu.ops.triton.new_rows import start_rows
from hstu.ops.triton.slot_kernels import (
    ADMITTED,
    COUNTERS,
    DISTINCT,
    EMPTY,
    MOST_PROGRAMS,
    NO_POSITION,
    NUMBERS,
    SIZE,
    answer,
    clear_full,
    count_admitted,
    count_new,
    find_and_count,
    find_slots,
    insert_new,
    list_admitted,
    list_new,
    place_new,
)
from hstu.ops.triton.slot_selection import (
    DIGIT_BITS,
    DIGITS,
    STATE,
    count_digit_values,
    find_threshold,
    list_beaten,
    list_undecided,
)

__all__ = ["Assigned", "DeviceSlots", "start_rows"]

# One warp per program, so that no warp waits for the longest search of another.
_BY_POSITION = [triton.Config({"BLOCK": 64}, num_warps=1, num_stages=1)]
# Triton 3.6 does not compile place_new with more than one position per lane: "operand #0 does not dominate this use".
_ONE_PER_LANE = [triton.Config({"BLOCK": 64}, num_warps=2, num_stages=1)]
_BLOCK = 512
_BY_SPAN = [triton.Config({"BLOCK": _BLOCK}, num_warps=4, num_stages=1)]
_LEAST_BITS = 4
_KEPT = 2
"""The first numbers, which are kept from batch to batch."""


@dataclass(frozen=True)
class Spans:
    """``number`` positions cut into spans of equal length, one per program."""

    programs: int
    span: int

    @classmethod
    def of(cls, number: int, most: int) -> Spans:
        """At most ``most`` spans of whole blocks."""
        blocks = max(1, triton.cdiv(number, _BLOCK))
        span = triton.cdiv(blocks, most)
        return cls(triton.cdiv(blocks, span), span * _BLOCK)


class BatchMemory:
    """Device memory for batches of up to ``most`` ids. The hash table is empty between calls."""

    def __init__(self, most: int, device: torch.device | str) -> None:
        self.most = most
        bits = max(_LEAST_BITS, (2 * most - 1).bit_length())
        self.probing = {"batch_last": (1 << bits) - 1, "batch_shift": 64 - bits}

        def numbers(count: int, value: int | None = None) -> Tensor:
            made = torch.empty(count, dtype=torch.int32, device=device)
            return made if value is None else made.fill_(value)

        self.holders, self.totals = numbers(1 << bits, EMPTY.value), numbers(1 << bits, 0)
        self.firsts, self.listed_at = numbers(1 << bits, NO_POSITION.value), numbers(1 << bits)
        self.entries, self.admitted_at, self.ranks, self.slot_of, self.victims = (numbers(most) for _ in range(5))
        self.counts = [numbers(most) for _ in range(2)]
        """Of the new ids, and of the admitted ones."""
        self.ids = [torch.empty(most, dtype=torch.int64, device=device) for _ in range(2)]
        self.sums = torch.empty(MOST_PROGRAMS.value, dtype=torch.int64, device=device)


@dataclass(frozen=True)
class Assigned:
    """What a batch of n ids got. The first counters[4] of the new ids and the first counters[5] evicted ids are set."""

    slots: Tensor
    new_slots: Tensor
    new_ids: Tensor
    evicted_ids: Tensor
    counters: Tensor
    """int64 [6]: lookups, hits, waiting, rejections, insertions, evictions."""


class DeviceSlots:
    """Ids by slot, how often and when they were last seen, and the index of the ids."""

    def __init__(self, capacity: int, lfu: bool, device: torch.device | str) -> None:
        self.capacity, self.lfu, self.device = capacity, lfu, device
        bits = max(_LEAST_BITS, (4 * capacity - 1).bit_length())
        self.entries = torch.empty(1 << bits, dtype=torch.int32, device=device)
        self._probing = {"last": len(self.entries) - 1, "shift": 64 - bits}
        self.ids = torch.zeros(capacity, dtype=torch.int64, device=device)
        self.seen = torch.zeros(capacity, dtype=torch.int64, device=device)
        """count · 2^32 + last step of each slot. A count may exceed the largest one by the size of a batch."""
        self.numbers = torch.zeros(NUMBERS, dtype=torch.int64, device=device)
        self._listed = torch.empty(0, dtype=torch.int32, device=device)
        self._memory = BatchMemory(0, device)
        self._size_at_most = 0
        self.restore(self.ids[:0], self.seen[:0])

    @property
    def size(self) -> Tensor:
        """Slots in use: int64 [1]."""
        return self.numbers[SIZE.value : SIZE.value + 1]

    def restore(self, ids: Tensor, seen: Tensor) -> None:
        """Replace the content by these ids, in slots 0, 1, …"""
        number = self._size_at_most = len(ids)
        self.ids[:number], self.seen[:number] = ids, seen
        self.entries.fill_(EMPTY.value)
        self.numbers[:_KEPT].fill_(0)
        counters = torch.zeros(COUNTERS, dtype=torch.int64, device=self.device)
        counters[4:5].fill_(number)
        new_slots = torch.arange(number, device=self.device)
        self._insert(new_slots, number, counters)
        self.numbers[:_KEPT].fill_(number)

    def find(self, wanted: Tensor) -> Tensor:
        """Slots of ids, int64 [n]; -1: none."""
        wanted = wanted.contiguous()
        slots = torch.empty_like(wanted)
        arguments = {"wanted": wanted, "slots": slots, "index": self.entries, "ids": self.ids}
        _by_position(find_slots, len(wanted), **arguments, num_ids=len(wanted), **self._probing)
        return slots

    def assign(self, wanted: Tensor, step: int, sightings: DeviceSlots | None = None, threshold: int = 0) -> Assigned:
        """Give slots to the ids of a batch, int64 [n]. ``sightings``: where ids below the ``threshold`` are counted."""
        return self._assign(wanted.contiguous(), None, None, step, sightings, threshold)

    def _assign(
        self,
        wanted: Tensor,
        weights: Tensor | None,
        limit: Tensor | None,
        step: int,
        sightings: DeviceSlots | None,
        threshold: int,
    ) -> Assigned:
        """``weights``: occurrences of each id, int32; None: 1. ``limit``: how many of ``wanted`` there are, on the
        device; None: all.
        """
        number = len(wanted)
        memory = self._memory_for(number)
        new = [torch.empty(min(number, self.capacity), dtype=torch.int64, device=self.device) for _ in range(3)]
        counters = torch.zeros(COUNTERS, dtype=torch.int64, device=self.device)
        assigned = Assigned(torch.empty_like(wanted), new[0], new[1], new[2], counters)
        if not number:
            return assigned
        self.numbers[_KEPT:].zero_()
        of_batch = {"limit": limit, "numbers": self.numbers, "num_ids": number}
        by_id = {"firsts": memory.firsts, "totals": memory.totals, "entries": memory.entries}
        _by_position(
            find_and_count,
            number,
            wanted=wanted,
            weights=weights,
            slots=assigned.slots,
            index=self.entries,
            ids=self.ids,
            halves=self.seen.view(torch.int32),
            holders=memory.holders,
            step=step,
            **by_id,
            **of_batch,
            **memory.probing,
            **self._probing,
        )
        claims = self._list_new(wanted, assigned.slots, memory, by_id, of_batch)
        if sightings is not None:
            claims = self._list_admitted(memory, counters, number, step, sightings, threshold)
        self._place(claims, memory, assigned, number, step)
        self._insert(assigned.new_slots, number, counters)
        _by_position(
            answer,
            number,
            slots=assigned.slots,
            listed_at=memory.listed_at,
            admitted_at=memory.admitted_at,
            slot_of=memory.slot_of,
            holders=memory.holders,
            counters=counters,
            last=self._probing["last"],
            ADMISSION=sightings is not None,
            **by_id,
            **of_batch,
        )
        return assigned

    def _list_new(
        self, wanted: Tensor, slots: Tensor, memory: BatchMemory, by_id: dict[str, Tensor], of_batch: dict[str, Any]
    ) -> dict[str, Tensor]:
        """List the distinct ids without a slot; returns the claims that ``_place`` takes."""
        spans = Spans.of(len(wanted), MOST_PROGRAMS.value)
        shared = {**of_batch, "slots": slots, "sums": memory.sums, "span": spans.span}
        used = {name: by_id[name] for name in ("entries", "firsts")}
        _by_span(count_new, spans.programs, **used, **shared)
        new_ids, new_counts = memory.ids[0], memory.counts[0]
        made = {"new_ids": new_ids, "new_counts": new_counts, "listed_at": memory.listed_at}
        _by_span(list_new, spans.programs, wanted=wanted, **by_id, **shared, **made)
        return {"claim_ids": new_ids, "claim_counts": new_counts, "claims": self._number(DISTINCT)}

    def _list_admitted(
        self, memory: BatchMemory, counters: Tensor, number: int, step: int, sightings: DeviceSlots, threshold: int
    ) -> dict[str, Tensor]:
        """List those of the new ids that were sighted ``threshold`` times; returns the claims that ``_place`` takes."""
        new_ids, new_counts = memory.ids[0][:number], memory.counts[0][:number]
        sighted = sightings._assign(new_ids, new_counts, self._number(DISTINCT), step, None, 0)
        spans = Spans.of(number, MOST_PROGRAMS.value)
        shared = {
            "sighted_slots": sighted.slots,
            "sighted": sightings.seen,
            "new_counts": new_counts,
            "numbers": self.numbers,
            "sums": memory.sums,
            "span": spans.span,
            "threshold": threshold,
        }
        _by_span(count_admitted, spans.programs, **shared)
        ids, counts = memory.ids[1], memory.counts[1]
        made = {"admitted_ids": ids, "admitted_counts": counts, "admitted_at": memory.admitted_at}
        _by_span(list_admitted, spans.programs, new_ids=new_ids, counters=counters, **made, **shared)
        return {"claim_ids": ids, "claim_counts": counts, "claims": self._number(ADMITTED)}

    def _place(
        self, claims: dict[str, Tensor], memory: BatchMemory, assigned: Assigned, number: int, step: int
    ) -> None:
        """Give slots to the claims. The host skips the selection as long as there must be unused slots for all."""
        self._size_at_most += number
        selects = self._size_at_most > self.capacity
        if selects:
            self._size_at_most = self.capacity
            self._select(claims, memory, number, step)
        _by_position(
            place_new,
            number,
            _ONE_PER_LANE,
            **claims,
            ranks=memory.ranks,
            victims=memory.victims,
            ids=self.ids,
            seen=self.seen,
            slot_of=memory.slot_of,
            new_slots=assigned.new_slots,
            new_ids=assigned.new_ids,
            evicted_ids=assigned.evicted_ids,
            numbers=self.numbers,
            counters=assigned.counters,
            capacity=self.capacity,
            step=step,
            SELECTS=selects,
        )

    def _select(self, claims: dict[str, Tensor], memory: BatchMemory, number: int, step: int) -> None:
        """Write the victims and the ranks of the claims to ``memory``."""
        step_digits = max(1, triton.cdiv(step.bit_length(), DIGIT_BITS.value))
        num_digits = step_digits + 2  # and one each for the count and the hash
        half = MOST_PROGRAMS.value // 2
        of_slots, of_claims = Spans.of(self.capacity, half), Spans.of(number, half)
        programs = of_slots.programs + of_claims.programs
        if not len(self._listed) or len(self._listed) < self.capacity + number:
            self._listed = torch.empty(self.capacity + memory.most, dtype=torch.int32, device=self.device)
        histograms = torch.zeros(num_digits, DIGITS.value, dtype=torch.int32, device=self.device)
        states = torch.empty(num_digits + 1, STATE, dtype=torch.int64, device=self.device)
        threshold = torch.empty(2, dtype=torch.int64, device=self.device)
        candidates = {
            **claims,
            "seen": self.seen,
            "ids": self.ids,
            "numbers": self.numbers,
            "capacity": self.capacity,
            "step": step,
            "slot_programs": of_slots.programs,
            "slot_span": of_slots.span,
            "claim_span": of_claims.span,
            "LFU": self.lfu,
        }
        step_bits = {"step_bits": step_digits * DIGIT_BITS.value}
        counted = {"states": states, "histograms": histograms, "num_digits": num_digits} | step_bits
        counted["count_digit"] = 0 if self.lfu else step_digits
        for digit_number in range(num_digits):
            _by_span(count_digit_values, programs, digit_number=digit_number, **candidates, **counted)
        listed = {"listed": self._listed, "sums": memory.sums}
        _by_span(list_undecided, programs, **candidates, **counted, **listed)
        last_state = {"state": states[num_digits], "threshold": threshold}
        _by_span(find_threshold, 1, **candidates, **listed, **last_state)
        made = {"victims": memory.victims, "ranks": memory.ranks, "sums": memory.sums}
        _by_span(list_beaten, programs, **candidates, **step_bits, **last_state, **made)

    def _insert(self, new_slots: Tensor, number: int, counters: Tensor) -> None:
        """Insert new slots, at most ``number``, into the index, which is refilled if it is full."""
        shared = {"index": self.entries, "numbers": self.numbers, "counters": counters, "last": self._probing["last"]}
        spans = Spans.of(len(self.entries), MOST_PROGRAMS.value)
        _by_span(clear_full, spans.programs, span=spans.span, **shared)
        spans = Spans.of(self.capacity, MOST_PROGRAMS.value)
        shared |= {"new_slots": new_slots, "ids": self.ids, "shift": self._probing["shift"]}
        _by_span(insert_new, spans.programs, span=spans.span, **shared)

    def _memory_for(self, number: int) -> BatchMemory:
        if number > self._memory.most:
            self._memory = BatchMemory(1 << max(number - 1, 0).bit_length(), self.device)
        return self._memory

    def _number(self, which: Any) -> Tensor:
        return self.numbers[which.value : which.value + 1]


def _by_position(kernel: Any, number: int, configs: list[triton.Config] = _BY_POSITION, /, **arguments: Any) -> None:
    if number:
        grid = lambda meta: (triton.cdiv(number, meta["BLOCK"]),)  # noqa: E731
        launcher(kernel, grid, configs)(**arguments)


def _by_span(kernel: Any, programs: int, **arguments: Any) -> None:
    launcher(kernel, lambda _: (programs,), _BY_SPAN)(**arguments)
