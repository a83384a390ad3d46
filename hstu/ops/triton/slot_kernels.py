"""Kernels that find the slots of a batch of ids and give slots to new ids. See slots.py for what they compute together.

Their results do not depend on the order in which programs run. Where several lanes write one address, they write the
same value, or add to it, or only the position of the value depends on the order. No kernel waits for another program,
and none reads what another program of the same launch may write, except through atomics.
"""

from __future__ import annotations

import triton
import triton.language as tl

EMPTY = tl.constexpr(-1)
NO_ENTRY = tl.constexpr(-3)
"""A value that no entry has, so that a compare-and-swap that expects it always fails."""
NO_POSITION = tl.constexpr(2**31 - 1)
MAX_COUNT = tl.constexpr(2**31 - 1)
MOST_PROGRAMS = tl.constexpr(1024)
"""Most programs of a kernel whose programs sum up what the ones before them have found."""

# Numbers on the device: the first two are kept, the others are those of one batch.
SIZE = tl.constexpr(0)
TAKEN = tl.constexpr(1)
"""Entries of the index that are not EMPTY."""
ABSENT = tl.constexpr(2)
"""Positions of the batch whose id has no slot."""
DISTINCT = tl.constexpr(3)
"""Distinct ids among them."""
ADMITTED = tl.constexpr(4)
"""How many of these are not kept out by admission_threshold."""
LISTED = tl.constexpr(5)
"""Ids in the group that the last digit leaves undecided (slot_selection.py)."""
NUMBERS = 6

# Counters of one batch, in the order of hstu.parallel.dynamic.slots.Counters.
LOOKUPS = tl.constexpr(0)
HITS = tl.constexpr(1)
WAITING = tl.constexpr(2)
REJECTIONS = tl.constexpr(3)
INSERTIONS = tl.constexpr(4)
EVICTIONS = tl.constexpr(5)
COUNTERS = 6


