"""The arguments of a compiled kernel, written to memory that its launches share.

The DSL turns a nested tuple of 25 numbers into addresses in 180 µs of Python for each launch, after the 50 µs that it
takes to make the numbers. It takes objects with ``__c_pointers__`` as they are.
"""

from __future__ import annotations

import ctypes
import itertools
import struct
from collections.abc import Iterable

_SLOT = 8
"""Bytes between two values."""


class LaunchArguments:
    """Memory for the arguments of one host function; a launch has read them by the time it returns.

    ``formats``: for each of the host function's arguments the types of its values, in the characters of ``struct``,
    each followed by spaces or x up to 8 bytes.
    """

    def __init__(self, *formats: str) -> None:
        self._layout = struct.Struct("=" + "".join(formats))
        counts = [struct.calcsize("=" + each) // _SLOT for each in formats]
        self._memory = (ctypes.c_uint64 * sum(counts))()
        addresses = itertools.count(ctypes.addressof(self._memory), _SLOT)
        self.values = tuple(_Addresses(itertools.islice(addresses, count)) for count in counts)
        """What the host function is called with."""

    def write(self, *values: float) -> None:
        """Set all values."""
        self._layout.pack_into(self._memory, 0, *values)


class _Addresses:
    """One argument: the addresses of its values."""

    def __init__(self, addresses: Iterable[int]) -> None:
        self._addresses = list(addresses)

    def __c_pointers__(self) -> list[int]:
        return self._addresses
