"""Saved activations of the first layers in host memory, from their forward to their backward.

While a layer computes in forward, what the layer before it has saved is copied to pinned host memory; then its memory
on the device is used again. While a layer computes in backward, what the layer before it has saved is copied back. At
most two such layers are on the device at a time. The copies run on a stream of their own, and the host waits for none
of them: the streams wait for each other's events. On a CPU the same copies are made at once, within one memory.

Megatron-core's fine-grained offload (0.16.1) does not serve here: it needs a GPU, its own modules around each operator
and one manager per process that learns the order of the layers in a first step.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, NamedTuple
from weakref import ref

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

LEAST_BYTES = 4096
"""Smaller tensors stay: starting a copy takes longer than copying so much, and pinned memory comes in pages."""
_ALIGNMENT = 512
"""Bytes to whose multiples the copied part of a storage is extended, so that tensors in it stay aligned alike."""
PIECE = 1 << 25
"""Bytes of a piece of pinned memory. torch rounds pinned memory up to a power of two, so what a layer saves is cut into
pieces of one: at most one is partly empty, and layers of all lengths share them. To copy one takes 0.6 ms of the link
between device and host, to start the copy 0.01 ms of the host."""


class Pieces(NamedTuple):
    """Pinned memory of a layer: ``number`` pieces of ``size`` bytes, a power of two."""

    number: int
    size: int

    @classmethod
    def of(cls, sizes: Iterable[int]) -> Pieces:
        """Those of a layer that saves parts of storages of these sizes in bytes."""
        total = sum(map(_aligned, sizes))
        size = min(PIECE, 1 << (total - 1).bit_length())
        return cls(-(-total // size), size)


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


class HostCopies:
    """Copies between a device and its host, in the order of their calls, beside what the device computes.

    It keeps the pinned memory that it has made: the most that micro-batches in flight have needed at a time. torch's
    allocator would not use memory again before the host has seen the end of its last copy, so a host that is ahead by
    some micro-batches would pin as many times the memory. Here all copies are in one stream, and memory that is given
    back can be filled by the next of them.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._free: defaultdict[int, list[Tensor]] = defaultdict(list)
        """Memory that nothing needs any more, by size in bytes."""

    def take(self, pieces: Pieces) -> list[Tensor]:
        """Memory of the host, uint8 [size] each; pinned for the copies of a GPU."""
        free, pinned = self._free[pieces.size], self._stream is not None
        return [
            free.pop() if free else torch.empty(pieces.size, dtype=torch.uint8, pin_memory=pinned)
            for _ in range(pieces.number)
        ]

    def give_back(self, memory: Iterable[Tensor]) -> None:
        """Use ``memory`` again, for copies that start later."""
        for piece in memory:
            self._free[len(piece)].append(piece)

    def start(self, targets: Iterable[Tensor], sources: Iterable[Tensor]) -> torch.cuda.Event | None:
        """Copy once the current stream has made ``sources`` and needs ``targets`` no more. Returns what to wait for."""
        pairs = zip(targets, sources, strict=True)
        if self._stream is None:
            for target, source in pairs:
                target.copy_(source)
            return None
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            for target, source in pairs:
                target.copy_(source, non_blocking=True)
            return self._stream.record_event()

    def wait(self, event: torch.cuda.Event | None) -> None:
        """Let the current stream, not the host, wait for the end of a copy."""
        if event is not None:
            torch.cuda.current_stream(self.device).wait_event(event)


copies_of = cache(HostCopies)
"""Those of a device. There is one per device, for all models of the process."""


class ActivationOffload:
    """The offload of one forward and its backward.

    Around the forward of each layer, in order: ``with offload.next_layer():``, then ``offload.follow(update)``.
    Nothing is copied where autograd saves nothing. The autograd graph owns the memory: both end together.

    Args:
        num_layers: how many layers keep what they save on the host, the first ones; another layer must follow them.
        device: of the tokens.
    """

    def __init__(self, num_layers: int, device: torch.device) -> None:
        self._remaining = num_layers
        self._copies = copies_of(device)
        self._packed: dict[tuple[int, torch.dtype], _Saved] = {}
        """What the layer has saved, by address of the storage and dtype."""
        self._leaving: list[_Saved] = []
        """What the layer before it has saved, on its way to the host."""

    @contextmanager
    def next_layer(self) -> Iterator[None]:
        """Around the forward of the next layer."""
        if self._remaining == 0:
            yield
            return
        self._remaining -= 1
        with saved_tensors_hooks(self._pack, _unpack):
            yield

    def follow(self, update: Tensor) -> None:
        """After the forward of a layer with this output: free what the layer before it has saved, and copy its own."""
        before, self._leaving = self._leaving, [*self._packed.values()]
        self._packed = {}
        if sizes := [saved.close() for saved in self._leaving]:
            memory = _LayerMemory(self._copies, self._copies.take(Pieces.of(sizes)))
            for saved in self._leaving:
                saved.leave(memory)
        if before and update.grad_fn is not None:
            update.grad_fn.register_prehook(partial(_fetch, [ref(saved) for saved in before]))
        for saved in before:
            saved.free()

    def _pack(self, tensor: Tensor) -> Any:
        if isinstance(tensor, nn.Parameter) or tensor.nbytes < LEAST_BYTES:
            return tensor
        key = tensor.untyped_storage().data_ptr(), tensor.dtype
        return self._packed.setdefault(key, _Saved(self._copies)).add(tensor.detach())


