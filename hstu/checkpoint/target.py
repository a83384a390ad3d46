"""Where in the memory of a run a stored tensor is read to."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from hstu.checkpoint.row_ids import MovedRows
from hstu.parallel.cut_tensor import CutTensor


class Target:
    """Where to read a stored tensor to: the live pieces or, where their rows have moved, a copy to pick them from."""

    def __init__(self, tensor: Tensor | CutTensor, stored: torch.Size, moved: MovedRows | None) -> None:
        live = tensor if isinstance(tensor, CutTensor) else CutTensor.whole(tensor)
        self._picked: list[tuple[Tensor, np.ndarray, Tensor]] = []
        if moved is None:
            self.pieces = live if live.size() == stored else live.with_rows(stored[0])
            return
        copies = []
        for start, part in live.pieces.items():
            assert moved.places is not None
            places = moved.places[start[0] : start[0] + len(part)]
            found = places[places >= 0]
            if not len(found):
                continue
            first, last = int(found.min()), int(found.max())
            copy = part.new_empty((last - first + 1, *part.shape[1:]))
            copies.append(((first, *start[1:]), copy))
            self._picked.append((part, places - first, copy))
        self.pieces = CutTensor(stored, copies)

    def finish(self) -> None:
        """Put what was read where it belongs."""
        for part, places, copy in self._picked:
            rows = torch.from_numpy(np.flatnonzero(places >= 0)).to(part.device)
            part[rows] = copy[torch.from_numpy(places[places >= 0]).to(part.device)]
