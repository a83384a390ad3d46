"""An array that lies in several files, of which only those that are read are opened: a column of a store in shards."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.lib.mixins import NDArrayOperatorsMixin

_MOST_OPEN = 1 << 10


class Parts(NDArrayOperatorsMixin):
    """A read-only array [n] of N consecutive parts. A part is opened when a value of it is first read.

    It reads like a memory map: by index, slice, mask and array of indices, and with NumPy's operators. These go part by
    part, so that memory holds only their result. np.asarray copies all values.

    Args:
        bounds: int64 [N + 1]; part k has the values [bounds[k], bounds[k + 1]).
        dtype: of every part.
        open_part: number of a part → its values. It is called again if the part has been closed since.
        most_open: parts that stay open. Beyond it, those that were read longest ago are closed. None: 1,024.
    """

    ndim = 1

    def __init__(
        self,
        bounds: np.ndarray,
        dtype: np.dtype,
        open_part: Callable[[int], np.ndarray],
        most_open: int | None = None,
    ) -> None:
        self.bounds, self.dtype = bounds, dtype
        self.shape = (int(bounds[-1]),)
        self._open_part, self._most_open = open_part, most_open or _MOST_OPEN
        self._opened: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        return self.shape[0]

    def part(self, number: int) -> np.ndarray:
        """The values of a part."""
        found = self._opened.pop(number, None)
        self._opened[number] = found = self._open_part(number) if found is None else found
        if len(self._opened) > self._most_open:
            for oldest in list(self._opened)[: -self._most_open]:
                self._opened.pop(oldest, None)  # another thread may have closed it
        return found

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            begin, stop, step = index.indices(len(self))
            return self._run(begin, max(begin, stop)) if step == 1 else self.take(np.arange(begin, stop, step))
        wanted = np.asarray(index)
        if wanted.dtype != bool:
            return self.take(wanted)[()]
        if wanted.shape != self.shape:
            raise IndexError(f"a mask of shape {wanted.shape} for an array of shape {self.shape}")
        chosen = ((part, wanted[begin:stop]) for part, (begin, stop) in enumerate(pairwise(self.bounds)))
        found = [self.part(part)[mask] for part, mask in chosen if mask.any()]
        return np.concatenate([np.empty(0, self.dtype), *found])

    def take(self, indices: np.ndarray) -> np.ndarray:
        """The values at ``indices``, integers of any shape."""
        flat, size = np.asarray(indices, dtype=np.int64).reshape(-1), len(self)
        if len(flat) and not -size <= flat.min() <= flat.max() < size:
            raise IndexError(f"indices from {flat.min()} to {flat.max()} for an array of {size} values")
        return Places(np.where(flat < 0, flat + size, flat), self.bounds).of(self).reshape(np.shape(indices))

    def min(self) -> Any:
        """The smallest value."""
        return min(self.part(part).min() for part in self._filled())

    def max(self) -> Any:
        """The largest value."""
        return max(self.part(part).max() for part in self._filled())

    def tolist(self) -> list[Any]:
        """All values."""
        return self[:].tolist()

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.array(self[:], dtype, copy=copy)

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: Any, **options: Any) -> Any:
        by_part = method == "__call__" and all(np.shape(each) in ((), self.shape) for each in inputs)
        if not by_part or options:
            return getattr(ufunc, method)(*(np.asarray(each) for each in inputs), **options)
        spans = [slice(*span) for span in pairwise(self.bounds.tolist())]
        return np.concatenate([ufunc(*(each[span] if np.ndim(each) else each for each in inputs)) for span in spans])

    def _filled(self) -> list[int]:
        return np.flatnonzero(np.diff(self.bounds)).tolist()

    def _run(self, begin: int, stop: int) -> np.ndarray:
        """The values [begin, stop): a view where they lie in one part."""
        if begin == stop:
            return np.empty(0, self.dtype)
        first, last = (np.searchsorted(self.bounds, [begin, stop - 1], side="right") - 1).tolist()
        starts = self.bounds[first : last + 1].tolist()
        found = [self.part(part)[max(begin - start, 0) : stop - start] for part, start in enumerate(starts, first)]
        return found[0] if len(found) == 1 else np.concatenate(found)


Values = np.ndarray | Parts
"""A stored array: one memory map or, in shards, the parts of which it consists."""


class Places:
    """n indices at which several arrays of the same parts are read. They are divided over the parts only once.

    Args:
        indices: int64 [n], each from 0 on.
        bounds: of the parts, see Parts.
    """

    def __init__(self, indices: np.ndarray, bounds: np.ndarray) -> None:
        self._indices, self._bounds = indices, bounds

    def of(self, values: Values) -> np.ndarray:
        """The values [n] of an array that lies in these parts, or in one."""
        if not isinstance(values, Parts):
            return values.take(self._indices)
        order, of_parts = self._by_part
        found = np.empty(len(order), values.dtype)
        if of_parts:
            found[order] = np.concatenate([values.part(part).take(inner) for part, inner in of_parts])
        return found

    @cached_property
    def _by_part(self) -> tuple[np.ndarray, list[tuple[int, np.ndarray]]]:
        """(the order of the indices by part, for each part that has some: its number and the indices within it)."""
        part_of = np.searchsorted(self._bounds, self._indices, side="right") - 1
        is_small = len(self._bounds) <= 1 << 16
        order = np.argsort(part_of.astype(np.uint16) if is_small else part_of, kind="stable")  # uint16: a radix sort
        counts = np.bincount(part_of)
        within, ends = (self._indices - self._bounds[part_of])[order], np.cumsum(counts)
        parts = np.flatnonzero(counts).tolist()
        return order, [(part, within[ends[part] - counts[part] : ends[part]]) for part in parts]