@triton.jit
def mixed(ids):
    """The SplitMix64 hash of int64 ids, uint64."""
    bits = ids.to(tl.uint64, bitcast=True) + 0x9E3779B97F4A7C15
    bits = (bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9
    bits = (bits ^ (bits >> 27)) * 0x94D049BB133111EB
    return bits ^ (bits >> 31)


@triton.jit
def home_of(ids, shift):
    """Entry where probing for ``ids`` begins: the upper 64 - ``shift`` bits of their hash."""
    return (mixed(ids) >> shift).to(tl.int64)


@triton.jit
def any_of(lanes):
    """Whether at least one position is set."""
    return tl.max(lanes.to(tl.int32), axis=0) > 0


@triton.jit
def sum_before(sums, program):
    """Sum of the first ``program`` of ``sums``."""
    others = tl.arange(0, MOST_PROGRAMS)
    return tl.sum(tl.load(sums + others, mask=others < program, other=0))


@triton.jit
def count_in(words):
    """The count of words that hold count · 2^32 + last step. A batch may add to a count that is the largest."""
    count = (words >> 32) & 0xFFFFFFFF
    return tl.minimum(count, MAX_COUNT)


@triton.jit
def search(id, is_id, index, ids, last, shift):
    """The slot of each ``id``, int32; EMPTY where it has none."""
    entry = home_of(id, shift)
    slot = tl.full(id.shape, EMPTY, tl.int32)
    searching = is_id
    probes = 0
    while any_of(searching) & (probes <= last):
        held = tl.load(index + entry, mask=searching, other=EMPTY)
        is_slot = searching & (held >= 0)
        matches = is_slot & (tl.load(ids + held.to(tl.int64), mask=is_slot, other=0) == id)
        slot = tl.where(matches, held, slot)
        searching = searching & (held != EMPTY) & (matches == 0)
        entry = (entry + 1) & last
        probes += 1
    return slot


@triton.jit(do_not_specialize=["num_ids", "last", "shift"])
def find_slots(wanted, slots, index, ids, num_ids, last, shift, BLOCK: tl.constexpr):
    """slots[i] = slot of wanted[i], or -1; last + 1 is the number of entries. Grid: (blocks of wanted,)."""
    position = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    is_id = position < num_ids
    id = tl.load(wanted + position, mask=is_id, other=0)
    tl.store(slots + position, search(id, is_id, index, ids, last, shift).to(tl.int64), mask=is_id)


@triton.jit(do_not_specialize=["num_ids", "last", "shift", "batch_last", "batch_shift", "step"])
def find_and_count(
    wanted, weights, limit, slots, index, ids, halves, holders, firsts, totals, entries, numbers,
    num_ids, last, shift, batch_last, batch_shift, step, BLOCK: tl.constexpr,
):  # fmt: skip
    """Find slots, count the occurrences of ids that have one, and gather those of the others by id.

    ``weights``: occurrences of each position; None: 1. ``limit``: points to the number of ids; None: ``num_ids``.
    ``halves``: int32 [2 · capacity]: last step and count of each slot. Each id without a slot gets an entry of a hash
    table that is empty before: holders[entry] is one of its positions, firsts[entry] the first, totals[entry] its
    occurrences; entries[i] is the entry of position i. Grid: (blocks of wanted,).
    """
    position = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    is_id = position < (num_ids if limit is None else tl.load(limit))
    id = tl.load(wanted + position, mask=is_id, other=0)
    slot = search(id, is_id, index, ids, last, shift).to(tl.int64)
    tl.store(slots + position, slot, mask=is_id)
    if weights is None:
        weight = tl.full((BLOCK,), 1, tl.int32)
    else:
        weight = tl.load(weights + position, mask=is_id, other=0)
    found = is_id & (slot >= 0)
    pointers = halves + 2 * slot
    before = tl.load(pointers + 1, mask=found, other=0)
    grows = found & (before >= 0) & (before < MAX_COUNT)
    tl.atomic_add(pointers + 1, weight, mask=grows, sem="relaxed")
    tl.store(pointers, tl.zeros((BLOCK,), tl.int32) + step.to(tl.int32), mask=found)

    absent = is_id & (slot < 0)
    if any_of(absent):
        tl.atomic_add(numbers + ABSENT, tl.sum(absent.to(tl.int64)), sem="relaxed")
        own = position.to(tl.int32)
        entry = home_of(id, batch_shift)
        at = entry
        searching = absent
        while any_of(searching):
            expected = tl.where(searching, EMPTY, NO_ENTRY)  # atomic_cas has no mask
            before_own = tl.atomic_cas(holders + entry, expected, own, sem="relaxed")
            holder = tl.where(before_own == EMPTY, own, before_own)
            matches = searching & (tl.load(wanted + holder, mask=searching, other=0) == id)
            at = tl.where(matches, entry, at)
            searching = searching & (matches == 0)
            entry = (entry + 1) & batch_last
        tl.store(entries + position, at.to(tl.int32), mask=absent)
        tl.atomic_min(firsts + at, own, mask=absent, sem="relaxed")
        tl.atomic_add(totals + at, weight, mask=absent, sem="relaxed")


@triton.jit
def first_of_absent(position, bound, slots, entries, firsts):
    """Whether a position is the first of an id without a slot, and the entry of that id."""
    absent = tl.load(slots + position, mask=position < bound, other=0) < 0
    entry = tl.load(entries + position, mask=absent, other=0)
    return absent & (tl.load(firsts + entry, mask=absent, other=EMPTY) == position), entry


@triton.jit(do_not_specialize=["num_ids", "span"])
def count_new(slots, entries, firsts, limit, numbers, sums, num_ids, span, BLOCK: tl.constexpr):
    """sums[p] = new distinct ids that occur first in the p-th span of positions. Grid: (spans,)."""
    if tl.load(numbers + ABSENT) == 0:
        return
    program = tl.program_id(0)
    bound = num_ids if limit is None else tl.load(limit)
    total = tl.zeros((BLOCK,), tl.int32)
    for offset in range(0, span, BLOCK):
        position = program.to(tl.int64) * span + offset + tl.arange(0, BLOCK)
        is_first, _ = first_of_absent(position, bound, slots, entries, firsts)
        total += is_first.to(tl.int32)
    tl.store(sums + program, tl.sum(total).to(tl.int64))


@triton.jit(do_not_specialize=["num_ids", "span"])
def list_new(
    wanted, slots, entries, firsts, totals, limit, numbers, sums, new_ids, new_counts, listed_at, num_ids, span,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """List the distinct ids without a slot by first occurrence: new_ids, new_counts (int32); sets DISTINCT.

    listed_at[entry]: where the id of an entry is in the list. Grid: (spans of positions,), those of ``count_new``.
    """
    if tl.load(numbers + ABSENT) == 0:
        return
    program = tl.program_id(0)
    bound = num_ids if limit is None else tl.load(limit)
    number = sum_before(sums, program)
    for offset in range(0, span, BLOCK):
        position = program.to(tl.int64) * span + offset + tl.arange(0, BLOCK)
        is_first, entry = first_of_absent(position, bound, slots, entries, firsts)
        ones = is_first.to(tl.int32)
        place = number + tl.cumsum(ones, 0) - ones
        tl.store(new_ids + place, tl.load(wanted + position, mask=is_first, other=0), mask=is_first)
        tl.store(new_counts + place, tl.load(totals + entry, mask=is_first, other=0), mask=is_first)
        tl.store(listed_at + entry, place.to(tl.int32), mask=is_first)
        number += tl.sum(ones)
    if program == tl.num_programs(0) - 1:
        tl.store(numbers + DISTINCT, number)


@triton.jit
def is_admitted(place, bound, sighted_slots, sighted, new_counts, threshold):
    """Whether listed ids were sighted ``threshold`` times, and how often they occur in this batch."""
    is_new = place < bound
    count = tl.load(new_counts + place, mask=is_new, other=0)
    slot = tl.load(sighted_slots + place, mask=is_new, other=-1)
    words = tl.load(sighted + slot, mask=is_new & (slot >= 0), other=0)
    sightings = tl.where(slot >= 0, count_in(words), count.to(tl.int64))
    return is_new & (sightings >= threshold), is_new, count


@triton.jit(do_not_specialize=["span", "threshold"])
def count_admitted(sighted_slots, sighted, new_counts, numbers, sums, span, threshold, BLOCK: tl.constexpr):
    """sums[p] = listed ids of the p-th span that are admitted. ``sighted``: words by slot. Grid: (spans,)."""
    bound = tl.load(numbers + DISTINCT)
    if bound == 0:
        return
    program = tl.program_id(0)
    total = tl.zeros((BLOCK,), tl.int32)
    for offset in range(0, span, BLOCK):
        place = program.to(tl.int64) * span + offset + tl.arange(0, BLOCK)
        admitted, _, _ = is_admitted(place, bound, sighted_slots, sighted, new_counts, threshold)
        total += admitted.to(tl.int32)
    tl.store(sums + program, tl.sum(total).to(tl.int64))


@triton.jit(do_not_specialize=["span", "threshold"])
def list_admitted(
    sighted_slots, sighted, new_ids, new_counts, numbers, counters, sums, admitted_ids, admitted_counts, admitted_at,
    span, threshold, BLOCK: tl.constexpr,
):  # fmt: skip
    """List the admitted ids in the order of the new ones, and their counts; sets ADMITTED, adds to WAITING.

    admitted_at[place]: where a new id is in the list of the admitted, or -1. Grid: (spans,), those of
    ``count_admitted``.
    """
    bound = tl.load(numbers + DISTINCT)
    if bound == 0:
        return
    program = tl.program_id(0)
    number = sum_before(sums, program)
    waiting = tl.zeros((BLOCK,), tl.int32)
    for offset in range(0, span, BLOCK):
        place = program.to(tl.int64) * span + offset + tl.arange(0, BLOCK)
        admitted, is_new, count = is_admitted(place, bound, sighted_slots, sighted, new_counts, threshold)
        ones = admitted.to(tl.int32)
        to = number + tl.cumsum(ones, 0) - ones
        tl.store(admitted_ids + to, tl.load(new_ids + place, mask=admitted, other=0), mask=admitted)
        tl.store(admitted_counts + to, count, mask=admitted)
        tl.store(admitted_at + place, tl.where(admitted, to, -1).to(tl.int32), mask=is_new)
        waiting += tl.where(is_new & (admitted == 0), count, 0)
        number += tl.sum(ones)
    tl.atomic_add(counters + WAITING, tl.sum(waiting).to(tl.int64), sem="relaxed")
    if program == tl.num_programs(0) - 1:
        tl.store(numbers + ADMITTED, number)


@triton.jit(do_not_specialize=["capacity", "step"])
def place_new(
    claim_ids, claim_counts, claims, ranks, victims, ids, seen, slot_of, new_slots, new_ids, evicted_ids, numbers,
    counters, capacity, step, SELECTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Give slots to the claims that have a rank: unused ones first, then those of the victims.

    ``claims`` points to the number of claims. slot_of[j]: the slot of a claim, or -1. Grid: (blocks of claims,).
    SELECTS: unused slots may run out, and ``ranks`` and ``victims`` say what happens then.
    """
    bound = tl.load(claims)
    first = tl.program_id(0).to(tl.int64) * BLOCK
    if first >= bound:
        return
    claim = first + tl.arange(0, BLOCK)
    is_claim = claim < bound
    size = tl.load(numbers + SIZE)
    unused = capacity - size
    rank = claim
    if SELECTS:  # noqa: SIM102 - a constant of the kernel, and a number
        if bound > unused:
            rank = tl.load(ranks + claim, mask=is_claim, other=-1).to(tl.int64)
    placed = is_claim & (rank >= 0)
    replaces = placed & (rank >= unused)
    slot = size + rank
    if SELECTS:
        slot = tl.where(replaces, tl.load(victims + rank - unused, mask=replaces, other=0), slot)
    count = tl.load(claim_counts + claim, mask=is_claim, other=0).to(tl.int64)
    id = tl.load(claim_ids + claim, mask=placed, other=0)
    evicted = tl.load(ids + slot, mask=replaces, other=0)
    tl.store(evicted_ids + rank - unused, evicted, mask=replaces)
    tl.store(ids + slot, id, mask=placed)
    tl.store(seen + slot, (count << 32) + step, mask=placed)
    tl.store(new_slots + rank, slot, mask=placed)
    tl.store(new_ids + rank, id, mask=placed)
    tl.store(slot_of + claim, tl.where(placed, slot, -1).to(tl.int32), mask=is_claim)
    tl.atomic_add(counters + INSERTIONS, tl.sum(placed.to(tl.int64)), sem="relaxed")
    tl.atomic_add(counters + EVICTIONS, tl.sum(replaces.to(tl.int64)), sem="relaxed")
    tl.atomic_add(counters + REJECTIONS, tl.sum(tl.where(is_claim & (rank < 0), count, 0)), sem="relaxed")


@triton.jit
def is_full(numbers, counters, last):
    """Whether more than half of the entries would be taken after the insertions of this batch."""
    return 2 * (tl.load(numbers + TAKEN) + tl.load(counters + INSERTIONS)) > last + 1


@triton.jit(do_not_specialize=["last", "span"])
def clear_full(index, numbers, counters, last, span, BLOCK: tl.constexpr):
    """Empty the index if it is full. Grid: (spans of entries,)."""
    if is_full(numbers, counters, last):
        for offset in range(0, span, BLOCK):
            entry = tl.program_id(0).to(tl.int64) * span + offset + tl.arange(0, BLOCK)
            tl.store(index + entry, tl.full((BLOCK,), EMPTY, tl.int32), mask=entry <= last)


@triton.jit(do_not_specialize=["last", "shift", "span"])
def insert_new(new_slots, ids, index, numbers, counters, last, shift, span, BLOCK: tl.constexpr):
    """Insert the new slots into the index, or all slots if it was full. Grid: (spans of slots,).

    The entries of a slot under former ids stay. A search passes over them, because the id of the slot differs.
    """
    inserted = tl.load(counters + INSERTIONS)
    refills = is_full(numbers, counters, last)
    bound = inserted
    if refills:
        bound = tl.load(numbers + SIZE) + inserted - tl.load(counters + EVICTIONS)
    first = tl.program_id(0).to(tl.int64) * span
    if first >= bound:
        return
    for offset in range(0, span, BLOCK):
        place = first + offset + tl.arange(0, BLOCK)
        claiming = place < bound
        slot = place
        if refills == 0:
            slot = tl.load(new_slots + place, mask=claiming, other=0)
        entry = home_of(tl.load(ids + slot, mask=claiming, other=0), shift)
        probes = 0
        while any_of(claiming) & (probes <= last):
            expected = tl.where(claiming, EMPTY, NO_ENTRY)  # atomic_cas has no mask
            before = tl.atomic_cas(index + entry, expected, slot.to(tl.int32), sem="relaxed")
            claiming = claiming & (before != EMPTY)
            entry = (entry + 1) & last
            probes += 1


@triton.jit(do_not_specialize=["num_ids", "last"])
def answer(
    slots, entries, listed_at, admitted_at, slot_of, holders, firsts, totals, limit, numbers, counters, num_ids, last,
    ADMISSION: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the slots of new ids to their positions, empty the hash table of the batch, and settle the numbers.

    Grid: (blocks of positions,).
    """
    program = tl.program_id(0)
    bound = num_ids if limit is None else tl.load(limit)
    absent_positions = tl.load(numbers + ABSENT)
    if program == 0:
        inserted, evicted = tl.load(counters + INSERTIONS), tl.load(counters + EVICTIONS)
        size = tl.load(numbers + SIZE) + inserted - evicted
        taken = tl.where(is_full(numbers, counters, last), size, tl.load(numbers + TAKEN) + inserted)
        tl.debug_barrier()  # all threads have read before one writes
        tl.store(numbers + SIZE, size)
        tl.store(numbers + TAKEN, taken)
        tl.store(counters + LOOKUPS, bound.to(tl.int64))
        tl.store(counters + HITS, bound.to(tl.int64) - absent_positions)
    if absent_positions == 0:
        return
    position = program.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    absent = tl.load(slots + position, mask=position < bound, other=0) < 0
    entry = tl.load(entries + position, mask=absent, other=0)
    claim = tl.load(listed_at + entry, mask=absent, other=0)
    if ADMISSION:
        claim = tl.load(admitted_at + claim, mask=absent, other=-1)
    slot = tl.load(slot_of + claim, mask=absent & (claim >= 0), other=-1)
    tl.store(slots + position, slot.to(tl.int64), mask=absent)
    tl.store(holders + entry, tl.full((BLOCK,), EMPTY, tl.int32), mask=absent)
    tl.store(firsts + entry, tl.full((BLOCK,), NO_POSITION, tl.int32), mask=absent)
    tl.store(totals + entry, tl.zeros((BLOCK,), tl.int32), mask=absent)
