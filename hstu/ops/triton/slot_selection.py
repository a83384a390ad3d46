"""Kernels that decide who gives way when there are more new ids than unused slots: exact lru and lfu, without the host.

Candidates are the slots whose ids do not occur in the batch, and the new ids ("claims"). As many of them as there are
too many give way: those of the lowest scores, equal scores by hash. A slot that gives way is a victim, a claim that
does is rejected. The kernels find the threshold by radix selection. A candidate has a code that rises with its score:

    lru    last step | bin of the count | upper bits of the hash of the id
    lfu    bin of the count | last step | upper bits of the hash of the id

One launch per digit of the code counts the candidates that share all digits so far with the threshold. Bins of small
counts hold one count each; where the threshold falls into a wider bin, the digits after it are not used. The few
candidates that are left are listed, and one program takes the threshold among them to the last bit. If nobody has to
give way, every kernel ends at once.

Programs [0, slot_programs) look at slots, ``slot_span`` each; the others at claims, ``claim_span`` each.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hstu.ops.triton.slot_kernels import LISTED, SIZE, any_of, count_in, mixed, sum_before

DIGIT_BITS = tl.constexpr(9)
DIGITS = tl.constexpr(512)
EXACT = tl.constexpr(256)
"""Counts below this have a bin of their own; 8 bins divide each power of two above."""
FLOAT_SHIFT = tl.constexpr(20)
"""A float32 keeps three bits of its fraction where its bits are shifted by this."""
FLOAT_EXACT = tl.constexpr((127 + 8) << 3)
"""The shifted bits of 256.0."""

# The state before each digit: four int64.
PREFIX = tl.constexpr(0)
"""The digits of the threshold so far."""
LEFT = tl.constexpr(1)
"""How many of those who share them give way."""
LIVE = tl.constexpr(2)
"""Whether the next digit is needed."""
SHIFT = tl.constexpr(3)
"""Bits of a code below the digits so far."""
STATE = 4


@triton.jit
def candidates_at(index, is_claim, seen, claim_counts, size, bound, step):
    """(count, last step, whether it is a candidate) of slots, or of claims if ``is_claim``, which all lanes share."""
    if is_claim:
        valid = index < bound
        count = tl.load(claim_counts + index, mask=valid, other=0).to(tl.int64)
        last = tl.zeros_like(count) + step
    else:
        words = tl.load(seen + index, mask=index < size, other=0)
        count = count_in(words)
        last = words & 0xFFFFFFFF
        valid = (index < size) & (last != step)
    return count, last, valid


@triton.jit
def id_at(index, is_claim, ids, claim_ids, mask):
    """The ids of candidates."""
    if is_claim:
        id = tl.load(claim_ids + index, mask=mask, other=0)
    else:
        id = tl.load(ids + index, mask=mask, other=0)
    return id


@triton.jit
def code_without_hash(count, last, step_bits, LFU: tl.constexpr):
    """The code of candidates without its last digit, int64."""
    bits = count.to(tl.float32).to(tl.int32, bitcast=True) >> FLOAT_SHIFT
    bin = tl.where(count < EXACT, count, bits.to(tl.int64) - FLOAT_EXACT + EXACT)
    if LFU:
        code = (bin << step_bits) | last
    else:
        code = (last << DIGIT_BITS) | bin
    return code << DIGIT_BITS


@triton.jit
def with_hash(code, needed, index, is_claim, ids, claim_ids):
    """The codes with their last digit where it is ``needed``."""
    if any_of(needed):
        id = id_at(index, is_claim, ids, claim_ids, needed)
        code = tl.where(needed, code | (mixed(id) >> (64 - DIGIT_BITS)).to(tl.int64), code)
    return code


@triton.jit
def state_after(digit_number, states, histograms, num_digits, count_digit, excess):
    """The state before digit ``digit_number``, by the histogram of the digit before it; program 0 stores it."""
    state = states + digit_number * 4
    if digit_number == 0:
        prefix = excess * 0
        left = excess
        live = (excess > 0).to(tl.int64)
        shift = excess * 0 + num_digits * DIGIT_BITS
    else:
        prefix = tl.load(state - 4 + PREFIX)
        left = tl.load(state - 4 + LEFT)
        live = tl.load(state - 4 + LIVE)
        shift = tl.load(state - 4 + SHIFT)
        if live != 0:
            digits = tl.arange(0, DIGITS)
            counted = tl.load(histograms + (digit_number - 1) * DIGITS + digits).to(tl.int64)
            up_to = tl.cumsum(counted, 0)
            decides = (up_to >= left) & (up_to - counted < left)
            digit = tl.sum(tl.where(decides, digits, 0).to(tl.int64))
            left -= tl.sum(tl.where(decides, up_to - counted, 0))
            prefix = (prefix << DIGIT_BITS) | digit
            shift -= DIGIT_BITS
            live = ((digit_number != count_digit + 1) | (digit < EXACT)).to(tl.int64)
    if tl.program_id(0) == 0:
        tl.store(state + PREFIX, prefix)
        tl.store(state + LEFT, left)
        tl.store(state + LIVE, live)
        tl.store(state + SHIFT, shift)
    return prefix, left, live, shift


@triton.jit
def part_of_program(slot_programs, slot_span, claim_span):
    """What this program looks at: (whether claims, its place among the programs that do, the first one, how many)."""
    program = tl.program_id(0)
    is_claim = program >= slot_programs
    span = tl.where(is_claim, claim_span, slot_span)
    own = program - tl.where(is_claim, slot_programs, 0)
    return is_claim, own, own.to(tl.int64) * span, span


@triton.jit
def compared_at(
    index, is_claim, seen, ids, claim_ids, claim_counts, size, bound, step, step_bits, prefix, shift,
    LFU: tl.constexpr,
):  # fmt: skip
    """(count, last step, whether it is below the threshold's digits, whether it has them) of candidates."""
    count, last, valid = candidates_at(index, is_claim, seen, claim_counts, size, bound, step)
    code = code_without_hash(count, last, step_bits, LFU)
    if shift == 0:
        needed = valid & ((code >> DIGIT_BITS) == (prefix >> DIGIT_BITS))
        code = with_hash(code, needed, index, is_claim, ids, claim_ids)
    return count, last, valid & ((code >> shift) < prefix), valid & ((code >> shift) == prefix)


@triton.jit
def excess_of(numbers, claims, capacity):
    """How many candidates give way."""
    return tl.maximum(tl.load(claims) - (capacity - tl.load(numbers + SIZE)), 0)


@triton.jit(
    do_not_specialize=[
        "capacity", "step", "step_bits", "digit_number", "num_digits", "count_digit", "slot_programs", "slot_span",
        "claim_span",
    ]
)  # fmt: skip
def count_digit_values(
    seen, ids, claim_ids, claim_counts, claims, numbers, states, histograms, capacity, step, step_bits, digit_number,
    num_digits, count_digit, slot_programs, slot_span, claim_span, LFU: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Count the values of one digit among the candidates that share all digits before it with the threshold."""
    excess = excess_of(numbers, claims, capacity)
    prefix, _, live, _ = state_after(digit_number, states, histograms, num_digits, count_digit, excess)
    if live == 0:
        return
    is_claim, _, first, span = part_of_program(slot_programs, slot_span, claim_span)
    size, bound = tl.load(numbers + SIZE), tl.load(claims)
    shift = ((num_digits - 1 - digit_number) * DIGIT_BITS).to(tl.int64)
    counted = tl.zeros((DIGITS,), tl.int32)
    for offset in range(0, span, BLOCK):
        index = first + offset + tl.arange(0, BLOCK)
        count, last, valid = candidates_at(index, is_claim, seen, claim_counts, size, bound, step)
        code = code_without_hash(count, last, step_bits, LFU)
        valid = valid & ((code >> (shift + DIGIT_BITS)) == prefix)
        if shift == 0:
            code = with_hash(code, valid, index, is_claim, ids, claim_ids)
        digit = ((code >> shift) & (DIGITS - 1)).to(tl.int32)
        counted += tl.histogram(digit, DIGITS, mask=valid)
    values = tl.arange(0, DIGITS)
    tl.atomic_add(histograms + digit_number * DIGITS + values, counted, mask=counted > 0, sem="relaxed")


@triton.jit(
    do_not_specialize=[
        "capacity", "step", "step_bits", "num_digits", "count_digit", "slot_programs", "slot_span", "claim_span",
    ]
)  # fmt: skip
def list_undecided(
    seen, ids, claim_ids, claim_counts, claims, numbers, states, histograms, listed, sums, capacity, step, step_bits,
    num_digits, count_digit, slot_programs, slot_span, claim_span, LFU: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """sums[p]: those of program p that certainly give way. ``listed``: those that share all digits, in any order.

    A slot is listed by its number, claim j as ``capacity`` + j.
    """
    excess = excess_of(numbers, claims, capacity)
    prefix, _, _, shift = state_after(num_digits, states, histograms, num_digits, count_digit, excess)
    if excess == 0:
        return
    is_claim, _, first, span = part_of_program(slot_programs, slot_span, claim_span)
    size, bound = tl.load(numbers + SIZE), tl.load(claims)
    total = tl.zeros((BLOCK,), tl.int32)
    for offset in range(0, span, BLOCK):
        index = first + offset + tl.arange(0, BLOCK)
        _count, _last, below, undecided = compared_at(
            index, is_claim, seen, ids, claim_ids, claim_counts, size, bound, step, step_bits, prefix, shift, LFU
        )
        total += below.to(tl.int32)
        ones = undecided.to(tl.int32)
        number = tl.sum(ones).to(tl.int64)
        if number > 0:
            place = tl.atomic_add(numbers + LISTED, number, sem="relaxed") + tl.cumsum(ones, 0) - ones
            entry = tl.where(is_claim, capacity + index, index)
            tl.store(listed + place, entry.to(tl.int32), mask=undecided)
    tl.store(sums + tl.program_id(0), tl.sum(total).to(tl.int64))


@triton.jit
def inverted(bits):
    """~bits of uint64, which the interpreter of Triton 3.6 has for signed numbers only."""
    return (~bits.to(tl.int64, bitcast=True)).to(tl.uint64, bitcast=True)


@triton.jit
def listed_at(place, number, listed, seen, ids, claim_ids, claim_counts, capacity, step, LFU: tl.constexpr):
    """(entry, score, hash, whether it is one) of listed candidates; score and hash as uint64."""
    valid = place < number
    entry = tl.load(listed + place, mask=valid, other=0).to(tl.int64)
    is_slot = valid & (entry < capacity)
    is_claim = valid & (entry >= capacity)
    words = tl.load(seen + entry, mask=is_slot, other=0)
    count, last = count_in(words), words & 0xFFFFFFFF
    count = tl.where(is_claim, tl.load(claim_counts + entry - capacity, mask=is_claim, other=0).to(tl.int64), count)
    last = tl.where(is_claim, step, last)
    id = tl.load(ids + entry, mask=is_slot, other=0)
    id = tl.where(is_claim, tl.load(claim_ids + entry - capacity, mask=is_claim, other=0), id)
    score = score_of(count, last, LFU)
    return entry, score.to(tl.uint64, bitcast=True), mixed(id), valid


@triton.jit
def score_of(count, last, LFU: tl.constexpr):
    """The score of hstu/parallel/dynamic/slots.py."""
    if LFU:
        score = (count << 32) + last
    else:
        score = (last << 31) + count
    return score


@triton.jit
def is_beaten(score, hash, highest_score, highest_hash):
    """Whether candidates are at or below the threshold."""
    return (score < highest_score) | ((score == highest_score) & (hash <= highest_hash))


@triton.jit(do_not_specialize=["capacity", "step", "slot_programs", "slot_span", "claim_span"])
def find_threshold(
    seen, ids, claim_ids, claim_counts, claims, numbers, state, listed, sums, threshold, capacity, step,
    slot_programs, slot_span, claim_span, LFU: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """threshold: score and hash of the last candidate that gives way; adds the listed ones to ``sums``. One program."""
    left = tl.load(state + LEFT)
    if left == 0:
        return
    number = tl.load(numbers + LISTED)
    sharing = number  # candidates that share the digits so far, of 8 bits, of score and hash
    score_digits, hash_digits = number.to(tl.uint64) * 0, number.to(tl.uint64) * 0
    score_mask, hash_mask = number.to(tl.uint64) * 0, number.to(tl.uint64) * 0
    digit_number = number.to(tl.int32) * 0
    values = tl.arange(0, 256)
    while (digit_number < 16) & (sharing != left):
        of_score = digit_number < 8
        shift = (56 - 8 * (digit_number % 8)).to(tl.uint64)
        counted = tl.zeros((256,), tl.int32)
        for offset in range(0, number, BLOCK):
            _, score, hash, valid = listed_at(
                offset + tl.arange(0, BLOCK), number, listed, seen, ids, claim_ids, claim_counts, capacity, step, LFU
            )
            valid = valid & (((score ^ score_digits) & score_mask) == 0) & (((hash ^ hash_digits) & hash_mask) == 0)
            digit = (tl.where(of_score, score, hash) >> shift) & 255
            counted += tl.histogram(digit.to(tl.int32), 256, mask=valid)
        up_to = tl.cumsum(counted.to(tl.int64), 0)
        below = up_to - counted
        decides = (up_to >= left) & (below < left)
        digit = tl.sum(tl.where(decides, values, 0).to(tl.uint64)) << shift
        mask = (tl.full((), 255, tl.uint64)) << shift
        sharing = tl.sum(tl.where(decides, counted, 0).to(tl.int64))
        left -= tl.sum(tl.where(decides, below, 0))
        score_digits |= tl.where(of_score, digit, 0)
        score_mask |= tl.where(of_score, mask, 0)
        hash_digits |= tl.where(of_score, 0, digit)
        hash_mask |= tl.where(of_score, 0, mask)
        digit_number += 1
    highest_score, highest_hash = score_digits | inverted(score_mask), hash_digits | inverted(hash_mask)
    tl.store(threshold, highest_score.to(tl.int64, bitcast=True))
    tl.store(threshold + 1, highest_hash.to(tl.int64, bitcast=True))
    for offset in range(0, number, BLOCK):
        entry, score, hash, valid = listed_at(
            offset + tl.arange(0, BLOCK), number, listed, seen, ids, claim_ids, claim_counts, capacity, step, LFU
        )
        beaten = valid & is_beaten(score, hash, highest_score, highest_hash)
        of_claim = slot_programs + (entry - capacity) // claim_span
        program = tl.where(entry < capacity, entry // slot_span, of_claim)
        tl.atomic_add(sums + program, tl.full((BLOCK,), 1, tl.int64), mask=beaten, sem="relaxed")


@triton.jit(
    do_not_specialize=["capacity", "step", "step_bits", "slot_programs", "slot_span", "claim_span"]
)  # fmt: skip
def list_beaten(
    seen, ids, claim_ids, claim_counts, claims, numbers, state, sums, threshold, victims, ranks, capacity, step,
    step_bits, slot_programs, slot_span, claim_span, LFU: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """``victims``: the slots that give way, ascending. ranks[j]: the place of claim j among those that stay, or -1."""
    if tl.load(state + LEFT) == 0:
        return
    prefix, shift = tl.load(state + PREFIX), tl.load(state + SHIFT)
    highest_score = tl.load(threshold).to(tl.uint64, bitcast=True)
    highest_hash = tl.load(threshold + 1).to(tl.uint64, bitcast=True)
    is_claim, own, first, span = part_of_program(slot_programs, slot_span, claim_span)
    before = sum_before(sums + tl.program_id(0) - own, own)
    size, bound = tl.load(numbers + SIZE), tl.load(claims)
    for offset in range(0, span, BLOCK):
        index = first + offset + tl.arange(0, BLOCK)
        count, last, beaten, undecided = compared_at(
            index, is_claim, seen, ids, claim_ids, claim_counts, size, bound, step, step_bits, prefix, shift, LFU
        )
        if any_of(undecided):
            id = id_at(index, is_claim, ids, claim_ids, undecided)
            score = score_of(count, last, LFU).to(tl.uint64, bitcast=True)
            beaten = beaten | (undecided & is_beaten(score, mixed(id), highest_score, highest_hash))
        ones = beaten.to(tl.int32)
        place = before + tl.cumsum(ones, 0) - ones
        if is_claim:
            tl.store(ranks + index, tl.where(beaten, -1, index - place).to(tl.int32), mask=index < bound)
        else:
            tl.store(victims + place, index.to(tl.int32), mask=beaten)
        before += tl.sum(ones)
