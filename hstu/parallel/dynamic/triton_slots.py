"""SlotTable on a GPU: TorchSlots, with a hash table in its memory for the index."""

from __future__ import annotations

import torch
from torch import Tensor

from hstu.ops.triton.slots import SlotIndex
from hstu.parallel.dynamic.slots import Policy
from hstu.parallel.dynamic.torch_slots import TorchSlots


class TritonSlots(TorchSlots):
    """See SlotTable. On a GPU, and where Triton interprets."""

    def __init__(self, capacity: int, policy: Policy, admission_threshold: int = 0, device: str = "cuda") -> None:
        self._index = SlotIndex(capacity, device)
        super().__init__(capacity, policy, admission_threshold, device)

    def _like(self, capacity: int, policy: Policy) -> TritonSlots:
        return TritonSlots(capacity, policy, device=str(self.ids.device))

    def lookup(self, ids: Tensor) -> Tensor:
        """See SlotTable."""
        return self._index.find(ids, self.ids)

    def _see(self, ids: Tensor, counts: Tensor | None, step: int) -> Tensor:
        return self._index.count(ids, self.ids, counts, self.scores, step, lfu=self.policy == "lfu")

    def _rebuild(self) -> None:
        self._index.clear()
        self._index.insert(self.ids[: self.size], torch.arange(self.size, device=self.ids.device))

    def _replace(self, old_ids: Tensor, old_slots: Tensor, new_ids: Tensor, new_slots: Tensor) -> None:
        if self._index.has_room(len(new_ids)):
            self._index.erase(old_ids, old_slots)
            self._index.insert(new_ids, new_slots)
        else:
            self._rebuild()
