"""When this process began its collectives, and for how long they held its main thread up."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from hstu.parallel.dense import ReplicatedDense

_COLLECTIVES = (  # all that torch.distributed calls, as torch 2.13 names them
    "all_gather_single",
    "all_gather_single_coalesced",
    "all_to_all_single",
    "allgather",
    "allgather_coalesced",
    "allreduce",
    "allreduce_coalesced",
    "alltoall",
    "barrier",
    "broadcast",
    "gather",
    "reduce",
    "reduce_scatter",
    "reduce_scatter_single",
    "reduce_scatter_single_coalesced",
    "scatter",
)
Key = tuple[str, int]
"""(name of the group, how many collectives of the group came before): the same collective on all ranks."""


@dataclass
class Times:
    """Seconds on CLOCK_MONOTONIC, which the processes of a machine share."""

    begun: dict[Key, float] = field(default_factory=dict)
    """When this rank had its part ready and began the collective."""
    blocked: list[tuple[Key, float, float]] = field(default_factory=list)
    """From when to when the main thread could not go on for want of a collective."""

    @property
    def blocked_s(self) -> float:
        """Sum of ``blocked``."""
        return sum(end - start for _, start, end in self.blocked)


class CollectiveClock:
    """Stamps what goes through torch's process groups from Python, and what DDP waits for at the end of backward.

    A collective that runs beside the main thread counts only where the main thread waits for it. Groups of one rank
    are left out. The stamps change neither the order nor the kind of any call. For a process of its own: it replaces
    methods of torch's classes.
    """

    def __init__(self) -> None:
        self.times = Times()
        self._counts: dict[str, int] = defaultdict(int)
        self._open: dict[int, tuple[Any, Key]] = {}  # keeps the handle, so that its id stays its own
        for name in _COLLECTIVES:
            self._stamp_begin(name)
        self._stamp_wait()

    def restart(self) -> Times:
        """The times since the last call; counting begins anew, on all ranks at the same point of the program."""
        times, self.times = self.times, Times()
        self._counts.clear()
        return times

    def watch(self, replicated: ReplicatedDense) -> None:
        """Stamp the buckets of a wrapped module, too."""
        average = replicated.average_bucket
        replicated.average_bucket = lambda bucket: self._reduce_bucket(average, bucket)  # type: ignore[method-assign]

    def _stamp_begin(self, name: str) -> None:
        original = getattr(dist.ProcessGroup, name)

        def stamped(group: Any, *args: Any, **options: Any) -> Any:
            begun = time.monotonic()
            work = original(group, *args, **options)
            if group.size() > 1:
                key = (group.group_name, self._counts[group.group_name])
                self._counts[group.group_name] += 1
                self.times.begun[key] = begun
                self.times.blocked.append((key, begun, time.monotonic()))
                self._open[id(work)] = (work, key)
            return work

        setattr(dist.ProcessGroup, name, stamped)

    def _stamp_wait(self) -> None:
        original = dist.Work.wait

        def stamped(work: Any, *args: Any, **options: Any) -> Any:
            begun = time.monotonic()
            result = original(work, *args, **options)
            if id(work) in self._open:
                _, key = self._open.pop(id(work))
                self.times.blocked.append((key, begun, time.monotonic()))
            return result

        dist.Work.wait = stamped  # type: ignore[method-assign, assignment]

    def _reduce_bucket(self, average: Callable[[dist.GradBucket], Any], bucket: dist.GradBucket) -> Any:
        if bucket.index() == 0:  # DDP queues its own wait for the buckets behind this, with the last bucket
            _at_the_end_of_backward(self._begin_last_wait)
        future = average(bucket)
        _, (_, self._last_bucket) = self._open.popitem()  # nobody waits for the handle, but for the future
        return future

    def _begin_last_wait(self) -> None:
        self._wait_begun = time.monotonic()
        _at_the_end_of_backward(self._end_last_wait)  # behind DDP's

    def _end_last_wait(self) -> None:
        self.times.blocked.append((self._last_bucket, self._wait_begun, time.monotonic()))


def _at_the_end_of_backward(function: Any) -> None:
    torch.autograd.Variable._execution_engine.queue_callback(function)


def split(times: Times, of_all_ranks: Sequence[Mapping[Key, float]]) -> tuple[float, float]:
    """(communication, waiting) seconds of one rank's ``times``; ``of_all_ranks``: each rank's ``begun``.

    Waiting lasts until the last rank has begun the collective that holds the main thread up, communication from then
    on.
    """
    waiting = 0.0
    for key, start, end in times.blocked:
        last = max(begun[key] for begun in of_all_ranks)
        waiting += min(max(last - start, 0.0), end - start)
    return times.blocked_s - waiting, waiting
