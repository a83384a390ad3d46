"""Triton kernels of dynamic tables: find slots in GPU memory, and write the first values of new rows.

The host never waits for the device: it launches each kernel for the most that a batch can need.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hstu.ops.triton.launch import launcher

EMPTY = tl.constexpr(-1)
NO_ENTRY = tl.constexpr(-3)
"""A value that no entry has: a compare-and-swap that expects it always fails."""
# One warp per program, so that no warp waits for the longest search of another.
_SEARCH = [triton.Config({"BLOCK": 64}, num_warps=1, num_stages=1)]
_CLEAR = [triton.Config({"BLOCK": 512}, num_warps=4, num_stages=1)]
_START = [triton.Config({"BLOCK": 16, "COLUMNS": 64}, num_warps=4, num_stages=1)]
_MOST_PROGRAMS = 2048
_LEAST_BITS = 4


class SlotIndex:
    """Hash table from keys to slots, with linear probing and four to eight int32 entries per slot.

    An entry is a slot or EMPTY. Keys are stored by slot, so every int64 is a valid key. When a slot changes its key,
    its old entry stays and no longer matches. Once half of the entries are taken, all are emptied and refilled.
    """

    def __init__(self, keys: Tensor) -> None:
        """``keys``: int64 [capacity], live: the key of each slot, a hash with evenly distributed upper bits."""
        bits = max(_LEAST_BITS, (4 * len(keys) - 1).bit_length())
        self.keys = keys
        self.entries = torch.full((1 << bits,), EMPTY.value, dtype=torch.int32, device=keys.device)
        self.taken = torch.zeros(1, dtype=torch.int64, device=keys.device)
        """Number of entries that are not EMPTY."""
        self._shared = {"entries": self.entries, "keys": keys, "last": len(self.entries) - 1, "shift": 64 - bits}

    def find(self, wanted: Tensor) -> Tensor:
        """Slots of the keys ``wanted``, int64 [n]; -1 for keys without a slot."""
        wanted = wanted.contiguous()
        slots = torch.empty_like(wanted)
        _launch(find_slots, len(wanted), _SEARCH, wanted=wanted, slots=slots, number=len(wanted), **self._shared)
        return slots

    def insert(self, slots: Tensor, size: Tensor) -> None:
        """Insert ``slots``, int64 [n], whose keys changed; skip negative slots. ``size``: int64 [1], slots in use."""
        slots = slots.contiguous()
        self.taken += (slots >= 0).sum()
        is_full = 2 * self.taken > len(self.entries)
        most = max(len(slots), len(self.keys))
        _launch(clear, len(self.entries), _CLEAR, entries=self.entries, is_full=is_full, last=self._shared["last"])
        _launch(insert_slots, most, _SEARCH, slots=slots, is_full=is_full, size=size, number=len(slots), **self._shared)
        self.taken = torch.where(is_full, size, self.taken)


def start_rows(
    target: Tensor,
    rows: Tensor,
    number: Tensor,
    ids: Tensor | None = None,
    quantiles: Tensor | None = None,
    *,
    first_row: int = 0,
    columns: int | None = None,
    table_key: int = 0,
    init_std: float = 0.0,
) -> None:
    """Set target[rows[i] - first_row] for i below ``number`` to its initial row, or to 0 without ``ids``.

    ``target``: float32 [R, columns or more], or [R]. ``rows``: int64 or int32 [n]; rows outside ``target`` are skipped.
    ``number``: int64 [1]. ``quantiles``, ``table_key`` and ``init_std``: see ``initial_rows`` in
    hstu/parallel/dynamic/hashing.py, which defines the values.
    """
    matrix = target.unsqueeze(1) if target.dim() == 1 else target
    _launch(
        *(write_first_values, len(rows), _START),
        target=matrix,
        rows=rows,
        ids=ids,
        quantiles=quantiles,
        number=number,
        first_row=first_row,
        num_rows=len(matrix),
        columns=matrix.shape[1] if columns is None else columns,
        stride=matrix.stride(0),
        table_key=table_key,
        init_std=init_std,
    )


def _launch(kernel: Any, number: int, configs: list[triton.Config], /, **arguments: Any) -> None:
    if number:
        grid = lambda meta: (min(_MOST_PROGRAMS, triton.cdiv(number, meta["BLOCK"])),)  # noqa: E731
        launcher(kernel, grid, configs)(**arguments)


@triton.jit
def any_of(lanes):
    """Whether any lane is set."""
    return tl.max(lanes.to(tl.int32), axis=0) > 0


@triton.jit
def home_of(key, shift):
    """Entry at which probing for a key begins: its upper 64 - ``shift`` bits."""
    return (key.to(tl.uint64, bitcast=True) >> shift).to(tl.int64)


@triton.jit(do_not_specialize=["number", "last", "shift"])
def find_slots(wanted, slots, entries, keys, number, last, shift, BLOCK: tl.constexpr):
    """slots[i] = slot of wanted[i], or -1; last + 1 is the number of entries. Grid: any."""
    for block in range(tl.program_id(0), tl.cdiv(number, BLOCK), tl.num_programs(0)):
        index = tl.cast(block, tl.int64) * BLOCK + tl.arange(0, BLOCK)
        searching = index < number
        key = tl.load(wanted + index, mask=searching, other=0)
        entry = home_of(key, shift)
        slot = tl.full((BLOCK,), EMPTY, tl.int32)
        probes = 0
        while any_of(searching) & (probes <= last):
            held = tl.load(entries + entry, mask=searching, other=EMPTY)
            is_slot = searching & (held >= 0)
            matches = is_slot & (tl.load(keys + held.to(tl.int64), mask=is_slot, other=0) == key)
            slot = tl.where(matches, held, slot)
            searching = searching & (held != EMPTY) & (matches == 0)
            entry = (entry + 1) & last
            probes += 1
        tl.store(slots + index, slot.to(tl.int64), mask=index < number)


@triton.jit(do_not_specialize=["last"])
def clear(entries, is_full, last, BLOCK: tl.constexpr):
    """Empty all entries if ``is_full``. Grid: any."""
    if tl.load(is_full):
        for block in range(tl.program_id(0), tl.cdiv(last + 1, BLOCK), tl.num_programs(0)):
            entry = tl.cast(block, tl.int64) * BLOCK + tl.arange(0, BLOCK)
            tl.store(entries + entry, tl.full((BLOCK,), EMPTY, tl.int32), mask=entry <= last)


@triton.jit(do_not_specialize=["number", "last", "shift"])
def insert_slots(slots, entries, keys, is_full, size, number, last, shift, BLOCK: tl.constexpr):
    """Insert ``number`` slots; if ``is_full``, the first ``size``. The insertion order affects no search. Grid: any."""
    refills = tl.load(is_full)
    bound = tl.cast(number, tl.int64)
    if refills:
        bound = tl.load(size)
    for block in range(tl.program_id(0), tl.cdiv(bound, BLOCK), tl.num_programs(0)):
        index = tl.cast(block, tl.int64) * BLOCK + tl.arange(0, BLOCK)
        claiming = index < bound
        slot = index
        if refills == 0:
            slot = tl.load(slots + index, mask=claiming, other=-1)
        claiming = claiming & (slot >= 0)
        entry = home_of(tl.load(keys + slot, mask=claiming, other=0), shift)
        probes = 0
        while any_of(claiming) & (probes <= last):
            expected = tl.where(claiming, EMPTY, NO_ENTRY)  # atomic_cas has no mask
            before = tl.atomic_cas(entries + entry, expected, slot.to(tl.int32), sem="relaxed")
            claiming = claiming & (before != EMPTY)
            entry = (entry + 1) & last
            probes += 1


@triton.jit
def mixed(ids):
    """SplitMix64 hash of int64 ids: uint64."""
    bits = ids.to(tl.uint64, bitcast=True) + 0x9E3779B97F4A7C15
    bits = (bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9
    bits = (bits ^ (bits >> 27)) * 0x94D049BB133111EB
    return bits ^ (bits >> 31)


@triton.jit(do_not_specialize=["first_row", "num_rows", "columns", "table_key", "init_std"])
def write_first_values(
    target, rows, ids, quantiles, number, first_row, num_rows, columns, stride, table_key, init_std,
    BLOCK: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """See ``start_rows``. Four columns share a hash, whose 16-bit parts select their quantiles. Grid: any."""
    bound = tl.load(number)
    stop = (bound + BLOCK - 1) // BLOCK
    for block in range(tl.program_id(0), stop, tl.num_programs(0)):
        index = block * BLOCK + tl.arange(0, BLOCK)
        row = tl.load(rows + index, mask=index < bound, other=-1).to(tl.int64) - first_row
        here = (index < bound) & (row >= 0) & (row < num_rows)
        if ids is not None:
            key = mixed(tl.load(ids + index, mask=here, other=0) ^ table_key).to(tl.int64, bitcast=True)
        for start in range(0, columns, COLUMNS):
            column = start + tl.arange(0, COLUMNS)
            mask = here[:, None] & (column < columns)[None, :]
            if ids is None:
                value = tl.zeros((BLOCK, COLUMNS), tl.float32)
            else:
                bits = mixed(key[:, None] + (column // 4)[None, :])
                part = (bits >> (16 * (column % 4)).to(tl.uint64)[None, :]) & 0xFFFF
                value = tl.load(quantiles + (part ^ 0x8000).to(tl.int64), mask=mask, other=0.0) * init_std
            tl.store(target + row[:, None] * stride + column[None, :], value, mask=mask)
