"""How fast training goes: counts between two log lines, divided by the time that training took."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Generic, TypeVar

import psutil
import torch

Batch = TypeVar("Batch")
SumOverRanks = Callable[[list[float]], list[float]]


@dataclass(frozen=True)
class Throughput:
    """Rates of all ranks together, except tflops, which is the mean rank's.

    mfu, data_wait: shares in [0, 1]; mfu is nan where the peak is unknown. step_s: seconds a step.
    """

    steps: int
    step_s: float
    samples_per_s: float
    tokens_per_s: float
    tflops: float
    mfu: float
    data_wait: float


class ThroughputMeter:
    """Accumulates this rank's counts; ``take`` turns them into rates and starts anew.

    It never asks the device: the counts are host integers, and time is the wall clock from construction (or the
    last ``take``), less what was ``paused``. On a GPU steps run ahead of the host, so read the loss, which waits for
    them, before ``take``; over the interval between two log lines the rates are then exact.

    peak_tflops: of this rank's device, see peak.py. clock: seconds, for tests.
    """

    def __init__(self, peak_tflops: float = math.nan, clock: Callable[[], float] = time.perf_counter) -> None:
        self._peak = peak_tflops
        self._clock = clock
        self._reset()

    def add(self, *, samples: int, tokens: int, flops: float = 0.0) -> None:
        """Count one step: this rank's samples without padding, tokens, and FLOPs (see flops.py)."""
        self._steps += 1
        self._samples += samples
        self._tokens += tokens
        self._flops += flops

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out the time inside: evaluations, checkpoints."""
        begun = self._clock()
        try:
            yield
        finally:
            self._paused_s += self._clock() - begun

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time inside as waiting for data; it stays part of the step."""
        begun = self._clock()
        try:
            yield
        finally:
            self._wait_s += self._clock() - begun

    def timed(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The same batches; the time to get each counts as waiting for data. Starts the clock anew: training begins."""
        self._reset()
        return _Timed(batches, self)

    def take(self, sum_over_ranks: SumOverRanks = list, num_ranks: int = 1) -> Throughput:
        """Rates since the last call (or construction), then start anew.

        sum_over_ranks: adds a list of numbers up over the ranks, element by element; all ranks then call together.
        """
        elapsed = max(self._clock() - self._begun - self._paused_s, 1e-9)
        samples, tokens, flops, wait_s = sum_over_ranks([self._samples, self._tokens, self._flops, self._wait_s])
        tflops = flops / num_ranks / elapsed / 1e12
        result = Throughput(
            steps=self._steps,
            step_s=elapsed / self._steps if self._steps else math.nan,
            samples_per_s=samples / elapsed,
            tokens_per_s=tokens / elapsed,
            tflops=tflops,
            mfu=tflops / self._peak if self._peak > 0 else math.nan,
            data_wait=min(wait_s / num_ranks / elapsed, 1.0),
        )
        self._reset()
        return result

    def _reset(self) -> None:
        self._begun = self._clock()
        self._steps = 0
        self._samples = 0.0
        self._tokens = 0.0
        self._flops = 0.0
        self._wait_s = 0.0
        self._paused_s = 0.0


class _Timed(Generic[Batch]):
    def __init__(self, batches: Iterator[Batch], meter: ThroughputMeter) -> None:
        self._batches = batches
        self._meter = meter

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        with self._meter.waiting():
            return next(self._batches)


def memory_bytes(device: torch.device) -> int:
    """Memory of this rank: on a GPU the most that tensors took so far, on a CPU the process's resident memory now."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return int(psutil.Process().memory_info().rss)
