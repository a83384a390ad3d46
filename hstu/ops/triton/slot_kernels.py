"""Kernels of a hash table in GPU memory: open addressing with linear probing. See slots.py, which launches them.

An entry of ``index`` is a slot, EMPTY or ERASED; its id is that of the slot, wherever the caller keeps those, so that
every int64 is an id like any other. Probing ends at an EMPTY entry, and after as many steps as there are entries. No
kernel both looks for ids and inserts them, so atomics need order nothing but their own address (sem="relaxed").
"""

from __future__ import annotations

import triton
import triton.language as tl

EMPTY = tl.constexpr(-1)
ERASED = tl.constexpr(-2)
NO_ENTRY = tl.constexpr(-3)
"""What no entry ever is: a claim that expects it fails."""
MAX_COUNT = tl.constexpr(2**31 - 1)


@triton.jit
def home_of(ids, shift):
    """Where probing for ``ids`` begins: the upper 64 - ``shift`` bits of their SplitMix64."""
    bits = ids.to(tl.uint64, bitcast=True) + 0x9E3779B97F4A7C15
    bits = (bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9
    bits = (bits ^ (bits >> 27)) * 0x94D049BB133111EB
    bits = bits ^ (bits >> 31)
    return (bits >> shift).to(tl.int64)


@triton.jit
def any_of(lanes):
    """Whether one lane at least is set."""
    return tl.max(lanes.to(tl.int32), axis=0) > 0


@triton.jit(do_not_specialize=["num_ids", "last", "shift"])
def find_slots(
    wanted, found, counts, occurrences, index, ids, num_ids, last, shift, stride_ids,
    COUNTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """found[i] = slot of wanted[i], or -1; ids[slot · stride_ids] is a slot's id, last + 1 the number of entries.

    COUNTS: occurrences[found[i]] += counts[i], or 1 where ``counts`` is None. Grid: (blocks of wanted,).
    """
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    is_id = places < num_ids
    id = tl.load(wanted + places, mask=is_id, other=0)
    entry = home_of(id, shift)
    slot = tl.full((BLOCK,), EMPTY, tl.int32)
    searching = is_id
    probes = 0
    while any_of(searching) & (probes <= last):
        held = tl.load(index + entry, mask=searching, other=EMPTY)
        is_slot = searching & (held >= 0)
        is_it = is_slot & (tl.load(ids + held.to(tl.int64) * stride_ids, mask=is_slot, other=0) == id)
        slot = tl.where(is_it, held, slot)
        searching = searching & (held != EMPTY) & (is_it == 0)
        entry = (entry + 1) & last
        probes += 1
    tl.store(found + places, slot.to(tl.int64), mask=is_id)
    if COUNTS:
        if counts is None:
            count = tl.full((BLOCK,), 1, tl.int32)
        else:
            count = tl.load(counts + places, mask=is_id, other=0).to(tl.int32)
        tl.atomic_add(occurrences + slot, count, mask=slot >= 0, sem="relaxed")


@triton.jit(do_not_specialize=["num_ids", "step"])
def settle_scores(
    slots, occurrences, scores, num_ids, step, stride_scores, LFU: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Scores of ``slots`` (-1: none; repeats allowed) after their occurrences at ``step``; those are set back to 0.

    Of several programs that have a slot one takes its occurrences. Grid: (blocks of slots,).
    """
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    slot = tl.load(slots + places, mask=places < num_ids, other=-1)
    is_slot = slot >= 0
    is_due = is_slot & (tl.load(occurrences + slot, mask=is_slot, other=0) > 0)
    count = tl.atomic_xchg(occurrences + slot, 0, mask=is_due, sem="relaxed").to(tl.int64)
    is_mine = is_due & (count > 0)
    pointers = scores + slot * stride_scores
    score = tl.load(pointers, mask=is_mine, other=0)
    now = tl.full((BLOCK,), 0, tl.int64) + step
    if LFU:
        score = (tl.minimum((score >> 32) + count, MAX_COUNT) << 32) + now
    else:
        score = (now << 31) + tl.minimum((score & MAX_COUNT) + count, MAX_COUNT)
    tl.store(pointers, score, mask=is_mine)


@triton.jit(do_not_specialize=["num_ids", "last", "shift"])
def insert_slots(ids, slots, index, num_ids, last, shift, BLOCK: tl.constexpr):
    """Put slots[i] where ids[i] is looked for; ids are distinct and not in the index. Grid: (blocks of ids,)."""
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    claiming = places < num_ids
    entry = home_of(tl.load(ids + places, mask=claiming, other=0), shift)
    entry = tl.where(claiming, entry, places & last)
    slot = tl.load(slots + places, mask=claiming, other=0).to(tl.int32)
    probes = 0
    while any_of(claiming) & (probes <= last):
        expected = tl.where(claiming, EMPTY, NO_ENTRY)  # there are no masked claims
        before = tl.atomic_cas(index + entry, expected, slot, sem="relaxed")
        claiming = claiming & (before != EMPTY)
        entry = (entry + 1) & last
        probes += 1


@triton.jit(do_not_specialize=["num_ids", "last", "shift"])
def erase_slots(ids, slots, index, num_ids, last, shift, BLOCK: tl.constexpr):
    """Forget slots[i], which is where ids[i] is looked for; both distinct, in the index. Grid: (blocks of ids,)."""
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    searching = places < num_ids
    entry = home_of(tl.load(ids + places, mask=searching, other=0), shift)
    slot = tl.load(slots + places, mask=searching, other=0).to(tl.int32)
    probes = 0
    while any_of(searching) & (probes <= last):
        held = tl.load(index + entry, mask=searching, other=EMPTY)
        is_it = searching & (held == slot)
        tl.store(index + entry, tl.full((BLOCK,), ERASED, tl.int32), mask=is_it)
        searching = searching & (held != EMPTY) & (is_it == 0)
        entry = (entry + 1) & last
        probes += 1
