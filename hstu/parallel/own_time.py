"""The time that this rank computes in forward and backward, without its waits for other ranks."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Variable


class OwnTime:
    """Adds up the time from each ``start`` to the end of its backward, without ``paused`` blocks.

    On a GPU these are CUDA events on the current stream, so the host waits only in ``pop_s``.
    """

    def __init__(self) -> None:
        self._on_gpu = False
        self._marks: list[Any] = []
        """Seconds or CUDA events, alternately at the begin and the end of a piece of time: odd in a step."""

    def start(self, device: torch.device) -> None:
        """Begin a step. A step that failed before its end does not count."""
        if len(self._marks) % 2:
            self._marks.pop()
        self._on_gpu = device.type == "cuda"
        self._mark()

    def stop_after_backward(self, loss: Tensor) -> None:
        """End the step when the backward of ``loss`` has all gradients, before DDP waits for their averages."""
        # The engine runs callbacks in the order in which they were queued. DDP queues its own at its last bucket.
        loss.register_hook(lambda _: Variable._execution_engine.queue_callback(self._mark))

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Exclude a block, in which this rank waits for others."""
        is_running = len(self._marks) % 2
        if is_running:
            self._mark()
        yield
        if is_running:
            self._mark()

    def pop_s(self) -> float:
        """Return the seconds since the last call. On a GPU, waits for the last step."""
        pairs = list(zip(self._marks[::2], self._marks[1::2], strict=False))
        self._marks.clear()
        if not self._on_gpu:
            return float(sum(end - begin for begin, end in pairs))
        torch.cuda.synchronize()
        return sum(begin.elapsed_time(end) for begin, end in pairs) / 1e3

    def _mark(self) -> None:
        if self._on_gpu:
            self._marks.append(torch.cuda.Event(enable_timing=True))
            self._marks[-1].record()
        else:
            self._marks.append(time.perf_counter())


own_time = OwnTime()
"""That of this process."""
