"""A batch on its way from a worker process: one block of bytes, through memory that is used again and again.

Every tensor that torch sends takes a shared file, a mapping and a connection of its own to hand the descriptor over, a
dozen a batch; and a pipe holds some kilobytes, so that for megabytes sender and receiver take turns. Here all tensors
are copied into one block and become slices of it again on arrival, so that pinning it pins them all. The block goes
through an anonymous file in memory, which the receiver opens by way of /proc. Its pages stay: fresh ones cost more than
the copy.
"""

from __future__ import annotations

import io
import os
import pickle
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_ALIGNMENT = 64


@dataclass(frozen=True)
class Packed:
    """Any object: its pickle, in which tensors are places in ``content``, the bytes of all tensors."""

    pickled: bytes
    content: bytearray | Tensor

    @property
    def tensor(self) -> Tensor:
        """The content as uint8 [bytes], sharing its memory."""
        if isinstance(self.content, Tensor):
            return self.content
        return torch.frombuffer(self.content, dtype=torch.uint8) if self.content else torch.empty(0, dtype=torch.uint8)

    def pin_memory(self) -> Packed:
        """The same in page-locked host memory; DataLoader asks for it."""
        return Packed(self.pickled, self.tensor.pin_memory())


class Outbox:
    """Where a worker leaves packed things for the process that unpickles what ``put`` returns.

    ``places``: things that may wait there at once; the next one takes the place of the oldest.
    """

    def __init__(self, places: int) -> None:
        self._places = places
        self._files: list[int] = []  # made by the worker itself, not by the process that it was forked from
        self._count = 0

    def put(self, packed: Packed) -> Sent:
        """To be unpickled, once, by a process of the same user while this one lives: it becomes ``packed``."""
        if len(self._files) < self._places:
            self._files.append(os.memfd_create("batch"))
        file = self._files[self._count % self._places]
        self._count += 1
        assert isinstance(packed.content, bytearray), "nothing is pinned yet"
        size = os.pwrite(file, packed.content, 0)
        if size != len(packed.content):
            raise OSError(f"only {size} of {len(packed.content)} bytes of a batch fitted into memory")
        return Sent(packed.pickled, os.getpid(), file, size)


@dataclass(frozen=True)
class Sent:
    """Something packed that lies in an Outbox: turns into it when unpickled. ConnectionError if that is gone."""

    pickled: bytes
    process: int
    file: int
    size: int

    def __reduce__(self) -> tuple[Any, ...]:
        return _fetch, (self.pickled, self.process, self.file, self.size)


def _fetch(pickled: bytes, process: int, file: int, size: int) -> Packed:
    content = bytearray(size)
    try:
        own = os.open(f"/proc/{process}/fd/{file}", os.O_RDONLY)
    except OSError as error:
        raise ConnectionError(f"process {process} is gone with a batch that it had made") from error
    try:
        os.preadv(own, [content], 0)
    finally:
        os.close(own)
    return Packed(pickled, content)


def pack(thing: Any) -> Packed:
    """For the way through a queue between processes; tensors must be on the CPU."""
    sink = io.BytesIO()
    packer = _Packer(sink)
    packer.dump(thing)
    packed = Packed(sink.getvalue(), bytearray(packer.size))
    content = packed.tensor
    for start, tensor in packer.tensors:
        _slice(content, start, tensor.dtype, tuple(tensor.shape)).copy_(tensor)
    return packed


def unpack(packed: Packed) -> Any:
    """What was packed; its tensors share the memory of ``packed``."""
    return _Unpacker(packed).load()


class _Packer(pickle.Pickler):
    def __init__(self, sink: io.BytesIO) -> None:
        super().__init__(sink, protocol=pickle.HIGHEST_PROTOCOL)
        self.tensors: list[tuple[int, Tensor]] = []
        self.size = 0

    def persistent_id(self, thing: Any) -> tuple[int, torch.dtype, tuple[int, ...]] | None:
        if not isinstance(thing, Tensor):
            return None
        start, bytes_ = self.size, thing.numel() * thing.element_size()
        self.tensors.append((start, thing))
        self.size += -(-bytes_ // _ALIGNMENT) * _ALIGNMENT
        return start, thing.dtype, tuple(thing.shape)


class _Unpacker(pickle.Unpickler):
    def __init__(self, packed: Packed) -> None:
        super().__init__(io.BytesIO(packed.pickled))
        self._content = packed.tensor

    def persistent_load(self, place: tuple[int, torch.dtype, tuple[int, ...]]) -> Tensor:
        return _slice(self._content, *place)


def _slice(content: Tensor, start: int, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    size = torch.Size(shape).numel() * dtype.itemsize
    return content[start : start + size].view(dtype).view(shape)
