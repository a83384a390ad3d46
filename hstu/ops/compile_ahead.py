"""Compile kernels before they are launched: on all cores, and for a GPU that need not be here.

The results lie where a launch looks for them: Triton's kernels in Triton's cache (TRITON_CACHE_DIR), the CUTLASS
kernels in this package's (``hstu.ops.self_check.cache_directory``). Both may be copied to another machine with the same
versions of these packages. The ``compile_ahead.py`` of a backend lists its kernels.
"""

from __future__ import annotations

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

READ_BY_LAUNCHES = (".cubin", ".json")
"""What Triton reads of a compiled kernel. The other files hold its intermediate representations."""


class Job(NamedTuple):
    """A kernel to compile."""

    name: str
    compile: Callable[[], object]


class Result(NamedTuple):
    """What came of a job."""

    name: str
    cpu_s: float
    """Of the compiler and the programs that it runs."""
    error: str | None
    """None: it is compiled."""


_jobs: Sequence[Job] = ()


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


def compile_all(jobs: Sequence[Job], processes: int) -> Iterator[Result]:
    """Compile all jobs and yield each result when it is there.

    The processes are forks, because launches hold functions and tensors that cannot be sent to another process. A
    process that has initialized CUDA must not call this. If one of them is killed, the jobs that are left fail.
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
        error = f"{type(problem).__name__}: {next(iter(str(problem).strip().splitlines()), '')}"
    # User and system time of this process and of its children; the last field is the time of day.
    return Result(name, sum(os.times()[:4]) - sum(begun[:4]), error)


def adopt_triton_cache(folder: Path) -> None:
    """Make the kernels of a Triton cache that was copied from elsewhere known to Triton.

    Triton notes the absolute paths of a kernel's files, and compiles again where they do not exist.
    """
    for group in folder.glob("*/__grp__*.json"):
        paths = json.loads(group.read_text(encoding="utf-8"))["child_paths"]
        here = {name: str(group.with_name(name)) for name in paths if group.with_name(name).exists()}
        if here != paths:
            replace_text(group, json.dumps({"child_paths": here}), shared=True)


def strip_triton_cache(folder: Path) -> None:
    """Delete what launches do not read, nine tenths of a cache."""
    for file in folder.glob("*/*"):
        if file.suffix not in READ_BY_LAUNCHES:
            shutil.rmtree(file) if file.is_dir() else file.unlink()
    adopt_triton_cache(folder)
