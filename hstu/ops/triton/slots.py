"""The index of dynamic tables by Triton kernels: a hash table in GPU memory that maps ids to slots.

The table uses open addressing with linear probing. An entry is a slot, EMPTY or ERASED. Ids are stored by the caller,
one per slot, so that every int64 is a valid id. Probing ends at an EMPTY entry, or after as many steps as there are
entries. No kernel both finds and inserts ids, so atomics need no order beyond their own address (sem="relaxed").
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hstu.ops.triton.launch import launcher

EMPTY = tl.constexpr(-1)
ERASED = tl.constexpr(-2)
NO_ENTRY = tl.constexpr(-3)
"""A value that no entry has, so that a compare-and-swap that expects it always fails."""
MAX_COUNT = tl.constexpr(2**31 - 1)
# One warp per program, so that no warp waits for the longest search of another.
_CONFIG = [triton.Config({"BLOCK": 128}, num_warps=1, num_stages=1)]
_LEAST_BITS = 4


class SlotIndex:
    """Maps ids to ``capacity`` slots, with four to eight int32 entries per slot.

    The caller stores the id of each slot, int64 of any stride. At most a quarter of the entries are slots in use.
    Erased entries are reused only after the index has been cleared. Clear and refill it once half of its entries are
    taken.
    """

    def __init__(self, capacity: int, device: torch.device | str) -> None:
        bits = max(_LEAST_BITS, (4 * capacity - 1).bit_length())
        self.entries = torch.empty(1 << bits, dtype=torch.int32, device=device)
        self.occurrences = torch.zeros(capacity, dtype=torch.int32, device=device)
        """All zero between calls."""
        self._probing = {"last": len(self.entries) - 1, "shift": 64 - bits}
        self.clear()

    def clear(self) -> None:
        """Remove all ids."""
        self.entries.fill_(EMPTY.value)
        self._taken = 0

    def has_room(self, number: int) -> bool:
        """Whether ``number`` ids can be inserted. If not, clear the index and insert all ids that are in use."""
        return 2 * (self._taken + number) <= len(self.entries)

    def find(self, wanted: Tensor, ids: Tensor) -> Tensor:
        """Slots of the ids ``wanted``, int64 [n]; -1: no slot. ``ids``: int64 [capacity], the id of each slot."""
        return self._find(wanted, ids, None, counts_occurrences=False)

    def count(self, wanted: Tensor, ids: Tensor, counts: Tensor | None, scores: Tensor, step: int, lfu: bool) -> Tensor:
        """Find slots and update the scores, int64 [capacity], of those that are found for ``step``.

        ``counts``: occurrences of each id of ``wanted``, int64 [n]; None: one each. A repeated id counts each time. The
        scores are those of hstu/parallel/dynamic/slots.py.
        """
        slots = self._find(wanted, ids, counts, counts_occurrences=True)
        _launch(
            settle_scores,
            len(slots),
            slots=slots,
            occurrences=self.occurrences,
            scores=scores,
            step=step,
            stride_scores=scores.stride(0),
            LFU=lfu,
        )
        return slots

    def insert(self, ids: Tensor, slots: Tensor) -> None:
        """Assign ``slots``, int64 [n], to ids, int64 [n], that are distinct and have none. There must be room."""
        self._taken += len(ids)
        self._change(insert_slots, ids, slots)

    def erase(self, ids: Tensor, slots: Tensor) -> None:
        """Remove ``ids``, which have these ``slots``; both int64 [n] and distinct."""
        self._change(erase_slots, ids, slots)

    def _change(self, kernel: Any, ids: Tensor, slots: Tensor) -> None:
        ids, slots = ids.contiguous(), slots.contiguous()
        _launch(kernel, len(ids), ids=ids, slots=slots, index=self.entries, **self._probing)

    def _find(self, wanted: Tensor, ids: Tensor, counts: Tensor | None, counts_occurrences: bool) -> Tensor:
        wanted = wanted.contiguous()
        found = torch.empty_like(wanted)
        _launch(
            find_slots,
            len(wanted),
            wanted=wanted,
            found=found,
            counts=counts,
            occurrences=self.occurrences,
            index=self.entries,
            ids=ids,
            stride_ids=ids.stride(0),
            COUNTS=counts_occurrences,
            **self._probing,
        )
        return found


def _launch(kernel: Any, number: int, **arguments: Any) -> None:
    if number:
        grid = lambda meta: (triton.cdiv(number, meta["BLOCK"]),)  # noqa: E731
        launcher(kernel, grid, _CONFIG)(num_ids=number, **arguments)


@triton.jit
def home_of(ids, shift):
    """Entry where probing for ``ids`` begins: the upper 64 - ``shift`` bits of their SplitMix64 hash."""
    bits = ids.to(tl.uint64, bitcast=True) + 0x9E3779B97F4A7C15
    bits = (bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9
    bits = (bits ^ (bits >> 27)) * 0x94D049BB133111EB
    bits = bits ^ (bits >> 31)
    return (bits >> shift).to(tl.int64)


@triton.jit
def any_of(lanes):
    """Whether at least one position is set."""
    return tl.max(lanes.to(tl.int32), axis=0) > 0


@triton.jit(do_not_specialize=["num_ids", "last", "shift"])
def find_slots(
    wanted, found, counts, occurrences, index, ids, num_ids, last, shift, stride_ids,
    COUNTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """found[i] = slot of wanted[i], or -1; ids[slot · stride_ids] is a slot's id, last + 1 the number of entries.

    COUNTS: occurrences[found[i]] += counts[i], or 1 where ``counts`` is None. Grid: (blocks of wanted,).
    """
    position = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    is_id = position < num_ids
    id = tl.load(wanted + position, mask=is_id, other=0)
    entry = home_of(id, shift)
    slot = tl.full((BLOCK,), EMPTY, tl.int32)
    searching = is_id
    probes = 0
    while any_of(searching) & (probes <= last):
        held = tl.load(index + entry, mask=searching, other=EMPTY)
        is_slot = searching & (held >= 0)
        matches = is_slot & (tl.load(ids + held.to(tl.int64) * stride_ids, mask=is_slot, other=0) == id)
        slot = tl.where(matches, held, slot)
        searching = searching & (held != EMPTY) & (matches == 0)
        entry = (entry + 1) & last
        probes += 1
    tl.store(found + position, slot.to(tl.int64), mask=is_id)
    if COUNTS:
        if counts is None:
            count = tl.full((BLOCK,), 1, tl.int32)
        else:
            count = tl.load(counts + position, mask=is_id, other=0).to(tl.int32)
        tl.atomic_add(occurrences + slot, count, mask=slot >= 0, sem="relaxed")


@triton.jit(do_not_specialize=["num_ids", "step"])
def settle_scores(
    slots, occurrences, scores, num_ids, step, stride_scores, LFU: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Update the scores of ``slots`` (-1: none; repeats allowed) by their occurrences, and reset those to 0.

    If a slot is repeated, the first to fetch its occurrences writes the score. Grid: (blocks of slots,).
    """
    position = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    slot = tl.load(slots + position, mask=position < num_ids, other=-1)
    is_slot = slot >= 0
    has_occurred = is_slot & (tl.load(occurrences + slot, mask=is_slot, other=0) > 0)
    count = tl.atomic_xchg(occurrences + slot, 0, mask=has_occurred, sem="relaxed").to(tl.int64)
    is_first = has_occurred & (count > 0)
    pointers = scores + slot * stride_scores
    score = tl.load(pointers, mask=is_first, other=0)
    now = tl.full((BLOCK,), 0, tl.int64) + step
    if LFU:
        score = (tl.minimum((score >> 32) + count, MAX_COUNT) << 32) + now
    else:
        score = (now << 31) + tl.minimum((score & MAX_COUNT) + count, MAX_COUNT)
    tl.store(pointers, score, mask=is_first)


