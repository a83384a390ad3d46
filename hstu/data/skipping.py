"""bad_row_policy = "skip": samples whose data is damaged are left out of batches, counted and capped."""

from __future__ import annotations

import logging
import multiprocessing
from dataclasses import replace
from typing import Protocol, TypeVar

import numpy as np

from hstu.config.errors import DataError
from hstu.data.sampler import BatchPlan

_log = logging.getLogger(__name__)
_Rows = TypeVar("_Rows", covariant=True)


class _Reader(Protocol[_Rows]):
    def read(self, plan: BatchPlan) -> _Rows: ...


class SkippedSamples:
    """Counts over all data workers of a rank; more than ``limit`` are a DataError. Goes to workers as they start."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._count = multiprocessing.Value("q", 0)

    @property
    def count(self) -> int:
        """Samples left out so far; one that comes again in another epoch counts again."""
        return int(self._count.value)

    def read(self, reader: _Reader[_Rows], plan: BatchPlan) -> tuple[BatchPlan, _Rows]:
        """The plan without its damaged samples, and their rows: the others keep their places in the epoch."""
        try:
            return plan, reader.read(plan)
        except DataError:
            good = np.array([self._is_good(reader, plan, place) for place in range(len(plan.indices))])
        plan = _only(plan, good)
        return plan, reader.read(plan)

    def _is_good(self, reader: _Reader[_Rows], plan: BatchPlan, place: int) -> bool:
        chosen = np.arange(len(plan.indices)) == place
        try:
            reader.read(_only(plan, chosen))
        except DataError as error:
            with self._count.get_lock():
                self._count.value += 1
                count = int(self._count.value)
            if count > self.limit:
                raise DataError(
                    f"{error}. It is damaged sample {count}, TrainerArgs.max_bad_rows = {self.limit}"
                ) from error
            _log.warning("left out (%d of at most %d): %s", count, self.limit, error)
            return False
        return True


def _only(plan: BatchPlan, chosen: np.ndarray) -> BatchPlan:
    return replace(plan, indices=plan.indices[chosen], ordinals=plan.ordinals[chosen])
