"""Compile kernels before they are launched: on all cores, and also for GPUs that this machine lacks.

Triton kernels go to Triton's cache (TRITON_CACHE_DIR), CUTLASS kernels to ``hstu.base.files.cache_directory``. Both
caches can be copied to a machine with the same package versions. ``jobs`` of each backend lists its kernels.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

from hstu.base.files import replace_text


class Job(NamedTuple):
    """A kernel to compile."""

    name: str
    compile: Callable[[], object]


class Result(NamedTuple):
    """Outcome of a job."""

    name: str
    cpu_s: float  # CPU time of the compiler and of the programs that it runs
    error: str | None  # None: the kernel compiled


_jobs: Sequence[Job] = ()


def num_cores() -> int:
    """Number of cores that this process may use."""
    return len(os.sched_getaffinity(0))


def compile_all(jobs: Sequence[Job], processes: int) -> Iterator[Result]:
    """Compile all jobs and yield each result when it is ready.

    The workers are forks, because launches hold functions and tensors that cannot be sent to another process. A process
    that has initialized CUDA must not call this. If a worker is killed, the remaining jobs fail.
    """
    global _jobs
    _jobs = jobs
    with ProcessPoolExecutor(min(processes, len(jobs)) or 1, mp_context=get_context("fork")) as pool:
        numbers = {pool.submit(_compile, number): number for number in range(len(jobs))}
        for done in as_completed(numbers):
            try:
                yield done.result()
            except BrokenProcessPool:
                yield Result(jobs[numbers[done]].name, 0.0, "a compiler killed its process: try again with fewer")


def _compile(number: int) -> Result:
    name, compile = _jobs[number]
    begun, error = os.times(), None
    try:
        compile()
    except Exception as problem:
        error = describe(problem)
    # User and system time of this process and of its children; the last field is elapsed time.
    return Result(name, sum(os.times()[:4]) - sum(begun[:4]), error)


def describe(error: Exception) -> str:
    """The type and the first line of an exception."""
    return f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')}"[:500]


def adopt_triton_cache(folder: Path) -> None:
    """Fix a Triton cache from another machine: Triton stores absolute paths and recompiles where they do not exist."""
    for group in folder.glob("*/__grp__*.json"):
        paths = json.loads(group.read_text(encoding="utf-8"))["child_paths"]
        here = {name: str(group.with_name(name)) for name in paths if group.with_name(name).exists()}
        if here != paths:
            replace_text(group, json.dumps({"child_paths": here}), shared=True)


def strip_triton_cache(folder: Path) -> None:
    """Delete intermediate representations, nine tenths of a cache. Launches read machine code and its description."""
    for file in folder.glob("*/*"):
        if file.suffix not in (".cubin", ".json"):
            shutil.rmtree(file) if file.is_dir() else file.unlink()
    adopt_triton_cache(folder)
