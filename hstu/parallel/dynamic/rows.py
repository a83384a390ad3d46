"""The rows of one rank's share of a dynamic table and their optimizer states, by slot, wherever they lie."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor


class Part:
    """Rows of consecutive slots, live: in GPU memory, or in host memory. Row 0 is that of the part's first slot."""

    is_cached = False
    """Whether rows may be somewhere else, too."""

    def __init__(self, weight: Tensor, states: Mapping[str, Tensor]) -> None:
        """``weight`` [rows, stored_dim]; ``states`` by name, each [rows, stored_dim], or [rows] of one number a row."""
        self.weight = weight
        self.states = dict(states)

    def begin(self, places: Tensor, weight: Tensor) -> None:
        """Write rows float32 [n, dim] at distinct ``places``, int64 [n], and zeros into their states."""
        self.weight[places, : weight.shape[1]] = weight
        for state in self.states.values():
            state.index_fill_(0, places, 0)

    def bring_near(self, places: Tensor) -> None:
        """Expect a lookup of rows at ``places``, int64 [n], soon; negative ones are none of this part."""

    def write_back(self) -> None:
        """Bring ``weight`` up to date with what is cached of it."""

    def forget(self) -> None:
        """``weight`` is written from outside: forget what is cached of it."""


class Rows:
    """The parts of a share one after the other: slot s is row s of them all."""

    def __init__(self, parts: Sequence[Part], dim: int) -> None:
        """``dim``: columns of a row that are in use."""
        self.parts = list(parts)
        self.dim = dim

    def __len__(self) -> int:
        return sum(len(part.weight) for part in self.parts)

    @property
    def device(self) -> torch.device:
        """Where slots are looked up."""
        return self.parts[0].weight.device

    @property
    def is_cached(self) -> bool:
        """Whether there is a cache to bring rows into."""
        return any(part.is_cached for part in self.parts)

    @torch.no_grad()
    def begin(self, slots: Tensor, weight: Tensor) -> None:
        """Write rows float32 [n, dim] into distinct ``slots``, int64 [n], and zeros into their states."""
        if len(self.parts) == 1:
            self.parts[0].begin(slots, weight)
            return
        for part, used in self._ranges(len(self)):
            here = (slots >= used.start) & (slots < used.stop)
            part.begin(slots[here] - used.start, weight[here])

    @torch.no_grad()
    def bring_near(self, slots: Tensor) -> None:
        """Expect a lookup of ``slots``, int64 [n], soon, of which negative ones are none. Waits for no device."""
        start = 0
        for part in self.parts:
            part.bring_near(torch.where(slots - start < len(part.weight), slots - start, -1))
            start += len(part.weight)

    def first(self, number: int) -> tuple[Tensor, dict[str, Tensor]]:
        """(rows, states) of the slots [0, ``number``): [number, dim], or [number].

        Views if there is one part; of several, copies in host memory: that of the GPU had no room for all of them.
        """
        rows, states = zip(*(self._used(part, len(used)) for part, used in self._ranges(number)), strict=True)
        return _joined(rows), {name: _joined([of_part[name] for of_part in states]) for name in states[0]}

    @torch.no_grad()
    def put_first(self, rows: Tensor, states: Mapping[str, Tensor]) -> None:
        """Write what ``first`` gives into the slots [0, n)."""
        for part, used in self._ranges(len(rows)):
            here = slice(used.start, used.stop)
            part.forget()
            own_rows, own_states = self._used(part, len(used))
            own_rows.copy_(rows[here])
            for name, state in own_states.items():
                state.copy_(states[name][here])

    def no_states(self, number: int) -> dict[str, Tensor]:
        """The states of ``number`` rows that were not trained, in host memory: zeros [number, dim], or [number]."""
        states = self.parts[0].states.items()
        sizes = {name: (number, self.dim) if state.dim() > 1 else (number,) for name, state in states}
        return {name: torch.zeros(sizes[name], dtype=state.dtype) for name, state in states}

    def _ranges(self, number: int) -> Iterator[tuple[Part, range]]:
        """Each part with those of the slots [0, ``number``) that lie in it."""
        start = 0
        for part in self.parts:
            stop = start + len(part.weight)
            yield part, range(min(start, number), min(stop, number))
            start = stop

    def _used(self, part: Part, number: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The first rows of a part, up to date, and their states; views."""
        part.write_back()
        states = part.states.items()
        return part.weight[:number, : self.dim], {
            name: state[:number, : self.dim] if state.dim() > 1 else state[:number] for name, state in states
        }


def _joined(tensors: Sequence[Tensor]) -> Tensor:
    if len(tensors) == 1:
        return tensors[0]
    joined = torch.empty(sum(map(len, tensors)), *tensors[0].shape[1:], dtype=tensors[0].dtype)
    for part, tensor in zip(joined.split([*map(len, tensors)]), tensors, strict=True):
        part.copy_(tensor)
    return joined