@triton.jit(do_not_specialize=["num_ids", "last", "shift"])
def insert_slots(ids, slots, index, num_ids, last, shift, BLOCK: tl.constexpr):
    """Insert slots[i] where probing for ids[i] finds it; ids are distinct and new. Grid: (blocks of ids,)."""
    position = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    claiming = position < num_ids
    entry = home_of(tl.load(ids + position, mask=claiming, other=0), shift)
    entry = tl.where(claiming, entry, position & last)
    slot = tl.load(slots + position, mask=claiming, other=0).to(tl.int32)
    probes = 0
    while any_of(claiming) & (probes <= last):
        expected = tl.where(claiming, EMPTY, NO_ENTRY)  # atomic_cas has no mask
        before = tl.atomic_cas(index + entry, expected, slot, sem="relaxed")
        claiming = claiming & (before != EMPTY)
        entry = (entry + 1) & last
        probes += 1


@triton.jit(do_not_specialize=["num_ids", "last", "shift"])
def erase_slots(ids, slots, index, num_ids, last, shift, BLOCK: tl.constexpr):
    """Erase slots[i], which probing for ids[i] finds; all distinct and in the index. Grid: (blocks of ids,)."""
    position = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    searching = position < num_ids
    entry = home_of(tl.load(ids + position, mask=searching, other=0), shift)
    slot = tl.load(slots + position, mask=searching, other=0).to(tl.int32)
    probes = 0
    while any_of(searching) & (probes <= last):
        held = tl.load(index + entry, mask=searching, other=EMPTY)
        matches = searching & (held == slot)
        tl.store(index + entry, tl.full((BLOCK,), ERASED, tl.int32), mask=matches)
        searching = searching & (held != EMPTY) & (matches == 0)
        entry = (entry + 1) & last
        probes += 1
