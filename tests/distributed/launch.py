"""Run a function on several real processes that can form a process group, as torchrun would start them.

    results = run_ranks("tests.distributed.table_cases:train", world_size=2, timeout_s=60, optimizer="sgd")

The function is called as ``function(**kwargs)`` on each rank with RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE,
MASTER_ADDR and MASTER_PORT in its environment; it starts the process group itself (``hstu.parallel.mesh.start``).
What it returns must be JSON; the list of all ranks' results comes back in rank order.

The ranks are forked from a server that has imported torch, TorchRec and Megatron once (seconds for each process
otherwise) and has neither threads nor groups; each is a process and a session of its own.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import math
import multiprocessing
import os
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
STDERR_TAIL_CHARACTERS = 6000
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["hstu.train.builder"])


class RankFailure(Exception):
    """A rank failed or the launch ran out of time. ``rank`` is None for a timeout; ``stderr`` is its whole output."""

    def __init__(self, message: str, rank: int | None, stderr: str) -> None:
        super().__init__(f"{message}\n{stderr[-STDERR_TAIL_CHARACTERS:]}")
        self.rank = rank
        self.stderr = stderr


@dataclass(frozen=True)
class EndedRank:
    """How a rank ended. ``at``: seconds since the epoch."""

    exit_code: int
    output: str
    at: float


def run_to_their_ends(
    target: str, world_size: int, timeout_s: float, lasting: Collection[int] = (), **kwargs: Any
) -> list[EndedRank]:
    """As run_ranks, for ranks that fail: none is touched while others end; how each ended, in rank order.

    ``lasting``: ranks that do not end by themselves. Raises RankFailure where others have not after ``timeout_s``.
    """
    with _launched(target, world_size, kwargs) as (folder, processes):
        ended_at: dict[int, float] = {}
        deadline = time.monotonic() + timeout_s
        while len(ended_at) < world_size - len(lasting):
            for rank, process in enumerate(processes):
                if process.exitcode is not None:
                    ended_at.setdefault(rank, time.time())
            _raise_overdue(processes, folder, target, deadline, timeout_s)
            time.sleep(0.02)
        for rank in lasting:
            _kill(processes[rank])
        return [
            EndedRank(process.exitcode or 0, _stderr(folder, rank), ended_at.get(rank, math.inf))
            for rank, process in enumerate(processes)
        ]


def run_ranks(target: str, world_size: int, timeout_s: float = 60.0, **kwargs: Any) -> list[Any]:
    """Call ``target`` ("module:function") with JSON-able ``kwargs`` on ``world_size`` processes.

    Returns the JSON results in rank order. Raises RankFailure as soon as one rank fails (the others, which may be
    waiting for it, are killed) or after ``timeout_s``.
    """
    with _launched(target, world_size, kwargs) as (folder, processes):
        _wait(processes, folder, target, timeout_s)
        return [json.loads((folder / f"result{rank}.json").read_text()) for rank in range(world_size)]


@contextlib.contextmanager
def _launched(target: str, world_size: int, kwargs: Any) -> Iterator[tuple[Path, list[ForkServerProcess]]]:
    with tempfile.TemporaryDirectory(prefix="hstu-ranks-") as directory:
        folder = Path(directory)
        (folder / "call.json").write_text(json.dumps({"target": target, "kwargs": kwargs}))
        port = free_port()
        processes = [_start_rank(folder, rank, world_size, port) for rank in range(world_size)]
        try:
            yield folder, processes
        finally:
            for process in processes:
                _kill(process)


def call_each(
    functions: Mapping[str, Callable[..., Any]], cases: Mapping[str, Mapping[str, Any]], mesh: Any
) -> dict[str, Any]:
    """For a rank, many cases in one launch: name → what the function that a case names under ``call`` returns.

    It is given ``mesh`` and the rest of the case.
    """
    results = {}
    for name, case in cases.items():
        arguments = dict(case)
        results[name] = functions[arguments.pop("call")](mesh, **arguments)
    return results


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _start_rank(folder: Path, rank: int, world_size: int, port: int) -> ForkServerProcess:
    environment = {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    process = SERVER.Process(target=_run_this_rank, args=(folder, dict(os.environ) | environment))
    process.start()
    return process


def _wait(processes: list[ForkServerProcess], folder: Path, target: str, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while any(process.exitcode is None for process in processes):
        _raise_failure(processes, folder, target)
        _raise_overdue(processes, folder, target, deadline, timeout_s)
        time.sleep(0.02)
    _raise_failure(processes, folder, target)


def _raise_overdue(
    processes: list[ForkServerProcess], folder: Path, target: str, deadline: float, timeout_s: float
) -> None:
    if time.monotonic() > deadline:
        running = [rank for rank, process in enumerate(processes) if process.exitcode is None]
        stderr = "".join(f"--- rank {rank} ---\n{_stderr(folder, rank)}" for rank in running)
        raise RankFailure(f"{target}: ranks {running} still running after {timeout_s:g} s", None, stderr)


def _raise_failure(processes: list[ForkServerProcess], folder: Path, target: str) -> None:
    for rank, process in enumerate(processes):
        if process.exitcode:
            message = f"{target}: rank {rank} of {len(processes)} failed with exit code {process.exitcode}"
            raise RankFailure(message, rank, _stderr(folder, rank))


def _stderr(folder: Path, rank: int) -> str:
    output = folder / f"stderr{rank}.txt"
    return output.read_text(errors="replace") if output.exists() else ""


def _kill(process: ForkServerProcess) -> None:
    """Kill a rank with everything it started (each rank leads a session of its own)."""
    assert process.pid is not None
    with contextlib.suppress(ProcessLookupError):  # raised once all of it has ended
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()  # one that has not got as far as a session of its own
    process.join()


def _run_this_rank(folder: Path, environment: dict[str, str]) -> None:
    os.setsid()
    os.chdir(REPOSITORY)
    os.environ.clear()  # the server's own is that of the first launch
    os.environ.update(environment)
    with (folder / f"stderr{environment['RANK']}.txt").open("wb") as output:
        os.dup2(output.fileno(), sys.stdout.fileno())
        os.dup2(output.fileno(), sys.stderr.fileno())

    import torch.distributed as dist

    call = json.loads((folder / "call.json").read_text())
    module, _, function = call["target"].partition(":")
    result = getattr(importlib.import_module(module), function)(**call["kwargs"])
    if dist.is_initialized():
        dist.destroy_process_group()
    (folder / f"result{os.environ['RANK']}.json").write_text(json.dumps(result))
