"""A batch on its way from a worker process: one block of memory that both can see.

Every tensor that torch sends takes a shared file, a mapping and a connection of its own to hand the descriptor over, a
dozen a batch; and the bytes themselves would have to take turns through a pipe of some kilobytes. Here all tensors are
copied into one anonymous file in memory and become slices of it on arrival, so that pinning it pins them all. The
receiver opens the file through the sender's own descriptor in /proc, so nothing waits for the sender and no directory
(/dev/shm is small in containers) limits the size.
"""

from __future__ import annotations

import io
import mmap
import os
import pickle
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_ALIGNMENT = 64


class SharedBytes:
    """Bytes in memory that another process of the same user maps when it unpickles this.

    The sender must keep the object until then.
    """

    def __init__(self, size: int) -> None:
        self._file = os.memfd_create("batch")
        os.ftruncate(self._file, max(size, 1))  # nothing cannot be mapped
        self.tensor = _mapped(self._file)

    def __reduce__(self) -> tuple[Any, ...]:
        return _open, (os.getpid(), self._file)

    def __del__(self) -> None:
        os.close(self._file)


def _open(process: int, file: int) -> Tensor:
    try:
        own = os.open(f"/proc/{process}/fd/{file}", os.O_RDWR)
    except OSError as error:
        raise ConnectionError(f"the memory of process {process} is gone") from error
    try:
        return _mapped(own)
    finally:
        os.close(own)


def _mapped(file: int) -> Tensor:
    return torch.frombuffer(mmap.mmap(file, 0), dtype=torch.uint8)


@dataclass(frozen=True)
class Packed:
    """Any object: its pickle, in which tensors are places in ``content``, the bytes of all tensors."""

    pickled: bytes
    content: SharedBytes | Tensor
    """On arrival uint8 [bytes]."""

    @property
    def tensor(self) -> Tensor:
        """The content as uint8 [bytes], sharing its memory."""
        return self.content if isinstance(self.content, Tensor) else self.content.tensor

    def pin_memory(self) -> Packed:
        """The same in page-locked host memory; DataLoader asks for it."""
        return Packed(self.pickled, self.tensor.pin_memory())


def pack(thing: Any) -> Packed:
    """For the way through a queue between processes; tensors must be on the CPU."""
    sink = io.BytesIO()
    packer = _Packer(sink)
    packer.dump(thing)
    packed = Packed(sink.getvalue(), SharedBytes(packer.size))
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
