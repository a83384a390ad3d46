"""Where an id lies in a table: a hash table in GPU memory, and scores by occurrence, as dynamic tables need them."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from hstu.ops.triton.launch import launch
from hstu.ops.triton.slot_kernels import EMPTY, erase_slots, find_slots, insert_slots, settle_scores

# A warp a program, so that no warp waits for the longest search of another.
_CONFIG = [triton.Config({"BLOCK": 128}, num_warps=1, num_stages=1)]
_LEAST_BITS = 4


class SlotIndex:
    """Which of ``capacity`` slots an id has: four to eight int32 a slot.

    Ids are the caller's: int64 by slot, of any stride. At most a quarter of the entries are slots in use; erased ones
    are not used again before ``rebuild``, which is due when those that are not empty become half of all.
    """

    def __init__(self, capacity: int, device: torch.device | str) -> None:
        bits = max(_LEAST_BITS, (4 * capacity - 1).bit_length())
        self.entries = torch.empty(1 << bits, dtype=torch.int32, device=device)
        self.occurrences = torch.zeros(capacity, dtype=torch.int32, device=device)
        """All zero between calls."""
        self._probing = {"last": len(self.entries) - 1, "shift": 64 - bits}
        self.clear()

    def clear(self) -> None:
        """Forget all."""
        self.entries.fill_(EMPTY.value)
        self._taken = 0

    def has_room(self, number: int) -> bool:
        """Whether so many can be inserted; else clear and insert all that are in use."""
        return 2 * (self._taken + number) <= len(self.entries)

    def find(self, wanted: Tensor, ids: Tensor) -> Tensor:
        """Slots of ``wanted``, int64 [n], -1 for those that have none. ``ids``, int64 [capacity]: of each slot."""
        return self._find(wanted, ids, None, counts_occurrences=False)

    def count(self, wanted: Tensor, ids: Tensor, counts: Tensor | None, scores: Tensor, step: int, lfu: bool) -> Tensor:
        """The same; the scores of the slots that are found, int64 [capacity], are brought to ``step``.

        ``counts``: occurrences of each of ``wanted``, int64 [n]; None: one each. Repeats count each time. Scores are
        those of hstu/parallel/dynamic/slots.py.
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
        """Give ids, int64 [n], distinct and without a slot, the ``slots``, int64 [n], for which there must be room."""
        self._taken += len(ids)
        self._change(insert_slots, ids, slots)

    def erase(self, ids: Tensor, slots: Tensor) -> None:
        """Take the ``slots`` from the ``ids`` that have them, int64 [n] both, distinct."""
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
        launch(kernel, grid, _CONFIG, (), num_ids=number, **arguments)
