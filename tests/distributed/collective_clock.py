"""Record when this process begins each collective, and how long each one blocks its main thread."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from hstu.parallel.ddp import ReplicatedDense

_COLLECTIVES = (  # all methods of ProcessGroup that torch.distributed calls, some in 2.13, some before
    "_allgather_base",
    "_reduce_scatter_base",
    "all_gather_single",
    "all_gather_single_coalesced",
    "all_to_all_single",
    "allgather",
    "allgather_coalesced",
    "allgather_into_tensor_coalesced",
    "allreduce",
    "allreduce_coalesced",
    "alltoall",
    "alltoall_base",
    "barrier",
    "broadcast",
    "gather",
    "reduce",
    "reduce_scatter",
    "reduce_scatter_single",
    "reduce_scatter_single_coalesced",
    "reduce_scatter_tensor_coalesced",
    "scatter",
)
Key = tuple[str, int]
"""(name of the group, number of its earlier collectives), which identifies a collective on all ranks."""


@dataclass
class Times:
    """Times in seconds of CLOCK_MONOTONIC, which all processes of a machine share."""

    begun: dict[Key, float] = field(default_factory=dict)
    """When this rank began each collective."""
    blocked: list[tuple[Key, float, float]] = field(default_factory=list)
    """Intervals in which a collective blocked the main thread."""

    @property
    def blocked_s(self) -> float:
        """Sum of ``blocked``."""
        return sum(end - start for _, start, end in self.blocked)


class CollectiveClock:
    """Records the collectives of torch's process groups, and the wait of DDP at the end of backward.

    A collective in the background counts only while the main thread waits for it. Groups of one rank are ignored. The
    order and kind of all calls stay the same. Use it in a process of its own: it replaces methods of torch's classes.
    """

    def __init__(self) -> None:
        self.times = Times()
        self._counts: dict[str, int] = defaultdict(int)
        self._open: dict[int, tuple[Any, Key]] = {}  # holding the handle keeps its id unique
        for name in set(_COLLECTIVES) & set(dir(dist.ProcessGroup)):
            self._stamp_begin(name)
        self._stamp_wait()

    def restart(self) -> Times:
        """Return the times since the last call and start anew. Call it at the same point on all ranks."""
        times, self.times = self.times, Times()
        self._counts.clear()
        return times

    def watch(self, replicated: ReplicatedDense) -> None:
        """Also record the gradient buckets of a wrapped module."""
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
        if bucket.index() == 0:  # before the last bucket, after which DDP queues its own wait
            _at_the_end_of_backward(self._begin_last_wait)
        future = average(bucket)
        _, (_, self._last_bucket) = self._open.popitem()  # DDP waits for the future, not for the handle
        return future

    def _begin_last_wait(self) -> None:
        self._wait_begun = time.monotonic()
        _at_the_end_of_backward(self._end_last_wait)  # runs after DDP's own callback

    def _end_last_wait(self) -> None:
        self.times.blocked.append((self._last_bucket, self._wait_begun, time.monotonic()))


def _at_the_end_of_backward(function: Any) -> None:
    torch.autograd.Variable._execution_engine.queue_callback(function)


def split(times: Times, of_all_ranks: Sequence[Mapping[Key, float]]) -> tuple[float, float]:
    """(communication, waiting) seconds of one rank's ``times``; ``of_all_ranks``: each rank's ``begun``.

    A blocked main thread waits until the last rank has begun the collective. The rest is communication.
    """
    waiting = 0.0
    for key, start, end in times.blocked:
        last = max(begun[key] for begun in of_all_ranks)
        waiting += min(max(last - start, 0.0), end - start)
    return times.blocked_s - waiting, waiting