def _unpack(packed: Any) -> Tensor:
    tensor: Tensor = packed.restore() if isinstance(packed, _View) else packed
    return tensor


def _fetch(saved: Sequence[ref[_Saved]], _gradients: Any) -> None:
    """Before the backward of a layer: what the layer before it has saved begins to come back."""
    for each in saved:
        if (alive := each()) is not None:
            alive.fetch()


@dataclass(eq=False)
class _LayerMemory:
    """Host memory of what a layer has saved, which is given back when none of it is needed any more."""

    copies: HostCopies
    pieces: list[Tensor]
    used: int = 0
    """Bytes."""

    def next(self, size: int) -> list[Tensor]:
        """The next ``size`` bytes."""
        first, found = self.used, []
        self.used += _aligned(size)
        while size:
            index, offset = divmod(first, len(self.pieces[0]))
            found.append(self.pieces[index][offset : offset + size])
            first, size = first + len(found[-1]), size - len(found[-1])
        return found

    def __del__(self) -> None:
        self.copies.give_back(self.pieces)


class _Saved:
    """Part of a storage: the union of the tensors in it that a layer saves. The handles of these tensors own it."""

    def __init__(self, copies: HostCopies) -> None:
        self._copies = copies
        self._tensors: list[Tensor] = []
        self._start = 0
        self._memory: _LayerMemory | None = None
        self._host: list[Tensor] = []
        """Bytes of ``_memory``, in order."""
        self._dtype = torch.uint8
        self._device: Tensor | None = None
        self._event: torch.cuda.Event | None = None
        """End of the copy under way."""

    def add(self, tensor: Tensor) -> _View:
        """A handle of a tensor in this storage."""
        self._tensors.append(tensor)
        return _View(self, tensor.size(), tensor.stride(), int(tensor.storage_offset()))

    def close(self) -> int:
        """No tensor follows. Returns the bytes to copy."""
        spans = [_span(tensor) for tensor in self._tensors]
        first, end = min(span.first for span in spans), max(span.end for span in spans)
        one = self._tensors[0]
        self._start = first - first % (_ALIGNMENT // one.element_size())
        self._tensors, self._dtype = [], one.dtype
        self._device = one.as_strided((end - self._start,), (1,), self._start)
        return self._device.nbytes

    def leave(self, memory: _LayerMemory) -> None:
        """Start the copy to the host."""
        assert self._device is not None
        self._memory, self._host = memory, memory.next(self._device.nbytes)
        self._event = self._copies.start(self._host, self._in_pieces(self._device))

    def _in_pieces(self, on_device: Tensor) -> Iterable[Tensor]:
        return on_device.view(torch.uint8).split([len(piece) for piece in self._host])

    def free(self) -> None:
        """Free the memory on the device. The current stream may use it for something else once it has been copied."""
        self._copies.wait(self._event)
        self._device = self._event = None

    def fetch(self) -> None:
        """Start the copy to the device, unless it has been started."""
        if self._device is None:
            size = sum(map(len, self._host)) // self._dtype.itemsize
            self._device = torch.empty(size, dtype=self._dtype, device=self._copies.device)
            self._event = self._copies.start(self._in_pieces(self._device), self._host)

    def restore(self, size: torch.Size, stride: Sequence[int], offset: int) -> Tensor:
        """A tensor that was saved, on the device."""
        self.fetch()
        self._copies.wait(self._event)
        self._event = None
        assert self._device is not None
        return self._device.as_strided(size, stride, offset - self._start)

    def __del__(self) -> None:
        """Where a step ends early, a copy may be under way, whose memory is not used before."""
        self._copies.wait(self._event)


class _Span(NamedTuple):
    """Elements of a storage."""

    first: int
    end: int


def _span(tensor: Tensor) -> _Span:
    last = sum((size - 1) * stride for size, stride in zip(tensor.size(), tensor.stride(), strict=True))
    first = int(tensor.storage_offset())
    return _Span(first, first + last + 1)


@dataclass(frozen=True)
class _View:
    """What autograd keeps in place of a tensor."""

    saved: _Saved
    size: torch.Size
    stride: tuple[int, ...]
    offset: int

    def restore(self) -> Tensor:
        """The tensor."""
        return self.saved.restore(self.size, self.stride, self.offset)
