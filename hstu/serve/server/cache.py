"""A cache of users' vectors that is bounded in bytes."""

from __future__ import annotations

from collections import OrderedDict

from torch import Tensor

ENTRY_BYTES = 1024
"""What an entry takes beside its numbers: the key, the tensor object and the place in the dictionary."""


class VectorCache:
    """Vectors by the digest of a history; the least recently used are dropped. Not thread-safe.

    Args:
        capacity_bytes: all entries together take so many bytes at most.
    """

    def __init__(self, capacity_bytes: int) -> None:
        self._capacity = capacity_bytes
        self._vectors: OrderedDict[bytes, Tensor] = OrderedDict()
        self.used_bytes = 0
        """Bytes of all entries."""

    def __len__(self) -> int:
        """Number of entries."""
        return len(self._vectors)

    def get(self, key: bytes) -> Tensor | None:
        """The vector under ``key``, which becomes the most recently used."""
        vector = self._vectors.get(key)
        if vector is not None:
            self._vectors.move_to_end(key)
        return vector

    def put(self, key: bytes, vector: Tensor) -> None:
        """Keep a copy of ``vector``, float32 [E], if it fits."""
        size = _size(vector)
        if size > self._capacity or key in self._vectors:
            return
        self._vectors[key] = vector.clone()  # a row of a batch would keep the whole batch in memory
        self.used_bytes += size
        while self.used_bytes > self._capacity:
            self.used_bytes -= _size(self._vectors.popitem(last=False)[1])


def _size(vector: Tensor) -> int:
    return vector.numel() * vector.element_size() + ENTRY_BYTES
