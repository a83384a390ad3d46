"""A torch.profiler trace of a window of iterations."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Optional, Self

import torch
from torch.profiler import ProfilerActivity, profile

logger = logging.getLogger(__name__)


class Profiler:
    """Traces the iterations [start, end) into ``directory``/trace-rank<rank>.json.gz.

    Use it as a context manager and call ``step`` when each iteration begins. A run that ends inside the window writes
    the trace so far; a run that resumes inside it starts tracing at once. On a GPU, cudaProfilerStart and
    cudaProfilerStop enclose the window, with one NVTX range per iteration: ``nsys profile
    --capture-range=cudaProfilerApi`` records it.
    """

    def __init__(self, directory: Path, start: int, end: int, *, rank: int = 0, enabled: bool = True) -> None:
        self.trace_file = Path(directory) / f"trace-rank{rank}.json.gz"
        self._window = range(start, end)
        self._enabled = enabled
        self._profile: Optional[profile] = None
        self._cuda = torch.cuda.is_available()
        self._last: Optional[int] = None

    def step(self, iteration: int) -> None:
        """Start, continue or stop the trace. Call it when ``iteration`` begins."""
        self._last, is_inside = iteration, self._enabled and iteration in self._window
        if self._profile is None and is_inside:
            self._start()
        elif self._profile is not None and is_inside:
            self._profile.step()
        elif self._profile is not None:
            self._stop()
        if self._cuda and is_inside:
            torch.cuda.nvtx.range_push(f"iteration {iteration}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._profile is not None:
            self._stop()
        elif self._enabled and not self.trace_file.exists():
            first, last = self._window.start, self._window.stop
            logger.warning("no profile: the run ended (at %s) outside of [%d, %d)", self._last, first, last)
            self._enabled = False

    def _start(self) -> None:
        activities = [ProfilerActivity.CPU]
        if self._cuda:
            activities.append(ProfilerActivity.CUDA)
            torch.cuda.synchronize()
            torch.cuda.cudart().cudaProfilerStart()
        self._profile = profile(activities=activities)
        self._profile.start()

    def _stop(self) -> None:
        assert self._profile is not None
        if self._cuda:
            torch.cuda.nvtx.range_pop()
            torch.cuda.synchronize()
            torch.cuda.cudart().cudaProfilerStop()
        self._profile.stop()
        self.trace_file.parent.mkdir(parents=True, exist_ok=True)
        self._profile.export_chrome_trace(str(self.trace_file))
        self._profile = None
        self._enabled = False
        logger.info("profile written: %s", self.trace_file)
